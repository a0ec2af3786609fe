"""The evaluation of `inference_spul.py`: several checkpoints on the same rows, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pandas as pd

from utils.errors import UserError
from utils.evaluation import saved
from utils.evaluation.frozen import Frozen
from utils.evaluation.overall import with_overall
from utils.evaluation.record import make_record, method_names, with_distances, with_mcnemar
from utils.evaluation.run import (
    GATE_COLUMNS,
    EvaluationSettings,
    check_served,
    evaluate_splits,
    note_other_length,
    note_other_rows,
)
from utils.interventions.gate_files import has_gate
from utils.interventions.router import find_router, routed
from utils.interventions.served import Served, load_served
from utils.models.base import ModelSettings
from utils.models.chain import resolve_chain
from utils.tasks.rows import Splits, refuse_other_form

OF_ROWS = ["method", "checkpoint", "split", "text", "label_text"]


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Which checkpoints are asked, and how: the flags of those names."""

    model_checkpoints: Sequence[str]
    parent_path: str | None = None
    router: str | None = None
    force: bool = False
    without_gate: bool = False
    forget_size: float = 1.0


def evaluate_checkpoints(
    asked: CheckpointSettings, frames: Splits, model: ModelSettings, settings: EvaluationSettings
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """One record per checkpoint, and one prediction per checkpoint and row.

    What a frozen model says of a row on which nothing acts is computed once for all checkpoints that stand in front of
    it; what it says alone is kept in a file for other runs (utils.evaluation.saved).
    """
    names = asked.model_checkpoints
    chains = [resolve_chain(name, model.trust_remote_code, asked.parent_path) for name in names]
    router = find_router(asked.router, chains, model, asked.parent_path, asked.force)
    note_other_rows(chains, frames, asked.forget_size)
    for chain in chains:
        refuse_other_form(chain[-1].manifest, frames.task, chain[-1].name)
    records, predictions, frozen = [], [], {}
    if asked.without_gate and not any(has_gate(chain[-1]) for chain in chains):
        raise UserError("--without_gate shows what stands behind a gate; none of --model_checkpoints has one")
    for method, name in zip(method_names(chains), names):
        served = load_served(name, model, asked.parent_path, settings.max_length)
        check_model(served, frames, settings.max_length)
        variants = {method: served}
        if router and served.chain[-1].kind == "prompt":
            variants[f"{method} + router"] = routed(served, router, model, settings.max_length)
        if asked.without_gate and served.is_gated:
            variants[f"{method} without gate"] = served.ungated
        own = tuple(link.sha256 for link in saved.model_of(served))
        for variant, one in variants.items():
            lets_through = one.is_gated or not one.interventions
            if lets_through and (own not in frozen or not one.interventions):
                frozen[own] = saved.find(served, frames, settings)
            cost, known = one.manifest.get("training"), frozen[own] if lets_through else None
            entry, rows = evaluate_model(one, variant, name, frames, settings, cost, known)
            records.append({**entry, "seed": one.manifest.get("seed", entry["seed"])})
            predictions.append(rows)
        del served, one, variants  # two models need not fit at once
    records = with_mcnemar(with_distances(records, predictions, frames.task), predictions)
    records = with_overall(records, predictions, frames.task)
    return records, pd.concat(predictions, ignore_index=True)


def check_model(served: Served, frames: Splits, max_length: int) -> None:
    """Raise UserError where a row does not fit the model; say where rows are cut elsewhere than in its training."""
    check_served(served, frames, max_length)
    note_other_length(served, pd.concat(frames.values()), frames.task, max_length)


def evaluate_model(
    served: Served,
    method: str,
    checkpoint: str,
    frames: Splits,
    settings: EvaluationSettings,
    training: dict[str, Any] | None = None,
    frozen: Frozen | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """(record, predictions) of one model that is ready to answer.

    training: what it cost, where there was one. frozen: what is known of the model alone; where that is what is
    evaluated, it is kept for other runs.
    """
    start = perf_counter()
    splits, rows = evaluate_splits(served, frames, frames.task, settings, method, frozen)
    if frozen and not served.interventions:
        saved.keep(frozen, frames, settings)
    seconds = perf_counter() - start
    entry = make_record(method, checkpoint, served.base_name, settings, frames.task, splits, seconds, training)
    columns = [*OF_ROWS, *(column for column in frames.task.scored if column in rows)]
    columns += [column for column in GATE_COLUMNS if served.is_gated and column in rows]
    return entry, rows.assign(method=method, checkpoint=str(checkpoint))[columns]
