"""Several completions of one prompt: the prompt goes through the model once, and every completion stands behind it.

With causal attention no position of a prompt sees its completion. So the keys and values that each layer gives them are
those of any pass over that prompt, and one pass serves all completions. A completion's own tokens then go through the
model behind them, at the positions and distances that they have in a pass over prompt and completion.

Prompts are padded on the right while they are read, as in every scoring pass: so what an intervention does to a prompt,
by the place of its tokens, is what it does there. Their keys and values then move to the right of the padding, next to
the completions. Sliding windows count the positions between two tokens, and padding between them would be counted.
"""

import inspect
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from transformers.cache_utils import Cache

from utils.data.batch import Example, collate
from utils.errors import note_once
from utils.models.attention import padded_behind
from utils.models.forward import (
    KeptLayer,
    Prefix,
    PrefixLayer,
    attempt,
    cache_argument,
    completion_logits,
    gather_before_head,
    other_state,
    same_numbers,
)

Applied = Callable[[Sequence[Example]], AbstractContextManager]
Tokens = tuple[int, ...]
_OBSTACLES = weakref.WeakKeyDictionary()  # {model: {with virtual tokens: why prompts cannot be shared, or None}}


@dataclass(frozen=True, eq=False)
class Read:
    """B prompts that a model has read, virtual tokens included: S positions, each prompt at the end of them.

    logits: what predicts the first token behind each, (B, |V|) float32. layers: (keys, values) of each, both
    (B, heads, S, width). lengths: positions of each prompt, (B,).
    """

    logits: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    lengths: torch.Tensor


@torch.no_grad()
def read_prompts(
    model: torch.nn.Module, examples: Sequence[Example], pad_id: int, prompt: Prefix | None, applied: Applied
) -> Read:
    """The prompts of `examples`, read once. prompt: None, or what `prompt_prefix` made of virtual tokens.

    applied: a context in which the model computes on examples as an intervention wants it.
    """
    model = _inner(model)
    asked = [replace(example, completion=(0,)) for example in examples]
    batch, p = collate(asked, pad_id, model.device), 0
    cache, mask = Cache(layer_class_to_replicate=KeptLayer), batch.attention_mask
    if prompt is not None:
        p = prompt[0][0].shape[2]
        cache = Cache(layers=[_PromptLayer(*pair) for pair in prompt])
        mask = torch.nn.functional.pad(mask, (p, 0), value=1)
    with applied(asked), gather_before_head(model, batch), padded_behind():
        kept = {cache_argument(model): cache}
        logits = model(input_ids=batch.input_ids, attention_mask=mask, **kept, use_cache=True).logits.float()
    lengths = mask.sum(1)
    found = [layer.read if prompt is not None else (layer.keys, layer.values) for layer in cache.layers]
    return Read(logits, [tuple(_moved(part, lengths) for part in pair) for pair in found], lengths)


@torch.no_grad()
def logits_behind(
    model: torch.nn.Module, read: Read, rows: Sequence[int], completions: Sequence[Tokens], pad_id: int
) -> list[torch.Tensor]:
    """For each completion, behind the prompt number `rows[i]`, the logits at its tokens, (m, |V|) float32."""
    model = _inner(model)
    first = read.logits[torch.tensor(rows, device=read.logits.device)]
    longer = [i for i, tokens in enumerate(completions) if len(tokens) > 1]
    found = [row[None] for row in first]
    if not longer:
        return found
    own = collate([Example((t[0],), t[1:]) for t in (completions[i] for i in longer)], pad_id, model.device)
    places = torch.tensor([rows[i] for i in longer], device=own.input_ids.device)
    lengths = read.lengths.to(places.device)[places]
    size = read.layers[0][0].shape[2]
    before = torch.arange(size, device=places.device) >= size - lengths[:, None]
    kept = {cache_argument(model): Cache(layers=[_BehindLayer(*pair, places) for pair in read.layers])}
    if "position_ids" in inspect.signature(model.forward).parameters:
        kept["position_ids"] = lengths[:, None] + torch.arange(own.input_ids.shape[1], device=places.device)
    mask = torch.cat([before.to(own.attention_mask.dtype), own.attention_mask], dim=1)
    with gather_before_head(model, own):
        logits = model(input_ids=own.input_ids, attention_mask=mask, **kept, use_cache=True).logits.float()
    for i, rest in zip(longer, logits.split([len(completions[i]) - 1 for i in longer])):
        found[i] = torch.cat([found[i], rest.to(found[i].device)])
    return found


def shares_prompts(model: torch.nn.Module, prompt: Prefix | None) -> bool:
    """Whether completions of one prompt can be scored behind one pass over it, behind virtual tokens if `prompt`.

    Not where a layer keeps another state than keys and values, or a trial shows other numbers; a note then says so
    once. prompt: what `prompt_prefix` gave; where it gave the virtual tokens themselves, nothing is shared.
    """
    if isinstance(prompt, torch.Tensor):
        return False
    known = _OBSTACLES.setdefault(model, {})
    if (prompt is not None) not in known:
        known[prompt is not None] = other_state(model) or _tried(model, prompt)
    if obstacle := known[prompt is not None]:
        note_once(f"a prompt is computed once for each of its completions: {obstacle}")
    return not obstacle


def _tried(model: torch.nn.Module, prompt: Prefix | None) -> str | None:
    """What a trial on two prompts of different lengths shows, or None where the numbers are those of a plain pass."""

    def both_ways() -> tuple[torch.Tensor, torch.Tensor]:
        size = model.get_input_embeddings().weight.shape[0]
        ids = [(5 + i) % size for i in range(16)]
        examples, completions = [Example(tuple(ids[:n]), ()) for n in (6, 4)], [tuple(ids[12:n]) for n in (16, 13, 14)]
        pairs = [(i, tokens) for i in range(len(examples)) for tokens in completions]
        asked = [replace(examples[i], completion=tokens) for i, tokens in pairs]
        read = read_prompts(model, examples, 0, prompt, lambda _: nullcontext())
        found = torch.cat(logits_behind(model, read, *zip(*pairs), 0))
        return found, completion_logits(model, collate(asked, 0, model.device), prompt)

    kind, found = model.config.model_type, attempt(both_ways)
    if found is None:
        return f"{kind} keeps no keys and values that completions could stand behind"
    return None if same_numbers(model, *found) else f"{kind} does not continue its keys and values exactly"


def _inner(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, without PEFT around it: that names neither a cache nor positions among its arguments."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _moved(kept: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`kept` (B, heads, S, width), row i of which has `lengths[i]` positions in front, with these at the end."""
    size = kept.shape[2]
    pads = size - lengths.to(kept.device)
    if not pads.any():
        return kept
    places = (torch.arange(size, device=kept.device) - pads[:, None]) % size
    return kept.gather(2, places[:, None, :, None].expand(kept.shape))


class _PromptLayer(PrefixLayer):
    """One layer's keys and values of virtual tokens; `read` is these and those of the prompts behind them."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.read = super().update(keys, values, *args, **kwargs)
        return self.read


class _BehindLayer(PrefixLayer):
    """One layer's keys and values of B prompts, of which row i of a batch stands behind number `rows[i]`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        super().__init__(keys, values)
        self.rows = rows.to(keys.device)

    def around(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return super().around(kept[self.rows], new)
