"""The frozen model's own predictions on the retain rows, computed once: the reference of L_kl."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from utils.cli import UserError
from utils.data import collate, dataset_name, fingerprint
from utils.forward import completion_hidden


class Reference:
    """Hidden states of the model without prompt where it predicts completion tokens; the frozen head makes logits of
    them (d numbers a token instead of |V|).

    `hidden` (N, d) lists the completion tokens of the retain examples in order; `rows(i...)` picks those of examples.
    """

    def __init__(self, hidden, examples):
        self.hidden = hidden
        self._spans, start = {}, 0
        for i, example in enumerate(examples):
            if not example.forget:
                self._spans[i] = (start, start + len(example.completion))
                start += len(example.completion)

    def of(self, rows):
        """Hidden states (M, d) of the retain examples among `rows`, in that order."""
        spans = [self.hidden[slice(*self._spans[i])] for i in rows if i in self._spans]
        return torch.cat([self.hidden[:0], *spans])


def load_reference(loaded, examples, retain, args):
    """The Reference for the retain rows (frame `retain`) of `examples`, from its file, computed first if there is none.

    The file is args.logits_path or saved_logits/<model>-<dataset>-<key>; it stores the key: all that the numbers depend
    on (model, data, settings). Raises UserError when the file there has another key; it is never used silently.
    """
    key = {
        "model": [link.sha256 for link in loaded.chain],
        "data": fingerprint({"train_retain": retain}),
        "max_length": args.max_length,
        "dtype": str(loaded.model.dtype),
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    name = f"{loaded.chain[-1].path.name}-{dataset_name(args.dataset)}-{digest}.safetensors"
    path = Path(args.logits_path or f"saved_logits/{name}")
    if not path.exists():
        _write(path, _compute(loaded, examples, args.eval_batch_size), key)
    try:
        with safe_open(path, "pt") as file:
            found = json.loads(file.metadata()["key"])
        hidden = load_file(path)["hidden"]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        raise UserError(
            f"{path} is not a file of reference logits or is damaged; delete it or pass another --logits_path"
        )
    different = [name for name in key if found.get(name) != key[name]]
    if different:
        raise UserError(f"{path} was computed for another {different[0]}; delete it or pass another --logits_path")
    return Reference(hidden.to(loaded.model.device), examples)


def _compute(loaded, examples, batch_size):
    """Hidden states (N, d) of all retain examples in order, without gradients."""
    retain = [i for i, example in enumerate(examples) if not example.forget]
    order = sorted(retain, key=lambda i: len(examples[i]))
    parts = {}
    with tqdm(total=len(retain), desc="reference", unit="row", dynamic_ncols=True, mininterval=1) as progress:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            chosen = [examples[i] for i in rows]
            hidden = completion_hidden(loaded.model, collate(chosen, loaded.pad_id, loaded.model.device)).cpu()
            parts |= dict(zip(rows, hidden.split([len(example.completion) for example in chosen])))
            progress.update(len(rows))
    return torch.cat([parts[i] for i in retain])


def _write(path, hidden, key):
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({"hidden": hidden.contiguous()}, temporary, {"key": json.dumps(key)})
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
