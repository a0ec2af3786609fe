"""Corrupted prompt embeddings (ECO, arXiv 2406.07933, section 3.2): what is done to the tokens of a flagged query."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from utils.data.batch import Example
from utils.storage.schemas import Amount, Count, Schema, Seed

# Every family maps the embeddings e (k, d) of one query's k marked tokens to corrupted ones of that shape. s: strength;
# n: --eco_dims; rng: a torch.Generator of this query alone.


def _first(e: torch.Tensor, n: int, rng: torch.Generator) -> torch.Tensor:
    return torch.arange(min(n, e.shape[1])).expand(len(e), -1)


def _random(e: torch.Tensor, n: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randperm(e.shape[1], generator=rng)[:n].expand(len(e), -1)


def _largest_size(e: torch.Tensor, n: int, rng: torch.Generator) -> torch.Tensor:
    return e.abs().topk(min(n, e.shape[1]), dim=1).indices


def _largest(e: torch.Tensor, n: int, rng: torch.Generator) -> torch.Tensor:
    return e.topk(min(n, e.shape[1]), dim=1).indices


def _least(e: torch.Tensor, n: int, rng: torch.Generator) -> torch.Tensor:
    return e.topk(min(n, e.shape[1]), dim=1, largest=False).indices


def _noise(values: torch.Tensor, s: float, rng: torch.Generator) -> torch.Tensor:
    return s * torch.randn(values.shape, generator=rng)


# What is done to the chosen numbers (k, n).
CHANGES = {
    "noise": lambda values, s, rng: values + _noise(values, s, rng),
    "set-noise": _noise,
    "zero": lambda values, s, rng: torch.zeros_like(values),
    "flip": lambda values, s, rng: -values,
    "add": lambda values, s, rng: values + s,
    "subtract": lambda values, s, rng: values - s,
}
DIMENSIONS = {
    "noise-first": _first, "noise-random": _random, "noise-largest": _largest_size, "set-noise-first": _first,
    "zero-first": _first, "zero-largest": _largest_size, "flip-first": _first, "flip-largest": _largest_size,
    "add-first": _first, "add-largest": _largest, "add-least": _least,
    "subtract-first": _first, "subtract-largest": _largest, "subtract-least": _least,
}  # fmt: skip
ORDERS = {
    "reverse": lambda k, rng: torch.arange(k - 1, -1, -1),
    "shuffle": lambda k, rng: torch.randperm(k, generator=rng),
}
FAMILIES = [*DIMENSIONS, *ORDERS]


def has_strength(family: str) -> bool:
    """Whether the family has a strength to search for; zeroing, flipping and reordering have none."""
    return family.split("-")[0] in ("noise", "set", "add", "subtract")


def corrupt(family: str, e: torch.Tensor, s: float, n: int, rng: torch.Generator) -> torch.Tensor:
    """The corrupted embeddings (k, d) of one query's marked tokens e (k, d), float32."""
    if family in ORDERS:
        return e[ORDERS[family](len(e), rng)]
    chosen = DIMENSIONS[family](e, n, rng)
    return e.scatter(1, chosen, CHANGES[family.rsplit("-", 1)[0]](e.gather(1, chosen), s, rng))


class Corruption:
    """A family with its strength; `seed` and the query's own tokens seed its noise, so batching changes nothing."""

    def __init__(self, family: str, strength: float, dims: int, seed: int) -> None:
        self.family, self.strength, self.dims, self.seed = family, strength, dims, seed

    @contextmanager
    def applied(self, model: torch.nn.Module, examples: Sequence[Example]) -> Iterator[None]:
        """While open, the embeddings of each example's `marked` prompt tokens come out of `model` corrupted."""

        def hook(_: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            for row, example in enumerate(examples):
                if example.marked:
                    at = torch.tensor(example.marked, device=output.device)
                    plain = output[row, at].float().cpu()
                    output[row, at] = corrupt(
                        self.family, plain, self.strength, self.dims, self._generator(example)
                    ).to(output)
            return output

        handle = model.get_input_embeddings().register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _generator(self, example: Example) -> torch.Generator:
        tokens = [self.seed, [example.prompt[i] for i in example.marked]]
        digest = hashlib.sha256(json.dumps(tokens).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class CorruptionSettings(Schema):
    family: Literal[tuple(FAMILIES)]
    strength: Amount
    dims: Count
    seed: Seed
