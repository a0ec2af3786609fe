"""What the audits share that change a model, or train something in front of it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from utils.audit.base import Case, Measure, Subject
from utils.data.batch import Example
from utils.errors import UserError
from utils.evaluation.answering import Acting, by_length, tokenized
from utils.interventions.base import NOTHING, Intervention, Spans, Template
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.served import Served, in_parts
from utils.models.forward import Prefix, prompt_prefix
from utils.tasks.answers import known_answers

BATCH = 16  # rows of a step


@dataclass(frozen=True, eq=False, kw_only=True)
class Attacked(Intervention):
    """What `inner` does, on a model whose weights change, and before virtual tokens of an attacker.

    tokens: (p, d), next to the query, behind those of `inner`; None without. Keys and values are computed at every
    call, with their gradient: those that a Prompt keeps may belong to weights that are no more.
    """

    inner: Intervention
    tokens: torch.Tensor | None = None

    @property
    def template(self) -> Template | None:
        return self.inner.template

    @property
    def n_tokens(self) -> int:
        return self.inner.n_tokens + (0 if self.tokens is None else len(self.tokens))

    def prefix(self, model: torch.nn.Module) -> Prefix | None:
        own = self.inner.vectors if isinstance(self.inner, Prompt) else None
        vectors = [part for part in (own, self.tokens) if part is not None]
        return prompt_prefix(model, torch.cat(vectors)) if vectors else None

    def spans(self, texts: Sequence[str]) -> list[Spans] | None:
        return self.inner.spans(texts)

    @property
    def fixed_answer(self) -> tuple[int, ...] | None:
        return self.inner.fixed_answer

    def fixed_logits(self, model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor | None:
        return self.inner.fixed_logits(model, examples)

    def applied(self, model: torch.nn.Module, examples: Sequence[Example]) -> AbstractContextManager:
        return self.inner.applied(model, examples)


def attacked(subject: Subject, attack: str, tokens: torch.Tensor | None = None) -> Subject:
    """`subject` without anything that was computed before the attack: keys, values, decisions of gates, results.

    attack: tells one from another that changes the same frozen model. tokens: (p, d), in front of every query that has
    no fixed answer, whatever a gate says of it.
    """
    found = [
        Attacked(inner=inner, tokens=tokens, gate=inner.gate and inner.gate.anew(), request=inner.request)
        for inner in subject.served.interventions
    ]
    if tokens is not None and all(intervention.gate is not None for intervention in found):
        found.append(Attacked(inner=NOTHING, tokens=tokens))
    return replace(subject, served=subject.served.using(*found), frozen=(*subject.frozen, attack))


def parted(frame: pd.DataFrame, n: int, seed: int, audit: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(`n` rows of `frame` drawn by `seed`, the rest), each with a row at least and in the order of the frame.

    audit: who asks. Raises UserError where there are fewer than two rows.
    """
    if len(frame) < 2:
        raise UserError(f"--audit {audit} trains on some rows and looks at others, and there is one; use more rows")
    order = np.random.default_rng(seed).permutation(len(frame))
    n = min(max(1, n), len(frame) - 1)
    first, rest = (frame.iloc[np.sort(rows)].reset_index(drop=True) for rows in (order[:n], order[n:]))
    return first, rest


def asked(subject: Subject, frame: pd.DataFrame, acting: Acting, case: Case) -> list[Example]:
    """The rows of `frame` with their true answers, as the interventions `acting` on them ask."""
    known = known_answers(subject.served.tokenizer, case.task)
    return tokenized(subject.served, frame, list(frame["label_text"]), known, case.settings.max_length, acting)


def train(
    served: Served,
    examples: Sequence[Example],
    acting: Acting,
    parameters: Sequence[torch.nn.Parameter],
    steps: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Teach `parameters` the completions of `examples` through what `acting` puts around them; each step's loss.

    The loss is the cross-entropy in nats, the mean over a step's completion tokens. A step has BATCH rows, or all where
    there are fewer, in passes that `seed` shuffles. AdamW at a constant rate, without decay; the norm of the gradient
    is clipped at 1. No example may have a fixed answer.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    found = []
    for rows in _batches(len(examples), steps, seed):
        chosen, numbers = [examples[i] for i in rows], [acting[i] for i in rows]
        n_tokens, loss = sum(len(example.completion) for example in chosen), 0.0
        for own in by_length(chosen, BATCH, numbers):
            together = [chosen[i] for i in own]
            for part in in_parts(together, len(together)):
                asked = [together[i] for i in part]
                logits = torch.cat(served.logits(asked, numbers[own[0]]))
                targets = torch.tensor([token for row in asked for token in row.completion], device=logits.device)
                term = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / n_tokens
                term.backward()
                loss += term.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss)
    return found


def _batches(n: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The row numbers of each of `steps` batches of `n` rows: shuffled passes, one after the other."""
    rng, size = np.random.default_rng(seed), min(BATCH, n)
    passes = -(-steps * size // n)
    order = np.concatenate([rng.permutation(n) for _ in range(passes)])
    yield from order[: steps * size].reshape(steps, size)


def named(measures: Sequence[Measure], what: str, compared: bool = True, headline: bool = True) -> list[Measure]:
    """`measures` that say `what` was done before them. headline: whether the one that stands for them may stay."""
    return [
        replace(measure, name=f"{measure.name}, {what}", compared=compared, headline=measure.headline and headline)
        for measure in measures
    ]
