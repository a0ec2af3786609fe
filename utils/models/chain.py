"""From a name to the models it stands for: base, LoRA, prompt, each verified by hash before anything is loaded."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from utils.errors import UserError, first_line
from utils.storage import schemas
from utils.storage.checkpoints import Link, first_manifest, parent_path, read_manifest, verify_parent
from utils.storage.files import recover
from utils.storage.schemas import Open, Text


class ModelConfig(Open):
    """config.json of a model, which is not ours: only what would fetch something is looked at."""

    what, remedy = "configuration of a model", "restore it"
    model_type: Text | None = None
    transformers_weights: Text | None = None


PROMPTED = ("prompt", "in-context", "eco", "gate", "refusal")  # kinds that stand at the end of a chain
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


def resolve_chain(
    name: str | Path,
    trust_remote_code: bool = False,
    parent: str | None = None,
    weights: bool = True,
    children: tuple[Path, ...] = (),
) -> list[Link]:
    """The Links from the base model to `name`, base first, every parent verified by hash.

    `name`: a checkpoint folder, a model folder, a .gguf file or a hub id. `parent`: where the parent of `name` lies,
    if it was moved. weights=False: nothing is verified, and of a hub id no weights are fetched. children: the folders
    whose parents led here, so that a circle is found. Raises UserError on anything missing, damaged or not the recorded
    parent.
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
    config = schemas.read_foreign(path / "config.json", ModelConfig)
    if config.get("transformers_weights"):
        raise UserError(f"{path}/config.json names its weights itself; remove transformers_weights from it")
    for key, value in _entries(config):
        if re.fullmatch(r"_?(attn|experts)_implementation(_internal)?", key) and value not in LOCAL_ATTENTION:
            raise UserError(f"{path}/config.json wants the {key} {value!r}, which is not in the folder; remove it")


def _entries(value: Any) -> list[tuple[str, Any]]:
    """Every (key, value) of nested JSON objects."""
    parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return [*(value.items() if isinstance(value, dict) else ()), *(entry for part in parts for entry in _entries(part))]


def short_name(name: str) -> str:
    """`<model>` of the published folder names: the base model's own name in lower case, `llama-2-7b-hf` say, whichever
    checkpoint on top of it `name` is."""
    path = Path(first_manifest([name]).get("base", name))
    own = path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name
    return own.lower()


def _local_path(name: str | Path, trust_remote_code: bool, weights: bool) -> Path:
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


def _from_hub(name: str, trust_remote_code: bool, weights: bool) -> Path:
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


def load_config(link: Link, trust_remote_code: bool, quantization: str = "none") -> PreTrainedConfig:
    """The configuration of a plain model; of a GGUF file from its metadata.

    Raises UserError where there is none, where the model is no causal language model, and where it cannot be loaded
    with this quantization (see utils.models.base.load_base).
    """
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


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """How the weights of a model with this configuration lie on the disk.

    None: as plain numbers. `4-bit`: as bitsandbytes packs them. Else the name of another method.
    """
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict | None) else stored.to_dict()
    if stored is None:
        return None
    return "4-bit" if stored.get("load_in_4bit") else stored.get("quant_method", "quantised")


def refuse_prompted(chain: Sequence[Link], flag: str = "--model_checkpoints") -> None:
    """Raise UserError if the last Link, which `flag` named, is a prompt: what trains or instructs a model takes the
    model itself."""
    if chain[-1].kind in PROMPTED:
        raise UserError(f"{chain[-1].path} already is a prompt; {flag} takes what it was made on")


def loading_arguments(path: Path) -> dict[str, str | bool]:
    """The arguments by which `from_pretrained` finds a folder or a GGUF file; nothing is fetched for either."""
    if path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
