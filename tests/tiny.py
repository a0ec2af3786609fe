"""Tiny random models for tests of mechanics, built in a second; never evidence that SPUL works."""

import functools
import json

import gguf
import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from utils.data.load import SNIPPETS_FOLDER
from utils.models.base import ModelSettings
from utils.tasks.classification import TEMPLATE_HEAD, TEMPLATE_TAIL

ON_CPU = ModelSettings(device="cpu", dtype="float32")
VOCABULARY = 2000
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, **COMMON),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, **COMMON),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16, **COMMON),
    "gemma2": Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=32, sliding_window=16, final_logit_softcapping=5.0, **COMMON
    ),
    "opt": OPTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, ffn_dim=256, word_embed_proj_dim=128, **COMMON
    ),
    "gpt2": GPT2Config(
        n_embd=128, n_layer=4, n_head=4, n_positions=512, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1
    ),
}


def build_tokenizer():
    """A byte-level BPE of 2,000 tokens from snippets' train sentences; ` positive` is one token, ` neutral` several."""
    tokenizer = Tokenizer.from_str(_trained_tokenizer())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def _trained_tokenizer():
    """The tokenizer as JSON, trained once a process."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = pd.read_csv(SNIPPETS_FOLDER / "train_retain.csv").head(3000)
    lines = [f"{TEMPLATE_HEAD}{text}{TEMPLATE_TAIL} {word}" for text, word in zip(rows["text"], rows["label_text"])]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str()


def rows_of(method, rows, preferred):
    """The Rows of a `method` whose training examples are `rows`, and `preferred` what its forget rows should say."""
    from utils.unlearning.objectives import Rows

    made = Rows.__new__(Rows)
    forget = [i for i, row in enumerate(rows) if row.forget]
    made.trained, made.alternative = rows, {i: len(rows) + k for k, i in enumerate(forget)} if method.preferred else {}
    made.all = [*rows, *preferred] if method.preferred else rows
    return made


def perturb(model, scale=0.05):
    """Change every trained weight a little, adapters included."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def build_model(architecture="llama", seed=0):
    """A random causal LM of about a million parameters, float32, in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture], attn_implementation="eager").float().eval()


def save(folder, architecture="llama"):
    """Write model and tokenizer as a plain Hugging Face folder."""
    model = build_model(architecture)
    if not model.config.tie_word_embeddings:
        model.get_output_embeddings().weight.data *= 10  # so that a few steps of training move probabilities
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_gguf(path):
    """Write what `save` writes as one GGUF file of float32 numbers. Attention rows lie in GGUF's order: the two halves
    of a head, which rotary embeddings pair, are interleaved."""
    model, tokenizer, config = build_model(), build_tokenizer(), CONFIGS["llama"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (VOCABULARY - 2))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values, kind = tensor.numpy(), name.split(".")[-2]
        if kind == "lm_head":
            values = values * 10  # as `save`
        if kind in heads:
            values = values.reshape(heads[kind], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ROWS = {"train_retain": 16, "train_forget": 8, "test_retain": 6, "test_forget": 4}


def save_splits(folder):
    """Write four small splits of snippets as CSV, half of each positive."""
    folder.mkdir()
    for split, n in ROWS.items():
        frame = pd.read_csv(SNIPPETS_FOLDER / f"{split}.csv")
        halves = [frame[frame["label"] == label].head(n // 2) for label in (0, 1)]
        pd.concat(halves).sort_index().to_csv(folder / f"{split}.csv", index=False)
    return folder
