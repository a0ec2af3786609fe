"""Answers to new texts, with and without what unlearning put in front of the model, printed as they come."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from utils.data.load import read_texts
from utils.evaluation.answering import answer_texts
from utils.evaluation.evaluate import CheckpointSettings
from utils.evaluation.run import check_texts, note_other_length
from utils.interventions.router import find_router, routed
from utils.interventions.served import Served, load_served
from utils.interventions.together import Request, serve_together
from utils.models.base import ModelSettings
from utils.models.chain import resolve_chain
from utils.storage.checkpoints import Link
from utils.tasks.base import Task
from utils.tasks.rows import recorded_task

NAMES = {"prompt": "prompt", "eco": "ECO", "refusal": "refusal"}  # kinds whose answers are shown beside the model's own
PRINTED_TOGETHER = 4  # batches of new texts: sorted by length among them they are padded less


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Which texts are answered and how: the flags of those names. Those of `text` come before those of input_file."""

    text: Sequence[str] | None = None
    input_file: str | None = None
    json: bool = False
    max_length: int = 1024
    max_new_tokens: int | None = None
    eval_batch_size: int = 32

    def rows(self) -> list[dict[str, Any]]:
        """[{"text"}, ...]. Raises UserError where the file cannot be read."""
        read = read_texts(self.input_file) if self.input_file else []
        return [{"text": text} for text in [*(self.text or []), *read]]


def predict_checkpoints(
    asked: CheckpointSettings, task: Task | None, model: ModelSettings, settings: TextSettings
) -> None:
    """Print each checkpoint's answer to each new text; for a prompt, without and with it side by side.

    Lines appear as they are answered, those of several checkpoints with the last one: two models need not fit at once.
    task: that of models which record none of their own.
    """
    rows, names = settings.rows(), asked.model_checkpoints
    named = names if asked.router else []
    chains = [resolve_chain(name, model.trust_remote_code, asked.parent_path) for name in named]
    router = find_router(asked.router, chains, model, asked.parent_path, asked.force)
    for number, name in enumerate(names, 1):
        served = load_served(name, model, asked.parent_path, settings.max_length)
        prefix, last = f"{Path(name).name}: " if len(names) > 1 else "", number == len(names)
        variants = variants_of(served, router, model, settings.max_length, prefix, asked.without_gate)
        _answer_all(rows, served, variants, recorded_task(served.manifest) or task, settings, last)
        del served, variants


def predict_together(requests: Sequence[Request], model: ModelSettings, settings: TextSettings) -> None:
    """Print the answer to each new text of the frozen model alone, and with all `requests`, and which of them acted."""
    rows, served = settings.rows(), serve_together(requests, model, settings.max_length)
    variants = {"without requests": served.plain, "with requests": served}
    _answer_all(rows, served, variants, recorded_task(requests[0].link.manifest), settings, True)


def _answer_all(
    rows: list[dict[str, Any]],
    served: Served,
    variants: Mapping[str, Served],
    task: Task,
    settings: TextSettings,
    last: bool,
) -> None:
    """`answer_rows` of texts that fit the model. last: print them. `settings` may allow other answers than the task of
    the checkpoint records."""
    texts = [row["text"] for row in rows]
    if settings.max_new_tokens and task.generates:
        task = replace(task, max_new_tokens=settings.max_new_tokens)
    check_texts(served, texts, task, settings.max_length)
    note_other_length(served, pd.DataFrame({"text": texts}), task, settings.max_length)
    answer_rows(rows, variants, task, settings.max_length, settings.eval_batch_size, settings.json, last)


def variants_of(
    served: Served,
    router: Link | None,
    settings: ModelSettings,
    max_length: int,
    prefix: str = "",
    without_gate: bool = False,
) -> dict[str, Served]:
    """{what the answer is called: the model that gives it}: as loaded, and without what unlearning added to it.

    prefix: of the names. without_gate: also with what stands behind a gate, in front of every query.
    """
    kind = served.chain[-1].kind
    if kind in NAMES:
        found = {f"without {NAMES[kind]}": served.plain, f"with {NAMES[kind]}": served}
        if router and kind == "prompt":
            found["with router"] = routed(served, router, settings, max_length)
        if without_gate and served.is_gated:
            found["without gate"] = served.ungated
    else:
        found = {"answer": served}
    return {f"{prefix}{name}": model for name, model in found.items()}


def answer_rows(
    rows: list[dict[str, Any]],
    variants: Mapping[str, Served],
    task: Task,
    max_length: int,
    batch_size: int,
    as_json: bool,
    print_them: bool,
) -> None:
    """Put into each of the `rows`, {"text"}, what every one of the `variants` answers.

    A row then also has {variant: {"answer", "probability", and what a gate said}}. task: decides where an answer has
    ended. print_them: print the rows as they are answered, as JSON lines or as text.
    """
    size = PRINTED_TOGETHER * batch_size
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    with tqdm(total=len(rows), desc="answering", unit="text", disable=len(parts) == 1, mininterval=1) as progress:
        for part in parts:
            _answer(part, variants, task, max_length, batch_size)
            progress.update(len(part))
            if print_them:
                with tqdm.external_write_mode(file=sys.stdout):
                    print("\n".join(shown(row, as_json) for row in part), flush=True)


def _answer(
    rows: list[dict[str, Any]], variants: Mapping[str, Served], task: Task, max_length: int, batch_size: int
) -> None:
    texts = [row["text"] for row in rows]
    for variant, model in variants.items():
        answers = answer_texts(model, texts, task, max_length, batch_size)
        _, said = model.decide(texts)
        for row, (word, probability), gate in zip(rows, answers, said):
            row[variant] = {"answer": word, "probability": _four_digits(probability)} | gate
            if gate:
                row[variant]["gate_probability"] = _four_digits(gate["gate_probability"])


def _four_digits(probability: float) -> float:
    """Rounded to four significant digits, so that what is small is not 0."""
    return float(f"{probability:.4g}")


def shown(row: dict[str, Any], as_json: bool) -> str:
    """One row of answers as a JSON line, or as its text with a line for each answer and its percentage below it."""
    if as_json:
        return json.dumps(row, allow_nan=False)
    lines = [row["text"]]
    for variant, value in row.items():
        if variant != "text":
            gate = f", gate {100 * value['gate_probability']:.1f} %" if "flagged" in value else ""
            gate += {True: ": flagged", False: ": let through"}.get(value.get("flagged"), "")
            gate += f" by {value['request']}" if value.get("request") else ""
            lines.append(f"    {variant:15} {value['answer']} ({100 * value['probability']:.1f} %{gate})")
    return "\n".join(lines)
