"""How sure a number is: intervals of rates, means and AUCs, and whether two models differ on the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

LEVEL = 0.95  # of every interval
DRAWS = 1000  # of a bootstrap

Interval = tuple[float, float]


def clopper_pearson(hits: int, n: int, level: float = LEVEL) -> Interval:
    """The exact interval of a rate, `hits` of `n` rows (Clopper and Pearson 1934). It holds the true rate in at least
    `level` of all samples, also where no row or every row is a hit."""
    found = binomtest(hits, n).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """The exact p-value of McNemar's test that two models are right equally often, in [0, 1].

    first, second: (n,) bool, whether each is right on the same rows in the same order. Only rows on which one is right
    and the other wrong have a say; without any the p-value is 1.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """The share of pairs in which the value of `members` (n,) is above that of `others` (m,); equal ones count half."""
    told = np.concatenate([np.ones(len(np.asarray(members))), np.zeros(len(np.asarray(others)))])
    return float(roc_auc_score(told, np.concatenate([members, others])))


def _wins(members: ArrayLike, others: ArrayLike) -> np.ndarray:
    """(n, m): 1 where the member's value is above the other's, 1/2 where they are equal, else 0."""
    members, others = np.asarray(members, dtype=float)[:, None], np.asarray(others, dtype=float)[None]
    return (members > others) + 0.5 * (members == others)


@dataclass(frozen=True)
class Sample:
    """The rows that a number is computed from. values: (n,), whose mean it is. others: (m,) where the number is the AUC
    of `values` against them instead."""

    values: np.ndarray
    others: np.ndarray | None = None

    def value(self) -> float:
        return float(np.mean(self.values)) if self.others is None else auc(self.values, self.others)

    @property
    def is_rate(self) -> bool:
        return self.others is None and bool(np.isin(self.values, (0, 1)).all())

    def resampled(self, seed: int, draws: int = DRAWS) -> np.ndarray:
        """(draws,): the number on rows drawn with replacement. Samples of the same sizes draw the same rows, so that
        differences of two are differences on the same rows. By weights of rows, all draws of an AUC are one product of
        matrices; scipy.stats.bootstrap would compute each by itself."""
        rng = np.random.default_rng(seed)
        weights = _weights(rng, len(self.values), draws)
        if self.others is None:
            return weights @ np.asarray(self.values, dtype=float)
        return ((weights @ _wins(self.values, self.others)) * _weights(rng, len(self.others), draws)).sum(1)

    def interval(self, seed: int) -> Interval:
        """Clopper and Pearson's of a rate, else the bootstrap's percentiles."""
        if self.is_rate:
            return clopper_pearson(int(np.sum(self.values)), len(self.values))
        return percentiles(self.resampled(seed))


def _weights(rng: np.random.Generator, n: int, draws: int) -> np.ndarray:
    """(draws, n): how often each of `n` rows is drawn, as shares that sum to 1."""
    return rng.multinomial(n, np.full(n, 1 / n), size=draws) / n


def percentiles(values: np.ndarray, level: float = LEVEL) -> Interval:
    """The middle `level` of `values`."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference(own: Sample, reference: Sample, seed: int) -> tuple[float, Interval]:
    """(own number - the reference's, its bootstrap interval). Where both are of as many rows these are the same ones in
    the same order, and are drawn together."""
    paired = len(own.values) == len(reference.values) and (own.others is None) == (reference.others is None)
    if paired and own.others is not None:
        paired = len(own.others) == len(reference.others)
    drawn = own.resampled(seed) - reference.resampled(seed if paired else seed + 1)
    return own.value() - reference.value(), percentiles(drawn)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over seeds; of one value the deviation is NaN."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
