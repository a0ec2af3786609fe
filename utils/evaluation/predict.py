"""Answers to new texts, with and without what unlearning put in front of the model, printed as they come."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from utils.evaluation.answering import answer_texts
from utils.interventions.router import routed
from utils.interventions.served import Served
from utils.models.base import ModelSettings
from utils.storage.checkpoints import Link

NAMES = {"prompt": "prompt", "eco": "ECO", "refusal": "refusal"}  # kinds whose answers are shown beside the model's own
PRINTED_TOGETHER = 4  # batches of new texts: sorted by length among them they are padded less


def variants_of(
    served: Served, router: Link | None, settings: ModelSettings, max_length: int, prefix: str = ""
) -> dict[str, Served]:
    """{what the answer is called: the model that gives it}: as loaded, and without what unlearning added to it.

    prefix: of the names.
    """
    kind = served.chain[-1].kind
    if kind in NAMES:
        found = {f"without {NAMES[kind]}": served.plain, f"with {NAMES[kind]}": served}
        if router and kind == "prompt":
            found["with router"] = routed(served, router, settings, max_length)
    else:
        found = {"answer": served}
    return {f"{prefix}{name}": model for name, model in found.items()}


def answer_rows(
    rows: list[dict[str, Any]],
    variants: Mapping[str, Served],
    words: Sequence[str],
    max_length: int,
    batch_size: int,
    as_json: bool,
    print_them: bool,
) -> None:
    """Put into each of the `rows`, {"text"}, what every one of the `variants` answers.

    A row then also has {variant: {"answer", "probability", and what a gate said}}. words: the data's label words.
    print_them: print the rows as they are answered, as JSON lines or as text.
    """
    size = PRINTED_TOGETHER * batch_size
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    with tqdm(total=len(rows), desc="answering", unit="text", disable=len(parts) == 1, mininterval=1) as progress:
        for part in parts:
            _answer(part, variants, words, max_length, batch_size)
            progress.update(len(part))
            if print_them:
                with tqdm.external_write_mode(file=sys.stdout):
                    print("\n".join(shown(row, as_json) for row in part), flush=True)


def _answer(
    rows: list[dict[str, Any]], variants: Mapping[str, Served], words: Sequence[str], max_length: int, batch_size: int
) -> None:
    texts = [row["text"] for row in rows]
    for variant, model in variants.items():
        answers = answer_texts(model, texts, words, max_length, batch_size)
        _, said = model.decide(texts)
        for row, (word, probability), gate in zip(rows, answers, said):
            row[variant] = {"answer": word, "probability": round(probability, 4)} | gate
            if gate:
                row[variant]["gate_probability"] = round(gate["gate_probability"], 4)


def shown(row: dict[str, Any], as_json: bool) -> str:
    """One row of answers as a JSON line, or as its text with a line for each answer and its percentage below it."""
    if as_json:
        return json.dumps(row, allow_nan=False)
    lines = [row["text"]]
    for variant, value in row.items():
        if variant != "text":
            gate = f", gate {100 * value['gate_probability']:.1f} %" if "flagged" in value else ""
            gate += {True: ": flagged", False: ": let through"}.get(value.get("flagged"), "")
            lines.append(f"    {variant:15} {value['answer']} ({100 * value['probability']:.1f} %{gate})")
    return "\n".join(lines)
