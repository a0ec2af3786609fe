"""The sentences that a model is taught to decline with, one of which is y~ of a forgotten row."""

from functools import cache
from pathlib import Path

from utils.data.load import read_texts
from utils.errors import UserError

OWN = Path(__file__).resolve().parents[2] / "data" / "refusals.txt"


@cache
def read_refusals(path: str | None) -> tuple[str, ...]:
    """The refusals of the text file `path`, one a line; None: the hundred of this project."""
    try:
        return tuple(read_texts(path or OWN))
    except UserError as error:
        raise UserError(str(error).replace("--input_file", "--refusals")) from None
