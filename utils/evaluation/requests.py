"""Requests that are served together: their evaluation, and how far each keeps off the rows of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from utils.errors import UserError
from utils.evaluation import saved
from utils.evaluation.evaluate import check_model, evaluate_model
from utils.evaluation.record import distinct_names
from utils.evaluation.run import EvaluationSettings
from utils.interventions import ledger
from utils.interventions.served import Served
from utils.interventions.together import Request, refuse_apart, refuse_name, resolve_request, serve_together
from utils.models.base import ModelSettings
from utils.tasks.rows import Splits


@dataclass(frozen=True, kw_only=True)
class RequestSettings:
    """Which requests are served: the flags of those names."""

    model_checkpoints: Sequence[str] | None = None
    request_names: Sequence[str] | None = None
    requests: str | None = None
    parent_path: str | None = None
    trust_remote_code: bool = False


def find_requests(settings: RequestSettings) -> list[Request]:
    """The active requests of the ledger, else those of the checkpoints, sorted by name.

    Raises UserError where they cannot be served together.
    """
    trusted, parent = settings.trust_remote_code, settings.parent_path
    if settings.requests:
        found = ledger.active_requests(settings.requests, trusted, parent)
    else:
        paths = settings.model_checkpoints
        for name in settings.request_names or ():
            refuse_name(name)
        names = settings.request_names or distinct_names(paths)
        found = [resolve_request(name, path, trusted, parent) for name, path in zip(names, paths)]
    refuse_apart(found)
    return sorted(found, key=lambda request: request.name)


def dataset_of(requests: Sequence[Request]) -> str:
    """The --dataset that all `requests` were trained on. Raises UserError where there are several."""
    found = sorted({request.link.manifest["arguments"]["dataset"] for request in requests})
    if len(found) > 1:
        raise UserError(f"the requests were trained on {found[0]} and {found[1]}; name one of them with --dataset")
    return found[0]


def evaluate_requests(
    requests: Sequence[Request],
    frames: Splits,
    model: ModelSettings,
    settings: EvaluationSettings,
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """([the one record], predictions) of the model that serves all `requests`.

    The record has "requests": {"names", "interference": see `interference`, and for each name "bytes", "seconds",
    "rows": see `cost`}.
    """
    served = serve_together(requests, model, settings.max_length)
    check_model(served, frames, settings.max_length)
    frozen = saved.find(served, frames, settings)
    method = f"{len(requests)} request{'s' if len(requests) > 1 else ''}"
    entry, rows = evaluate_model(served, method, " + ".join(map(path_of, requests)), frames, settings, frozen=frozen)
    costs = {request.name: cost(request) for request in requests}
    about = {"names": [request.name for request in requests], "interference": interference(served, requests)}
    about |= {key: {name: one[key] for name, one in costs.items()} for key in ("bytes", "seconds", "rows")}
    return [{**entry, "requests": about}], rows


def path_of(request: Request) -> str:
    """The checkpoint of a request as the user, or the ledger, names it."""
    return request.link.name


def interference(served: Served, requests: Sequence[Request]) -> dict[str, dict[str, dict[str, Any]]]:
    """{request: {forget split: {"n", "acts": {request: share}, "none": share}}} on the own forget rows of each.

    acts: the share of the n rows that this request acts on. none: the share that no gate catches. A request whose rows
    cannot be loaded is left out, with a note.
    """
    result = {}
    for owner in requests:
        for split, frame in (owner.forget_rows or {}).items():
            _, said = served.decide(list(frame["text"]))
            acted = [row["request"] for row in said]
            result.setdefault(owner.name, {})[split] = {
                "n": len(acted),
                "acts": {request.name: acted.count(request.name) / len(acted) for request in requests},
                "none": acted.count(None) / len(acted),
            }
    return result


def cost(request: Request) -> dict[str, int | float | None]:
    """{"bytes": of the checkpoint folder on the disk; "seconds", "rows": of its training, None where there was none}.

    seconds: steps times the median of a step. rows: steps times the batch size, the most that it may have read.
    """
    training, size = request.link.manifest.get("training"), request.link.manifest["arguments"].get("train_batch_size")
    seconds, steps = (training["seconds_per_step"], training["steps"]) if training else (None, None)
    return {
        "bytes": sum(file.stat().st_size for file in Path(request.link.path).rglob("*") if file.is_file()),
        "seconds": None if seconds is None else round(steps * seconds, 1),
        "rows": steps * size if steps and isinstance(size, int) else None,
    }
