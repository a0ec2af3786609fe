"""The records of metrics.json, and how far each is from a model that never saw the forget rows."""

import numpy as np
import pandas as pd
from scipy.special import rel_entr

from utils.data.splits import SPLITS
from utils.distributed import peak_memory
from utils.errors import UserError


def with_distances(records, predictions):
    """`records` with how far each is from the one whose method is "retrained", which never saw the forget rows.

    predictions: for each record a DataFrame with split, label_probabilities and label_mass, same rows in the same
    order. Adds "distance_to_retrained": {"accuracy_forget", "accuracy_retain": mean over train and test of
    |difference|, "js_train_forget", "js_test_forget": mean Jensen-Shannon divergence of the answers, in bits, in
    [0, 1]}. The sides stand apart because their mean rewards a model that was left as it is. Without a retrained
    record they come back as they are.
    """
    methods = [record["method"] for record in records]
    if methods.count("retrained") != 1:
        return records
    if not all("label_mass" in rows for rows in predictions):
        raise UserError("the predictions of an older version have no label_mass; remove them and evaluate again")
    target, target_rows = records[methods.index("retrained")], predictions[methods.index("retrained")]
    return [
        {**record, "distance_to_retrained": _distance(record, rows, target, target_rows)}
        for record, rows in zip(records, predictions)
    ]


def _distance(record: dict, rows: pd.DataFrame, target: dict, target_rows: pd.DataFrame) -> dict[str, float]:
    distance = {}
    for side in ("forget", "retain"):
        pairs = [(record["splits"][s]["accuracy"], target["splits"][s]["accuracy"]) for s in SPLITS if side in s]
        distance[f"accuracy_{side}"] = float(np.mean([abs(own - other) for own, other in pairs]))
    for split in ("train_forget", "test_forget"):
        distance[f"js_{split}"] = js_divergence(_outcomes(rows, split), _outcomes(target_rows, split))
    return distance


def js_divergence(p, q):
    """Mean over rows of the Jensen-Shannon divergence, in bits, of distributions p and q, both (rows, outcomes).

    By hand, since scipy's jensenshannon takes the root of a sum that rounding makes negative where p is almost q.
    """
    mixture = (p + q) / 2
    rows = (rel_entr(p, mixture) + rel_entr(q, mixture)).sum(axis=1) / (2 * np.log(2))
    return float(np.clip(rows, 0, 1).mean())


def _outcomes(rows: pd.DataFrame, split: str) -> np.ndarray:
    """(rows, words + 1) of one split: the probability of every label word, and of anything else, refusals included."""
    rows = rows[rows["split"] == split]
    scaled = np.array([list(row.values()) for row in rows["label_probabilities"]])
    mass = rows["label_mass"].to_numpy()[:, None]
    return np.hstack([scaled * mass, 1 - mass])


def make_record(method, checkpoint, model, args, splits, seconds, training=None):
    """One record of metrics.json, the schema that every script and table shares. seconds: the evaluation's. training:
    what the training cost (utils.training.Training.cost), where there was one. "validation_share" is there where the
    test splits are rows cut from train."""
    return {
        "method": method,
        "checkpoint": str(checkpoint),
        "model": str(model),
        "dataset": args.dataset,
        "seed": args.seed,
        "splits": splits,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
        **({"training": training} if training else {}),
        **({"validation_share": args.validation_share} if args.validation_share and not args.final else {}),
    }
