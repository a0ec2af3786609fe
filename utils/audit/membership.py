"""Can rows to forget that were trained on be told from unseen ones of the same kind? (membership inference)

Each attack gives a row a score, higher for rows that look trained on; its AUC is that of train_forget against
test_forget. The retain-only model has seen neither, so its AUC says how far the two differ by themselves.

loss: mean log-probability of the answer's tokens (Yeom et al. 2018). zlib: the same per byte of the row's text as zlib
compresses it (Carlini et al. 2021). min-k: mean over the share k of the answer's tokens that are least likely (Shi et
al. 2024). min-k++: the same of log-probabilities that are standardised by the whole vocabulary (Zhang et al. 2024).
Signs and shares are those of open-unlearning (src/evals/metrics/mia), which gives losses. An answer of one token has
the same loss and min-k.

Where an answer is one of a few words zlib compresses the text that was asked about, since all answers are about
as short.
"""

import zlib

import numpy as np
import pandas as pd

from utils.audit.base import Audit, Case, Measure, Passes, Subject
from utils.audit.shadows import likelihood_ratios
from utils.audit.tokens import mean_log_p, token_statistics
from utils.evaluation.statistics import Sample

SHARES = (0.2, 0.4)
PRIVACY = ("membership", "AUC, min-k 0.4")  # audit and measure of which MUSE's privacy leakage is told


def attack_scores(tokens: list[np.ndarray], frame: pd.DataFrame, by_text: bool) -> dict[str, np.ndarray]:
    """{attack: (n,) scores of the rows of `frame`}, higher for rows that look trained on. by_text: zlib compresses the
    text, not the answer. tokens: what `token_statistics` gives."""
    loss = mean_log_p(tokens)
    sizes = [len(zlib.compress(text.encode("utf-8"))) for text in frame["text" if by_text else "label_text"]]
    scores = {"loss": loss, "zlib": loss / np.array(sizes)}
    for share in SHARES:
        scores[f"min-k {share:g}"] = np.array([_least(row[:, 0], share) for row in tokens])
    for share in SHARES:
        scores[f"min-k++ {share:g}"] = np.array([_least((row[:, 0] - row[:, 1]) / row[:, 2], share) for row in tokens])
    return scores


def _least(values: np.ndarray, share: float) -> float:
    """The mean of the smallest `share` of the values, of one at least."""
    return float(np.sort(values)[: max(1, int(len(values) * share))].mean())


def privacy_leakage(auc: float, retain_auc: float) -> float:
    """MUSE's PrivLeak in percent (arXiv 2407.06460, section 3.3): (A - A_retain) / A_retain, where A is the AUC of
    unseen rows against trained ones. Far below 0: too little was unlearnt; far above 0: too much."""
    own, retain = 1 - auc, 1 - retain_auc
    return 100 * (own - retain) / (retain + 1e-10)


def measure(subject: Subject, case: Case) -> list[Measure]:
    """AUCs of train_forget against test_forget; where there are shadow models also of their likelihood ratios."""
    by_text, scores = bool(case.task.words), {}
    for split in ("train_forget", "test_forget"):
        tokens = token_statistics(subject.served, case.frames[split], case.task, case.settings)
        scores[split] = attack_scores(tokens, case.frames[split], by_text)
    if case.settings.shadows:
        losses = {split: found["loss"] for split, found in scores.items()}
        for split, ratios in likelihood_ratios(losses, case).items():
            scores[split]["likelihood ratio"] = ratios
    found = scores["train_forget"], scores["test_forget"]
    headline = "likelihood ratio" if case.settings.shadows else "loss"
    return [
        Measure(name=f"AUC, {name}", sample=Sample(found[0][name], found[1][name]), headline=name == headline)
        for name in found[0]
    ]


MEMBERSHIP = Audit(
    name="membership",
    asks="Can rows to forget that were trained on be told from unseen ones?",
    measure=measure,
    passes=lambda case: Passes(forward=len(case.frames["train_forget"]) + len(case.frames["test_forget"])),
    reads=("shadows",),
)
