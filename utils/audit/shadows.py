"""Likelihood ratios of membership, row by row, with shadow models (LiRA, arXiv 2112.03570, section IV).

For every row some shadow models were trained on it and some were not. Their confidence in the row's answer gives two
normal distributions; the score of a row is how much better the audited model's confidence fits the first one. With few
shadow models each side has a mean of its own per row and one variance for all rows, as the authors advise.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm

from utils.audit.base import Case
from utils.audit.tokens import mean_log_p, token_statistics
from utils.data.select import learnt_by, shadow_rows
from utils.errors import UserError
from utils.interventions.served import load_served
from utils.storage.checkpoints import read_manifest
from utils.tasks.base import Frames

LEAST_SPREAD = 1e-3  # where all shadow models are equally sure of every row


def likelihood_ratios(log_p: Mapping[str, np.ndarray], case: Case) -> dict[str, np.ndarray]:
    """{split: (n,) log likelihood ratios} of the forget rows of `case`, higher for rows that look trained on.

    log_p: for each of these splits the audited model's mean log-probability of a token of the answer, (n,). A row that
    stands in the data twice may have been in the training of every shadow model. It gets 0, which says nothing.
    """
    found = {}
    for split, (inside, confidence) in _shadows(case).items():
        told = (inside.any(0) & ~inside.all(0)).nonzero()[0]
        found[split] = np.zeros(inside.shape[1])
        if len(told):
            own = confidence_of(log_p[split][told])
            found[split][told] = _ratios(own, inside[:, told], confidence[:, told])
    return found


def _ratios(own: np.ndarray, inside: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """(n,) log likelihood ratios of confidences `own` (n,), by those of K shadow models, (K, n), of which every row has
    one that was trained on it and one that was not."""
    masks = inside, ~inside
    means = [np.where(mask, confidence, 0).sum(0) / mask.sum(0) for mask in masks]
    spreads = [max(LEAST_SPREAD, _spread(confidence, mask, mean)) for mask, mean in zip(masks, means)]
    return norm.logpdf(own, means[0], spreads[0]) - norm.logpdf(own, means[1], spreads[1])


def confidence_of(log_p: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of probabilities given by their logarithms, kept finite."""
    log_p = np.clip(log_p, -50, -1e-12)
    return log_p - np.log(-np.expm1(log_p))


def _spread(confidence: np.ndarray, mask: np.ndarray, mean: np.ndarray) -> float:
    """The standard deviation of (K, n) confidences around their row's mean, over all rows, where `mask` is true; each
    row gives as many degrees of freedom as it has values less one."""
    squares, degrees = ((confidence - mean) ** 2)[mask].sum(), mask.sum() - mask.shape[1]
    return float(np.sqrt(squares / degrees)) if degrees > 0 else float(np.sqrt(squares / mask.sum()))


def _shadows(case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{forget split: (inside, confidence)}, both (K, n): whether shadow model k was trained on row i, and how sure it
    is of the answer. Computed once a run."""
    if "shadows" not in case.kept:
        parts = [_one_shadow(name, case) for name in case.settings.shadows]
        case.kept["shadows"] = {s: tuple(map(np.stack, zip(*(part[s] for part in parts)))) for s in parts[0]}
    return case.kept["shadows"]


def _one_shadow(name: str, case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    learnt = set(_keys(shadow_rows(case.whole, _number(name))["train_forget"]))
    served, found = load_served(name, case.model, max_length=case.settings.max_length), {}
    for split in ("train_forget", "test_forget"):
        frame = case.frames[split]
        tokens = token_statistics(served, frame, case.task, case.settings)
        found[split] = np.array([key in learnt for key in _keys(frame)]), confidence_of(mean_log_p(tokens))
    return found


def _keys(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """By what a row is known again."""
    return list(zip(frame["text"], frame["label_text"]))


def _number(name: str) -> int:
    """The number of the shadow model `name`. Raises UserError where it is none."""
    manifest = read_manifest(name, verify=False)
    number = manifest["arguments"].get("shadow") if manifest else None
    if number is None:
        raise UserError(f"{name} is no shadow model; --shadows takes what qlora.py --shadow=N wrote")
    return number


def check_shadows(names: Sequence[str], whole: Frames) -> None:
    """Raise UserError unless `names` are shadow models of the rows `whole`, in pairs that have the two halves of one
    draw."""
    numbers = [_number(name) for name in names]
    for name, number in zip(names, numbers):
        if numbers.count(number) != 1 or numbers.count(number ^ 1) != 1:
            raise UserError(
                f"--shadows needs pairs: {name} has number {number}, give number {number ^ 1} too, each once"
            )
        if not learnt_by(read_manifest(name, verify=False), {**whole, **shadow_rows(whole, number)}):
            raise UserError(f"{name} was trained on other rows; give this command the rows of its training")
