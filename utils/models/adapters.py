"""LoRA adapters: made, merged, saved and loaded."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import Field

from utils.errors import UserError, first_line
from utils.models.base import dequantized
from utils.sharding import whole_weights
from utils.storage import schemas
from utils.storage.checkpoints import Link
from utils.storage.reading import FLOATS, Like, read_tensors
from utils.storage.schemas import Count, Open, PlainName


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapter that is trained, as the flags of those names say it.

    lora_alpha: the scale is lora_alpha / lora_rank. lora_target_modules: None for PEFT's choice for the architecture.
    """

    lora_rank: int = 16
    lora_alpha: float = 64
    lora_dropout: float = 0.1
    lora_bias: str = "none"
    lora_target_modules: list[str] | None = None


class LoraFile(Open):
    """adapter_config.json of a LoRA adapter: what we set. `lora_config` refuses other fields unless they do nothing."""

    what = "configuration of a LoRA adapter"
    peft_type: Literal["LORA"]
    r: Count
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Annotated[list[PlainName], Field(min_length=1)] | Literal["all-linear"]
    fan_in_fan_out: bool = False


def merge_lora(model: torch.nn.Module, link: Link) -> torch.nn.Module:
    """`model` with the LoRA adapter of `link` added into its weights, dequantised first where it was quantised.

    Raises UserError where the adapter's tensors are not those that its configuration asks for on this model.
    """
    model = dequantized(model)
    config = lora_config(link.path)
    try:
        adapted = PeftModelForCausalLM(model, config)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{link.path} is not a LoRA adapter of this model ({first_line(error)})")
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {name: Like(tuple(t.shape), FLOATS[:1] if "lora_" in name else FLOATS) for name, t in expected.items()}
    tensors = read_tensors(link.path / "adapter_model.safetensors", expected, "LoRA adapter of this model")
    set_peft_model_state_dict(adapted, tensors)
    untie(adapted)
    return adapted.merge_and_unload().eval().requires_grad_(False)


def lora_config(folder: Path) -> LoraConfig:
    """The configuration of the LoRA adapter in `folder`. Raises UserError where it says more than we write there: a
    field that changes what is computed, or names code to import."""
    file = folder / "adapter_config.json"
    found = schemas.read(file, LoraFile)
    known = {*LoraFile.model_fields, "base_model_name_or_path", "inference_mode", "peft_version"}
    plain = LoraConfig(task_type="CAUSAL_LM").to_dict()
    for name, value in found.items():
        if name not in known and value != plain.get(name) and value not in (None, False, {}, []):
            raise UserError(f"{file} sets {name}, which this project does not know; train the checkpoint again")
    names = "r", "lora_alpha", "lora_dropout", "bias", "target_modules"
    return LoraConfig(
        task_type="CAUSAL_LM", inference_mode=True, **{name: found[name] for name in names if name in found}
    )


def untie(model: torch.nn.Module) -> None:
    """Give every adapted layer of the PEFT `model` a weight of its own.

    An adapter changes its layer alone; merged into a weight that another layer shares (a head tied to the embedding)
    it would change both. PEFT then notes in the configuration that they are no longer tied.
    """
    layers = list(model.modules())
    owners = Counter(id(layer.weight) for layer in layers if isinstance(getattr(layer, "weight", None), torch.Tensor))
    for layer in layers:
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if base is not None and owners[id(base.weight)] > 2:  # itself, its wrapper, another layer
            base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def add_lora(model: torch.nn.Module, settings: LoraSettings) -> PeftModel:
    """`model` with trainable float32 LoRA matrices on the layers that `settings` names.

    Where it names none: PEFT's default layers for the architecture, or all linear ones where PEFT has no default.
    Raises UserError where PEFT cannot place the matrices.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    targets = settings.lora_target_modules
    if not targets:
        targets = None if model.config.model_type in DEFAULTS else "all-linear"
    elif targets == ["all-linear"]:
        targets = "all-linear"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias=settings.lora_bias,
        target_modules=targets,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"cannot place LoRA ({first_line(error)}); choose --lora_target_modules")
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # biases of --lora_bias are the model's own and compute in its dtype
            parameter.data = parameter.data.float()
    return model


def gathered_weights(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """What `save_weights` writes of a model in shards, in the main process; None of a whole one. All processes must
    call it."""
    return whole_weights(model, trained=isinstance(model, PeftModel))


def save_weights(model: torch.nn.Module, folder: Path, gathered: dict[str, torch.Tensor] | None = None) -> None:
    """Write the weights of a model, or of the adapter in it, into `folder`. gathered: see `gathered_weights`."""
    if isinstance(model, PeftModel):  # which by default asks the hub whether the base's embeddings have grown
        model.save_pretrained(folder, state_dict=gathered, save_embedding_layers=False)
    else:
        model.save_pretrained(folder, state_dict=gathered)
