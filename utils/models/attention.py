"""How attention is computed: without a mask where padding is behind rows, and for short rows on a CPU without copies.

A token sees only what stands before it. Padding behind a row's last token is before none of them, so causality alone
hides it, and no mask is needed. Without one, SDPA takes its fastest kernel, which skips what nobody sees.

Several query heads may share one key head. `grouped_attention` makes them rows of one matrix product, q_1 K^T above
q_2 K^T. So it needs no copy of K and V for each of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils import is_flash_attn_2_available

from utils.errors import UserError, first_line
from utils.models.layers import decoder_of, kept_positions

SOFTMAX_LANES = 32  # torch's bfloat16 softmax on a CPU takes up to 5 times as long for rows of any other length
GROUPED, CAUSAL = "grouped", "causal"  # names of the two below among transformers' attention implementations
GROUPED_UP_TO = 256  # tokens, virtual ones included: wider batches on a CPU go to CAUSAL
_PADDED_BEHIND = ContextVar("padded_behind", default=False)


@contextmanager
def padded_behind() -> Iterator[None]:
    """While open, the rows that a model reads have their padding behind them, and what it gives there is not used."""
    token = _PADDED_BEHIND.set(True)
    try:
        yield
    finally:
        _PADDED_BEHIND.reset(token)


def causal_mask(
    *, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, local_size: int | None = None,
    allow_is_causal_skip: bool = True, **kwargs: object,
) -> torch.Tensor | None:  # fmt: skip
    """The mask for `causal_attention`: none within `padded_behind`, else as transformers makes it for SDPA.

    The arguments are those of transformers' sdpa_mask. local_size: how many tokens a window shows, None for all.
    allow_is_causal_skip: False where the architecture hides more than what comes later.
    """
    whole = q_offset + q_length == kv_length and not kv_offset and (local_size is None or kv_length <= local_size)
    if _PADDED_BEHIND.get() and allow_is_causal_skip and whole:
        return None
    sizes = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    return sdpa_mask(**sizes, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


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
        query = torch.nn.functional.pad(query, (0, 0, in_front, 0))
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
    """Attention for short rows on a CPU: (B, T, heads, width) and None, as transformers' interface has it.

    query: (B, heads, T, width); key, value: (B, groups, S, width), or with masked keys behind these up to a multiple of
    SOFTMAX_LANES. attention_mask: (B, 1, T, S), added to the scores. dropout: the probability. scaling: None for
    1 / sqrt(width). It takes the place of SDPA only; without a mask, or with a bias of positions, it calls SDPA.
    """
    if attention_mask is None or kwargs.get("position_bias") is not None:
        if attention_mask is not None:
            key, value = (kept[:, :, : attention_mask.shape[-1]] for kept in (key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    size, heads, length, width = query.shape
    seen = attention_mask.shape[-1]
    spare = -seen % SOFTMAX_LANES  # keys that nobody sees: see SOFTMAX_LANES
    if spare:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, spare), value=-torch.inf)
        if key.shape[2] == seen:
            key, value = (torch.nn.functional.pad(kept, (0, 0, 0, spare)) for kept in (key, value))
    rows, kept = (size * key.shape[1], -1, width), key.shape[2]
    scores = torch.bmm(query.reshape(rows), key.reshape(rows).transpose(1, 2)).view(size, heads, length, kept)
    scores = torch.add(attention_mask, scores, alpha=width**-0.5 if scaling is None else scaling)
    shares = torch.nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    mixed = torch.bmm(shares.view(rows[0], -1, kept), value.reshape(rows[0], kept, -1))
    return mixed.view(size, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)
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


def own_kinds(model: PreTrainedModel, device: str) -> tuple[str, ...]:
    """Which of ours `--attn_implementation=auto` takes: none where the architecture has no SDPA, whose place they take,
    or may make masks outside its decoder. On a CPU both: see GROUPED_UP_TO."""
    interchangeable = model.config._attn_implementation == "sdpa" and model._supports_attention_backend
    if not interchangeable or decoder_of(model).config is not model.config:
        return ()
    return (GROUPED, CAUSAL) if device == "cpu" else (CAUSAL,)


def set_attention(model: PreTrainedModel, choice: str, device: str) -> None:
    """Let `model` compute attention by `choice` (--attn_implementation): auto is `own_kinds`, or the library's choice.
    Raises UserError where the architecture does not have the implementation asked for."""
    if choice == "auto":
        kinds = own_kinds(model, device)
        if len(kinds) > 1:
            decoder_of(model).register_forward_pre_hook(_attention_by_width, with_kwargs=True)
        elif kinds:
            model.set_attn_implementation(kinds[0])
        return
    try:
        model.set_attn_implementation(choice)
    except (ValueError, ImportError) as error:
        raise UserError(f"{model.config.model_type} has no {choice} attention ({first_line(error)}); use auto")


def _attention_by_width(decoder: PreTrainedModel, args: tuple, kwargs: dict[str, object]) -> None:
    tokens = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
    width = tokens.shape[1] + kept_positions(*args, *kwargs.values())
    decoder.set_attn_implementation(GROUPED if width <= GROUPED_UP_TO else CAUSAL)
