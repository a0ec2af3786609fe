"""How attention is computed: by the library, or for short rows on a CPU without copies.

Several query heads may share one key head. `grouped_attention` makes them rows of one matrix product, q_1 K^T above
q_2 K^T. So it needs no copy of K and V for each of them.
"""

import torch
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.utils import is_flash_attn_2_available

from utils.errors import UserError, first_line
from utils.models.layers import decoder_of, kept_positions

SOFTMAX_LANES = 32  # torch's bfloat16 softmax on a CPU takes up to 5 times as long for rows of any other length
GROUPED = "grouped"  # the name of grouped_attention among transformers' attention implementations


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


GROUPED_UP_TO = 256  # tokens, virtual ones included: wider batches go to SDPA


def refuse_attention(choice: str, device: str, dtype: torch.dtype) -> None:
    """Raise UserError where `--attn_implementation` cannot work, before anything is loaded."""
    if choice != "flash_attention_2":
        return
    if not device.startswith(("cuda", "balanced")) or dtype == torch.float32 or not is_flash_attn_2_available():
        raise UserError(
            "--attn_implementation=flash_attention_2 needs a GPU, --dtype=bfloat16 or float16 and the package "
            "flash-attn; use auto"
        )


def set_attention(model: PreTrainedModel, choice: str, device: str) -> RemovableHandle | None:
    """Let `model` compute attention by `choice` (--attn_implementation).

    auto: SDPA where the architecture has it. On a CPU batches of up to GROUPED_UP_TO tokens a row take the faster
    `grouped_attention`; then the hook that chooses is returned, else None. Raises UserError where the architecture does
    not have the implementation asked for.
    """
    if choice == "auto":
        decoder = decoder_of(model)
        interchangeable = model.config._attn_implementation == "sdpa" and model._supports_attention_backend
        if device == "cpu" and interchangeable and decoder.config is model.config:  # else masks may be made outside it
            return decoder.register_forward_pre_hook(_attention_by_width, with_kwargs=True)
        return
    try:
        model.set_attn_implementation(choice)
    except (ValueError, ImportError) as error:
        raise UserError(f"{model.config.model_type} has no {choice} attention ({first_line(error)}); use auto")


def _attention_by_width(decoder: PreTrainedModel, args: tuple, kwargs: dict[str, object]) -> None:
    tokens = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
    width = tokens.shape[1] + kept_positions(*args, *kwargs.values())
    decoder.set_attn_implementation(GROUPED if width <= GROUPED_UP_TO else "sdpa")
