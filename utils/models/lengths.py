"""What fits a model: positions and tokens that it knows."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from utils.data.batch import Example
from utils.errors import UserError


def check_length(config: PreTrainedConfig, n_tokens: int, p: int, spare: int = 0) -> None:
    """Raise UserError if a row of `n_tokens` behind `p` virtual tokens has more positions than the model knows.

    config: the model's. spare: how many of these tokens --max_length does not count.
    """
    limit = position_limit(config)
    if limit and n_tokens + p > limit:
        raise UserError(
            f"the longest row has {n_tokens} tokens and the prompt {p}, but the model has {limit} positions; "
            f"use --max_length={limit - p - spare} or less"
        )


def check_tokens(config: PreTrainedConfig, tokenizer: Any, examples: Sequence[Example]) -> None:
    """Raise UserError if an example holds a token for which a model with this configuration has no embedding."""
    size = vocabulary_size(config)
    if len(tokenizer) <= size:
        return
    largest = max((max(*example.prompt, *example.completion) for example in examples), default=0)
    if largest >= size:
        raise UserError(
            f"a text holds token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model knows {size}; "
            "take it out of the texts, or give the model its own tokenizer"
        )


def vocabulary_size(config: PreTrainedConfig) -> int | float:
    """How many tokens a model with this configuration has embeddings for; infinite where it does not say."""
    return getattr(config.get_text_config(), "vocab_size", None) or float("inf")


def position_limit(config: PreTrainedConfig) -> int | None:
    """The number of positions that a model's configuration names, or None."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
