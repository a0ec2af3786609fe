"""What is loaded is what was trained, whatever shares its weights, is quantised or is unusual; the rest is refused."""

import copy
import json
import shutil

import pytest
import scripts
import tiny
import torch
from marks import mostly_long
from peft import PeftModel
from scripts import done, refused
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BitsAndBytesConfig,
    CTRLConfig,
    DogeConfig,
    Gemma3Config,
    Gemma3nTextConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
)

from utils.data.batch import Example, collate
from utils.errors import UserError, is_out_of_memory
from utils.interventions.served import load_served
from utils.models import base
from utils.models.base import ModelSettings, dequantized
from utils.models.chain import resolve_chain
from utils.models.forward import completion_logits, prompt_prefix
from utils.models.layers import decoder_layers

FEW = ("--max_eval_samples=4", "--max_train_samples=8")
TWO_LAYERS = tiny.SIZES | {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Folder of a tiny Llama whose head is its embedding."""
    return save(tmp_path_factory.mktemp("tied") / "tied", LlamaConfig(**TWO_LAYERS, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def in_4_bits(tiny_model, tmp_path_factory):
    """Folder of the tiny Llama as bitsandbytes saves it."""
    return quantize(tiny_model, tmp_path_factory.mktemp("quantised") / "in-4-bits", load_in_4bit=True)


def quantize(source, folder, **kind):
    if "load_in_4bit" in kind:
        kind |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    options = {"quantization_config": BitsAndBytesConfig(**kind), "device_map": {"": "cpu"}, "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def save(folder, config, auto=AutoModelForCausalLM, tokenizer=True):
    """A random model of that configuration, its vocabulary that of the tiny models, with larger numbers than usual."""
    torch.manual_seed(0)
    for key, value in tiny.COMMON.items():
        setattr(config.get_text_config(), key, value)
    model = auto.from_config(config).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if tokenizer:
        tiny.build_tokenizer().save_pretrained(folder)
    return folder


def load_base(folder, **changes):
    return base.load_base(resolve_chain(str(folder))[0], ModelSettings(**vars(tiny.ON_CPU) | changes))


def losses(folder, place):
    """{split: loss} of the last record in a folder of results."""
    splits = json.loads((place / folder / "metrics.json").read_text())[-1]["splits"]
    return {split: splits[split]["loss"] for split in ("train_retain", "train_forget", "test_retain", "test_forget")}


TARGETS = "lm_head", "embed_tokens", "embed_tokens lm_head", "q_proj up_proj", "all-linear"


def scores_again(place, data, folder, few=FEW):
    """The checkpoint `folder`, loaded by inference_spul.py, has the losses that its training reported."""
    flags = f"--model_checkpoints={folder}", f"--dataset={data}", *scripts.ROWS, *few, "--output_path=again"
    done(scripts.call(place, "inference_spul", *flags, "--overwrite"))
    assert losses("again", place) == pytest.approx(losses(folder, place), rel=1e-4)


@pytest.mark.parametrize("targets", mostly_long(TARGETS, "embed_tokens lm_head", "all-linear"))
def test_a_lora_on_tied_weights_scores_the_same_when_loaded(targets, tied, small_data, tmp_path):
    """It changes the head or the embedding alone; merged into the weight that both share it would change both."""
    more = "--lr=2e-2", *FEW, "--output_path=out", "--lora_target_modules", *targets.split()
    done(scripts.qlora(tmp_path, tied, small_data, *more))
    scores_again(tmp_path, small_data, "out")
    model = load_served(str(tmp_path / "out"), tiny.ON_CPU).model
    separate = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert separate == ("lm_head" in targets or "embed" in targets) == (not model.config.tie_word_embeddings)
    if targets == "lm_head":  # on the untied model everything else can be trained, and is saved untied
        full = "--lr=1e-3", *FEW, "--output_path=full"
        done(scripts.baselines(tmp_path, "out", small_data, "gradient_ascent", *full))
        scores_again(tmp_path, small_data, "full")
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 600_000  # no copy of the embedding (1 MB)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_score_the_same_when_loaded(bias, small_data, tmp_path):
    opt = tiny.save(tmp_path / "opt", "opt")
    more = "--lr=2e-2", *FEW, f"--lora_bias={bias}", "--output_path=out"
    done(scripts.qlora(tmp_path, opt, small_data, *more))
    scores_again(tmp_path, small_data, "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["gradient_ascent_kl", "npo --tune=lora", "prompting --instruction=Go", "icul", "eco"]
)
def test_every_method_on_a_tied_model_scores_the_same_when_loaded(method, tied, small_data, tmp_path):
    name, *more = method.split()
    few = FEW if name != "eco" else FEW[:1]  # its classifier needs more rows
    few += ("--max_length=300",) if name == "icul" else ()
    more += {
        "eco": ["--eco_strength=1", "--eco_threshold=0.5"],
        "npo": ["--lr=1e-3"],
        "gradient_ascent_kl": ["--lr=1e-3"],
    }.get(name, [])
    done(scripts.baselines(tmp_path, tied, small_data, name, *few, "--output_path=out", *more))
    scores_again(tmp_path, small_data, "out", few)


def test_a_prompt_on_a_tied_model_scores_the_same_when_loaded(tied, small_data, tmp_path):
    done(scripts.spul(tmp_path, tied, small_data, *FEW, "--lr=1e-2", "--output_path=out"))
    scores_again(tmp_path, small_data, "out")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_lora_on_a_4_bit_model_is_merged_into_plain_weights(quantization, in_4_bits, small_data, tmp_path):
    more = "--lr=2e-2", *FEW, f"--quantization={quantization}", "--output_path=out", "--lora_target_modules=q_proj"
    done(scripts.qlora(tmp_path, in_4_bits, small_data, *more))
    scores_again(tmp_path, small_data, "out")
    merged = load_served(str(tmp_path / "out"), tiny.ON_CPU).model
    assert not merged.is_quantized and not hasattr(merged.config, "quantization_config")
    plain = dequantized(load_base(in_4_bits))
    adapter = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "out").base_model.model
    layer, own = (each.model.layers[0].self_attn.q_proj for each in (adapter, merged))
    assert torch.equal(own.weight, layer.base_layer.weight + layer.get_delta_weight("default"))


def test_a_4_bit_model_is_tuned_in_full(in_4_bits, small_data, tmp_path):
    flags = in_4_bits, small_data, "gradient_ascent", "--lr=1e-3", *FEW, "--output_path=out"
    assert "dry run" in done(scripts.baselines(tmp_path, *flags, "--dry_run")).stdout
    done(scripts.baselines(tmp_path, *flags))
    scores_again(tmp_path, small_data, "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_other_quantisations_are_taken_as_they_are_or_refused(tiny_model, small_data, tmp_path):
    in_8_bits = quantize(tiny_model, tmp_path / "in-8-bits", load_in_8bit=True)
    flags = f"--model_name={in_8_bits}", f"--dataset={small_data}", *scripts.QLORA, *FEW, "--output_path=out"
    for dry in ([], ["--dry_run"]):
        refused(tmp_path, "is quantised already; add --quantization=none", "qlora", *flags, "--quantization=nf4", *dry)
    done(scripts.call(tmp_path, "qlora", *flags))
    assert not load_served(str(tmp_path / "out"), tiny.ON_CPU).model.is_quantized
    config = json.loads((tiny_model / "config.json").read_text())
    other = shutil.copytree(tiny_model, tmp_path / "other")
    for method in ("gptq", "awq"):
        stored = {"quant_method": method, "bits": 4, "group_size": 128, "zero_point": True}
        (other / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
        refused(
            tmp_path, "cannot load a causal language model", "qlora", f"--model_name={other}", *flags[1:], "--overwrite"
        )


@pytest.mark.long
def test_what_a_quantised_model_takes_in_a_plan(tiny_model, in_4_bits, small_data, tmp_path):
    """Frozen in its 4 bits, plain once an adapter is merged into it."""

    def weights(model, *more):
        said = done(scripts.call(tmp_path, "spul", f"--model_checkpoints={model}", *flags, *more)).stdout
        return float(said.split("weights ")[1].split(" MiB")[0])

    flags = f"--dataset={small_data}", *scripts.SPUL, "--dry_run"
    done(scripts.qlora(tmp_path, in_4_bits, small_data, "--max_eval_samples=0", "--output_path=out"))
    assert weights(in_4_bits) < 0.6 * weights(tiny_model)
    assert weights(tmp_path / "out") == weights(tiny_model)


def test_4_bit_weights_stay_as_they_are_through_an_evaluation(in_4_bits, monkeypatch):
    """On some processors bitsandbytes packs them anew for evaluation: rounded, and without a gradient afterwards."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_base(in_4_bits)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert torch.equal(layer.weight.data, before) and not getattr(layer.weight.quant_state, "packing_format_for_cpu", 0)


@pytest.fixture
def larger(tiny_model, tmp_path):
    """A copy of the tiny model whose tokenizer has a padding token and one more, both beyond the embedding."""
    folder = shutil.copytree(tiny_model, tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<film>"]})
    assert tokenizer.pad_token_id == tiny.VOCABULARY
    tokenizer.save_pretrained(folder)
    return folder


def test_a_padding_token_beyond_the_embedding_is_not_used(larger, small_data, tmp_path):
    done(scripts.qlora(tmp_path, larger, small_data, *FEW, "--output_path=out"))
    assert load_served(str(tmp_path / "out"), tiny.ON_CPU).pad_id == 1  # the end-of-sequence token
    done(scripts.spul(tmp_path, "out", small_data, *FEW, "--output_path=prompt"))


@pytest.mark.parametrize("split", ["train_retain", "test_forget"])
def test_a_text_with_a_token_beyond_the_embedding_is_refused(split, larger, small_data, tmp_path):
    data = shutil.copytree(small_data, tmp_path / "data")
    lines = (data / f"{split}.csv").read_text()
    (data / f"{split}.csv").write_text(lines.replace("the ", "the <film> "))
    sentence = f"a text holds token {tiny.VOCABULARY + 1} ('<film>'), but the model knows {tiny.VOCABULARY}"
    flags = f"--dataset={data}", "--output_path=out"
    for dry in ([], ["--dry_run"]):
        refused(tmp_path, sentence, "qlora", f"--model_name={larger}", *scripts.QLORA, *flags, *dry)
        refused(tmp_path, sentence, "spul", f"--model_checkpoints={larger}", *scripts.SPUL, *flags, *dry)
    answer = f"--model_checkpoints={larger}", f"--dataset={small_data}", *scripts.ROWS, "--text=a <film> like that"
    refused(tmp_path, sentence, "inference_spul", *answer)
    start = f"--model_checkpoints={larger}", f"--dataset={small_data}", *scripts.SPUL, "--init_text=a <film>"
    refused(tmp_path, "--init_text holds '<film>', which the model does not know", "spul", *start, "--beta=0")


@pytest.mark.parametrize("kind", [ModernBertDecoderConfig, DogeConfig])
def test_an_architecture_of_another_build_takes_a_prompt(kind, tmp_path):
    """The one has a part of its head named decoder, the other makes masks of its values; both give what they should."""
    exact(load_base(save(tmp_path / "model", kind(**TWO_LAYERS))))


def test_a_text_model_within_another_is_exact(tmp_path):
    """It makes its masks outside of the decoder, whose attention must not be exchanged underneath them."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = TWO_LAYERS | {"head_dim": 32, "num_key_value_heads": 2, "sliding_window": 16}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    config.mm_tokens_per_image = 4
    exact(load_base(save(tmp_path / "model", config)))


def test_a_model_that_scales_embeddings_in_place_leaves_the_prompt_alone(tmp_path):
    config = CTRLConfig(n_embd=128, dff=256, n_layer=2, n_head=4, n_positions=512)
    model = load_base(save(tmp_path / "model", config))
    prompt = torch.randn(3, 128)
    before = prompt.clone()
    prompt_prefix(model, prompt)
    assert torch.equal(prompt, before)
    exact(model)


def exact(model):
    """Completion logits behind a prompt are those of every row alone, with the attention that was loaded."""
    torch.manual_seed(1)
    draw = lambda n: tuple(torch.randint(2, tiny.VOCABULARY, (n,)).tolist())  # noqa: E731
    rows = [Example(draw(prompt), draw(completion)) for prompt, completion in ((30, 1), (7, 3), (18, 2))]
    prompt = torch.randn(5, model.get_input_embeddings().weight.shape[1]) * 0.1
    with torch.no_grad():
        prefix = prompt_prefix(model, prompt)
        got = completion_logits(model, collate(rows, 1, "cpu"), prefix)
        alone = []
        for row in rows:
            embedded = model.get_input_embeddings()(torch.tensor([row.prompt + row.completion[:-1]]))
            inputs = torch.cat([prompt[None], embedded], dim=1)
            alone += model(inputs_embeds=inputs, use_cache=False).logits[0, len(prompt) + len(row.prompt) - 1 :]
    assert isinstance(prefix, list)
    assert torch.allclose(got, torch.stack(alone), atol=1e-4 * got.abs().max().item())


def test_models_that_are_not_causal_are_refused(small_data, tmp_path):
    bert = BertConfig(**TWO_LAYERS)
    bart = BartConfig(d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64)
    for name, config, auto, sentence in (
        (
            "encoder",
            bert,
            AutoModelForCausalLM,
            "is not causal: later tokens change what its earlier positions predict",
        ),
        ("both", bart, AutoModelForSeq2SeqLM, "is an encoder-decoder model; use a causal language model"),
        ("classes", tiny.CONFIGS["qwen2"], AutoModelForSequenceClassification, "is a Qwen2ForSequenceClassification"),
    ):
        folder = save(tmp_path / name, copy.deepcopy(config), auto)
        flags = f"--model_name={folder}", f"--dataset={small_data}", *scripts.QLORA
        refused(tmp_path, sentence, "qlora", *flags)
        if name != "encoder":
            refused(tmp_path, sentence, "qlora", *flags, "--dry_run")


def test_a_prompt_is_refused_where_embeddings_cannot_stand_for_tokens():
    """Gemma 3n looks every token up a second time, in each layer."""
    sizes = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 300, "num_kv_shared_layers": 0}
    config = Gemma3nTextConfig(**TWO_LAYERS | {"num_hidden_layers": 5}, head_dim=32, vocab_size=300, **sizes)
    config.layer_types = ["full_attention"] * 5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(UserError, match="gemma3n_text takes no embeddings in place of tokens"):
        prompt_prefix(model, torch.randn(3, 128))


def test_layers_that_cannot_be_found_are_a_sentence(tiny_model):
    model = load_base(tiny_model)
    model.config.num_hidden_layers = 77
    with pytest.raises(UserError, match="llama has no list of its 77 layers"):
        decoder_layers(model)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_one_sentence(error, tiny_model, small_data, tmp_path, monkeypatch):
    """While loading too, where other errors mean that the file is no model."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    flags = f"--model_name={tiny_model}", f"--dataset={small_data}", *scripts.QLORA
    refused(tmp_path, "the machine has too little memory; lower --micro_batch_size", "qlora", *flags)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_training_in_float16_is_refused(tiny_model, small_data, tmp_path):
    """Small gradients would become 0; what trains nothing may run in it."""
    sentence = "--dtype=float16 loses small gradients in training"
    refused(tmp_path, sentence, "qlora", f"--model_name={tiny_model}", f"--dataset={small_data}", "--dtype=float16")
    for script, method in (("spul", []), ("baselines", ["--unlearn_method=npo"])):
        flags = f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", "--dtype=float16", *method
        refused(tmp_path, sentence, script, *flags)
    done(
        scripts.baselines(
            tmp_path, tiny_model, small_data, "icul", *FEW, "--max_length=300", "--dtype=float16", "--output_path=out"
        )
    )


def test_gradients_of_a_memorised_row_vanish_in_float16():
    """Why: a head's gradient at p = 0.9999, of a batch of 32, is below half of float16's smallest number."""
    logits = torch.tensor([[10.0, 0.0]], requires_grad=True)
    (torch.nn.functional.cross_entropy(logits, torch.tensor([0])) / 32 * 0.02).backward()
    assert logits.grad.abs().max() > 0 and logits.grad.half().abs().max() == 0
