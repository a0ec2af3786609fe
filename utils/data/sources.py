"""Known public datasets, each read in its own layout: where they lie, who may use them, which folder holds which."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from utils.data.known import mmlu, sciq, tofu, wmdp


@dataclass(frozen=True)
class Source:
    """A public dataset.

    read: gives {split: DataFrame} with the four splits and, in some, splits that are only evaluated.
    task: question answering (columns question, answer ...) or multiple choice (question, choices, answer, subject).
    files: names of which a local copy has at least one; none where only the hub has it.
    """

    read: Callable[..., dict[str, pd.DataFrame]]
    task: str
    hub_id: str
    licence: str
    files: tuple[str, ...] = ()


KNOWN = {
    "tofu": Source(
        tofu.read_tofu,
        "question answering",
        tofu.HUB_ID,
        "MIT",
        tuple(f"{split}{suffix}" for split in tofu.SPLITS for suffix in tofu.SUFFIXES),
    ),
    "mmlu": Source(
        mmlu.read_mmlu,
        "multiple choice",
        mmlu.HUB_ID,
        "MIT",
        tuple(f"{subject}_test.csv" for pair in mmlu.PAIRS.values() for kind in pair for subject in kind),
    ),
    "sciq": Source(sciq.read_sciq, "multiple choice", sciq.HUB_ID, "CC BY-NC 3.0", (sciq.TRAIN_FILE,)),
    "wmdp": Source(wmdp.read_wmdp, "multiple choice", wmdp.HUB_ID, "MIT"),
}


def recognise(folder: Path) -> str | None:
    """The name in `KNOWN` of the dataset whose layout `folder` has, by the names of its files, else None."""
    for name, source in KNOWN.items():
        if any((folder / file).is_file() for file in source.files):
            return name
    return None
