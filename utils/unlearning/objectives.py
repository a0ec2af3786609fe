"""From rows to the loss of a training step: fine-tuning, SPUL, and every method that changes the model itself.

An objective is what `utils.training.loop.Training` calls: objective(rows, n_forget, n_retain) -> (loss, parts), where
`rows` are the numbers of a micro-batch and the counts those of the whole step.
"""

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch

from utils.data.batch import Example, collate
from utils.errors import note_once
from utils.interventions.served import Served
from utils.models.forward import completion_logits, prompt_prefix
from utils.tasks.answers import known_answers
from utils.tasks.encode import tokenize
from utils.tasks.rows import Splits
from utils.unlearning import losses
from utils.unlearning.hiding import Hiding
from utils.unlearning.losses import Parts, Shares
from utils.unlearning.methods import CompletionTokens, Method, MethodSettings
from utils.unlearning.reference import Loader, Reference
from utils.unlearning.rmu import SteeringObjective


class FineTuning:
    """Cross-entropy of the labels (`qlora.py`), the mean over rows."""

    def __init__(self, model: torch.nn.Module, examples: Sequence[Example], pad_id: int) -> None:
        self.model, self.examples, self.pad_id = model, examples, pad_id

    def __call__(self, rows: list[int], n_forget: int, n_retain: int) -> Parts:
        batch = collate([self.examples[i] for i in rows], self.pad_id, self.model.device)
        nll = losses.token_nll(completion_logits(self.model, batch), batch.targets)
        return losses.mean_over_rows(nll, n_forget + n_retain), {}


def prompt_rows(
    tokenizer: Any,
    frames: Splits,
    max_length: int,
    seed: int,
    retain: pd.DataFrame | None = None,
) -> tuple[list[Example], list[Example]]:
    """What SPUL trains on: the retain rows with their labels, and the forget rows with a word drawn by `seed`.

    retain: the rows to keep, where not all of train_retain are wanted.
    """
    retain, forget = frames["train_retain"] if retain is None else retain, frames["train_forget"]
    encode = partial(tokenize, tokenizer, max_length=max_length, answers=known_answers(tokenizer, frames.task))
    words = frames.task.unlearning_answers(forget, seed)
    return encode(retain, retain["label_text"]), encode(forget, words, forget=True)


class PromptTuning:
    """SPUL's loss of the virtual tokens that `encoder` gives (equation 4). reference: what the model says without
    them, about the retain rows; None without L_kl. shares: where a gate has chosen the rows (utils.unlearning.behind),
    what these are of all. hiding: None without L_hide."""

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: torch.nn.Module,
        examples: Sequence[Example],
        pad_id: int,
        reference: Reference | None,
        alpha: float,
        beta: float,
        shares: Shares | None = None,
        hiding: Hiding | None = None,
    ) -> None:
        self.shares, self.hiding = shares, hiding
        self.model, self.encoder, self.examples, self.pad_id = model, encoder, examples, pad_id
        self.reference, self.alpha, self.beta = reference, alpha, beta

    def __call__(self, rows: list[int], n_forget: int, n_retain: int) -> Parts:
        examples = [self.examples[i] for i in rows]
        read = self.hiding.read(examples) if self.hiding else examples
        batch = collate(read, self.pad_id, self.model.device)
        prefix = prompt_prefix(self.model, self.encoder())
        if self.reference is None:
            logits, kl = completion_logits(self.model, batch, prefix), None
        else:
            logits, before = completion_logits(self.model, batch, prefix, self.reference.of(rows))
            kl = losses.token_kl(before, logits[batch.retain_tokens])
        nll = losses.token_nll(logits, batch.targets)
        of_forget, of_retain = nll[batch.forget_tokens], nll[batch.retain_tokens]
        hidden, hide = (self.hiding(examples, logits), self.hiding.weight) if self.hiding else (None, 0.0)
        weights = self.alpha, self.beta, hide
        loss, parts = losses.spul_loss(of_forget, of_retain, kl, n_forget, n_retain, *weights, hidden)
        if self.shares is None:
            return loss, parts
        return losses.behind_gate(parts, self.shares, len(rows) / (n_forget + n_retain), *weights)


class Rows:
    """The training examples of a method. `trained`: retain rows (if it has a retain loss), then forget rows; `all`:
    those, then the forget rows once more with the preferred answer (dpo); `alternative`: {number: number in `all`}."""

    def __init__(self, tokenizer: Any, frames: Splits, method: Method, settings: MethodSettings) -> None:
        task, retain, forget = frames.task, frames["train_retain"], frames["train_forget"]
        labels = task.unlearning_answers(forget, settings.seed) if method.flipped else forget["label_text"]
        kept = retain if settings.retain_loss != "none" else retain.head(0)
        known = known_answers(tokenizer, task)
        encode = partial(tokenize, tokenizer, max_length=settings.max_length, answers=known)
        self.trained = encode(kept, kept["label_text"])
        self.trained += encode(forget, labels, forget=True)
        self.all, self.alternative = list(self.trained), {}
        if method.refusals:
            self.alternative = {i: i + len(forget) for i in range(len(kept), len(self.trained))}
            self.all += encode(forget, task.preferred_answers(forget, settings.seed), forget=True)

    def referred(self, method: Method, retain_loss: str) -> list[int]:
        """Numbers in `all` of the examples whose reference logits the loss needs."""
        kl = retain_loss == "kl"
        return [i for i, example in enumerate(self.all) if (method.reference if example.forget else kl)]


class TokenObjective:
    """The loss of a method that looks at completion tokens.

    What the model said before unlearning is computed once, by `load`, and kept as hidden states; with a trained head a
    frozen copy of that head makes logits of them. There is never a second model.
    """

    def __init__(
        self,
        method: Method,
        served: Served,
        rows: Rows,
        frames: Mapping[str, pd.DataFrame],
        settings: MethodSettings,
        numerics: str,
        load: Loader,
    ) -> None:
        """numerics: in what numbers the reference is computed. load: as `utils.unlearning.reference.load_reference`."""
        self.method, self.served, self.rows, self.settings = method, served, rows, settings
        self.constants = settings.constants(method)
        self.reference = self.head = None
        if referred := rows.referred(method, settings.retain_loss):
            depends_on = [settings.unlearn_method, settings.retain_loss, numerics]
            self.reference = load(served, rows.all, referred, frames, depends_on=depends_on)
            self.head = frozen_head(served.model)
        elif settings.logits_path:
            note_once(f"{settings.unlearn_method} compares with no earlier model, so --logits_path is not used")

    def __call__(self, rows: list[int], n_forget: int, n_retain: int) -> Parts:
        examples, alternative = self.rows.all, self.rows.alternative
        numbers = [*rows, *(alternative[i] for i in rows if i in alternative)]
        logits, before = self._logits(numbers)
        forget = [i for i in rows if examples[i].forget]
        parts = {"L_f": logits.new_zeros(())}
        if forget:
            tokens = self._tokens(numbers, forget, logits, before)
            if alternative:
                preferred = self._tokens(numbers, [alternative[i] for i in forget], logits, before)
                tokens = dataclasses.replace(tokens, preferred=preferred)
            values = self.method.forget(tokens, *self.constants)
            if self.method.reduction == "mean" and len(values) == len(tokens.rows):  # not where they are of rows
                values = values / tokens.n_tokens[tokens.rows]
            parts["L_f"] = losses.mean_over_rows(values, n_forget)
        compared = before if self.settings.retain_loss == "kl" else None
        kept = self._tokens(numbers, [i for i in rows if not examples[i].forget], logits, compared)
        if self.settings.retain_loss == "ce":
            parts["L_r"] = losses.mean_over_rows(kept.nll, n_retain)
        elif self.settings.retain_loss == "kl":
            kl = losses.token_kl(kept.reference_logits, kept.logits)
            parts["L_kl"] = losses.mean_over_rows(kl, n_retain)
        return losses.with_retain_weight(parts, self.settings.retain_weight)

    def _tokens(
        self, numbers: list[int], chosen: list[int], logits: torch.Tensor, before: torch.Tensor | None
    ) -> CompletionTokens:
        """What the logits (N, |V|) of the examples `numbers` say about those of them that are `chosen`."""
        completions = [self.rows.all[i].completion for i in numbers]
        starts = dict(zip(numbers, itertools.accumulate(map(len, completions), initial=0)))
        places = [starts[i] + k for i in chosen for k in range(len(self.rows.all[i].completion))]
        row_of = [row for row, i in enumerate(chosen) for _ in self.rows.all[i].completion]
        targets = [token for i in chosen for token in self.rows.all[i].completion]
        places, row_of, targets = (
            torch.tensor(values, dtype=torch.long, device=logits.device) for values in (places, row_of, targets)
        )
        reference = None if before is None else before[places]
        return CompletionTokens(logits[places], reference, targets, row_of, len(chosen))

    def _logits(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (N, |V|) of all completion tokens, and those before unlearning at the same places (or None).

        Of examples that the model reads alike (dpo's two answers of one token to the same prompt: the last token of an
        answer is predicted, never read) it reads one, and the others take its logits.
        """
        model, examples = self.served.model, self.rows.all
        first = {}  # what the model reads: number of the first such example
        alike = [first.setdefault(self._read(i), i) for i in numbers]
        distinct = list(first.values())
        starts = dict(zip(distinct, itertools.accumulate((len(examples[i].completion) for i in distinct), initial=0)))
        tokens = [starts[i] + k for i in alike for k in range(len(examples[i].completion))]
        batch = collate([examples[i] for i in distinct], self.served.pad_id, model.device)
        if self.reference is None:
            return completion_logits(model, batch)[tokens], None
        known = [starts[i] + k for i in distinct if self.reference.has(i) for k in range(len(examples[i].completion))]
        logits, before = completion_logits(model, batch, None, self.reference.of(distinct), self.head)
        filled = torch.full_like(logits.detach(), torch.nan)
        filled[known] = before.detach()
        return logits[tokens], filled[tokens]

    def _read(self, number: int) -> tuple[tuple, tuple, bool]:
        """What the model reads of an example, and whether its answer is compared with the reference."""
        example = self.rows.all[number]
        return example.prompt, example.completion[:-1], self.reference is not None and self.reference.has(number)


def frozen_head(model: torch.nn.Module) -> torch.nn.Module | None:
    """A frozen copy of the model's head where the head is trained, None where it stays as it is."""
    head = model.get_output_embeddings()
    if not any(parameter.requires_grad for parameter in head.parameters()):
        return None
    return copy.deepcopy(head).requires_grad_(False).eval()


def objective_of(method: Method) -> type[TokenObjective] | type[SteeringObjective]:
    """The kind of objective that `method` has, by what it looks at."""
    return SteeringObjective if method.activations else TokenObjective
