"""A model ready to answer: frozen weights, and the list of interventions between them and a query."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from utils.data.batch import Example, collate, in_groups
from utils.interventions import eco, gate_files, in_context, prompt_encoders, refusal
from utils.interventions.base import NOTHING, Intervention, Template
from utils.interventions.gates import Gate
from utils.models.adapters import merge_lora
from utils.models.base import FrozenModel, ModelSettings, load_base, load_tokenizer, spread
from utils.models.chain import resolve_chain
from utils.models.continued import logits_behind, read_prompts, shares_prompts
from utils.models.forward import Prefix, completion_logits
from utils.models.generate import generate
from utils.storage.checkpoints import Link, base_name
from utils.tasks.encode import Tokens

LOGITS = 1024  # completion tokens whose logits are held at a time in scoring
KEPT = 8192  # prompt tokens whose keys and values are held at a time, for several completions of each prompt


def gate_alone(link: Link, served: FrozenModel, model_settings: ModelSettings, max_length: int) -> Intervention:
    """A gate that changes nothing: what it flags is reported."""
    return Intervention(gate=gate_files.load(link.path, served, model_settings.trust_remote_code, max_length))


LOADERS = {  # by kind of checkpoint
    "prompt": prompt_encoders.load, "in-context": in_context.load, "eco": eco.load, "gate": gate_alone,
    "refusal": refusal.load,
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """chain: the Links that it was loaded from, base first.

    Of the `interventions` whose gates flag a query one acts on it: that whose probability lies furthest above its
    threshold, in log odds; of equal ones the first. On all other queries the first intervention without a gate acts;
    where there is none the model answers alone.
    """

    model: torch.nn.Module
    tokenizer: Any
    chain: list[Link]
    interventions: tuple[Intervention, ...] = ()

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def base_name(self) -> str:
        return base_name(self.chain)

    @property
    def manifest(self) -> dict[str, Any]:
        """That of the last link; empty for a plain model."""
        return self.chain[-1].manifest or {}

    @property
    def plain(self) -> "Served":
        """The model without any intervention."""
        return replace(self, interventions=())

    @property
    def is_gated(self) -> bool:
        return any(intervention.gate is not None for intervention in self.interventions)

    @property
    def surroundings(self) -> list[tuple[Template | None, int]]:
        """What a query may come to stand in: (the template, the number of virtual tokens in front)."""
        found = [(intervention.template, intervention.n_tokens) for intervention in self.interventions]
        all_caught = any(intervention.gate is None for intervention in self.interventions)
        return list(dict.fromkeys(found if all_caught else [*found, (None, 0)]))

    @property
    def ungated(self) -> "Served":
        """The same model whose interventions act on every query."""
        return self.using(*(replace(intervention, gate=None) for intervention in self.interventions))

    def using(self, *interventions: Intervention) -> "Served":
        """The same model with these interventions instead of its own."""
        return replace(self, interventions=interventions)

    def behind(self, gate: Gate) -> "Served":
        """The same model, whose interventions act only on the queries that `gate` flags."""
        return self.using(*(replace(intervention, gate=gate) for intervention in self.interventions))

    def decide(self, texts: Sequence[str]) -> tuple[list[int | None], list[dict[str, bool | float | str | None]]]:
        """For each text the number of the intervention that acts on it, or None; and what the gates said.

        That is {"flagged", "gate_probability" (of the gate with the largest margin), and "request" (of the intervention
        that acts) where requests are told apart}; empty where there is no gate.
        """
        gated = [number for number, intervention in enumerate(self.interventions) if intervention.gate is not None]
        rest = next((number for number in range(len(self.interventions)) if number not in gated), None)
        if not gated or not len(texts):
            return [rest] * len(texts), [{} for _ in texts]
        gates = [self.interventions[number].gate for number in gated]
        flags, probabilities = map(np.array, zip(*(gate.decide(texts) for gate in gates)))  # both (gates, texts)
        margins = np.array([gate.margins(found) for gate, found in zip(gates, probabilities)])
        chosen = np.where(flags.any(axis=0), np.where(flags, margins, -np.inf).argmax(axis=0), margins.argmax(axis=0))
        acting = [gated[best] if flags[best, i] else rest for i, best in enumerate(chosen)]
        said = [
            {"flagged": bool(flags[best, i]), "gate_probability": float(probabilities[best, i])}
            for i, best in enumerate(chosen)
        ]
        if any(intervention.request is not None for intervention in self.interventions):
            said = [row | {"request": self.acting(number).request} for row, number in zip(said, acting)]
        return acting, said

    def acting(self, number: int | None) -> Intervention:
        """The intervention of that number; of None one that changes nothing."""
        return NOTHING if number is None else self.interventions[number]

    def logits(self, examples: Sequence[Example], number: int | None) -> tuple[torch.Tensor, ...]:
        """Logits at each example's completion tokens, one (m, |V|) tensor a row, under the intervention `number`."""
        intervention, model = self.acting(number), self.model
        sizes = [len(example.completion) for example in examples]
        if (fixed := intervention.fixed_logits(model, examples)) is not None:
            return fixed.split(sizes)
        batch = collate(examples, self.pad_id, model.device)
        with intervention.applied(model, examples):
            logits = completion_logits(model, batch, intervention.prefix(model))
        return logits.split(sizes)

    def completions(
        self, examples: Sequence[Example], completions: Sequence[Sequence[Tokens]], number: int | None
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields, in any order, (i, j, the logits (m, |V|) at the tokens of `completions[i][j]` behind the prompt of
        example i) under the intervention `number`. At most as many rows as there are examples are in a pass.

        A prompt with several completions is computed once for all of them where that is exact.
        """
        pairs = [(i, j) for i, several in enumerate(completions) for j in range(len(several))]
        asked = [replace(examples[i], completion=completions[i][j]) for i, j in pairs]
        intervention, model = self.acting(number), self.model
        if len(pairs) > len(examples) and intervention.fixed_answer is None:
            prefix = intervention.prefix(model)
            if shares_prompts(model, prefix):
                yield from self._behind_prompts(examples, pairs, asked, intervention, prefix)
                return
        for part in in_parts(asked, len(examples)):
            for n, logits in zip(part, self.logits([asked[n] for n in part], number)):
                yield *pairs[n], logits

    def _behind_prompts(
        self,
        examples: Sequence[Example],
        pairs: Sequence[tuple[int, int]],
        asked: Sequence[Example],
        intervention: Intervention,
        prefix: Prefix | None,
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """`completions` where prompts are shared. asked: the example that each pair (i, j) is."""
        applied = partial(intervention.applied, self.model)
        for rows in _together(examples):
            read = read_prompts(self.model, [examples[i] for i in rows], self.pad_id, prefix, applied)
            place = {i: at for at, i in enumerate(rows)}
            own = sorted((n for n, (i, _) in enumerate(pairs) if i in place), key=lambda n: len(asked[n].completion))
            for part in in_parts([asked[n] for n in own], len(examples)):
                numbers = [own[at] for at in part]
                where, tokens = [place[pairs[n][0]] for n in numbers], [asked[n].completion for n in numbers]
                for n, logits in zip(numbers, logits_behind(self.model, read, where, tokens, self.pad_id)):
                    yield *pairs[n], logits

    def generate(
        self,
        examples: Sequence[Example],
        number: int | None,
        end: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[tuple[tuple[int, ...], float]]:
        """The continuation of each example's prompt under the intervention `number`: (tokens up to and with `end`,
        their log-probability in nats). temperature: 0 is greedy; above it tokens are drawn, by `seed`."""
        intervention, model = self.acting(number), self.model
        if (fixed := intervention.fixed_answer) is not None:
            return [(fixed, 0.0)] * len(examples)
        prefix, applied = intervention.prefix(model), partial(intervention.applied, model)
        how = prefix, applied, temperature, seed
        return generate(model, examples, self.pad_id, (end,), max_new_tokens, *how)


def in_parts(examples: Sequence[Example], most: int) -> Iterator[list[int]]:
    """The numbers of `examples` in order, in groups of at most `most` with at most LOGITS completion tokens. An example
    alone may have more."""
    sizes = [len(example.completion) for example in examples]
    return in_groups(len(sizes), lambda part: len(part) <= most and sum(sizes[i] for i in part) <= LOGITS)


def _together(examples: Sequence[Example]) -> Iterator[list[int]]:
    """The numbers of `examples` in order, in groups whose padded prompts have at most KEPT tokens; an example alone
    may have more."""
    sizes = [len(example.prompt) for example in examples]
    return in_groups(len(sizes), lambda part: len(part) * max(sizes[i] for i in part) <= KEPT)


def load_served(name: str, settings: ModelSettings, parent: str | None = None, max_length: int = 1024) -> Served:
    """All that the checkpoint or model `name` stands for, link by link: LoRA is merged into the unquantised weights,
    every other link becomes an intervention.

    parent: where the parent of `name` lies, if it was moved. max_length: of a gate that reads hidden states. Raises
    UserError where something is missing, damaged or not the recorded parent.
    """
    return load_chain(resolve_chain(name, settings.trust_remote_code, parent), settings, max_length)


def load_chain(chain: list[Link], settings: ModelSettings, max_length: int = 1024) -> Served:
    """The same of a chain that is resolved already."""
    tokenizer = load_tokenizer(chain, settings.set_pad_id, settings.trust_remote_code)
    model = load_base(chain[0], settings)
    for link in chain[1:]:
        if link.kind == "lora":
            model = merge_lora(model, link)
    served = Served(spread(model, settings), tokenizer, chain)
    for link in chain[1:]:
        if link.kind in LOADERS:
            intervention = LOADERS[link.kind](link, served, settings, max_length)
            served = served.using(*served.interventions, intervention)
    return served
