"""Which weights of a model a method changes."""

import contextlib
from contextlib import AbstractContextManager

import torch
from peft import PeftModel

from utils.models.adapters import LoraSettings, add_lora
from utils.models.base import dequantized
from utils.sharding import to_dtype
from utils.unlearning.methods import Method, MethodSettings
from utils.unlearning.rmu import train_three_layers


def trainable(
    model: torch.nn.Module, lora: LoraSettings | None, method: Method, settings: MethodSettings
) -> torch.nn.Module:
    """`model` ready to train: frozen with a new float32 adapter, or with lora=None float32 weights that all learn; of
    RMU only those of its three layers. No dropout, since the reference is computed first."""
    model = add_lora(model, lora) if lora else _all_weights(model)
    if method.activations:
        train_three_layers(model, settings.rmu_layer)
    return model.eval()


def _all_weights(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with plain float32 weights that all learn."""
    return to_dtype(dequantized(model), torch.float32).requires_grad_(True)


def only_adapter_dropout(model: torch.nn.Module) -> None:
    """Switch on the dropout in front of a new adapter, and no other: with the model's own (GPT-2, OPT) a comparison
    with the reference, which is computed without, would not start at 0."""
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()


def computing_in(model: torch.nn.Module, dtype: torch.dtype, shards: int = 1) -> AbstractContextManager:
    """While open, float32 weights are multiplied in `dtype`, the one that they came in; frozen ones have it anyway.

    shards: in how many a layer lies; if in several, no copy of it in `dtype` is kept for its next use.
    """
    if isinstance(model, PeftModel) or dtype == torch.float32:
        return contextlib.nullcontext()
    device = "cpu" if model.device.type == "meta" else model.device.type
    return torch.autocast(device, dtype, cache_enabled=shards == 1)
