"""From rows to the loss of a training step: fine-tuning, SPUL, and every method that changes the model itself.

An objective is what `utils.training.loop.Training` calls: objective(rows, n_forget, n_retain, step) -> (loss, parts),
where `rows` are the numbers of a micro-batch, the counts those of the whole step, and `step` the numbers of its rows.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch

from utils.data.batch import Example, collate, index_on
from utils.errors import note_once
from utils.interventions.served import Served
from utils.models.forward import Prefix, prompt_prefix, shared_prefix
from utils.models.pieces import Piece, completion_values
from utils.tasks.answers import known_answers
from utils.tasks.encode import tokenize
from utils.tasks.rows import Splits
from utils.unlearning import losses
from utils.unlearning.hiding import Hiding
from utils.unlearning.losses import Parts, Shares
from utils.unlearning.methods import Answers, CompletionTokens, Method, MethodSettings
from utils.unlearning.reference import Loader, Reference
from utils.unlearning.rmu import SteeringObjective


class FineTuning:
    """Cross-entropy of the labels (`qlora.py`), the mean over all completion tokens of a step, as Trainer has it."""

    def __init__(self, model: torch.nn.Module, examples: Sequence[Example], pad_id: int, logit_chunk: int = 0) -> None:
        self.model, self.examples, self.pad_id, self.chunk = model, examples, pad_id, logit_chunk

    def __call__(self, rows: list[int], n_forget: int, n_retain: int, step: Sequence[int] | None = None) -> Parts:
        batch = collate([self.examples[i] for i in rows], self.pad_id, self.model.device)

        def values(logits: torch.Tensor, _: None, piece: Piece) -> dict[str, torch.Tensor]:
            return {"nll": losses.token_nll(logits, piece.cut(batch.targets))}

        nll = completion_values(self.model, batch, values, chunk=self.chunk)["nll"]
        return losses.mean_over_rows(nll, n_completion_tokens(self.examples, rows if step is None else step)), {}


def n_completion_tokens(examples: Sequence[Example], rows: Iterable[int]) -> int:
    """How many tokens the completions of the examples `rows` (numbers) have together."""
    return sum(len(examples[i].completion) for i in rows)


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
    what these are of all. hiding: None without L_hide. logit_chunk: see utils.models.pieces."""

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
        logit_chunk: int = 0,
    ) -> None:
        self.shares, self.hiding, self.chunk = shares, hiding, logit_chunk
        self.model, self.encoder, self.examples, self.pad_id = model, encoder, examples, pad_id
        self.reference, self.alpha, self.beta = reference, alpha, beta
        self._shared: Callable[[], Prefix] | None = None

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """While open, all calls belong to one step: the virtual tokens go through the model once for all of them."""
        with shared_prefix(self._prefix()) as self._shared:
            try:
                yield
            finally:
                self._shared = None

    def _prefix(self) -> Prefix:
        return self._shared() if self._shared else prompt_prefix(self.model, self.encoder())

    def __call__(self, rows: list[int], n_forget: int, n_retain: int, step: Sequence[int] | None = None) -> Parts:
        examples = [self.examples[i] for i in rows]
        read = self.hiding.read(examples) if self.hiding else examples
        batch = collate(read, self.pad_id, self.model.device)
        scored = self.hiding.scored(examples) if self.hiding else None

        def values(logits: torch.Tensor, before: torch.Tensor | None, piece: Piece) -> dict[str, torch.Tensor]:
            found = {}
            if before is not None:
                kept = batch.retain_tokens[piece.compared.start : piece.compared.stop] - piece.tokens.start
                found["kl"] = losses.token_kl(before, logits[kept])
            found["nll"] = losses.token_nll(logits, piece.cut(batch.targets))
            return found | (scored.read(logits, piece.tokens) if scored else {})

        before, compared = None, []
        if self.reference is not None:
            kinds = [example.forget for example in read for _ in example.completion]
            before = self.reference.of(rows, self.model.device)
            compared = [n for n, forget in enumerate(kinds) if forget is False]
        found = completion_values(self.model, batch, values, self._prefix(), before, compared, chunk=self.chunk)
        nll, hidden, hide = found["nll"], None, 0.0
        if scored:
            hidden, hide = self.hiding(examples, scored.sums(found)), self.hiding.weight
        of_forget, of_retain = nll[batch.forget_tokens], nll[batch.retain_tokens]
        weights = self.alpha, self.beta, hide
        terms = of_forget, of_retain, found.get("kl"), n_forget, n_retain
        loss, parts = losses.spul_loss(*terms, *weights, hidden)
        if self.shares is None:
            return loss, parts
        return losses.behind_gate(parts, self.shares, len(rows) / (n_forget + n_retain), *weights)


class Rows:
    """The training examples of a method. `trained`: retain rows (if it has a retain loss), then forget rows; `all`:
    those, then the forget rows once more with the preferred answer (dpo); `alternative`: {number: number in `all`}."""

    def __init__(self, tokenizer: Any, frames: Splits, method: Method, settings: MethodSettings) -> None:
        task, retain, forget = frames.task, frames["train_retain"], frames["train_forget"]
        labels = task.unlearning_answers(forget, settings.seed) if method.flipped else forget["label_text"]
        if method.refused:
            labels = task.preferred_answers(forget, settings.seed)
        kept = retain if settings.retain_loss != "none" else retain.head(0)
        known = known_answers(tokenizer, task)
        encode = partial(tokenize, tokenizer, max_length=settings.max_length, answers=known)
        self.trained = encode(kept, kept["label_text"])
        self.trained += encode(forget, labels, forget=True)
        self.all, self.alternative = list(self.trained), {}
        if method.preferred:
            source = {"refusal": task.preferred_answers, "alternate": task.alternate_answers}[method.preferred]
            answers = source(forget, settings.seed)
            self.alternative = {i: i + len(forget) for i in range(len(kept), len(self.trained))}
            self.all += encode(forget, answers, forget=True)

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
        self.constants, self.chunk = settings.constants(method), settings.logit_chunk
        # What is part of a resumable state: the weight of the retain term, where it moves.
        self.dual = torch.tensor(settings.retain_weight, dtype=torch.float64) if method.dual else None
        self.reference = self.head = None
        if referred := rows.referred(method, settings.retain_loss):
            depends_on = [settings.unlearn_method, settings.retain_loss, numerics]
            self.reference = load(served, rows.all, referred, frames, depends_on=depends_on)
            self.head = frozen_head(served.model)
        elif settings.logits_path:
            note_once(f"{settings.unlearn_method} compares with no earlier model, so --logits_path is not used")

    def __call__(self, rows: list[int], n_forget: int, n_retain: int, step: Sequence[int] | None = None) -> Parts:
        method, examples, alternative = self.method, self.rows.all, self.rows.alternative
        forget, kept = ([i for i in rows if examples[i].forget == wanted] for wanted in (True, False))
        preferred = [alternative[i] for i in forget if i in alternative]
        chosen = {"forget": forget, "preferred": preferred} if forget else {}
        if self.settings.retain_loss != "none":
            chosen["kept"] = kept
        found = self._values([*rows, *(alternative[i] for i in rows if i in alternative)], chosen)
        every = rows if step is None else step
        to_forget, to_keep = (
            n_completion_tokens(examples, [i for i in every if examples[i].forget == kind]) for kind in (True, False)
        )
        parts = {"L_f": torch.zeros((), device=self.served.model.device)}
        if forget and method.of_answers:
            better = self._answers(found, "preferred", len(forget)) if preferred else None
            values = method.forget(self._answers(found, "forget", len(forget), better), *self.constants)
            parts["L_f"] = losses.mean_over_rows(values, n_forget)
        elif forget:
            values = found["forget"], found["forget_rows"], len(forget)
            parts["L_f"] = losses.reduced(*values, method.reduction, n_forget, to_forget)
        if self.settings.retain_loss != "none":
            name = {"ce": "L_r", "kl": "L_kl"}[self.settings.retain_loss]
            values = found["kept"], found["kept_rows"], len(kept)
            parts[name] = losses.reduced(*values, method.retain_reduction, n_retain, to_keep)
        weight = self.settings.retain_weight if self.dual is None else self.dual
        return losses.with_retain_weight(parts, weight)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """What changes during training beside the parameters, {name: scalar}."""
        return {} if self.dual is None else {"dual": self.dual}

    def after_step(self, parts: Mapping[str, float], progress: float) -> dict[str, float]:
        """Move the dual variable of `pdu` (arXiv 2506.05314, algorithm 1): lambda <- max(0, lambda + step x excess).

        parts: those of the whole step, of all processes. progress: the share of the run's steps that are done, this
        one included. Returns what belongs into the log: the weight that the step had.
        """
        if self.dual is None:
            return {}
        used = {"retain_weight": float(self.dual)}
        bound, step, warmup = self.constants[-3:]
        if progress > warmup and parts["L_r"]:  # a step without retain rows says nothing
            self.dual.add_(step * (parts["L_r"] - bound)).clamp_(min=0)
        return used

    def _answers(
        self, found: Mapping[str, torch.Tensor], role: str, n_rows: int, preferred: Answers | None = None
    ) -> Answers:
        return Answers.of(found[role], found.get(f"{role}_ref"), found[f"{role}_rows"], n_rows, preferred)

    def _values(self, numbers: list[int], chosen: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
        """What the losses need of the completion tokens of some examples, after one pass over the examples `numbers`.

        chosen: {role: example numbers}. Returns {role: (n,), f"{role}_rows": which of the role's examples each value is
        of, f"{role}_ref": (n,)}. Values are - log f of a token, the second before unlearning; of `forget` the method's
        own where it looks at tokens; of `kept` what the retain loss is a mean of.

        Of examples that the model reads alike (dpo's two answers of one token to the same prompt: the last token of an
        answer is predicted, never read) it reads one, and the others take its logits.
        """
        model, examples = self.served.model, self.rows.all
        first = {}  # what the model reads: number of the first such example
        alike = {i: first.setdefault(self._read(i), i) for i in numbers}
        distinct = list(first.values())
        starts = dict(zip(distinct, itertools.accumulate((len(examples[i].completion) for i in distinct), initial=0)))
        known = [i for i in distinct if self.reference and self.reference.has(i)]
        compared = [starts[i] + k for i in known for k in range(len(examples[i].completion))]
        wanted = {
            role: [
                (starts[alike[i]] + k, token, row)
                for row, i in enumerate(some)
                for k, token in enumerate(examples[i].completion)
            ]
            for role, some in chosen.items()
        }
        batch = collate([examples[i] for i in distinct], self.served.pad_id, model.device)
        before = self.reference.of(distinct, model.device) if self.reference else None
        numbered = {place: m for m, place in enumerate(compared)}

        def values(logits: torch.Tensor, before: torch.Tensor | None, piece: Piece) -> dict[str, torch.Tensor]:
            found = {}
            for role, tokens in wanted.items():
                own = [entry for entry in tokens if entry[0] in piece.tokens]
                places = [place - piece.tokens.start for place, _, _ in own]
                at, targets, of_rows = (
                    index_on(logits.device, numbers)
                    for numbers in (places, [token for _, token, _ in own], [row for _, _, row in own])
                )
                reference = None
                if self._compares(role):
                    m = [numbered[place] - piece.compared.start for place, _, _ in own]
                    reference = before[index_on(logits.device, m)]
                found |= self._scores(role, CompletionTokens(logits[at], reference, targets))
                found[f"{role}_rows"] = of_rows
            return found

        return completion_values(model, batch, values, None, before, compared, self.head, self.chunk)

    def _compares(self, role: str) -> bool:
        """Whether the values of these examples compare with the model before unlearning."""
        return self.settings.retain_loss == "kl" if role == "kept" else self.method.reference

    def _scores(self, role: str, tokens: CompletionTokens) -> dict[str, torch.Tensor]:
        """`_values` of some tokens of one role."""
        if role == "kept" and self.settings.retain_loss == "kl":
            return {role: losses.token_kl(tokens.reference_logits, tokens.logits)}
        if role == "forget" and not self.method.of_answers:
            return {role: self.method.forget(tokens, *self.constants)}
        found = {role: tokens.nll}
        if tokens.reference_logits is not None:
            found[f"{role}_ref"] = losses.token_nll(tokens.reference_logits, tokens.targets)
        return found

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
