"""Loading the four splits: from the hub, from what is embedded, or from a folder (SPUL, section 4.1)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from utils.data.splits import READERS, SPLITS, TRAIN_SPLITS, UNLEARNING_LABELS, is_text, read_table, whole_number
from utils.errors import UserError, first_line
from utils.storage.reading import refuse_special, regular_file

if TYPE_CHECKING:  # it takes seconds to import, and a folder of tables needs none of it
    from datasets import DatasetDict

HUB_DATASETS = {"sst2": "karuna-bhaila/Unlearning_SST2", "yelp": "karuna-bhaila/Unlearning_Yelp_Polarity"}
SNIPPETS_FOLDER = Path(__file__).resolve().parents[2] / "data" / "snippets"


def load_splits(dataset: str) -> dict[str, pd.DataFrame]:
    """The four splits of `dataset` as {split: DataFrame with columns text, label, label_text, ...}.

    `dataset` is `sst2`, `yelp` (hub ids above), `snippets` (embedded) or a folder: four CSV, JSONL or Parquet files,
    or what `datasets.DatasetDict.save_to_disk` wrote. Raises UserError on a missing split or column, an empty split,
    a cell that is empty or not text, and labels that contradict each other.
    """
    if dataset in HUB_DATASETS:
        frames = _from_hub(HUB_DATASETS[dataset])
    elif dataset == "snippets":
        frames = _from_files(SNIPPETS_FOLDER)
    elif os.path.isdir(dataset):
        folder = Path(dataset)
        frames = _from_disk(folder) if (folder / "dataset_dict.json").exists() else _from_files(folder)
    else:
        known = ", ".join([*HUB_DATASETS, "snippets"])
        raise UserError(f"dataset {dataset!r} is neither one of {known} nor an existing folder; check --dataset")
    frames = {split: _checked(split, frames[split], dataset) for split in SPLITS}
    _check_labels(frames)
    return frames


def read_texts(path: str | Path) -> list[str]:
    """The texts of a .txt (one a line), .csv, .jsonl or .parquet file (column `text`), in file order.

    Empty lines of a .txt are left out. Raises UserError where the file is missing, cannot be read, has no text or a row
    without one.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; pass an existing file to --input_file")
    regular_file(path)
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines ends them at a form feed, too
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, one text a line")
        texts = [line.strip() for line in lines if is_text(line)]
    elif path.suffix in READERS:
        frame = read_table(path)
        if "text" not in frame:
            raise UserError(f"{path} has no column 'text'; name the column of texts so")
        texts = list(frame["text"])
    else:
        raise UserError(f"{path} is neither .txt, .csv, .jsonl nor .parquet; convert it to one of them")
    if not texts or not all(map(is_text, texts)):
        raise UserError(f"{path} has no text or a row whose text is empty; fix the file")
    return texts


def dataset_name(dataset: str) -> str:
    """The short name that output folders carry: `sst2` for `sst2`, the last part of a folder's path."""
    return Path(dataset).resolve().name if os.path.isdir(dataset) else dataset


def _from_hub(hub_id: str) -> dict[str, pd.DataFrame]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(hub_id)
    except Exception as error:  # the hub client raises a dozen types: offline, not found, gated, broken
        raise UserError(f"cannot fetch dataset {hub_id} ({first_line(error)}); pass a local folder to --dataset")
    return _frames_of(loaded, hub_id)


def _from_disk(folder: Path) -> dict[str, pd.DataFrame]:
    from datasets import load_from_disk

    for inner in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        refuse_special(inner)
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder} is not a readable save_to_disk folder ({first_line(error)}); write it again")
    return _frames_of(loaded, folder)


def _frames_of(dataset_dict: "DatasetDict", source: str | Path) -> dict[str, pd.DataFrame]:
    missing = [split for split in SPLITS if split not in dataset_dict]
    if missing:
        raise UserError(f"{source} has no split {missing[0]!r}; the four splits are {', '.join(SPLITS)}")
    return {split: dataset_dict[split].to_pandas() for split in SPLITS}


def _from_files(folder: Path) -> dict[str, pd.DataFrame]:
    frames = {}
    for split in SPLITS:
        paths = [folder / f"{split}{suffix}" for suffix in READERS if (folder / f"{split}{suffix}").is_file()]
        if not paths:
            raise UserError(f"{folder} has no {split}.csv, .jsonl or .parquet; the four splits are {', '.join(SPLITS)}")
        if len(paths) > 1:
            raise UserError(f"{folder} has {paths[0].name} and {paths[1].name}; keep one of them")
        frames[split] = read_table(paths[0])
    return frames


def _checked(split: str, frame: pd.DataFrame, source: str) -> pd.DataFrame:
    for column in ("text", "label", "label_text"):
        if column not in frame.columns:
            raise UserError(f"{split} of {source} has no column {column!r}; it needs text, label, label_text")
    if not len(frame):
        raise UserError(f"{split} of {source} has no rows; every split needs at least one")
    for column in ("text", "label_text"):
        bad = [not is_text(cell) for cell in frame[column]]
        if any(bad):
            raise UserError(
                f"{split} of {source}, row {bad.index(True) + 1}: {column} is empty or not text; fix the row"
            )
    labels = [whole_number(cell) for cell in frame["label"]]
    if None in labels:
        row = labels.index(None) + 1
        raise UserError(f"{split} of {source}, row {row}: label is not a whole number of 64 bits; fix the row")
    for column in frame.columns.intersection(["names_other", "nested"]):
        marks = [whole_number(cell) for cell in frame[column]]
        if not set(marks) <= {0, 1}:
            raise UserError(f"{split} of {source} has a {column} that is neither 0 nor 1; fix or drop the column")
        frame = frame.assign(**{column: marks})
    if "paraphrase" in frame:  # a row may have none: an empty cell, null or NaN
        bad = [not isinstance(cell, str | float | None) and cell is not pd.NA for cell in frame["paraphrase"]]
        if any(bad):
            raise UserError(f"{split} of {source}, row {bad.index(True) + 1}: paraphrase is not text; fix the row")
    words = [word.strip() for word in frame["label_text"]]
    return frame.assign(label=labels, label_text=words).reset_index(drop=True)


def _check_labels(frames: Mapping[str, pd.DataFrame]) -> None:
    """Every label has one word, every word one label, and the test splits use no label that train lacks."""
    words = {}
    for split in SPLITS:
        for label, word in sorted(set(zip(frames[split]["label"], frames[split]["label_text"]))):
            if split not in TRAIN_SPLITS and (label, word) not in words.items():
                raise UserError(f"{split} has the unknown label {label} ({word!r}); the train splits have {words}")
            if words.setdefault(label, word) != word or list(words.values()).count(word) > 1:
                raise UserError(f"{split}: label {label} and the word {word!r} do not pair one to one in {words}")
    clash = set(words.values()) & set(UNLEARNING_LABELS)
    if clash:
        raise UserError(f"the label word {clash.pop()!r} is one that unlearning answers with; rename it in the data")
