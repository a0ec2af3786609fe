"""Loading a causal language model and its tokenizer: device, dtype, quantisation, and what is tried before use."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from utils import distributed
from utils.errors import UserError, first_line, is_out_of_memory, note_once
from utils.models.attention import own_kind, refuse_attention, set_attention
from utils.models.chain import load_config, loading_arguments, stored_quantization
from utils.models.forward import attention_agrees, trial
from utils.models.layers import checkpoint_layers, compile_decoder, decoder_layers
from utils.models.lengths import vocabulary_size
from utils.sharding import shard
from utils.storage.checkpoints import Link, model_files
from utils.storage.reading import is_finite


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is loaded: the flags of those names. With the defaults of a caller that is no script."""

    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str = "auto"
    trust_remote_code: bool = False
    set_pad_id: bool = False
    gradient_checkpointing: str | None = None
    compile: bool = False
    shard: bool = False

    @property
    def shards(self) -> int:
        """In how many parts the weights of a layer lie: with --shard one a process."""
        return distributed.world_size() if self.shard else 1


class FrozenModel(Protocol):
    """A loaded model with its tokenizer, as what stands in front of it sees it (utils.interventions.served.Served)."""

    model: torch.nn.Module
    tokenizer: Any

    @property
    def pad_id(self) -> int: ...


def pick_device(name: str) -> str:
    """`auto` -> cuda, mps or cpu, whichever is there first; of several processes on GPUs each gets its own, `cuda:<i>`.

    Raises UserError when the named device is not there.
    """
    cuda = torch.cuda.is_available()
    available = {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpu": True, "balanced": cuda}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device={name} is not available on this machine; use --device=auto")
    if name == "balanced" and distributed.world_size() > 1:
        raise UserError("--device=balanced gives all GPUs to one process; start it with python, not accelerate launch")
    return distributed.own_gpu() if name == "cuda" and distributed.world_size() > 1 else name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """`auto` -> bfloat16 where the device computes in it, else float32.

    Never float16, which needs activations below 65,504. In training its loss must be scaled, as in the published code,
    or small gradients become 0. bfloat16 needs neither.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.startswith(("cuda", "balanced")):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        onednn = device == "cpu" and torch.backends.mkldnn.is_available()
        fast = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if platform.machine().lower() in ("x86_64", "amd64"):  # where that also holds for processors that emulate it
            fast = fast and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def load_tokenizer(chain: list[Link], set_pad_id: bool, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the last Link that has one.

    It pads with its own pad token, unless `set_pad_id` or the model does not know that token. Then it pads with the
    end-of-sequence token, or token 0 where there is none either. Masks go by length, so the choice changes no result.
    Raises UserError where it cannot be loaded or has no fast version.
    """
    has_files = (link for link in reversed(chain) if link.path.is_file() or list(link.path.glob("tokenizer*")))
    link = next(has_files, chain[0])
    source = loading_arguments(link.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=trust_remote_code, use_fast=True)
    except Exception as error:  # of a damaged file, whatever the library that reads it raises
        raise UserError(f"cannot load the tokenizer of {link.name} ({first_line(error)})")
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {link.name} has no fast version, which texts are cut with; add tokenizer.json"
        )

    def known(token: str) -> bool:  # tokenizers get new ones that models do not follow
        number = tokenizer.convert_tokens_to_ids(token)
        is_added = number >= tokenizer.vocab_size
        return not is_added or number < vocabulary_size(load_config(chain[0], trust_remote_code))

    wanted = [] if set_pad_id else [tokenizer.pad_token]
    usable = (token for token in (*wanted, tokenizer.eos_token) if token and known(token))
    pad = next(usable, None) or tokenizer.convert_ids_to_tokens(0)
    if pad != tokenizer.pad_token:
        tokenizer.pad_token = pad
    return tokenizer


def load_base(link: Link, settings: ModelSettings, quantization: str = "none") -> PreTrainedModel:
    """The causal LM of a plain Link on settings.device in settings.dtype, in eval mode, all weights frozen.

    With --shard it is still whole and on the CPU: `spread` brings it to the device when it has all of its weights.
    quantization: `nf4` loads its linear layers in 4-bit NormalFloat through bitsandbytes, `none` as they are. What lies
    in 4 bits on the disk is loaded as it is either way. Raises UserError where it is no causal language model, lacks a
    weight or holds numbers that are not finite. So it does where it does not fit the device or the attention asked for.
    """
    config = load_config(link, settings.trust_remote_code, quantization)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    placement = device if device == "balanced" else {"": "cpu" if settings.shards > 1 else device}
    refuse_shards(settings, link, config, device)
    options = {"dtype": dtype, "device_map": placement, "trust_remote_code": settings.trust_remote_code}
    if quantization == "nf4" and not stored_quantization(config):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    refuse_attention(settings.attn_implementation, device, dtype)
    compiled = settings.compile
    if compiled and not device.startswith("cuda"):
        raise UserError(f"--compile is for CUDA, this model goes to {device}; leave it out")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            **loading_arguments(link.path), **options, output_loading_info=True
        )
    except Exception as error:  # as above
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot load a causal language model from {link.name} ({first_line(error)})")
    weights = dict(model.named_parameters())
    if broken := [name for name, weight in weights.items() if not is_finite(_numbers(weight))]:
        raise UserError(
            f"{link.name} holds numbers that are not finite ({broken[0]}); restore it or use --dtype=float32"
        )
    if whole := [name for name in _whole_numbers(link.path) if name in weights and weights[name].is_floating_point()]:
        raise UserError(f"{link.name} holds whole numbers for the weight {whole[0]}; restore its files")
    if info["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(f"{link.name} lacks the weight {min(info['missing_keys'])}; restore its files")
    if link.path.is_file():  # from GGUF: loading has dequantised the weights, yet the model still claims otherwise
        del model.config.quantization_config, model.hf_quantizer
        model.is_quantized = False
    if device == "balanced" and any(p.device.type != "cuda" for p in model.parameters()):
        raise UserError(f"{link.name} does not fit the GPUs; use more of them or a smaller --dtype")
    keep_one_format(model)
    model.eval().requires_grad_(False)
    _try(model, link.name, settings.attn_implementation, device)
    if settings.gradient_checkpointing:
        checkpoint_layers(model, settings.gradient_checkpointing)
    if compiled:
        compile_decoder(model)
    return model


def refuse_shards(settings: ModelSettings, link: Link, config: PreTrainedConfig, device: str) -> None:
    """Raise UserError where --shard cannot work with a model of this configuration; say where it changes nothing."""
    if not settings.shard:
        return
    if settings.shards == 1:
        note_once(
            "--shard gives each process a part of the model, and there is only one: see data/accelerate/README.md"
        )
    elif device == "mps":
        raise UserError("--shard is for CUDA or a CPU, this model goes to mps; leave it out")
    elif stored_quantization(config) == "4-bit":
        raise UserError(f"the 4-bit weights of {link.name} cannot be cut into shards; leave out --shard")


def spread(model: torch.nn.Module, settings: ModelSettings) -> torch.nn.Module:
    """`model` on settings.device: with --shard each layer as this process's part of it, else as it is."""
    if settings.shards == 1:
        return model
    return shard(model, decoder_layers(model), pick_device(settings.device))


def _try(model: torch.nn.Module, name: str, attention: str, device: str) -> None:
    """Let `model` compute attention by `attention`; where ours would change its numbers, by SDPA. Raises UserError as
    `trial` and `set_attention` do."""
    expected, kind = trial(model, name), own_kind(model, device)
    if attention == "auto" and kind and not attention_agrees(model, kind, expected):
        return
    set_attention(model, attention, device)


def keep_one_format(model: torch.nn.Module) -> None:
    """Let the 4-bit layers of `model` keep their weights as they are. On processors with AVX512-BF16 bitsandbytes
    packs them anew in the first pass of evaluation: rounded, without a gradient, and no longer to be dequantised."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _whole_numbers(path: Path) -> list[str]:
    """The names of the tensors in a model's safetensors files that are no floats; loading would turn them into some."""
    found = []
    for name in model_files(path) if path.is_dir() else ():
        if name.endswith(".safetensors"):
            with safe_open(path / name, "pt") as file:
                found += [key for key in file.keys() if file.get_slice(key).get_dtype()[0] not in "FB"]  # noqa: SIM118
    return found


def _numbers(weight: torch.nn.Parameter) -> torch.Tensor:
    """Those in which a weight is not finite: of one in 4 bits the scale of each block."""
    packed = getattr(weight, "quant_state", None)
    return weight if packed is None else packed.absmax


def dequantized(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with plain weights in its dtype. Raises UserError where the kind of its quantisation cannot be undone."""
    if not getattr(model, "is_quantized", False):
        return model
    kind = stored_quantization(model.config)
    try:
        return model.dequantize(model.dtype).requires_grad_(False)
    except (NotImplementedError, ValueError):
        raise UserError(f"the weights of this model ({kind}) cannot be dequantised; use the model it was made from")
