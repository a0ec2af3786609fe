"""The scores of a frozen model in a file, so that another run need not compute them again.

A file is about one model and one set of rows. It stores the key: all that the scores depend on. Where anything differs,
or the file is damaged, the scores are computed anew. It is written only by an evaluation of the model alone, so that
what is read is, bit for bit, what would be computed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from utils import distributed
from utils.data.load import dataset_name
from utils.errors import UserError, note_once
from utils.evaluation.frozen import Frozen
from utils.evaluation.run import EvaluationSettings, chosen
from utils.evaluation.scores import may_be_fine_tuned
from utils.interventions.served import LOADERS, Served
from utils.storage import files, schemas
from utils.storage.checkpoints import Link
from utils.storage.schemas import Digest, Schema
from utils.tasks.base import Task
from utils.tasks.rows import Splits

FOLDER = "saved_scores"
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "peft")
CODE = Path(__file__).parents[1]


class ScoresFile(Schema):
    """A file of scores. key: all that they depend on; rows: {split: one dict a row}; sha256: of the rows."""

    what, remedy = "file of scores", "delete it"
    key: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]
    sha256: Digest


def find(served: Served, frames: Splits, settings: EvaluationSettings) -> Frozen:
    """The scores of the frozen model of `served` on the rows that `settings` choose of `frames`, from their file; none
    where there is no such file, or --fresh_scores or --probe ask for a computation.

    served: loaded as its chain says; the weights of a model that is being trained are not those that the chain names.
    """
    rows_of = chosen(frames, settings)
    key = key_of(served, rows_of, frames.task, settings)
    name = f"{model_of(served)[-1].path.name}-{dataset_name(settings.dataset)}-{_digest(key)[:12]}.json"
    place = str(Path(FOLDER) / name)
    if settings.fresh_scores or settings.probe:
        return Frozen(place=place, key=key)
    rows = distributed.on_main(lambda: _read(place, key, rows_of))
    if rows:
        print(f"scores of {model_of(served)[-1].name} alone are taken from {place}")
    return Frozen(rows or {}, place, key)


def keep(frozen: Frozen, frames: Mapping[str, pd.DataFrame], settings: EvaluationSettings) -> None:
    """Write `frozen`, which an evaluation of the model alone has filled, into its file unless it lies there already.

    Where that cannot be written nothing is kept, and a note says so.
    """
    rows_of = chosen(frames, settings)
    if settings.probe or not frozen.place or not frozen.knows(rows_of) or not distributed.is_main():
        return
    if not settings.fresh_scores and Path(frozen.place).exists() and _read(frozen.place, frozen.key, rows_of):
        return
    try:
        text = _text(frozen.rows)
        found = {"key": frozen.key, "rows": json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        with files.new_file(frozen.place) as file:
            file.write_text(json.dumps(found), encoding="utf-8")
    except (UserError, OSError, ValueError) as error:  # ValueError: a number that is not finite, which JSON has not
        note_once(f"the scores of the frozen model are not kept for other runs ({error})")


def key_of(
    served: Served, frames: Mapping[str, pd.DataFrame], task: Task, settings: EvaluationSettings
) -> dict[str, Any]:
    """All that the scores of the frozen model of `served` on the rows `frames` depend on, down to their last bits."""
    device = served.model.device.type
    return {
        "model": [[link.kind, link.sha256] for link in model_of(served)],
        "judge": may_be_fine_tuned(served.plain),
        "pad": served.pad_id,
        "task": json.loads(json.dumps({"kind": task.kind, **asdict(task)})),
        "rows": {split: _digest(frame.to_json(orient="split")) for split, frame in frames.items()},
        "max_length": settings.max_length,
        "eval_batch_size": settings.eval_batch_size,
        "dtype": str(served.model.dtype),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "attention": settings.attn_implementation,
        "compile": settings.compile,
        "libraries": {name: version(name) for name in LIBRARIES},
        "code": _code(),
    }


def model_of(served: Served) -> list[Link]:
    """The Links of its frozen model."""
    return [link for link in served.chain if link.kind not in LOADERS]


def _read(place: str, key: Mapping[str, Any], frames: Mapping[str, pd.DataFrame]) -> dict[str, list[dict]] | None:
    """The rows of the file, None where there is none with this key; a note where it is damaged."""
    if not Path(place).exists():
        return None
    try:
        found = schemas.read(place, ScoresFile)
    except UserError as error:
        note_once(f"{error}; the scores are computed again")
        return None
    rows = found["rows"]
    sizes = {split: len(frame) for split, frame in frames.items()}
    whole = {split: len(scores) for split, scores in rows.items()} == sizes
    if found["key"] != key or not whole or hashlib.sha256(_text(rows).encode()).hexdigest() != found["sha256"]:
        note_once(f"{place} is damaged or of other rows; the scores are computed again")
        return None
    return rows


def _text(rows: Mapping[str, Any]) -> str:
    return json.dumps(rows, allow_nan=False, default=lambda number: number.item())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@cache
def _code() -> str:
    """SHA-256 over the sources of this package: a change of any may be one of the scores."""
    digest = hashlib.sha256()
    for path in sorted(CODE.rglob("*.py")):
        digest.update(path.relative_to(CODE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
