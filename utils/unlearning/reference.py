"""What the frozen model itself computes on training rows, once, before any training: the reference of a loss."""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from utils import distributed
from utils.data.batch import Batch, Example, collate, to_device
from utils.data.load import dataset_name
from utils.data.select import fingerprint
from utils.errors import UserError, first_line
from utils.interventions.served import Served
from utils.models.forward import completion_hidden
from utils.models.layers import record_activations
from utils.storage import files, schemas
from utils.storage.reading import FLOATS, Like, parse_json, read_tensors, regular_file, tensors_sha256
from utils.storage.schemas import Digest, Schema

FOLDER = "saved_logits"


class ReferenceText(Schema):
    """The text in a file of reference quantities. key: all that they depend on; sha256: of its tensors."""

    what, remedy = "file of reference logits", "delete it or pass another --logits_path"
    key: dict[str, Any]
    sha256: Digest


class Reference:
    """One vector per token of some examples: `values` (N, d) lists them in order, `sizes` {example number: tokens}.
    They stay on the CPU: RMU's are the activations at every token of the data."""

    def __init__(self, values: torch.Tensor, sizes: dict[int, int]) -> None:
        self.values = values
        self._spans, start = {}, 0
        for i, size in sizes.items():
            self._spans[i] = (start, start + size)
            start += size

    def has(self, row: int) -> bool:
        return row in self._spans

    def examples(self, examples: Sequence[Example]) -> list[Example]:
        """Those of `examples` that have vectors here."""
        return [examples[i] for i in self._spans]

    def of(self, rows: Iterable[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """The vectors (M, d) of those among the example numbers `rows` that have any, in that order, on `device`."""
        spans = [self.values[slice(*self._spans[i])] for i in rows if i in self._spans]
        return to_device(torch.cat([self.values[:0], *spans]), device)


@dataclass(frozen=True)
class Measure:
    """What of the model's computation a loss compares with. compute: function(served, batch) -> (N, d). every_token: a
    vector for every token of a row, instead of one for every completion token."""

    name: str
    compute: Callable[[Served, Batch], torch.Tensor]
    every_token: bool = False

    def counts(self, examples: Sequence[Example], rows: Iterable[int]) -> dict[int, int]:
        """{example number: vectors that there are of it}, for the numbers `rows`."""
        return {i: len(examples[i]) if self.every_token else len(examples[i].completion) for i in rows}


Loader = Callable[..., Reference]  # `load_reference` without its settings, or the planner's stand-in for it

# The head's inputs where completion tokens are predicted: d numbers instead of |V| logits.
HIDDEN_STATES = Measure("hidden_states", lambda served, batch: completion_hidden(served.model, batch))


def activations_of(layer: torch.nn.Module, until: torch.nn.Module | None = None) -> Measure:
    """The outputs of module `layer` at every real token. until: see utils.models.layers.record_activations."""

    @torch.no_grad()
    def activations(served: Served, batch: Batch) -> torch.Tensor:
        with record_activations(layer, until) as seen:
            completion_hidden(served.model, batch)
        return seen["activations"].to(batch.rows.device)[batch.attention_mask.bool()]

    return Measure("activations", activations, every_token=True)


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """Where the file lies and how it is computed: the flags of those names."""

    logits_path: str | None = None
    dataset: str = "sst2"
    max_length: int = 1024
    eval_batch_size: int = 32


def try_place(logits_path: str | None) -> None:
    """Raise UserError where a reference can neither be written nor, perhaps, read."""
    path = Path(logits_path or f"{FOLDER}/any.safetensors")
    try:
        distributed.on_main(lambda: files.try_to_write(path))
    except UserError:
        if not any(other.exists() for other in ([path] if logits_path else path.parent.glob("*.safetensors"))):
            raise


def load_reference(
    served: Served,
    examples: Sequence[Example],
    rows: Sequence[int],
    frames: Mapping[str, pd.DataFrame],
    measure: Measure = HIDDEN_STATES,
    depends_on: list[Any] | None = None,
    *,
    settings: ReferenceSettings,
) -> Reference:
    """The Reference of the examples number `rows` under `measure`, from its file, computed first if there is none.

    frames: {split: DataFrame} that the rows come from. depends_on: what else the numbers depend on, as JSON. The file
    is settings.logits_path or saved_logits/<model>-<dataset>-<key>; it stores the key: all that the numbers depend on.
    It is memory-mapped: a step reads the pages of its rows, not the whole. Raises UserError when the file there has
    another key.
    """
    key = {
        "model": [link.sha256 for link in served.chain],
        "data": fingerprint(frames),
        "max_length": settings.max_length,
        "dtype": str(served.model.dtype),
        "quantity": [measure.name, depends_on],
        "tokenisation": _digest([(examples[i].prompt, examples[i].completion) for i in rows]),
    }
    name = f"{served.chain[-1].path.name}-{dataset_name(settings.dataset)}-{_digest(key)[:12]}.safetensors"
    path = Path(settings.logits_path or f"{FOLDER}/{name}")
    sizes = measure.counts(examples, rows)
    if not distributed.broadcast(path.exists()):
        _write(path, key, lambda: _compute(served, examples, sizes, settings.eval_batch_size, measure))
    found = _recorded(path)
    different = [name for name in key if found["key"].get(name) != key[name]]
    if different:
        raise UserError(f"{path} was computed for another {different[0]}; delete it or pass another --logits_path")
    like = Like((sum(sizes.values()), None), FLOATS)
    tensors = read_tensors(path, {"values": like}, "reference of these rows", ReferenceText.remedy)
    if tensors_sha256(tensors) != found["sha256"]:
        raise UserError(f"{path} is damaged (its hash differs); {ReferenceText.remedy}")
    return Reference(tensors["values"], sizes)


def _recorded(path: Path) -> dict:
    """What the reference file `path` records of itself, as `ReferenceText` has it."""
    try:
        with safe_open(regular_file(path), "pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        what, remedy = ReferenceText.what, ReferenceText.remedy
        raise UserError(f"{path} is no {what} or is damaged ({first_line(error)}); {remedy}")
    found = {name: parse_json(value, path) if name == "key" else value for name, value in found.items()}
    return schemas.check(found, ReferenceText, path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _compute(
    served: Served, examples: Sequence[Example], sizes: dict[int, int], batch_size: int, measure: Measure
) -> torch.Tensor:
    """The vectors (N, d) of the examples in `sizes`, in that order."""
    order = sorted(sizes, key=lambda i: len(examples[i]))
    starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0)))
    result = None
    with tqdm(total=len(order), desc="reference", unit="row", dynamic_ncols=True, mininterval=1) as progress:
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for rows, n_rows in distributed.deal(batches):
            own = {}
            if rows:
                batch = collate([examples[i] for i in rows], served.pad_id, served.model.device)
                values = measure.compute(served, batch).cpu()
                own = dict(zip(rows, values.split([sizes[i] for i in rows])))
            for i, vectors in (item for part in distributed.all_gather(own) for item in part.items()):
                if result is None:
                    result = vectors.new_empty(sum(sizes.values()), vectors.shape[1])
                result[starts[i] : starts[i] + sizes[i]] = vectors
            progress.update(n_rows)
    return result


def _write(path: Path, key: dict[str, Any], compute: Callable[[], torch.Tensor]) -> None:
    """Put what `compute()` gives into the file `path`, unless another run has done that meanwhile; it is waited for."""
    with files.workplace(path, wait=True) if distributed.is_main() else contextlib.nullcontext() as place:
        if distributed.broadcast(path.exists()):
            return
        values = compute()
        if place:
            tensors = {"values": values.contiguous()}
            recorded = {"key": json.dumps(key), "sha256": tensors_sha256(tensors)}
            save_file(tensors, place / files.NEW, recorded)
            files.publish(place, path)
    distributed.all_gather(None)  # the others wait for the file


def loader(settings: ReferenceSettings) -> Loader:
    """`load_reference` with these settings."""
    return functools.partial(load_reference, settings=settings)
