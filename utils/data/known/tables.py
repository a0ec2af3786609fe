"""What the readers of known datasets share: tables of the hub or of a folder, and what a cell must hold."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from utils.data.hub import LOCAL, from_hub
from utils.data.splits import is_text, whole_number
from utils.errors import UserError, note_once

LETTERS = "ABCD"
CHOICE_COLUMNS = ["question", "choices", "answer", "subject"]


def hub_tables(
    hub_id: str, splits: Sequence[str], columns: Sequence[str], config: str | None = None, remedy: str = LOCAL
) -> list[pd.DataFrame]:
    """`columns` of each of the hub's `splits`, in this order. Raises UserError where a split or column is missing."""
    loaded = from_hub(hub_id, config, remedy)
    name = f"{hub_id} ({config})" if config else hub_id
    missing = [split for split in splits if split not in loaded]
    if missing:
        raise UserError(f"{name} has no split {missing[0]!r}; {remedy}")
    return [with_columns(loaded[split].to_pandas(), columns, f"{split} of {name}") for split in splits]


def present(path: Path) -> Path:
    """`path`, where there is such a file, else UserError."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no file {path.name}; put it there or fetch the dataset from the hub")
    return path


def with_columns(frame: pd.DataFrame, columns: Sequence[str], source: str | Path) -> pd.DataFrame:
    """`columns` of `frame`. Raises UserError, naming the `source`, where one is missing or there is no row."""
    for column in columns:
        if column not in frame:
            raise UserError(f"{source} has no column {column!r}; restore the published layout")
    if not len(frame):
        raise UserError(f"{source} has no rows; restore the published file")
    return frame[list(columns)].reset_index(drop=True)


def check_texts(frame: pd.DataFrame, columns: Sequence[str], source: str | Path) -> None:
    """Raise UserError where a cell of `columns` is empty or not text."""
    for column in columns:
        bad = [not is_text(cell) for cell in frame[column]]
        if any(bad):
            raise UserError(f"{source}, row {bad.index(True) + 1}: {column} is empty or not text; fix the row")


def as_lists(cells: pd.Series, source: str | Path) -> pd.Series:
    """`cells` as Python lists. Raises UserError where one is no list, is empty, or holds something other than text."""
    lists = [list(cell) if isinstance(cell, list | tuple | np.ndarray) else [] for cell in cells]
    bad = [not cell or not all(map(is_text, cell)) for cell in lists]
    if any(bad):
        row = bad.index(True) + 1
        raise UserError(f"{source}, row {row}: {cells.name} is not a list of texts, none of them empty; fix the row")
    return pd.Series(lists, index=cells.index, dtype=object)


def multiple_choice(frame: pd.DataFrame, source: str | Path) -> pd.DataFrame:
    """`frame` (columns question, choices and answer among others) with `answer` as a letter and `choices` as lists.

    Raises UserError where a question or a choice is empty, where there are not four choices, and where an answer is
    neither a letter from A to D nor a number from 0 to 3.
    """
    check_texts(frame, ["question"], source)
    choices = as_lists(frame["choices"], source)
    for row, (listed, answer) in enumerate(zip(choices, frame["answer"]), start=1):
        if len(listed) != len(LETTERS):
            raise UserError(f"{source}, row {row}: there are {len(listed)} choices, not four; fix the row")
        if answer not in list(LETTERS) and whole_number(answer) not in range(len(LETTERS)):
            raise UserError(f"{source}, row {row}: the answer {answer!r} is none of the four choices; fix the row")
    letters = [answer if answer in list(LETTERS) else LETTERS[whole_number(answer)] for answer in frame["answer"]]
    return frame.assign(choices=choices, answer=letters)


def without_equal_choices(frame: pd.DataFrame, source: str | Path) -> pd.DataFrame:
    """`frame` without the rows of which two `choices` are equal but for spaces; a note says how many these are.

    Published files have a few of them, which nobody who uses them can mend.
    """
    whole = [len({" ".join(choice.split()) for choice in choices}) == len(choices) for choices in frame["choices"]]
    left_out = len(whole) - sum(whole)
    if left_out:
        note_once(f"{left_out} of {len(frame):,} rows of {source} have two equal choices and are left out")
    return frame[whole].reset_index(drop=True)
