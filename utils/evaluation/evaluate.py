"""The evaluation of `inference_spul.py`: several checkpoints on the same rows, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pandas as pd

from utils.evaluation.record import make_record, method_names, with_distances
from utils.evaluation.run import (
    EvaluationSettings,
    Frames,
    check_served,
    evaluate_splits,
    note_other_length,
    note_other_rows,
)
from utils.interventions.router import find_router, routed
from utils.interventions.served import Served, load_served
from utils.models.base import ModelSettings
from utils.models.chain import resolve_chain

PREDICTION_COLUMNS = [
    "method", "checkpoint", "split", "text", "label_text", "prediction", "correct", "label_prediction",
    "label_probabilities", "label_mass", "loss",
]  # fmt: skip
GATE_COLUMNS = ["flagged", "gate_probability", "request"]  # as far as there are any


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Which checkpoints are asked, and how: the flags of those names."""

    model_checkpoints: Sequence[str]
    parent_path: str | None = None
    router: str | None = None
    force: bool = False
    forget_size: float = 1.0


def evaluate_checkpoints(
    asked: CheckpointSettings, frames: Frames, words: Sequence[str], model: ModelSettings, settings: EvaluationSettings
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """One record per checkpoint, and one prediction per checkpoint and row; words: the label words."""
    names = asked.model_checkpoints
    chains = [resolve_chain(name, model.trust_remote_code, asked.parent_path) for name in names]
    router = find_router(asked.router, chains, model, asked.parent_path, asked.force)
    note_other_rows(chains, frames, asked.forget_size)
    records, predictions = [], []
    for method, name in zip(method_names(chains), names):
        served = load_served(name, model, asked.parent_path, settings.max_length)
        check_model(served, frames, settings.max_length)
        variants = {method: served}
        if router and served.chain[-1].kind == "prompt":
            variants[f"{method} + router"] = routed(served, router, model, settings.max_length)
        for variant, one in variants.items():
            entry, rows = evaluate_model(one, variant, name, frames, words, settings, one.manifest.get("training"))
            records.append({**entry, "seed": one.manifest.get("seed", entry["seed"])})
            predictions.append(rows)
        del served, one, variants  # two models need not fit at once
    return with_distances(records, predictions), pd.concat(predictions, ignore_index=True)


def check_model(served: Served, frames: Frames, max_length: int) -> None:
    """Raise UserError where a row does not fit the model; say where rows are cut elsewhere than in its training."""
    check_served(served, frames, max_length)
    note_other_length(served, [text for frame in frames.values() for text in frame["text"]], max_length)


def evaluate_model(
    served: Served,
    method: str,
    checkpoint: str,
    frames: Frames,
    words: Sequence[str],
    settings: EvaluationSettings,
    training: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """(record, predictions) of one model that is ready to answer. training: what it cost, where there was one."""
    start = perf_counter()
    splits, rows = evaluate_splits(served, frames, words, settings, method)
    entry = make_record(method, checkpoint, served.base_name, settings, splits, perf_counter() - start, training)
    columns = [*PREDICTION_COLUMNS, *(column for column in GATE_COLUMNS if served.is_gated and column in rows)]
    return entry, rows.assign(method=method, checkpoint=str(checkpoint))[columns]
