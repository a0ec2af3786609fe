"""What a model as it is served has inside while it reads rows: hidden states, and what they say by themselves."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd
import torch

from utils.audit.base import AuditSettings
from utils.data.batch import Example, collate
from utils.evaluation.answering import by_length, tokenized
from utils.interventions.served import LOGITS, Served
from utils.models.forward import layer_logits
from utils.models.layers import decoder_layers
from utils.tasks.answers import Answers

LAYERS = 8  # that are looked at, at most


def chosen_layers(served: Served) -> list[int]:
    """The numbers of at most LAYERS evenly spaced layers, the last one included; the first layer is 1."""
    n = len(decoder_layers(served.model))
    count = min(LAYERS, n)
    return [-(-n * (i + 1) // count) for i in range(count)]


def hidden_states(
    served: Served, examples: Sequence[Example], number: int | None, layers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states (L, N, d) after `layers` at the positions that predict the examples' N completion tokens, and the
    logits (L, N, |V|) that the model's own end makes of them, under the intervention `number`.

    Behind a fixed answer they are the frozen model's, which whoever reads hidden states can read as well.
    """
    intervention, model = served.acting(number), served.model
    batch = collate(examples, served.pad_id, model.device)
    with intervention.applied(model, examples):
        return layer_logits(model, batch, layers, intervention.prefix(model))


@torch.inference_mode()
def states_of(
    served: Served, frame: pd.DataFrame, known: Answers, settings: AuditSettings, layers: Sequence[int], first: bool
) -> Iterator[tuple[int, Example, torch.Tensor, torch.Tensor]]:
    """For each row of `frame`, in any order: its number, its example, its states (L, m, d) and logits (L, m, |V|).

    first: only at the first token of its true answer, so that m = 1; else at all of them.
    """
    acting, _ = served.decide(list(frame["text"]))
    examples = tokenized(served, frame, list(frame["label_text"]), known, settings.max_length, acting)
    if first:
        examples = [replace(example, completion=example.completion[:1]) for example in examples]
    longest = max(len(example.completion) for example in examples)
    size = max(1, min(settings.eval_batch_size, LOGITS // (longest * len(layers))))  # which bounds the logits held
    for rows in by_length(examples, size, acting):
        chosen = [examples[i] for i in rows]
        states, logits = hidden_states(served, chosen, acting[rows[0]], layers)
        sizes = [len(example.completion) for example in chosen]
        yield from zip(rows, chosen, states.split(sizes, dim=1), logits.split(sizes, dim=1))
