"""How attention is computed: without a mask where padding is behind rows, and on a CPU as products of matrices.

A token sees only what stands before it. Padding behind a row's last token is before none of them, so causality alone
hides it, and no mask is needed. Without one, SDPA takes its fastest kernel, which skips what nobody sees.

On a CPU `grouped_attention` takes the place of SDPA. Several query heads may share one key head. It makes them rows of
one matrix product, q_1 K^T above q_2 K^T, and so needs no copy of K and V for each of them. It goes through the queries
in blocks. Without a mask, a block has only the keys that its last query sees. The backward pass computes the shares of
long rows again, block by block, instead of keeping them (Dao et al. 2022, FlashAttention; here a block has all its keys
at once).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from utils.errors import UserError, first_line
from utils.models.layers import decoder_of

SOFTMAX_LANES = 32  # torch's bfloat16 softmax on a CPU takes up to 5 times as long for rows of any other length
QUERIES = 128  # of a block: fewer take more calls, more compute more of what nobody sees
KEPT_UP_TO = 256  # queries: the shares of shorter rows are kept for the backward pass
GROUPED, CAUSAL = "grouped", "causal"  # names of the two below among transformers' attention implementations
_BESIDE_SDPA = "beside_sdpa"  # and the one of `compared_with_sdpa`
_PADDED_BEHIND = ContextVar("padded_behind", default=False)


@contextmanager
def padded_behind() -> Iterator[None]:
    """While open, the rows that a model reads have their padding behind them, and what it gives there is not used."""
    token = _PADDED_BEHIND.set(True)
    try:
        yield
    finally:
        _PADDED_BEHIND.reset(token)


def _needs_no_mask(
    q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, local_size: int | None = None,
    allow_is_causal_skip: bool = True, **_: object,
) -> bool:  # fmt: skip
    """Whether causality hides all that a mask would. The arguments are those of transformers' sdpa_mask.

    local_size: how many tokens a window shows, None for all. allow_is_causal_skip: False where the architecture hides
    more than what comes later.
    """
    whole = q_offset + q_length == kv_length and not kv_offset and (local_size is None or kv_length <= local_size)
    return _PADDED_BEHIND.get() and allow_is_causal_skip and whole


def causal_mask(**sizes: object) -> torch.Tensor | None:
    """The mask for `causal_attention`: none where `_needs_no_mask`, else as transformers makes it for SDPA."""
    return None if _needs_no_mask(**sizes) else sdpa_mask(**sizes)


def grouped_mask(**sizes: object) -> torch.Tensor | None:
    """The mask for `grouped_attention`: none where `_needs_no_mask`, else as transformers adds it to scores."""
    return None if _needs_no_mask(**sizes) else eager_mask(**sizes)


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """SDPA that needs no mask behind virtual tokens: (B, T, heads, width) and None, as transformers' interface has it.

    query: (B, heads, T, width); key, value: (B, groups, S, width). SDPA's causal kernels want as many queries as keys.
    So S - T empty ones, whose answers are dropped, stand in front.
    """
    in_front = key.shape[2] - query.shape[2]
    if attention_mask is not None or query.shape[2] == 1:
        in_front = 0
    if in_front:
        query = pad(query, (0, 0, in_front, 0))
    mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return mixed[:, in_front:], None


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention on a CPU: (B, T, heads, width) and None, as transformers' interface has it.

    query: (B, heads, T, width); key, value: (B, groups, S, width), or with masked keys behind these up to a multiple of
    SOFTMAX_LANES. attention_mask: (B or 1, 1, T, S), added to the scores; None: only what comes later is hidden, and
    with one query nothing. scaling: None for 1 / sqrt(width). Where scores get a bias of positions, or dropout, or a
    module without a mask hides nothing, it calls SDPA.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    biased = kwargs.get("position_bias") is not None
    if biased or (dropout and module.training) or (attention_mask is None and not causal):
        if attention_mask is not None:
            key, value = (kept[:, :, : attention_mask.shape[-1]] for kept in (key, value))
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return causal_attention(module, query, key, value, attention_mask, **kwargs)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    spare = -key.shape[2] % SOFTMAX_LANES  # keys that nobody sees: see SOFTMAX_LANES
    seen = key.shape[2] if attention_mask is None else attention_mask.shape[-1]
    if spare:
        key, value = (pad(kept, (0, 0, 0, spare)) for kept in (key, value))
    if attention_mask is not None:  # a query that sees nothing must not divide by 0, in whichever dtype the mask came
        attention_mask = attention_mask.clamp(min=torch.finfo(query.dtype).min / 2).to(query.dtype)
        attention_mask = pad(attention_mask, (0, key.shape[2] - seen), value=-torch.inf)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(device, enabled=False):
        return _BlockAttention.apply(query, key, value, attention_mask, seen, scale), None


class _BlockAttention(torch.autograd.Function):
    """softmax(Q K^T scale + mask) V, block by block: (B, T, heads, width of V).

    Q: (B, heads, T, width). K, V: (B, groups, S, width), of which the first `seen` keys are real, S a multiple of
    SOFTMAX_LANES. mask: (B or 1, 1, T, S), or None; then the last query sees all real keys, the one before one less.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        seen: int, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        size, heads, length, _ = query.shape
        shape, kept, keep = key.shape, [], length <= KEPT_UP_TO and any(ctx.needs_input_grad)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        mixed = query.new_empty(size, length, heads, value.shape[-1])
        for block in _blocks(length):
            shares = _shares(_rows(query, block, key) * scale, key, mask, block, length - seen)
            found = torch.bmm(shares, value[:, : shares.shape[-1]])
            mixed[:, block] = found.view(size, heads, -1, mixed.shape[-1]).transpose(1, 2)
            kept += [shares] if keep else []
        ctx.save_for_backward(query, key, value, mask, *kept)
        ctx.numbers = shape, length - seen, scale
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, *kept = ctx.saved_tensors
        (size, groups, n_keys, _), shift, scale = ctx.numbers
        of_query, of_key, of_value = query.new_empty(query.transpose(1, 2).shape), None, None
        for i, block in reversed([*enumerate(_blocks(query.shape[2]))]):  # the last one sees all keys
            asked, wanted = _rows(query, block, key) * scale, _rows(gradient.transpose(1, 2), block, key)
            shares = kept[i] if kept else _shares(asked, key, mask, block, shift)
            seen = shares.shape[-1]
            of_value = _added(of_value, torch.bmm(shares.mT, wanted))
            of_scores = torch.bmm(wanted, value[:, :seen].mT)
            of_scores = torch._softmax_backward_data(of_scores, shares, -1, shares.dtype)
            found = torch.bmm(of_scores, key[:, :seen]) * scale
            of_query[:, block] = found.view(size, query.shape[1], -1, found.shape[-1]).transpose(1, 2)
            of_key = _added(of_key, torch.bmm(of_scores.mT, asked))
        of_key, of_value = (part.to(key.dtype).view(size, groups, n_keys, -1) for part in (of_key, of_value))
        return of_query.transpose(1, 2), of_key, of_value, None, None, None


def _blocks(length: int) -> list[slice]:
    """The queries of each block."""
    return [slice(start, min(start + QUERIES, length)) for start in range(0, length, QUERIES)]


def _rows(query: torch.Tensor, block: slice, key: torch.Tensor) -> torch.Tensor:
    """A block of queries (B, heads, T, width) under each other for every key head of `key` (B groups, S, width)."""
    return query[:, :, block].reshape(len(key), -1, query.shape[-1])


def _shares(rows: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, block: slice, shift: int) -> torch.Tensor:
    """How the queries of a block mix values: (B groups, heads of a group x block, S'), S' a multiple of SOFTMAX_LANES.

    rows: of `_rows`, scaled. Without a mask query i sees the keys up to i - shift, and later ones than those of the
    block are left out.
    """
    end, length = key.shape[1], block.stop - block.start
    if mask is None:
        end = block.stop - shift
        end += -end % SOFTMAX_LANES
    scores = torch.bmm(rows, key[:, :end].mT)
    if mask is None:
        first = block.start - shift
        later = torch.ones(length, end - first, dtype=torch.bool, device=rows.device).triu_(1)
        scores.view(len(key), -1, length, end)[..., first:].masked_fill_(later, -torch.inf)
    else:
        scores.view(len(mask), -1, length, end).add_(mask[:, :, block])
    return scores.softmax(-1)


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """The sum over blocks, in float32 from the second one on. `part` has the first rows of `total`, perhaps not all."""
    if total is None:
        return part
    total = total.float()
    total[:, : part.shape[1]] += part
    return total


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, grouped_mask)
AttentionInterface.register(CAUSAL, causal_attention)
AttentionMaskInterface.register(CAUSAL, causal_mask)


def refuse_attention(choice: str, device: str, dtype: torch.dtype) -> None:
    """Raise UserError where `--attn_implementation` cannot work, before anything is loaded."""
    if choice != "flash_attention_2":
        return
    if not device.startswith(("cuda", "balanced")) or dtype == torch.float32 or not is_flash_attn_2_available():
        raise UserError(
            "--attn_implementation=flash_attention_2 needs a GPU, --dtype=bfloat16 or float16 and the package "
            "flash-attn; use auto"
        )


def own_kind(model: PreTrainedModel, device: str) -> str | None:
    """Which of ours `--attn_implementation=auto` takes: None where the architecture has no SDPA, whose place they take,
    or may make masks outside its decoder."""
    interchangeable = model.config._attn_implementation == "sdpa" and model._supports_attention_backend
    if not interchangeable or decoder_of(model).config is not model.config:
        return None
    return GROUPED if device == "cpu" else CAUSAL


@contextmanager
def compared_with_sdpa(model: PreTrainedModel, kind: str, real: torch.Tensor) -> Iterator[list[float]]:
    """While open, `model` computes attention by SDPA, and beside it by `kind`. Yields a list, to which every call adds
    the relative difference of the two, over the positions `real` (B, T).

    Both are compared in float32 on the inputs of that call, and what follows goes on from SDPA's result. Otherwise a
    deep model in half precision makes of two roundings two answers, and nobody could tell them from a fault.
    """
    masks, differences, before = [], [], model.config._attn_implementation
    mask_of, attention_of = ALL_MASK_ATTENTION_FUNCTIONS[kind], ALL_ATTENTION_FUNCTIONS[kind]

    def both_masks(**sizes: object) -> torch.Tensor | None:
        masks.append((sdpa_mask(**sizes), mask_of(**sizes)))
        return masks[-1][0]

    def both(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, **kwargs: object,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        own = next(own for theirs, own in reversed(masks) if _same_mask(theirs, attention_mask))
        inputs = query.float(), key.float(), value.float()
        expected, _ = sdpa_attention_forward(module, *inputs, attention_mask, **kwargs)
        found, _ = attention_of(module, *inputs, None if own is None else own.to(query.device).float(), **kwargs)
        shown = real.to(found.device)
        differences.append(((found - expected)[shown].norm() / expected[shown].norm()).item())
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(_BESIDE_SDPA, both)
    AttentionMaskInterface.register(_BESIDE_SDPA, both_masks)
    model.set_attn_implementation(_BESIDE_SDPA)
    try:
        yield differences
    finally:
        model.set_attn_implementation(before)


def _same_mask(made: torch.Tensor | None, given: torch.Tensor | None) -> bool:
    """Whether a layer was given the mask that was made; one on another device is given a copy."""
    if made is None or given is None or made.shape != given.shape:
        return made is given
    return torch.equal(made.to(given.device), given)


def set_attention(model: PreTrainedModel, choice: str, device: str) -> None:
    """Let `model` compute attention by `choice` (--attn_implementation): auto is `own_kind`, or what the library chose
    for each part of it. Raises UserError where the architecture does not have the implementation asked for."""
    if choice == "auto":
        choice = own_kind(model, device)
    if choice is None:
        return
    try:
        model.set_attn_implementation(choice)
    except (ValueError, ImportError) as error:
        raise UserError(f"{model.config.model_type} has no {choice} attention ({first_line(error)}); use auto")
