"""One number of forgetting, privacy and utility together: each in [0, 1], and higher is better.

It follows OpenUnlearning (arXiv 2506.12618, the section that compares methods): the harmonic mean of the three, so that
none makes up for another. It needs a model that never saw the rows to forget, the retain model.

forgetting: harmonic mean of 1 - x over what train_forget still shows. Of free answers x is the extraction strength, the
exact memorisation, the probability of the answer and, where there are wrong answers, the mean of p(right) / (p(right) +
p(wrong)) = 1 / (1 + R), R the geometric truth ratio. Of label words x is the accuracy, and label_accuracy above chance,
max(0, (label_accuracy - chance) / (1 - chance)) with chance = 1 / number of words.

privacy: 1 - |AUC - AUC_retain| / max(AUC_retain, 1 - AUC_retain). AUC tells train_forget from test_forget by the mean
loss of a token of the answer, of label words by the answer's loss: lower for rows that were trained on (Yeom et al.
2018).

utility: the task's model utility where it has one (TOFU, arXiv 2401.06121), else the harmonic mean, over train_retain
and test_retain, of the headline as a share of the retain model's, 1 at most.

The retain model has privacy 1, but its own forgetting: it guesses some answers, too. Compare scores with its.

What differs from OpenUnlearning: there x is the probability of a paraphrased answer, here that of the answer, which is
the task's own `probability`. There privacy is the harmonic mean of four such scores, of loss, zlib, min-k and min-k++;
here it is that of the loss. There utility also has the fluency of what is answered to rows to forget. There the unseen
rows are those of other authors; here they are test_forget, which on TOFU are the same facts in other words, so that
privacy says less there. There label words do not occur.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import hmean

from utils.evaluation.statistics import auc
from utils.tasks.base import Recorded, Task

MEMORISED = ("extraction_strength", "exact_memorisation", "probability")


def with_overall(records: list[dict], predictions: Sequence[pd.DataFrame], task: Task) -> list[dict]:
    """`records` with "overall": {"score", "forgetting", "privacy", "utility", "parts"}, as this module defines them.

    parts: {"forgetting": {name: 1 - x}, "privacy": {"auc", "auc_retain"}, "utility": {name: share}}. predictions: for
    each record a DataFrame with split, loss and what else score_rows gives. Unless exactly one record is of a method
    "retain model", they come back as they are.
    """
    methods = [record["method"] for record in records]
    if methods.count("retain model") != 1:
        return records
    at = methods.index("retain model")
    retain = {split: scores.get(task.headline) for split, scores in records[at]["splits"].items()}
    auc_retain = membership_auc(predictions[at])
    return [
        {**record, "overall": _overall(record, rows, retain, auc_retain, task)}
        for record, rows in zip(records, predictions)
    ]


def _overall(
    record: dict, rows: pd.DataFrame, retain: Mapping[str, Any], auc_retain: float, task: Task
) -> dict[str, Any]:
    """retain: {split: headline of the retain model}. auc_retain: of its losses."""
    own = membership_auc(rows)
    forgetting = forgotten(record["splits"]["train_forget"], rows[rows["split"] == "train_forget"], task)
    utility = kept(record, retain, task.headline)
    three = {
        "forgetting": _mean(forgetting.values()),
        "privacy": privacy(own, auc_retain),
        "utility": _mean(utility.values()),
    }
    parts = {"forgetting": forgetting, "privacy": {"auc": own, "auc_retain": auc_retain}, "utility": utility}
    return {"score": _mean(three.values()), **three, "parts": parts}


def forgotten(scores: Recorded, rows: pd.DataFrame, task: Task) -> dict[str, float]:
    """{name: 1 - x}: how little each score of train_forget still shows, in [0, 1]. rows: the scored ones."""
    if task.words:
        chance = 1 / len(task.words)
        above = (scores["label_accuracy"] - chance) / (1 - chance) if chance < 1 else 0.0
        return {"accuracy": 1 - scores["accuracy"], "label_accuracy": 1 - max(0.0, above)}
    shown = {name: scores[name] for name in MEMORISED if name in scores}
    ratios = rows["truth_ratio_geometric"].dropna() if "truth_ratio_geometric" in rows else []
    if len(ratios):
        shown["truth_ratio"] = float((1 / (1 + ratios)).mean())
    return {name: 1 - value for name, value in shown.items()}


def membership_auc(rows: pd.DataFrame) -> float:
    """The AUC, in [0, 1], by which a token's loss tells train_forget from test_forget; higher where rows of
    train_forget have the lower losses."""
    losses = rows["loss"] / rows["tokens"] if "tokens" in rows else rows["loss"]
    return auc(-losses[rows["split"] == "train_forget"], -losses[rows["split"] == "test_forget"])


def privacy(own: float, retain: float) -> float:
    """1 where the AUC is the retain model's, 0 where it is as far from it as it can be."""
    return float(np.clip(1 - abs(own - retain) / max(retain, 1 - retain), 0, 1))


def kept(record: dict, retain: Mapping[str, Any], headline: str) -> dict[str, float]:
    """What the utility is made of: the model utility, or for both retain splits the share of the retain model's
    headline, 1 at most; 1 too where the retain model has nothing."""
    if "model_utility" in record.get("summary", {}):
        return {"model_utility": record["summary"]["model_utility"]}
    own = {split: record["splits"][split][headline] for split in ("train_retain", "test_retain")}
    return {split: min(1.0, value / retain[split]) if retain[split] else 1.0 for split, value in own.items()}


def _mean(values: Sequence[float]) -> float:
    """The harmonic mean of numbers in [0, 1]; 0 where any of them is."""
    return float(hmean(list(values)))
