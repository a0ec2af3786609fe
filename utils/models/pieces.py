"""What a loss needs of many completion tokens, without the logits of all of them at once.

N tokens have N x |V| logits in float32: 8 rows of 512 tokens over 262,144 words are 4.3 GB a copy, and a loss makes
several. What a loss keeps of them is a number or two a token. So the model runs once, up to the head. The head then
maps some tokens at a time, and their logits are made again in the backward pass.

The head is called here, not by the model, so what an architecture does behind it has to be done here, too. What its
configuration says of that is tried on a few hidden states, small and large, before it is relied on.
"""

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint

from utils.data.batch import Batch
from utils.errors import note_once
from utils.models.forward import (
    Prefix,
    attempt,
    completion_logits,
    completion_states,
    float32_product,
    rounds,
    trial_batch,
)
from utils.sharding import is_sharded

Tail = Callable[[torch.Tensor], torch.Tensor]  # what stands behind a head, (n, |V|) -> (n, |V|)
_TAILS = weakref.WeakKeyDictionary()  # {model: its Tail, or None where it is not known}
SCALES = (1, 30, 1000)  # of the hidden states that a tail is tried on: a soft cap shows at large logits only


class Piece(NamedTuple):
    """Some of the N completion tokens of a batch, and which of the M reference vectors are about them."""

    tokens: range
    compared: range

    def cut(self, per_token: torch.Tensor) -> torch.Tensor:
        """The entries of these tokens in `per_token` (N, ...)."""
        return per_token[self.tokens.start : self.tokens.stop]


Values = Callable[[torch.Tensor, torch.Tensor | None, Piece], dict[str, torch.Tensor]]


def completion_values(
    model: torch.nn.Module,
    batch: Batch,
    values: Values,
    prompt: Prefix | None = None,
    reference: torch.Tensor | None = None,
    compared: Sequence[int] = (),
    reference_head: torch.nn.Module | None = None,
    chunk: int = 0,
) -> dict[str, torch.Tensor]:
    """What `values` gives of the logits of all N completion tokens of `batch`, at most `chunk` of them at a time.

    model, batch, prompt, reference, reference_head: as utils.models.forward.completion_logits takes them. values:
    function(logits (n, |V|), reference logits (m, |V|) or None, Piece) -> {name: (any number, ...)}; it is called
    twice for a piece and must give the same both times. compared: which of the N tokens each of the M reference
    vectors is about, ascending. chunk: 0 for all at once. Returns {name: the values of all pieces in order}.
    """
    n = len(batch.targets)
    pieces = 0 < chunk < n
    tail = _tail(model, batch) if pieces or (chunk and is_sharded(model)) else None  # trying it takes all processes
    if tail is None or not pieces:
        logits = completion_logits(model, batch, prompt, reference, reference_head)
        logits, before = (logits, None) if reference is None else logits
        return values(logits, before, Piece(range(n), range(len(compared))))

    def of_piece(states: torch.Tensor, piece: Piece) -> dict[str, torch.Tensor]:
        before = None
        if reference is not None:
            with torch.no_grad():
                kept = reference[piece.compared.start : piece.compared.stop].to(states)
                before = _logits(model, kept, tail, reference_head).to(batch.targets.device)
        return values(_logits(model, states, tail).to(batch.targets.device), before, piece)

    found, start = [], 0
    for states in completion_states(model, batch, prompt).split(chunk):
        tokens = range(start, start + len(states))
        piece = Piece(tokens, range(*(bisect_left(compared, at) for at in (tokens.start, tokens.stop))))
        if torch.is_grad_enabled():
            found.append(checkpoint(of_piece, states, piece, use_reentrant=False))
        else:
            found.append(of_piece(states, piece))
        start = tokens.stop
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _logits(
    model: torch.nn.Module, states: torch.Tensor, tail: Tail, reference_head: torch.nn.Module | None = None
) -> torch.Tensor:
    """Float32 logits (n, |V|) of the head's inputs `states` (n, d), as `completion_logits` computes them."""
    own = model.get_output_embeddings()
    head = own if reference_head is None else reference_head
    return tail(float32_product(head, states) if rounds(own) else head(states)).float()


def _tail(model: torch.nn.Module, batch: Batch) -> Tail | None:
    """What `model` does with the output of its head; None, and a note, where that is not known."""
    if isinstance(batch.input_ids, FakeTensor):  # it has no numbers to compare
        return next(_tails(model))
    if model not in _TAILS:
        with _evaluating(model):
            _TAILS[model] = attempt(lambda: _tried_tail(model))
    if _TAILS[model] is None:
        note_once(f"what {model.config.model_type} does behind its head is not known, so --logit_chunk is not used")
    return _TAILS[model]


@torch.no_grad()
def _tried_tail(model: torch.nn.Module) -> Tail | None:
    """The first of `_tails` that gives the model's own logits of hidden states of every size."""
    batch = trial_batch(model)
    states = [completion_states(model, batch) * scale for scale in SCALES]
    every = completion_logits(model, batch, None, torch.cat(states))[1].split(len(batch.targets))
    return next((tail for tail in _tails(model) if _same(model, states, every, tail)), None)


def _same(model: torch.nn.Module, states: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tail: Tail) -> bool:
    for hidden, wanted in zip(states, expected):
        logits = _logits(model, hidden, tail).to(wanted.device)
        exact = rounds(model.get_output_embeddings()) or hidden.dtype == torch.float32
        tolerance = 1e-4 if exact else 4 * torch.finfo(hidden.dtype).eps
        if not (logits - wanted).norm() <= tolerance * wanted.norm():
            return False
    return True


def _tails(model: torch.nn.Module) -> Iterator[Tail]:
    """What may stand behind the head by the model's configuration: scales, then a soft cap; nothing in most models."""
    config = model.config.get_text_config()

    def known(*names: str) -> list[float]:
        found = (getattr(config, name, None) for name in names)
        return [value for value in found if isinstance(value, int | float) and value]

    factors, caps = (
        known("output_multiplier", "logit_scale", "lm_head_multiplier"),
        known("final_logit_softcapping", "logits_soft_cap"),
    )
    for divisor in known("logits_scaling"):  # by which Granite divides and HyperCLOVA X multiplies
        yield partial(_scaled_and_capped, factors=factors, divisors=[divisor], caps=caps)
        factors = [*factors, divisor]
    yield partial(_scaled_and_capped, factors=factors, divisors=[], caps=caps)
    yield partial(_scaled_and_capped, factors=[], divisors=[], caps=[])


def _scaled_and_capped(
    logits: torch.Tensor, factors: Sequence[float], divisors: Sequence[float], caps: Sequence[float]
) -> torch.Tensor:
    for factor in factors:
        logits = logits * factor
    for divisor in divisors:
        logits = logits / divisor
    for cap in caps:
        logits = torch.tanh(logits / cap) * cap
    return logits


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """While open, nothing in `model` drops out, so that no random number is drawn."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
