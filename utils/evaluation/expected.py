"""How long an evaluation will take: the rows and tokens that it is about, and the time by that of its first batches."""

import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

PATIENCE, FIRST = 2, 10  # minutes that need no word, and seconds after which the expectation is made


class Meter:
    """The progress bar of an evaluation; says once how long it is expected to take where that is more than PATIENCE.

    lengths: {split: tokens of each row that is to be computed}. generates: whether answers are generated once the rows
    of a split are scored; then only whole splits say something about the time.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], description: str, generates: bool) -> None:
        ordered = [n for split in lengths for n in sorted(split)]  # as `by_length` takes them
        self._sizes = [len(split) for split in lengths]
        self._read = np.cumsum([0, *ordered])
        self._generates, self._start, self._done, self._said = generates, time.perf_counter(), 0, False
        options = {"unit": "row", "dynamic_ncols": True, "mininterval": 1}
        self.bar = tqdm(total=len(ordered), desc=description, **options)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, n: int) -> None:
        """`n` further rows are scored."""
        self._done += n
        self.bar.update(n)
        if not self._generates:
            self._expect()

    def ended(self) -> None:
        """All that is asked about the rows so far is known."""
        if self._generates:
            self._expect()

    def _expect(self) -> None:
        seconds, done = time.perf_counter() - self._start, self._read[min(self._done, len(self._read) - 1)]
        if self._said or seconds < FIRST or not done:
            return
        minutes = seconds * self._read[-1] / done / 60
        if round(minutes) > PATIENCE:
            self._said = True
            few = max(1, int(max(self._sizes) * PATIENCE / minutes))
            self.bar.write(
                f"this evaluation takes about {minutes:.0f} minutes; "
                f"--max_eval_samples={few} would take about {PATIENCE}"
            )
