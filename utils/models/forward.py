"""Forward passes that compute what is used: logits at completion tokens, the prompt's keys and values once.

Why both are exact. N positions predict a completion token, and the head acts on each position alone. So gathering them
before the head gives the same N rows of logits as computing all B x T and gathering afterwards.

With causal attention the virtual tokens see only themselves, so their keys and values are the same for every row.
Computing them once and expanding over the batch gives the same numbers. By the chain rule it gives the same gradient,
the sum over rows. Sliding windows change nothing of that. They hide keys from a position by their distance, and all p
keys of every layer are kept. So the mask decides as it does without a cache.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch._subclasses import FakeTensor
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.cache_utils import Cache, DynamicLayer

from utils.data.batch import Batch, Example, collate
from utils.errors import UserError, first_line, is_out_of_memory, note_once
from utils.models.attention import compared_with_sdpa, padded_behind
from utils.models.layers import decoder_layers, record_activations
from utils.sharding import gather_for_gradients, is_sharded

# Virtual tokens (p, d), or what `prompt_prefix` made of them: keys and values of every layer, (1, heads, p, width).
Prefix = torch.Tensor | list[tuple[torch.Tensor, torch.Tensor]]
Seen = dict[str, int | torch.Tensor]  # what `gather_before_head` notes down
HEAD_ROWS = 16384  # words of the head that are converted to float32 at a time,
CACHED = 2**20  # on a CPU only so many numbers, which stay in its cache until they are multiplied
_OBSTACLES = weakref.WeakKeyDictionary()  # {model: why its prompt cannot be shared by the rows of a batch, or None}


def completion_logits(
    model: torch.nn.Module,
    batch: Batch,
    prompt: Prefix | None = None,
    reference: torch.Tensor | None = None,
    reference_head: torch.nn.Module | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Logits at the positions that predict a completion token, float32, (N, |V|); a pair if `reference` is given.

    model: causal LM. batch: of N completion tokens (utils.data.batch.Batch). prompt: None, virtual tokens (p, d) to
    stand in front of every row, or what `prompt_prefix` made of them. reference: hidden states (M, d) as
    `completion_hidden` gives them. The head maps them in the same call, and the second item of the pair is their logits
    (M, |V|). reference_head: a frozen copy of the head from before training, which maps them instead of the head.
    """
    with gather_before_head(model, batch, reference, reference_head) as seen:
        logits = _run(model, batch, prompt, seen).float()
    return logits if reference is None else logits.split([len(batch.rows), len(reference)])


def completion_states(model: torch.nn.Module, batch: Batch, prompt: Prefix | None = None) -> torch.Tensor:
    """The head's inputs at the positions that predict a completion token, (N, d), in the model's dtype.

    batch, prompt: as `completion_logits` takes them. The head itself maps at most the first of them, for nobody.
    """
    with gather_before_head(model, batch, states_only=True) as seen:
        _run(model, batch, prompt, seen)
    return seen["hidden"]


@torch.no_grad()
def completion_hidden(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """`completion_states` without a prompt and without a gradient."""
    return completion_states(model, batch)


@torch.no_grad()
def layer_logits(
    model: torch.nn.Module, batch: Batch, layers: Sequence[int], prompt: Prefix | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands at the positions that predict a completion token after each of `layers`, (L, N, d), and what the
    model's own end makes of it, (L, N, |V|), both float32 (logit lens, nostalgebraist 2020).

    layers: their numbers, the first one is 1. batch, prompt: as `completion_logits` takes them.

    It takes one pass. Behind the last layer the states of all `layers` go on as further rows. So the final norm, a
    projection, the head and soft caps act on each of them as they do on the last one.
    """
    modules, size = decoder_layers(model), len(batch.input_ids)
    rows = torch.cat([batch.rows + i * size for i in range(len(layers))])
    wide, states = replace(batch, rows=rows, positions=batch.positions.repeat(len(layers))), []

    def stack(_: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        kept = [seen["activations"].to(hidden.device) for seen in before] + [hidden]
        chosen = torch.cat([kept[numbers.index(number)] for number in layers])
        states.append(chosen[wide.rows.to(hidden.device), wide.positions.to(hidden.device) + gathered["offset"]])
        return chosen if isinstance(output, torch.Tensor) else (chosen, *output[1:])

    numbers = [*(number for number in sorted(set(layers)) if number < len(modules)), len(modules)]
    with ExitStack() as open_hooks:
        before = [open_hooks.enter_context(record_activations(modules[number - 1])) for number in numbers[:-1]]
        handle = modules[-1].register_forward_hook(stack)
        open_hooks.callback(handle.remove)
        gathered = open_hooks.enter_context(gather_before_head(model, wide))
        logits = _run(model, batch, prompt, gathered).float()
    return states[0].float().unflatten(0, (len(layers), -1)), logits.unflatten(0, (len(layers), -1))


def prompt_prefix(model: torch.nn.Module, prompt: torch.Tensor) -> Prefix:
    """Keys and values of the virtual tokens `prompt` (p, d) per layer, for reuse over batches and with their gradient.

    It is `prompt` itself where a layer cannot keep them (chunked attention, recurrent state) or a trial shows other
    numbers. A note then says so once. Raises UserError where the model computes something else from embeddings than
    from tokens.
    """
    if model not in _OBSTACLES:
        obstacle = other_state(model)
        if isinstance(prompt, FakeTensor):  # it has no numbers to compare
            return prompt if obstacle else _kept(model, prompt)
        _OBSTACLES[model] = _tried_obstacle(model, obstacle)
    if _OBSTACLES[model]:
        note_once(f"the prompt is computed once a row instead of once a batch: {_OBSTACLES[model]}")
        return prompt
    return _kept(model, prompt)


@contextmanager
def shared_prefix(prefix: Prefix) -> Iterator[Callable[[], Prefix]]:
    """While open, several backward passes end at `prefix` (as `prompt_prefix` gives it); at the end one goes on from
    there, with the sum of their gradients, which is kept in float32. Yields function() -> prefix for each of them."""
    alone = isinstance(prefix, torch.Tensor)
    flat = [prefix] if alone else [part for pair in prefix for part in pair]
    leaves = [part.detach().float().requires_grad_(part.requires_grad) for part in flat]

    def copied() -> Prefix:
        copies = [leaf.to(part.dtype) for leaf, part in zip(leaves, flat)]
        return copies[0] if alone else list(zip(copies[::2], copies[1::2]))

    yield copied
    reached = [(part, leaf.grad.to(part.dtype)) for part, leaf in zip(flat, leaves) if leaf.grad is not None]
    if reached:
        torch.autograd.backward(*zip(*reached))


def _kept(model: torch.nn.Module, prompt: torch.Tensor) -> Prefix:
    """Keys and values of every layer for `prompt` (p, d); `prompt` where the model fills no cache."""
    cache = Cache(layer_class_to_replicate=KeptLayer)
    kept = {cache_argument(model): cache}
    embedded = _cast(model, prompt)[None].clone()  # some models (CTRL) scale what they are given in place
    with _idle_head(model):
        model(inputs_embeds=embedded, **kept, use_cache=True, logits_to_keep=1)
    if not cache.layers:
        return prompt
    for layer, own in zip(decoder_layers(model) if is_sharded(model) else (), cache.layers):
        gather_for_gradients(layer, own.keys, own.values)
    return [(layer.keys, layer.values) for layer in cache.layers]


@contextmanager
def _idle_head(model: torch.nn.Module) -> Iterator[None]:
    """While open, a plain head in half precision maps nothing: one position takes as long as many, since the library
    reorders the whole weight for it."""
    head = model.get_output_embeddings()
    if not rounds(head):
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :0],))
    try:
        yield
    finally:
        handle.remove()


def other_state(model: torch.nn.Module) -> str | None:
    """Why a layer's cache is not just keys and values of all positions; None where every layer's is."""
    config, text_config = model.config, model.config.get_text_config()
    kinds = getattr(text_config, "layer_types", None) or []
    other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if other:
        return f"{config.model_type} has layers of the kind {other[0]}"
    if getattr(model, "_is_stateful", False) or getattr(text_config, "num_kv_shared_layers", None):
        return f"{config.model_type} keeps another state than keys and values per layer"
    return None


@torch.no_grad()
def trial(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Completion logits (5, |V|) of two short rows, for comparison with other ways to compute them.

    name: what the user calls `model`. Raises UserError where it is no causal language model. Then a later token changes
    what an earlier position predicts, or the head does not map each position on its own.
    """
    batch = trial_batch(model)
    try:
        every = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        expected = every[batch.rows, batch.positions].float()
    except Exception as error:  # whatever an architecture raises that wants more than text
        if is_out_of_memory(error):
            raise
        raise UserError(f"{name} cannot read plain text ({first_line(error)}); use a causal language model")
    first, last = (expected[i] - expected[i + 2] for i in (0, 1))  # one prompt, different completions
    if first.norm() > 0.1 * last.norm():
        raise UserError(
            f"{name} is not causal: later tokens change what its earlier positions predict; use a causal language model"
        )
    if not same_logits(model, batch, expected):
        raise UserError(f"{name} has no head that maps each position on its own; use another causal language model")
    return expected


@torch.no_grad()
def same_logits(model: torch.nn.Module, batch: Batch, expected: torch.Tensor, prompt: Prefix | None = None) -> bool:
    """Whether `completion_logits` gives `expected` (N, |V|) up to rounding; False also where it raises."""
    logits = attempt(lambda: completion_logits(model, batch, prompt))
    return logits is not None and same_numbers(model, logits, expected)


def same_numbers(model: torch.nn.Module, logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether `logits` of `model` are `expected` (N, |V|) up to the rounding of its dtype."""
    if logits.shape != expected.shape:
        return False
    tolerance = torch.finfo(model.dtype).eps ** 0.5 * (expected - expected.mean()).norm()
    return not (logits - expected).norm() > tolerance  # NaN, of an overflow, is refused elsewhere


def attention_agrees(model: torch.nn.Module, kind: str, expected: torch.Tensor) -> bool:
    """Whether attention of `kind` (utils.models.attention) would give what SDPA gives, with and without a mask, on the
    rows of `trial`, which returned `expected`."""
    batch = trial_batch(model)
    with compared_with_sdpa(model, kind, batch.attention_mask.bool()) as differences, torch.no_grad():
        same = same_logits(model, batch, expected)
        masked = attempt(lambda: model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False))
        same = same and masked is not None
    tolerance = torch.finfo(torch.float32).eps ** 0.5
    return same and bool(differences) and all(difference <= tolerance for difference in differences)


def trial_batch(model: torch.nn.Module, start: int = 0) -> Batch:
    """Two rows of the same 6 prompt tokens, those from `start` on, with different completions of 2 and 3 tokens."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = [(5 + i) % size for i in range(11)]
    examples = [Example(tuple(ids[start:6]), tuple(completion)) for completion in (ids[6:8], ids[8:])]
    return collate(examples, 0, model.device)


@torch.no_grad()
def _tried_obstacle(model: torch.nn.Module, obstacle: str | None) -> str | None:
    """`obstacle`, or what a trial of the shared prompt shows. Raises UserError where the model cannot take embeddings
    in place of tokens, or gives other numbers for them."""
    kind, rest = model.config.model_type, trial_batch(model, 3)
    embedded = model.get_input_embeddings()(trial_batch(model).input_ids[0, :6])
    tokens, virtual = embedded[:3], (embedded[:3] + embedded[3:]) / 2  # the latter are those of no token
    expected = attempt(lambda: completion_logits(model, rest, virtual))
    if expected is None or not same_logits(model, rest, completion_logits(model, trial_batch(model)), tokens):
        raise UserError(f"{kind} takes no embeddings in place of tokens, which a prompt is; use another model")
    if obstacle:
        return obstacle
    kept = attempt(lambda: _kept(model, virtual))
    if kept is None or isinstance(kept, torch.Tensor):
        return f"{kind} keeps no keys and values"
    exact = same_logits(model, rest, expected, kept)
    return None if exact else f"{kind} does not continue its keys and values exactly"


def attempt(work: Callable) -> object:
    """What `work()` returns; None where the architecture trips over it (wrong shapes, arguments it does not have)."""
    try:
        return work()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None


class KeptLayer(DynamicLayer):
    """All of one layer's keys and values of the pass that it is given to.

    A configuration's own cache would drop those that have left the sliding window.
    """

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


class PrefixLayer(DynamicLayer):
    """One layer's keys and values of the virtual tokens, (1, heads, p, width), in front of every row of a batch."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self.around(*pair) for pair in ((self.keys, keys), (self.values, values)))

    def around(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([kept.expand(len(new), -1, -1, -1), new], dim=-2)


@padded_behind()
def _run(model: torch.nn.Module, batch: Batch, prompt: Prefix | None, seen: Seen) -> torch.Tensor:
    if prompt is None:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    size = len(batch.input_ids)
    if isinstance(prompt, torch.Tensor):
        seen["offset"] = len(prompt)
        embedded = model.get_input_embeddings()(batch.input_ids)
        virtual = _cast(model, prompt).expand(size, -1, -1)
        mask = torch.nn.functional.pad(batch.attention_mask, (len(prompt), 0), value=1)
        inputs = torch.cat([virtual, embedded], dim=1)
        return model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
    mask = torch.nn.functional.pad(batch.attention_mask, (prompt[0][0].shape[2], 0), value=1)
    cache = Cache(layers=[PrefixLayer(*pair) for pair in prompt])
    kept = {cache_argument(model): cache}
    return model(input_ids=batch.input_ids, attention_mask=mask, **kept, use_cache=True).logits


def cache_argument(model: torch.nn.Module) -> str:
    """The name under which `model` takes a cache: transformers renamed it in 5.24, remote code may keep the old one."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _cast(model: torch.nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    return prompt.to(model.get_input_embeddings().weight.dtype)


@contextmanager
def gather_before_head(
    model: torch.nn.Module,
    batch: Batch,
    reference: torch.Tensor | None = None,
    reference_head: torch.nn.Module | None = None,
    states_only: bool = False,
) -> Iterator[Seen]:
    """While open, the head sees only hidden states that predict completion tokens, then the rows of `reference`.

    Hooks on the head rather than a second call of it, so that whatever the architecture does after the head (soft
    caps, scales) still happens. A plain head in half precision (or under autocast) sees no rows at all: its product is
    taken in float32, see `float32_product`. Yields a dict. The caller sets `offset`, the number of virtual tokens in
    front, before the pass; after it `hidden` holds the gathered states (N, d). states_only: the logits are of no use,
    and the head sees one row at most.
    """
    seen = {"offset": 0}
    head = model.get_output_embeddings()
    in_float32 = rounds(head)

    def gather(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden = inputs[0]  # the head may be on another device than the batch
        rows, positions = batch.rows.to(hidden.device), batch.positions.to(hidden.device)
        seen["hidden"] = hidden[rows, positions + seen["offset"]]
        if states_only:
            return (seen["hidden"][: 0 if in_float32 else 1].detach(),)
        seen["read"] = seen["hidden"]
        if reference is not None and reference_head is None:
            seen["read"] = torch.cat([seen["hidden"], reference.to(hidden)])
        return (seen["read"][:0] if in_float32 else seen["read"],)

    def multiply(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        logits = float32_product(head, seen["read"]) if in_float32 else output
        if reference_head is None:
            return logits
        product = float32_product if in_float32 else torch.nn.Module.__call__
        return torch.cat([logits, product(reference_head, reference.to(inputs[0])).to(logits)])

    handles = [head.register_forward_pre_hook(gather)]
    if not states_only:
        handles.append(head.register_forward_hook(multiply))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def rounds(head: torch.nn.Module) -> bool:
    """Whether a plain linear `head` would round its logits to half precision: in bfloat16 the best two often tie."""
    if type(head) is not torch.nn.Linear or head.weight.is_meta:  # weights that are elsewhere until the head is called
        return False
    return head.weight.dtype != torch.float32 or torch.is_autocast_enabled(head.weight.device.type)


def float32_product(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 logits (N, |V|) of hidden states (N, d), whatever the dtype of `head`."""
    with torch.autocast(head.weight.device.type, enabled=False):
        hidden = hidden.to(head.weight.device).float()
        if head.weight.requires_grad:
            logits = hidden @ head.weight.float().T
        else:
            logits = _FrozenProduct.apply(hidden, head.weight)
        return logits if head.bias is None else logits + head.bias.float()


class _FrozenProduct(torch.autograd.Function):
    """hidden (N, d) float32 times a frozen weight (|V|, d) of another dtype, in float32: (N, |V|).

    The weight is converted piece by piece, and again in the backward pass. A float32 copy of all of it would be larger
    than all else in a step.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        logits = hidden.new_empty(len(hidden), len(weight))
        for words, part in _pieces(weight, hidden):
            torch.mm(hidden, part.T, out=logits[:, words])
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        total = gradient.new_zeros(len(gradient), weight.shape[1])
        for words, part in _pieces(weight, gradient):
            total.addmm_(gradient[:, words], part)
        return total, None


def _pieces(weight: torch.Tensor, like: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The words of `weight` (|V|, d), some at a time, and their rows in the dtype of `like`, all in the same memory."""
    rows = min(HEAD_ROWS, max(1, CACHED // weight.shape[1])) if weight.device.type == "cpu" else HEAD_ROWS
    space = like.new_empty(min(rows, len(weight)), weight.shape[1])
    for start in range(0, len(weight), rows):
        words = slice(start, min(start + rows, len(weight)))
        yield words, space[: words.stop - start].copy_(weight[words])
