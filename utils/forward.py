"""Forward passes that compute what is used: logits at completion tokens, the prompt's keys and values once.

Why both are exact. The head acts on each position alone, so gathering the N positions that predict a completion token
before the head gives the same N rows of logits as computing all B x T and gathering afterwards. With causal attention
the virtual tokens see only themselves, so their keys and values are the same for every row: computing them once and
expanding over the batch gives the same numbers, and by the chain rule the same gradient (the sum over rows).
"""

from contextlib import contextmanager

import torch
from transformers import DynamicCache


def completion_logits(model, batch, prompt=None, reference=None, reference_head=None):
    """Logits at the positions that predict a completion token, float32, (N, |V|); a pair if `reference` is given.

    model: causal LM. batch: utils.data.Batch. prompt: None, virtual tokens (p, d) to stand in front of every row, or
    what `prompt_prefix` made of them. reference: hidden states (M, d) as `completion_hidden` gives them; the head
    maps them in the same call and the second item of the pair is their logits (M, |V|). reference_head: what maps
    them instead, where the head itself is trained: a frozen copy of it from before.
    """
    with _gather_before_head(model, batch, reference, reference_head) as seen:
        logits = _run(model, batch, prompt, seen).float()
    return logits if reference is None else logits.split([len(batch.rows), len(reference)])


@torch.no_grad()
def completion_hidden(model, batch):
    """The head's inputs at the positions that predict a completion token, (N, d), in the model's dtype."""
    with _gather_before_head(model, batch) as seen:
        _run(model, batch, None, seen)
    return seen["hidden"]


def prompt_prefix(model, prompt):
    """Keys and values of the virtual tokens `prompt` (p, d) per layer, for reuse over batches; `prompt` where a layer
    cannot keep them (sliding windows, recurrent state)."""
    if not _attends_fully(model.config, model.config.get_text_config()):
        return prompt
    cache = model(inputs_embeds=_cast(model, prompt)[None], use_cache=True, logits_to_keep=1).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def _attends_fully(config, text_config):
    """Whether every layer is plain causal attention, whose cache is just keys and values of all positions."""
    kinds = getattr(text_config, "layer_types", None)
    if kinds is not None:
        return all(kind == "full_attention" for kind in kinds)
    return getattr(text_config, "sliding_window", None) is None and not getattr(config, "is_stateful", False)


def _run(model, batch, prompt, seen):
    if prompt is None:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    size = len(batch.input_ids)
    if isinstance(prompt, torch.Tensor):
        seen["offset"] = len(prompt)
        embedded = model.get_input_embeddings()(batch.input_ids)
        virtual = _cast(model, prompt).expand(size, -1, -1)
        mask = torch.nn.functional.pad(batch.attention_mask, (len(prompt), 0), value=1)
        inputs = torch.cat([virtual, embedded], dim=1)
        return model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
    expanded = [(k.expand(size, -1, -1, -1), v.expand(size, -1, -1, -1)) for k, v in prompt]
    mask = torch.nn.functional.pad(batch.attention_mask, (prompt[0][0].shape[2], 0), value=1)
    cache = DynamicCache(ddp_cache_data=expanded)
    return model(input_ids=batch.input_ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits


def _cast(model, prompt):
    return prompt.to(model.get_input_embeddings().weight.dtype)


@contextmanager
def _gather_before_head(model, batch, reference=None, reference_head=None):
    """While open, the head sees only hidden states that predict completion tokens, then the rows of `reference`.

    Hooks on the head rather than a second call of it, so that whatever the architecture does after the head (soft
    caps, scales) still happens. Yields a dict: `offset` = virtual tokens in front, set before the pass; `hidden`.
    """
    seen = {"offset": 0}

    def gather(_, inputs):
        hidden = inputs[0]  # the head may be on another device than the batch
        rows, positions = batch.rows.to(hidden.device), batch.positions.to(hidden.device)
        seen["hidden"] = hidden[rows, positions + seen["offset"]]
        if reference is None or reference_head is not None:
            return (seen["hidden"],)
        return (torch.cat([seen["hidden"], reference.to(inputs[0])]),)

    def append(_, inputs, output):
        return torch.cat([output, reference_head(reference.to(inputs[0])).to(output)])

    head = model.get_output_embeddings()
    handles = [head.register_forward_pre_hook(gather)]
    if reference_head is not None:
        handles.append(head.register_forward_hook(append))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_activations(layer):
    """While open, every pass leaves the output (B, T, d) of module `layer` in the yielded dict under `activations`."""
    seen = {}

    def keep(_, inputs, output):
        seen["activations"] = output[0] if isinstance(output, tuple) else output

    handle = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
