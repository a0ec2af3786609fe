"""Scores of rows that are answered with one of a few words."""

from collections.abc import Sequence

import pandas as pd
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from utils.tasks.base import Scores

LABELLED = ("prediction", "correct", "label_prediction", "label_probabilities", "label_mass", "loss")  # of every row
SHARES = ("accuracy", "f1", "precision", "recall", "label_accuracy", "out_of_label")  # of a split


def label_scores(frame: pd.DataFrame, words: Sequence[str]) -> Scores:
    """Scores of scored rows (label_text, prediction, ...): shares in [0, 1], loss in nats.

    f1, precision and recall are scikit-learn's, weighted by class size (the paper's tables give accuracy and that F1).
    The published code takes precision and recall as micro averages; with one answer a row both equal the accuracy.
    """
    truth, prediction = frame["label_text"], frame["prediction"]
    precision, recall, f1, _ = precision_recall_fscore_support(truth, prediction, average="weighted", zero_division=0)
    values = {
        "accuracy": accuracy_score(truth, prediction),
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "out_of_label": 1 - prediction.isin(words).mean(),
        "label_accuracy": accuracy_score(truth, frame["label_prediction"]),
        "loss": frame["loss"].mean(),
    }
    return {"n": len(frame), **{key: float(value) for key, value in values.items()}}
