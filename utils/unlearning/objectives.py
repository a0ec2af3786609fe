"""From a method to the loss of a training step: its rows, its references, its forward pass."""

import copy
import dataclasses
import itertools
from functools import partial

import torch

from utils.data.batch import collate
from utils.errors import note_once
from utils.models.forward import completion_logits
from utils.models.layers import record_activations
from utils.tasks.answers import known_answers
from utils.tasks.classification import draw_unlearning_labels, label_words
from utils.tasks.encode import tokenize
from utils.unlearning import losses, reference
from utils.unlearning.methods import ForgetTokens
from utils.unlearning.rmu import _generator, rmu_layers

PREFERRED = "unknown"  # the answer that dpo prefers


class Rows:
    """The training examples of a method. `trained`: retain rows (if it has a retain loss), then forget rows; `all`:
    those, then the forget rows once more with the preferred answer (dpo); `alternative`: {number: number in `all`}."""

    def __init__(self, tokenizer, frames, method, args):
        retain, forget = frames["train_retain"], frames["train_forget"]
        labels = draw_unlearning_labels(len(forget), args.seed) if method.flipped else forget["label_text"]
        kept = retain if args.retain_loss != "none" else retain.head(0)
        known = known_answers(tokenizer, label_words(frames))
        encode = partial(tokenize, tokenizer, max_length=args.max_length, answers=known)
        self.trained = encode(kept["text"], kept["label_text"])
        self.trained += encode(forget["text"], labels, forget=True)
        self.all, self.alternative = list(self.trained), {}
        if method.preferred:
            self.alternative = {i: i + len(forget) for i in range(len(kept), len(self.trained))}
            self.all += encode(forget["text"], [PREFERRED] * len(forget), forget=True)

    def referred(self, method, args):
        """Numbers in `all` of the examples whose reference logits the loss needs."""
        kl = args.retain_loss == "kl"
        return [i for i, example in enumerate(self.all) if (method.reference if example.forget else kl)]


class Objective:
    """The loss of a method as the training loop calls it: objective(rows, n_forget, n_retain) -> (loss, parts).

    What the model said before unlearning is computed here, once, and kept as hidden states; with a trained head a
    frozen copy of that head makes logits of them. There is never a second model.
    """

    def __init__(self, method, loaded, rows, frames, args, numerics, load=reference.load_reference):
        self.method, self.loaded, self.rows, self.args = method, loaded, rows, args
        given = {flag: getattr(args, flag) for flag in method.constants}
        self.constants = [method.constants[flag] if given[flag] is None else given[flag] for flag in method.constants]
        self.reference = self.head = None
        if method.forget is None:
            self._prepare_rmu(frames, numerics, load)
        elif referred := rows.referred(method, args):
            settings = [args.unlearn_method, args.retain_loss, numerics]
            self.reference = load(loaded, rows.all, referred, frames, args, settings=settings)
            self.head = frozen_head(loaded.model)
        if args.logits_path and self.reference is None:
            note_once(f"{args.unlearn_method} compares with no earlier model, so --logits_path is not used")

    def __call__(self, numbers, n_forget, n_retain):
        if self.method.forget is None:
            return self._rmu(numbers, n_forget, n_retain)
        numbers = [*numbers, *(self.rows.alternative[i] for i in numbers if i in self.rows.alternative)]
        batch = collate([self.rows.all[i] for i in numbers], self.loaded.pad_id, self.loaded.model.device)
        logits, reference_logits = self._logits(numbers)
        alternative = torch.tensor([i >= len(self.rows.trained) for i in numbers], device=batch.forget.device)
        own, retain = batch.forget & ~alternative, ~batch.forget
        parts = {"L_f": logits.new_zeros(())}
        if own.any():
            tokens = forget_tokens(batch, own, logits, reference_logits)
            if self.rows.alternative:
                preferred = forget_tokens(batch, alternative, logits, reference_logits)
                tokens = dataclasses.replace(tokens, preferred=preferred)
            parts["L_f"] = losses.mean_over_rows(self.method.forget(tokens, *self.constants), n_forget)
        retained = retain[batch.rows]
        if self.args.retain_loss == "ce":
            nll = losses.token_nll(logits[retained], batch.targets[retained])
            parts["L_r"] = losses.mean_over_rows(nll, n_retain)
        elif self.args.retain_loss == "kl":
            kl = losses.token_kl(reference_logits[retained], logits[retained])
            parts["L_kl"] = losses.mean_over_rows(kl, n_retain)
        return self._total(parts)

    def _total(self, parts):
        retain = sum(value for key, value in parts.items() if key != "L_f")
        return parts["L_f"] + self.args.retain_weight * retain, parts

    def _logits(self, numbers):
        """Logits (N, |V|) of all completion tokens, and those before unlearning at the same places (or None).

        Of examples that the model reads alike (dpo's two answers of one token to the same prompt: the last token of an
        answer is predicted, never read) it reads one, and the others take its logits.
        """
        model, examples = self.loaded.model, self.rows.all
        first = {}  # what the model reads: number of the first such example
        alike = [first.setdefault(self._read(i), i) for i in numbers]
        distinct = list(first.values())
        starts = dict(zip(distinct, itertools.accumulate((len(examples[i].completion) for i in distinct), initial=0)))
        tokens = [starts[i] + k for i in alike for k in range(len(examples[i].completion))]
        batch = collate([examples[i] for i in distinct], self.loaded.pad_id, model.device)
        if self.reference is None:
            return completion_logits(model, batch)[tokens], None
        known = torch.tensor([self.reference.has(i) for i in distinct], device=batch.rows.device)[batch.rows]
        logits, before = completion_logits(model, batch, None, self.reference.of(distinct), self.head)
        filled = torch.full_like(logits.detach(), torch.nan)
        filled[known] = before.detach()
        return logits[tokens], filled[tokens]

    def _read(self, number):
        """What the model reads of an example, and whether its answer is compared with the reference."""
        example = self.rows.all[number]
        return example.prompt, example.completion[:-1], self.reference is not None and self.reference.has(number)

    def _prepare_rmu(self, frames, numerics, load):
        args, model = self.args, self.loaded.model
        self.layers, number = rmu_layers(model, args)
        direction = torch.rand(model.config.get_text_config().hidden_size, generator=_generator(args.seed))
        self.target = (self.constants[1] * direction / direction.norm()).to(model.device)
        retain = [i for i, example in enumerate(self.rows.trained) if not example.forget]
        measure, settings = reference.activations_of(*self.layers), [number, numerics]
        self.reference = load(
            self.loaded, self.rows.trained, retain, {"train_retain": frames["train_retain"]}, args, measure, settings
        )

    def _rmu(self, numbers, n_forget, n_retain):
        chosen = [self.rows.trained[i] for i in numbers]
        batch = collate(chosen, self.loaded.pad_id, self.loaded.model.device)
        with record_activations(*self.layers) as seen:
            completion_logits(self.loaded.model, batch)
        real = batch.attention_mask.bool()
        activations = seen["activations"].to(real.device)  # the layer may be on another one
        forget = batch.forget[:, None] & real
        weights = (1 / real.sum(1, keepdim=True)).expand(real.shape)  # the mean over a row's tokens
        steered = losses.rmu(activations[forget], self.target) * weights[forget]
        kept = real & ~batch.forget[:, None]
        held = losses.rmu(activations[kept], self.reference.of(numbers).to(activations.device)) * weights[kept]
        return self._total(
            {"L_f": losses.mean_over_rows(steered, n_forget), "L_r": losses.mean_over_rows(held, n_retain)}
        )


def forget_tokens(batch, chosen, logits, reference_logits):
    """The ForgetTokens of the rows `chosen` (B,) bool of a batch."""
    mask = chosen[batch.rows]
    numbering = chosen.cumsum(0) - 1
    before = None if reference_logits is None else reference_logits[mask]
    return ForgetTokens(logits[mask], before, batch.targets[mask], numbering[batch.rows[mask]], int(chosen.sum()))


def frozen_head(model):
    """A frozen copy of the model's head where the head is trained, None where it stays as it is."""
    head = model.get_output_embeddings()
    if not any(parameter.requires_grad for parameter in head.parameters()):
        return None
    return copy.deepcopy(head).requires_grad_(False).eval()
