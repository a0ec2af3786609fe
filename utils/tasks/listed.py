"""Cells that hold a list of texts: as such in JSON and Parquet, as JSON text in CSV."""

import json
from collections.abc import Iterable


def listed(cell: object) -> list[str] | None:
    """The texts of a cell, stripped; None where it is no list of texts."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            return None
    if isinstance(cell, (str, bytes, dict)) or not isinstance(cell, Iterable):
        return None
    found = list(cell)
    return [text.strip() for text in found] if all(isinstance(text, str) for text in found) else None
