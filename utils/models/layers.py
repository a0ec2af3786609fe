"""The layers of a causal language model: finding them, watching them, checkpointing and compiling them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import NoReturn

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from utils.errors import UserError
from utils.sharding import is_sharded


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """A causal LM without its head: the layers, and what stands around them.

    transformers' own `get_decoder` looks for an attribute named decoder, which in some architectures is part of the
    head. There it is the base model.
    """
    found = model.get_decoder()
    return found if isinstance(found, PreTrainedModel) else model.base_model


class _Enough(Exception):
    """Ends a pass that has given what was asked of it."""


@contextmanager
def record_activations(
    layer: torch.nn.Module, until: torch.nn.Module | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """While open, every pass leaves the output (B, T, d) of module `layer` in the yielded dict under `activations`.

    until: None, or the module that the pass reaches next. There the pass ends, and the block of the `with` statement
    too: what would follow has no share in the activations or in their gradient. A module in shards ends no pass: other
    processes may need its part of the weights.
    """
    seen = {}

    def keep(_: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        seen["activations"] = output if isinstance(output, torch.Tensor) else output[0]

    def stop(*_: object) -> NoReturn:
        raise _Enough

    handles = [layer.register_forward_hook(keep)]
    if until is not None and not is_sharded(until):
        handles.append(until.register_forward_pre_hook(stop))
    try:
        yield seen
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


@cache
def _kept_by_selective() -> set[object]:
    """The operators whose results `selective` keeps: products with weights, and attention in one kernel. Attention in
    blocks (utils.models.attention) is computed again: its parts take more memory than time."""
    kernels = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    names = ["mm", "addmm", *(f"_scaled_dot_product_{kernel}" for kernel in kernels)]
    return {getattr(torch.ops.aten, name).default for name in names}


def checkpoint_layers(model: torch.nn.Module, kind: str = "layers") -> None:
    """Gradient checkpointing: every decoder layer of `model` keeps only its inputs for the backward pass (`layers`), or
    also the results of what takes most of the time, see `_kept_by_selective` (`selective`).

    There it computes the rest again, with the same numbers, since the random state is restored. Raises UserError where
    the architecture does not say which its layers are.

    transformers' own switch does not serve. It works in training mode only, which turns dropout on in a frozen model.
    It also takes the cache away from a layer, so nothing could be shared between rows.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{model.config.model_type} cannot be checkpointed; leave out --gradient_checkpointing")
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    options = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if kind == "selective" else {}
    for layer in layers:
        if id(layer) not in inner:
            layer.forward = partial(_checkpointed, layer.forward, options)


def _policy(_: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    kept = operator in _kept_by_selective()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_decoder(model: torch.nn.Module, backend: str | Callable = "inductor") -> None:
    """`--compile`: the layers of `model` become fused kernels when they first run, for all batch sizes and lengths.

    Adapters that are put into them before that are included. Parameters, their names and what is saved stay. backend:
    of torch.compile, by name or as a function.

    The decoder is compiled as a whole. A layer reads its own number in the cache, so that nothing compiled for one
    layer serves the next. What stands behind it (the head, which sees only some positions) is left alone.
    """
    decoder_of(model).compile(backend=backend, dynamic=True)


def _checkpointed(forward: Callable, options: dict[str, Callable], *args: object, **kwargs: object) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's transformer layers, first to last: the first list of modules as long as its configuration says.

    Raises UserError where there is none.
    """
    n = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)
    layers = next(lists, None)
    if layers is None:
        kind = model.config.model_type
        raise UserError(f"{kind} has no list of its {n} layers, which rmu, --audit probe and --shard need")
    return layers
