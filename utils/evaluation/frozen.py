"""What a frozen model says of rows when nothing stands in front of it: computed once, taken wherever nothing acts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

RowScores = dict[str, Any]  # of one row, as `score_rows` has them, without what a gate says


@dataclass(eq=False)
class Frozen:
    """The scores of one frozen model. rows: {split: for each row its scores, or None where they are not known yet}.

    Whoever scores rows puts in what is missing. place: the file that the scores are read from and written to, with the
    `key` of all that they depend on; None: they are kept for this process alone.
    """

    rows: dict[str, list[RowScores | None]] = field(default_factory=dict)
    place: str | None = None
    key: Mapping[str, Any] = field(default_factory=dict)

    def of(self, split: str, n: int) -> list[RowScores | None]:
        """Those of the `n` rows of `split`, to be read and to be filled."""
        return self.rows.setdefault(split, [None] * n)

    def knows(self, frames: Mapping[str, pd.DataFrame]) -> bool:
        """Whether no row of `frames`, {split: rows}, is missing."""
        return all(len(self.rows.get(s, [])) == len(frame) and None not in self.rows[s] for s, frame in frames.items())
