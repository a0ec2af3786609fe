"""Which rows a command works on (SPUL, section 4.1): subsets, people, rows put aside to choose settings by."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

from utils.data.names import Person, count_rows, mentions, note_absent, read_names
from utils.data.splits import TRAIN_SPLITS, mark_nested, split_rows
from utils.errors import UserError, note_once

SUBSET_SEED = 42  # the published protocol draws forget subsets with default_rng(42), whatever the training seed
SELECTION = (  # arguments that decide which rows a command works on
    "forget_size", "max_train_samples", "forget_share", "forget_only", "rows_seed", "validation_share", "final",
    "shadow",
)  # fmt: skip


def select_rows(
    frames: dict[str, pd.DataFrame],
    forget_size: float = 1.0,
    max_train_samples: int | None = None,
    forget_share: float | None = None,
    forget_only: str | None = None,
    rows_seed: int = SUBSET_SEED,
    validation_share: float | None = None,
    final: bool = False,
    shadow: int | None = None,
) -> dict[str, pd.DataFrame]:
    """The training protocol's row selection; returns new frames, order kept.

    `forget_only` names a file with a list of people (utils.data.names). Forget rows, train and test, that name none of
    them are left out. `max_train_samples` keeps so many train rows in all, drawn by `rows_seed`. Of these,
    `forget_share` are forget rows (default: the share the data has). `validation_share` puts that share of each train
    split aside. Unless `final`, these rows stand in for the test splits, so that settings are chosen without test rows.
    `forget_size` < 1 then keeps int(size * n) rows of train_forget, drawn with NumPy default_rng(42) (the published
    protocol). Nothing depends on the training seed. The rows that a `forget_size` keeps are among those kept without
    one, so spul.py sees rows that qlora.py has seen. A column `nested` of the test splits is about the train rows kept
    before `forget_size`, since the model that unlearns has seen them. `shadow`: see `shadow_rows`, last of all. Says on
    stderr how many rows to forget name whom.
    Raises UserError when a split would be left without a row, or has fewer than were asked for.
    """
    whole, frames = frames, dict(frames)
    if final and not validation_share:
        raise UserError("--final goes with --validation_share, without which test rows are evaluated anyway")
    if forget_only:
        frames |= _that_name(read_names(forget_only), frames, forget_only)
    sizes = {split: len(frames[split]) for split in TRAIN_SPLITS}
    if forget_share and not max_train_samples:
        raise UserError("--forget_share is a share of --max_train_samples; give both")
    if max_train_samples and (forget_share or max_train_samples < sum(sizes.values())):
        forget = max(1, round(max_train_samples * (forget_share or sizes["train_forget"] / sum(sizes.values()))))
        wanted = {"train_retain": max_train_samples - forget, "train_forget": forget}
        if wanted["train_retain"] < 1:
            raise UserError(f"--max_train_samples={max_train_samples} leaves no retain row; use more rows")
        for split in TRAIN_SPLITS:
            if wanted[split] > sizes[split]:
                named = f" that name people of {forget_only}" if forget_only and split == "train_forget" else ""
                raise UserError(
                    f"{split} has {sizes[split]} rows{named}, --max_train_samples={max_train_samples} and "
                    f"--forget_share ask for {wanted[split]}; change one of them"
                )
            frames[split] = sample_rows(frames[split], wanted[split], rows_seed)
    if validation_share:
        frames |= _without_validation(frames, validation_share, rows_seed, final)
    if "nested" in whole["test_retain"] and any(len(frames[split]) < len(whole[split]) for split in TRAIN_SPLITS):
        frames = mark_nested(frames)
    if forget_size < 1:
        kept = int(forget_size * len(frames["train_forget"]))
        if not kept:
            raise UserError(f"--forget_size={forget_size} leaves no forget row; choose a larger share")
        frames["train_forget"] = sample_rows(frames["train_forget"], kept)
    return frames if shadow is None else frames | shadow_rows(frames, shadow)


def shadow_rows(frames: Mapping[str, pd.DataFrame], shadow: int) -> dict[str, pd.DataFrame]:
    """The forget splits of shadow model number `shadow`: a half of all rows to forget, train and test together, as
    train_forget, and the other half as test_forget. Numbers 2 i and 2 i + 1 have the two halves of one draw, so that of
    every such pair one model was trained on a row and the other was not (Carlini et al. 2022, arXiv 2112.03570)."""
    rows = pd.concat([frames["train_forget"], frames["test_forget"]], ignore_index=True)
    if len(rows) < 2:
        raise UserError("a shadow model needs two rows to forget at least; use more rows")
    order = np.random.default_rng([shadow // 2, 2112]).permutation(len(rows))
    halves = order[: len(rows) // 2], order[len(rows) // 2 :]
    chosen = halves[shadow % 2], halves[1 - shadow % 2]
    parts = (rows.iloc[np.sort(numbers)].reset_index(drop=True) for numbers in chosen)
    return dict(zip(("train_forget", "test_forget"), parts))


def _that_name(people: list[Person], frames: dict[str, pd.DataFrame], path: str) -> dict[str, pd.DataFrame]:
    """The forget splits without the rows that name nobody of `people`, who are of the list at `path`."""
    kept, counts = {}, {}
    for split in ("train_forget", "test_forget"):
        found = [mentions(text, people) for text in frames[split]["text"]]
        kept[split] = frames[split][[bool(names) for names in found]].reset_index(drop=True)
        if not len(kept[split]):
            raise UserError(f"no row of {split} names anybody of {path}; name others")
        counts[split] = count_rows(found, people)
    listed = [f"{person.name} {' + '.join(str(counts[split][person.name]) for split in counts)}" for person in people]
    note_once(f"rows of {' + '.join(counts)} that name them: {', '.join(listed)}")
    note_absent({name: sum(counts[split][name] for split in counts) for name in counts["train_forget"]}, path)
    return kept


def _without_validation(
    frames: dict[str, pd.DataFrame], share: float, seed: int, final: bool
) -> dict[str, pd.DataFrame]:
    """The train splits without a share of their rows, by label, and unless `final` these rows as the test splits."""
    changed = {}
    for kind in ("retain", "forget"):
        parts = split_rows(frames[f"train_{kind}"].assign(forget=kind == "forget"), share, seed)
        changed |= {split: parts[split] for split in (f"train_{kind}", f"test_{kind}")}
    for split, frame in changed.items():
        if not len(frame):
            raise UserError(f"--validation_share={share} leaves no row for {split}; use another share or more rows")
    return {split: frame for split, frame in changed.items() if split in TRAIN_SPLITS or not final}


def sample_rows(frame: pd.DataFrame, n: int | None, seed: int = SUBSET_SEED) -> pd.DataFrame:
    """`n` rows of `frame` drawn by default_rng(seed) without replacement, in file order; all if n is larger or None."""
    if n is None or n >= len(frame):
        return frame
    rows = np.random.default_rng(seed).choice(len(frame), n, replace=False)
    return frame.iloc[np.sort(rows)].reset_index(drop=True)


def learnt_by(manifest: dict, frames: dict[str, pd.DataFrame]) -> bool:
    """Whether the checkpoint of `manifest` was trained on the train rows of `frames`, on all of them and no others."""
    splits = TRAIN_SPLITS[:1] if manifest["arguments"].get("exclude_forget") else TRAIN_SPLITS
    return manifest["data_fingerprint"] == fingerprint({split: frames[split] for split in splits})


def fingerprint(frames: Mapping[str, pd.DataFrame]) -> str:
    """SHA-256, in hex, over text, label and label word (and choices) of the given splits' rows, in order.

    It is the same for the same data in any format.
    """
    digest = hashlib.sha256()
    for split, frame in sorted(frames.items()):
        rows = list(zip(frame["text"], frame["label"].tolist(), frame["label_text"]))
        if "choices" in frame:
            rows = list(zip(rows, frame["choices"]))
        digest.update(json.dumps([split, rows]).encode())
    return digest.hexdigest()
