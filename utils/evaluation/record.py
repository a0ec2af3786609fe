"""The records of metrics.json, and how far each is from a model that never saw the forget rows."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import rel_entr

from utils.data.splits import SPLITS
from utils.distributed import peak_memory
from utils.errors import UserError
from utils.evaluation.run import EvaluationSettings
from utils.evaluation.statistics import mcnemar
from utils.storage.checkpoints import Link
from utils.tasks.base import Recorded, Task


def with_distances(records: list[dict], predictions: Sequence[pd.DataFrame], task: Task) -> list[dict]:
    """`records` with how far each is from the one whose method is "retain model", which never saw the forget rows.

    predictions: for each record a DataFrame with split and what score_rows gives, same rows in the same order. Adds
    "distance_to_retain_model": {"accuracy_forget", "accuracy_retain": mean over train and test of |difference of the
    headlines|; where there are label words "js_train_forget", "js_test_forget": mean Jensen-Shannon divergence of the
    answers, in bits, in [0, 1]; else what the task's `distance` gives, forget quality say}. The sides stand apart
    because their mean rewards a model that was left as it is. Unless exactly one record is such a model, they come back
    as they are. Raises UserError on predictions of an older version.
    """
    methods = [record["method"] for record in records]
    if methods.count("retain model") != 1:
        return records
    if task.words and not all("label_mass" in rows for rows in predictions):
        raise UserError("the predictions of an older version have no label_mass; remove them and evaluate again")
    target, target_rows = records[methods.index("retain model")], predictions[methods.index("retain model")]
    return [
        {**record, "distance_to_retain_model": _distance(record, rows, target, target_rows, task)}
        for record, rows in zip(records, predictions)
    ]


def _distance(
    record: dict, rows: pd.DataFrame, target: dict, target_rows: pd.DataFrame, task: Task
) -> dict[str, float]:
    distance, headline = task.distance(rows, target_rows), task.headline
    for side in ("forget", "retain"):
        pairs = [(record["splits"][s][headline], target["splits"][s][headline]) for s in SPLITS if side in s]
        distance[f"accuracy_{side}"] = float(np.mean([abs(own - other) for own, other in pairs]))
    for split in ("train_forget", "test_forget") if task.words else ():
        distance[f"js_{split}"] = js_divergence(_outcomes(rows, split), _outcomes(target_rows, split))
    return distance


def with_mcnemar(records: list[dict], predictions: Sequence[pd.DataFrame]) -> list[dict]:
    """`records` with a test of whether each is right as often as the model that it is compared with.

    That is the first fine-tuned or merged one, or the first of all where there is none. Every record behind it gets
    "mcnemar": {"against": its method, "p": {split: p-value of McNemar's exact test (1947)}}. Splits whose rows do not
    say whether they are `correct` have none. predictions: as in `with_distances`.
    """
    names = [record["method"] for record in records]
    at = next((i for i, name in enumerate(names) if name.split(" (")[0] in ("fine-tuned", "merged")), 0)
    found = list(records)
    for i in range(at + 1, len(records)):
        if p := _p_values(predictions[at], predictions[i]):
            found[i] = {**records[i], "mcnemar": {"against": names[at], "p": p}}
    return found


def _p_values(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, float]:
    """{split: p-value} of two models' predictions, the same rows in the same order."""
    if not all("correct" in rows for rows in (first, second)):
        return {}
    found = {}
    for split in dict.fromkeys(first["split"]):
        own, other = (rows.loc[rows["split"] == split, "correct"] for rows in (first, second))
        if own.notna().all() and other.notna().all():
            found[split] = mcnemar(own, other)
    return found


def js_divergence(p: np.ndarray, q: np.ndarray) -> float:
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


def make_record(
    method: str,
    checkpoint: object,
    model: object,
    settings: EvaluationSettings,
    task: Task,
    splits: dict[str, Recorded],
    seconds: float,
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One record of metrics.json, the schema that every script and table shares (utils.storage.formats.Record).

    splits: {split or slice: scores}, as `evaluate_splits` gives them. seconds: what the evaluation took. training: what
    the training cost (`cost` of utils.training.loop.Training), where there was one. The record has "validation_share"
    only where the test splits are rows cut from train.
    """
    return {
        "method": method,
        "checkpoint": str(checkpoint),
        "model": str(model),
        "dataset": settings.dataset,
        "seed": settings.seed,
        "task": task.kind,
        "headline": task.headline,
        "splits": splits,
        **({"summary": summary} if (summary := task.summary(splits)) else {}),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
        **({"training": training} if training else {}),
        **({"validation_share": settings.validation_share} if settings.validation_share and not settings.final else {}),
    }


def method_names(chains: Sequence[list[Link]]) -> list[str]:
    """What the table calls each checkpoint. Those of one method carry as much of their paths as tells them apart.

    Raises UserError where one checkpoint is named twice.
    """
    names = []
    for chain in chains:
        last = chain[-1]
        arguments = last.manifest["arguments"] if last.manifest else {}
        rows = None if arguments.get("shadow") is None else "shadow model"
        retain = "retain model" if arguments.get("exclude_forget") else rows
        known = {"model": "base", "lora": "fine-tuned", "prompt": "SPUL"}  # the others carry their method
        gated = "SPUL behind a gate" if last.kind == "prompt" and "gate" in last.manifest else None
        names.append(arguments.get("unlearn_method") or retain or gated or known[last.kind])
    paths = [Path(os.path.abspath(chain[-1].name)) for chain in chains]
    if repeated := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"--model_checkpoints names {repeated[0]} more than once; name it once")
    alike = [[path for other, path in zip(names, paths) if other == name] for name in names]
    return [
        f"{name} ({distinct_part(path, among)})" if len(among) > 1 else name
        for name, path, among in zip(names, paths, alike)
    ]


def distinct_names(names: Sequence[str]) -> list[str]:
    """For each of several paths as much of its end as tells it from the others."""
    paths = [Path(os.path.abspath(name)) for name in names]
    return [str(distinct_part(path, paths)) for path in paths]


def distinct_part(path: Path, among: Sequence[Path]) -> Path:
    """The shortest end of `path` that no other of `among` ends in."""
    ends = (Path(*path.parts[-n:]) for n in range(1, len(path.parts)))
    return next((end for end in ends if sum(other.parts[-len(end.parts) :] == end.parts for other in among) == 1), path)
