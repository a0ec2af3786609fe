"""Encoders that produce the p x d virtual tokens phi (SPUL section 3.1; P-tuning, arXiv 2103.10385)."""

import torch
from peft import PromptEmbedding, PromptEncoder, PromptEncoderConfig, PromptTuningConfig

from utils.errors import UserError


class VirtualTokens(torch.nn.Module):
    """phi = encoder(0..p-1) + start, (p, d) float32; the encoder is PEFT's, `start` is fixed.

    `mlp`: embedding p x d, then Linear d->h, ReLU, Linear h->h, ReLU, Linear h->d (the published one). `lstm`: a
    bidirectional LSTM in front of a two-layer head. `embedding`: the p x d vectors themselves. Given `start` (p, d),
    the encoder's last layer begins at zero, so that training begins exactly at those vectors.
    """

    def __init__(self, kind, n_tokens, dim, hidden_size, start=None):
        super().__init__()
        self.config = peft_config(kind, n_tokens, dim, hidden_size)
        self.encoder = PromptEmbedding(self.config, None) if kind == "embedding" else PromptEncoder(self.config)
        self.register_buffer("start", torch.zeros(n_tokens, dim) if start is None else start.float())
        self.register_buffer("indices", torch.arange(n_tokens), persistent=False)
        if start is not None:
            last = self.encoder.embedding if kind == "embedding" else self.encoder.mlp_head[-1]
            for parameter in last.parameters():
                torch.nn.init.zeros_(parameter)

    def forward(self):
        return self.encoder(self.indices) + self.start


def peft_config(kind, n_tokens, dim, hidden_size):
    """The PEFT config under which the finished vectors are saved and reloaded by `PeftModel.from_pretrained`."""
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": n_tokens, "token_dim": dim}
    common["num_transformer_submodules"] = 1
    if kind == "embedding":
        return PromptTuningConfig(**common)
    return PromptEncoderConfig(
        **common, encoder_hidden_size=hidden_size, encoder_reparameterization_type=kind.upper(), encoder_dropout=0.0
    )


def start_from_text(tokenizer, embeddings, text, n_tokens):
    """The embeddings (p, d) of `text`, its tokens repeated or cut to `n_tokens` (P-tuning's TEXT initialisation)."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("--init_text has no token; write an instruction")
    if max(ids) >= embeddings.weight.shape[0]:
        unknown = tokenizer.decode(max(ids))
        raise UserError(f"--init_text holds {unknown!r}, which the model does not know; leave it out")
    if len(ids) > n_tokens:
        print(f"note: --init_text has {len(ids)} tokens and the prompt {n_tokens}; the last ones are left out")
    ids = (ids * (n_tokens // len(ids) + 1))[:n_tokens]
    with torch.no_grad():
        return embeddings(torch.tensor(ids, device=embeddings.weight.device)).float()
