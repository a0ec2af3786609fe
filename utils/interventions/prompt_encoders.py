"""Encoders that produce the p x d virtual tokens phi (SPUL section 3.1; P-tuning, arXiv 2103.10385)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PromptEmbedding, PromptEncoder, PromptEncoderConfig, PromptTuningConfig
from safetensors.torch import save_file

from utils.errors import UserError, note_once
from utils.interventions import gate_files
from utils.interventions.base import Intervention
from utils.models.base import FrozenModel, ModelSettings
from utils.models.forward import Prefix, prompt_prefix
from utils.storage import schemas
from utils.storage.checkpoints import Link, verify_parent
from utils.storage.reading import Like, read_tensors
from utils.storage.schemas import Count, Open


class VirtualTokens(torch.nn.Module):
    """phi = encoder(0..p-1) + start, (p, d) float32; the encoder is PEFT's, `start` is fixed.

    `mlp`: embedding p x d, then Linear d->h, ReLU, Linear h->h, ReLU, Linear h->d (the published one). `lstm`: a
    bidirectional LSTM in front of a two-layer head. `embedding`: the p x d vectors themselves. Given `start` (p, d),
    the encoder's last layer begins at zero, so that training begins exactly at those vectors.
    """

    def __init__(self, kind: str, n_tokens: int, dim: int, hidden_size: int, start: torch.Tensor | None = None) -> None:
        super().__init__()
        self.config = peft_config(kind, n_tokens, dim, hidden_size)
        self.encoder = PromptEmbedding(self.config, None) if kind == "embedding" else PromptEncoder(self.config)
        self.register_buffer("start", torch.zeros(n_tokens, dim) if start is None else start.float())
        self.register_buffer("indices", torch.arange(n_tokens), persistent=False)
        if start is not None:
            last = self.encoder.embedding if kind == "embedding" else self.encoder.mlp_head[-1]
            for parameter in last.parameters():
                torch.nn.init.zeros_(parameter)

    def forward(self) -> torch.Tensor:
        return self.encoder(self.indices) + self.start


def peft_config(kind: str, n_tokens: int, dim: int, hidden_size: int) -> PromptEncoderConfig | PromptTuningConfig:
    """The PEFT config under which the finished vectors are saved and reloaded by `PeftModel.from_pretrained`."""
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": n_tokens, "token_dim": dim}
    common["num_transformer_submodules"] = 1
    if kind == "embedding":
        return PromptTuningConfig(**common)
    return PromptEncoderConfig(
        **common, encoder_hidden_size=hidden_size, encoder_reparameterization_type=kind.upper(), encoder_dropout=0.0
    )


def start_from_text(tokenizer: Any, embeddings: torch.nn.Module, text: str, n_tokens: int) -> torch.Tensor:
    """The embeddings (p, d) of `text`, its tokens repeated or cut to `n_tokens` (P-tuning's TEXT initialisation)."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("--init_text has no token; write an instruction")
    if max(ids) >= embeddings.weight.shape[0]:
        unknown = tokenizer.decode(max(ids))
        raise UserError(f"--init_text holds {unknown!r}, which the model does not know; leave it out")
    if len(ids) > n_tokens:
        note_once(f"--init_text has {len(ids)} tokens and the prompt {n_tokens}; the last ones are left out")
    ids = (ids * (n_tokens // len(ids) + 1))[:n_tokens]
    with torch.no_grad():
        return embeddings(torch.tensor(ids, device=embeddings.weight.device)).float()


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """The encoder of a new prompt: the flags of those names."""

    prompt_encoder: str = "mlp"
    ptuning_num_tokens: int = 30
    ptuning_hidden_size: int = 128
    init_text: str | None = None


def build_encoder(served: FrozenModel, settings: EncoderSettings) -> VirtualTokens:
    """A new encoder for the model of `served`, started from settings.init_text if there is one."""
    embeddings, n_tokens, start = served.model.get_input_embeddings(), settings.ptuning_num_tokens, None
    if settings.init_text is not None:
        start = start_from_text(served.tokenizer, embeddings, settings.init_text, n_tokens)
    width = embeddings.weight.shape[1]
    return VirtualTokens(settings.prompt_encoder, n_tokens, width, settings.ptuning_hidden_size, start)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt(Intervention):
    """Virtual tokens in front of every query. vectors: (p, d) float32."""

    vectors: torch.Tensor
    _kept: dict[torch.nn.Module, Prefix] = field(default_factory=dict, init=False, repr=False)

    @property
    def n_tokens(self) -> int:
        return len(self.vectors)

    def prefix(self, model: torch.nn.Module) -> Prefix:
        """What `prompt_prefix` makes of the vectors, computed once."""
        if model not in self._kept:
            self._kept[model] = prompt_prefix(model, self.vectors)
        return self._kept[model]


class PromptFile(Open):
    """adapter_config.json of a prompt."""

    what = "configuration of a prompt"
    peft_type: Literal["P_TUNING", "PROMPT_TUNING"]
    num_virtual_tokens: Count
    token_dim: Count
    auto_mapping: None = None


def load(link: Link, served: FrozenModel, model_settings: ModelSettings, max_length: int) -> Prompt:
    """The prompt of a checkpoint, which PEFT's saved format calls prompt_embeddings, with its gate if it has one.

    Raises UserError where it is not one for the model of `served`.
    """
    settings = schemas.read(link.path / "adapter_config.json", PromptFile)
    width = served.model.get_input_embeddings().weight.shape[1]
    expected = {"prompt_embeddings": Like((settings["num_virtual_tokens"], width))}
    tensors = read_tensors(link.path / "adapter_model.safetensors", expected, "prompt for this model")
    gate = None
    if gate_files.has_gate(link):
        gate = gate_files.load(link.path, served, model_settings.trust_remote_code, max_length)
    return Prompt(vectors=tensors["prompt_embeddings"].to(served.model.device), gate=gate)


def save(encoder: VirtualTokens, base: str, folder: Path) -> None:
    """Write the finished vectors as a prompt of PEFT on the model `base`, and the encoder that made them."""
    encoder.config.base_model_name_or_path = base
    encoder.config.inference_mode = True
    encoder.config.save_pretrained(folder)
    save_file({"prompt_embeddings": encoder().detach().cpu().contiguous()}, folder / "adapter_model.safetensors")
    save_file({k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}, folder / "encoder.safetensors")


def refuse_other_start(link: Link, parent: Link) -> None:
    """Raise UserError unless the checkpoint `link` is a prompt on the model `parent`."""
    if link.kind != "prompt":
        raise UserError(f"{link.name} is no prompt; --init_checkpoint takes what spul.py wrote")
    verify_parent(parent, link)


def load_encoder(encoder: VirtualTokens, link: Link) -> None:
    """Give `encoder` the weights that the prompt `link` was made by. Raises UserError where they have another form."""
    expected = {name: Like(tuple(tensor.shape)) for name, tensor in encoder.state_dict().items()}
    what = "encoder of this --prompt_encoder, --ptuning_num_tokens and --ptuning_hidden_size"
    remedy = "pass those that it was trained with"
    encoder.load_state_dict(read_tensors(link.path / "encoder.safetensors", expected, what, remedy))
