"""What stands between a query and the frozen model: virtual tokens, corrupted embeddings, words around the text.

Every kind is an `Intervention`. It acts on the queries that its gate flags; without a gate it acts on all of them.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from utils.data.batch import Example
from utils.interventions.gates import Gate
from utils.models.forward import Prefix
from utils.tasks.base import Query, Task

Spans = Sequence[tuple[int, int]] | None  # character ranges of a text; None: every token of the prompt but the last


class Template(Protocol):
    """Other words in which a query is asked."""

    def around(self, task: Task, queries: Sequence[Query]) -> list[Query]:
        """`queries` of `task`, in other words."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention:
    """The base of every kind, and itself the one that changes nothing. A kind overrides what it does differently.

    gate: flags the queries that it acts on; None: it acts on all. request: the name of the unlearning request that it
    serves; None where requests are not told apart.
    """

    gate: Gate | None = None
    request: str | None = None

    @property
    def changes_nothing(self) -> bool:
        """Whether the model answers as it does alone."""
        return type(self) is Intervention

    @property
    def template(self) -> Template | None:
        """In what words a query is asked; None: in those of its task."""
        return None

    @property
    def n_tokens(self) -> int:
        """How many virtual tokens stand in front of a query."""
        return 0

    def prefix(self, model: torch.nn.Module) -> Prefix | None:
        """What `utils.models.forward.completion_logits` takes as its prompt; None: no virtual tokens."""
        return None

    def spans(self, texts: Sequence[str]) -> list[Spans] | None:
        """For each text the characters whose tokens are changed; None where no token is."""
        return None

    @property
    def fixed_answer(self) -> tuple[int, ...] | None:
        """The tokens that every query is answered with; None: the model is asked."""
        return None

    def fixed_logits(self, model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor | None:
        """The logits (N, |V|) at the examples' completion tokens that a fixed answer amounts to; None: those of the
        model."""
        return None

    def applied(self, model: torch.nn.Module, examples: Sequence[Example]) -> AbstractContextManager:
        """While open, `model` computes on `examples` as this intervention wants it."""
        return contextlib.nullcontext()


NOTHING = Intervention()
