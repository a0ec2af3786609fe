"""Loading models: hub ids, folders and GGUF files; base -> merged LoRA -> prompt, each verified by hash."""

import utils.quiet  # noqa: F401, I001  (before PEFT, which imports bitsandbytes)

import platform
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import is_flash_attn_2_available

from utils import in_context, processes, schemas
from utils.checkpoints import (
    Link,
    base_name,
    first_manifest,
    model_files,
    parent_path,
    read_manifest,
    recover,
    verify_parent,
)
from utils.cli import UserError, first_line, is_out_of_memory
from utils.forward import GROUPED, decoder_of, kept_positions, prompt_prefix, same_as_trial, trial
from utils.reading import FLOATS, Like, is_finite, read_tensors

GROUPED_UP_TO = 256  # tokens, virtual ones included; README, "Speed and memory"
PROMPTED = ("prompt", "in-context", "eco")  # kinds that stand at the end of a chain
LOCAL_ATTENTION = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")  # others come from the hub
OTHER_HEADS = {
    name
    for heads in (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    )
    for name in heads.values()
}
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Loaded:
    """A model ready to run. `prompt`: its virtual tokens (p, d) float32, or None. `chain`: Links, base first.
    `template`: what stands around every text (utils.in_context), None for the published template. `gate`: a
    utils.gates.Gate; only the queries that it flags get the prompt or the corruption, None flags all. `corruption`:
    what utils.corruption does to flagged queries, at the tokens that `marks` (utils.eco.Marks) names."""

    model: torch.nn.Module
    tokenizer: object
    prompt: torch.Tensor | None
    chain: list
    template: object = None
    gate: object = None
    corruption: object = None
    marks: object = None

    @property
    def pad_id(self):
        return self.tokenizer.pad_token_id

    @property
    def base_name(self):
        return base_name(self.chain)

    @cached_property
    def prefix(self):
        """What `utils.forward.prompt_prefix` makes of the prompt, computed once; None without a prompt."""
        return None if self.prompt is None else prompt_prefix(self.model, self.prompt)


def resolve_chain(name, trust_remote_code=False, parent=None, weights=True, children=()):
    """The Links from the base model to `name`, base first, every parent verified by hash.

    `name`: a checkpoint folder, a model folder, a .gguf file or a hub id. `parent`: where the parent of `name` lies,
    if it was moved. weights=False: nothing is verified, and of a hub id no weights are fetched. children: the folders
    that led here. Raises UserError on anything missing, damaged or not the recorded parent.
    """
    path = _local_path(name, trust_remote_code, weights)
    if path.resolve() in children:
        raise UserError(f"{path} is its own parent, or that of its parent; train the checkpoint again")
    manifest = None if path.is_file() else read_manifest(path, verify=weights)
    link = Link(path, str(name), manifest)
    if weights:
        link.sha256  # noqa: B018  (taken now, so that it is that of what gets loaded)
    if link.kind in PROMPTED and children:
        raise UserError(f"{path} is a prompt, which is nobody's parent; pass another --parent_path or train again")
    if link.kind in ("model", "full"):  # holds all its weights: its parent is not needed
        refuse_fetching(path)
        return [link]
    above = parent_path(path, manifest, parent)
    chain = resolve_chain(above, trust_remote_code, weights=weights, children=(*children, path.resolve()))
    if weights:
        verify_parent(chain[-1], link)
    return [*chain, link]


def refuse_fetching(path: Path) -> None:
    """Raise UserError where the model in folder `path` would make transformers load something that is not in it."""
    if path.is_file():
        return
    if (path / "adapter_config.json").exists():
        raise UserError(f"{path} is a model with an adapter in it; merge them, or move adapter_config.json away")
    config = schemas.read_foreign(path / "config.json", schemas.ModelConfig)
    if config.get("transformers_weights"):
        raise UserError(f"{path}/config.json names its weights itself; remove transformers_weights from it")
    for key, value in _entries(config):
        if re.fullmatch(r"_?(attn|experts)_implementation(_internal)?", key) and value not in LOCAL_ATTENTION:
            raise UserError(f"{path}/config.json wants the {key} {value!r}, which is not in the folder; remove it")


def _entries(value):
    """Every (key, value) of nested JSON objects."""
    parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return [*(value.items() if isinstance(value, dict) else ()), *(entry for part in parts for entry in _entries(part))]


def short_name(name: str) -> str:
    """`<model>` of the published folder names: the base model's own name in lower case, `llama-2-7b-hf` say, whichever
    checkpoint on top of it `name` is."""
    path = Path(first_manifest([name]).get("base", name))
    own = path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name
    return own.lower()


def _local_path(name, trust_remote_code, weights):
    recover(name)
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UserError(f"{name} is a file but no .gguf model; pass a folder, a .gguf file or a hub id")
    # A folder beside us of the first name: a mistyped path, which is no reason to ask the network.
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)) or (len(path.parts) > 1 and path.parent.exists()):
        raise UserError(f"{name} does not exist; pass an existing folder, a .gguf file or a hub id")
    return _from_hub(str(name), trust_remote_code, weights)


def _from_hub(name, trust_remote_code, weights):
    from huggingface_hub import snapshot_download

    patterns = HUB_FILES + ["*.py"] * trust_remote_code
    if not weights:
        patterns.remove("*.safetensors")
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if weights and not list(folder.glob("*.safetensors")):  # older ones hold only .bin, which is read safely
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "*.bin"]))
    except Exception as error:  # the hub client raises a dozen types: offline, not found, gated, broken
        reason = first_line(error)
        raise UserError(f"{name} is no existing folder or .gguf file and the hub does not give it ({reason})")
    return folder


def pick_device(name):
    """`auto` -> cuda, mps or cpu, whichever is there first; of several processes on GPUs each gets its own, `cuda:<i>`.

    Raises UserError when the named device is not there.
    """
    cuda = torch.cuda.is_available()
    available = {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpu": True, "balanced": cuda}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device={name} is not available on this machine; use --device=auto")
    if name == "balanced" and processes.count() > 1:
        raise UserError("--device=balanced gives all GPUs to one process; start it with python, not accelerate launch")
    return processes.own_gpu() if name == "cuda" and processes.count() > 1 else name


def pick_dtype(name, device):
    """`auto` -> bfloat16 where the device computes in it, else float32.

    Never float16: it needs activations below 65,504, and training needs its loss scaled, as the published code had it
    (small gradients become 0 otherwise); bfloat16 needs neither.
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


def load_tokenizer(chain, set_pad_id, trust_remote_code=False):
    """The tokenizer of the last Link that has one. It pads with its own pad token, or with the end-of-sequence token
    when `set_pad_id` or when it has none that the model knows (or token 0 if there is none either); masks go by length,
    so the choice changes no result."""
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

    def known(token):  # tokenizers get new ones that models do not follow
        number = tokenizer.convert_tokens_to_ids(token)
        is_added = number >= tokenizer.vocab_size
        return not is_added or number < vocabulary_size(load_config(chain[0], trust_remote_code))

    wanted = [] if set_pad_id else [tokenizer.pad_token]
    usable = (token for token in (*wanted, tokenizer.eos_token) if token and known(token))
    pad = next(usable, None) or tokenizer.convert_ids_to_tokens(0)
    if pad != tokenizer.pad_token:
        tokenizer.pad_token = pad
    return tokenizer


def load_config(link: Link, trust_remote_code: bool, quantization: str = "none") -> object:
    """The configuration of a plain model; of a GGUF file from its metadata. Raises UserError if there is none, or if it
    is that of no causal language model or cannot be loaded with this quantization (see `load_base`)."""
    if link.path.is_file() and quantization != "none":
        raise UserError(f"{link.name} is quantised already; add --quantization=none")
    try:
        config = AutoConfig.from_pretrained(**loading_arguments(link.path), trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged file, whatever the library that reads it raises
        raise UserError(f"cannot read the configuration of {link.name} ({first_line(error)})")
    if getattr(config, "is_encoder_decoder", False):  # transformers would take its decoder alone
        raise UserError(f"{link.name} is an encoder-decoder model; use a causal language model")
    heads = [name for name in getattr(config, "architectures", None) or () if name in OTHER_HEADS]
    if heads:
        raise UserError(f"{link.name} is a {heads[0]}, no language model; use the model it was made from")
    if quantization != "none" and stored_quantization(config) not in (None, "4-bit"):
        raise UserError(f"{link.name} is quantised already; add --quantization=none")
    return config


def stored_quantization(config: object) -> str | None:
    """How the weights of a model with this configuration lie on the disk: None as plain numbers, `4-bit` as those of
    bitsandbytes, else the name of another method."""
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict | None) else stored.to_dict()
    if stored is None:
        return None
    return "4-bit" if stored.get("load_in_4bit") else stored.get("quant_method", "quantised")


def load_base(link, args, quantization="none"):
    """The causal LM of a plain Link on args.device in args.dtype, in eval mode, all weights frozen.

    quantization: `nf4` loads its linear layers in 4-bit NormalFloat through bitsandbytes, `none` as they are. What lies
    in 4 bits on the disk is loaded as it is either way. Raises UserError where it is no causal language model.
    """
    config = load_config(link, args.trust_remote_code, quantization)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    placement = device if device == "balanced" else {"": device}
    options = {"dtype": dtype, "device_map": placement, "trust_remote_code": args.trust_remote_code}
    if quantization == "nf4" and not stored_quantization(config):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    refuse_attention(args.attn_implementation, device, dtype)
    compiled = getattr(args, "compile", False)
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
    _try(model, link.name, args.attn_implementation, device)
    if getattr(args, "gradient_checkpointing", False):
        checkpoint_layers(model)
    if compiled:
        compile_decoder(model)
    return model


def _try(model: torch.nn.Module, name: str, attention: str, device: str) -> None:
    """Let `model` compute attention by `attention`; where the one for short rows changes its numbers, by SDPA alone.
    Raises UserError as `trial` and `set_attention` do."""
    expected = trial(model, name)
    hook = set_attention(model, attention, device)
    if hook and not same_as_trial(model, expected):
        hook.remove()
        model.set_attn_implementation("sdpa")


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


def refuse_attention(choice, device, dtype):
    """Raise UserError where `--attn_implementation` cannot work, before anything is loaded."""
    if choice != "flash_attention_2":
        return
    if not device.startswith(("cuda", "balanced")) or dtype == torch.float32 or not is_flash_attn_2_available():
        raise UserError(
            "--attn_implementation=flash_attention_2 needs a GPU, --dtype=bfloat16 or float16 and the package "
            "flash-attn; use auto"
        )


def set_attention(model, choice, device):
    """Let `model` compute attention by `choice` (--attn_implementation).

    auto: SDPA where the architecture has it; on a CPU utils.forward.grouped_attention for short batches, which is
    faster there (the hook that chooses is returned, else None). Raises UserError where the architecture does not have
    the one asked for.
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


def _attention_by_width(decoder, args, kwargs):
    tokens = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
    width = tokens.shape[1] + kept_positions(*args, *kwargs.values())
    decoder.set_attn_implementation(GROUPED if width <= GROUPED_UP_TO else "sdpa")


def checkpoint_layers(model):
    """Gradient checkpointing: every decoder layer of `model` keeps its inputs only and computes the rest again when the
    gradient comes by (same numbers, random state included). Raises UserError where the architecture does not say which
    its layers are.

    transformers' own switch does not serve: it works in training mode only, which turns dropout on in a frozen model,
    and it takes the cache away from a layer, so nothing could be shared between rows.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{model.config.model_type} cannot be checkpointed; leave out --gradient_checkpointing")
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    for layer in layers:
        if id(layer) not in inner:
            layer.forward = partial(_checkpointed, layer.forward, model.config)


def compile_decoder(model, backend="inductor"):
    """`--compile`: the layers of `model` become fused kernels when they first run, for all batch sizes and lengths at
    once (adapters that are put into them before that included). Parameters, their names and what is saved stay.

    The decoder as a whole, not layer by layer: a layer reads its own number in the cache, so that nothing compiled for
    one serves the next. What stands behind it (the head, which sees only some positions) is left alone.
    """
    decoder_of(model).compile(backend=backend, dynamic=True)


def _checkpointed(forward, config, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    attention = config._attn_implementation  # the second time, `_attention_by_width` may have chosen for another pass

    def again(*args, **kwargs):
        if config._attn_implementation != attention:
            config._attn_implementation = attention
        return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)


def load(name, args, parent=None):
    """Everything `name` stands for, merged and ready: base, LoRA merged into it unquantised, prompt beside it."""
    chain = resolve_chain(name, args.trust_remote_code, parent)
    tokenizer = load_tokenizer(chain, args.set_pad_id, args.trust_remote_code)
    model, prompt, template = load_base(chain[0], args), None, None
    for link in chain[1:]:
        if link.kind == "lora":
            model = merge_lora(model, link)
        elif link.kind == "prompt":
            prompt = load_prompt(link, model.get_input_embeddings().weight.shape[1]).to(model.device)
        elif link.kind == "in-context":
            template = in_context.load(link)
    loaded = Loaded(model, tokenizer, prompt, chain, template)
    if chain[-1].kind == "eco":
        from utils import eco  # it evaluates models, so it builds on this module

        return eco.load(chain[-1], loaded, args)
    return loaded


def refuse_prompted(chain):
    """Raise UserError if the last Link is a prompt: what trains or instructs a model takes the model itself."""
    if chain[-1].kind in PROMPTED:
        raise UserError(f"{chain[-1].path} already is a prompt; --model_checkpoints takes what it was made on")


def decoder_layers(model):
    """The model's transformer layers, first to last: the list of modules as long as its configuration says. Raises
    UserError where there is none."""
    n = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)
    layers = next(lists, None)
    if layers is None:
        raise UserError(f"{model.config.model_type} has no list of its {n} layers, which rmu needs; use another method")
    return layers


def merge_lora(model, link):
    """`model`, dequantised where it was quantised, with the LoRA adapter of `link` added into its weights. Raises
    UserError unless its tensors are those that an adapter of its configuration on this model has."""
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
    found = schemas.read(file, schemas.LoraSettings)
    known = {*schemas.LoraSettings.model_fields, "base_model_name_or_path", "inference_mode", "peft_version"}
    plain = LoraConfig(task_type="CAUSAL_LM").to_dict()
    for name, value in found.items():
        if name not in known and value != plain.get(name) and value not in (None, False, {}, []):
            raise UserError(f"{file} sets {name}, which this project does not know; train the checkpoint again")
    names = "r", "lora_alpha", "lora_dropout", "bias", "target_modules"
    return LoraConfig(
        task_type="CAUSAL_LM", inference_mode=True, **{name: found[name] for name in names if name in found}
    )


def load_prompt(link: Link, width: int) -> torch.Tensor:
    """The virtual tokens (p, width), float32, that PEFT's saved format calls prompt_embeddings."""
    settings = schemas.read(link.path / "adapter_config.json", schemas.PromptSettings)
    expected = {"prompt_embeddings": Like((settings["num_virtual_tokens"], width))}
    tensors = read_tensors(link.path / "adapter_model.safetensors", expected, "prompt for this model")
    return tensors["prompt_embeddings"]


def dequantized(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with plain weights in its dtype. Raises UserError where the kind of its quantisation cannot be undone."""
    if not getattr(model, "is_quantized", False):
        return model
    kind = stored_quantization(model.config)
    try:
        return model.dequantize(model.dtype).requires_grad_(False)
    except (NotImplementedError, ValueError):
        raise UserError(f"the weights of this model ({kind}) cannot be dequantised; use the model it was made from")


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


def add_lora(model, args):
    """`model` with trainable float32 LoRA matrices, on PEFT's default layers for the architecture, else all linear."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    targets = args.lora_target_modules
    if not targets:
        targets = None if model.config.model_type in DEFAULTS else "all-linear"
    elif targets == ["all-linear"]:
        targets = "all-linear"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
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


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write the weights of a model, or of the adapter in it, into `folder`."""
    if isinstance(model, PeftModel):  # which by default asks the hub whether the base's embeddings have grown
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.save_pretrained(folder)


def check_length(config, n_tokens, p, spare=0):
    """Raise UserError if rows of `n_tokens` behind `p` virtual tokens do not fit the position range of a model with
    this configuration.

    spare: how many of these tokens --max_length does not count.
    """
    limit = position_limit(config)
    if limit and n_tokens + p > limit:
        raise UserError(
            f"the longest row has {n_tokens} tokens and the prompt {p}, but the model has {limit} positions; "
            f"use --max_length={limit - p - spare} or less"
        )


def check_tokens(config: object, tokenizer: object, examples: list) -> None:
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


def vocabulary_size(config: object) -> float:
    """How many tokens a model with this configuration has embeddings for; infinite where it does not say."""
    return getattr(config.get_text_config(), "vocab_size", None) or float("inf")


def position_limit(config):
    """The number of positions that a model's configuration names, or None."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def loading_arguments(path):
    """The arguments by which `from_pretrained` finds a folder or a GGUF file; nothing is fetched for either."""
    if path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
