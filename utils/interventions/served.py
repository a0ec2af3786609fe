"""A model ready to answer: the frozen weights and what stands between them and a query."""

from dataclasses import dataclass
from functools import cached_property

import torch

from utils.interventions import eco, in_context
from utils.models.adapters import load_prompt, merge_lora
from utils.models.base import load_base, load_tokenizer
from utils.models.chain import resolve_chain
from utils.models.forward import prompt_prefix
from utils.storage.checkpoints import base_name


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


def load_served(name, args, parent=None):
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
        return eco.load(chain[-1], loaded, args)
    return loaded
