"""Loading the four splits: from the hub, from what is embedded, or from a folder (SPUL, section 4.1)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from utils.data.hub import from_hub
from utils.data.sources import KNOWN, recognise
from utils.data.splits import READERS, SPLITS, is_text, read_table
from utils.errors import UserError, first_line
from utils.storage.reading import refuse_special, regular_file

if TYPE_CHECKING:  # it takes seconds to import, and a folder of tables needs none of it
    from datasets import DatasetDict

HUB_DATASETS = {"sst2": "karuna-bhaila/Unlearning_SST2", "yelp": "karuna-bhaila/Unlearning_Yelp_Polarity"}
DATA = Path(__file__).resolve().parents[2] / "data"
SNIPPETS_FOLDER = DATA / "snippets"
EMBEDDED = {
    "snippets": SNIPPETS_FOLDER,
    "plays": DATA / "plays" / "passages",
    "plays-questions": DATA / "plays" / "questions",
    "plays-both": DATA / "plays" / "both",
}
PARTS = {"tofu": ("tofu_split", "tofu_authors"), "mmlu": ("mmlu_pair",), "wmdp": ("wmdp_part",)}  # arguments


def read_splits(dataset: str, arguments: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The splits of `dataset` as its source has them, the four of every data set first.

    `dataset` is `sst2`, `yelp` (hub ids above), `tofu`, `mmlu`, `sciq`, `wmdp` (utils.data.sources), one of EMBEDDED or
    a folder: that of a known data set, or four CSV, JSONL or Parquet files, or what
    `datasets.DatasetDict.save_to_disk` wrote. arguments: those of the command, some of which say what of a known data
    set is meant. Raises UserError on a missing split, and on such an argument of another data set.
    """
    folder = EMBEDDED.get(dataset) or (Path(dataset) if os.path.isdir(dataset) else None)
    known = dataset if dataset in KNOWN else recognise(folder) if folder else None
    _refuse_other_part(known, arguments)
    if known:
        parts = {name: arguments[name] for name in PARTS.get(known, ()) if arguments.get(name) is not None}
        return KNOWN[known].read(folder, **parts) if KNOWN[known].files else KNOWN[known].read(**parts)
    if dataset in HUB_DATASETS:
        hub_id = HUB_DATASETS[dataset]
        return _frames_of(from_hub(hub_id), hub_id)
    if folder:
        return _from_disk(folder) if (folder / "dataset_dict.json").exists() else _from_files(folder)
    names = ", ".join([*HUB_DATASETS, *KNOWN, *EMBEDDED])
    raise UserError(f"dataset {dataset!r} is neither one of {names} nor an existing folder; check --dataset")


def _refuse_other_part(known: str | None, arguments: Mapping[str, Any]) -> None:
    """Raise UserError on an argument that says what of another data set is meant."""
    for owner, names in PARTS.items():
        for name in names:
            if arguments.get(name) is not None and owner != known:
                raise UserError(f"--{name} is of the data set {owner}; leave it out with this --dataset")


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
