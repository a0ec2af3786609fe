"""Loading any causal language model from a folder, its tokenizer, and LoRA on it."""

import copy
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import scripts
import tiny
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    masking_utils,
)

from utils.errors import UserError
from utils.models import attention, base, forward, quiet
from utils.models.adapters import LoraSettings, add_lora
from utils.models.attention import GROUPED
from utils.models.base import ModelSettings, load_base, load_tokenizer, pick_device
from utils.models.chain import resolve_chain, short_name
from utils.models.lengths import check_length
from utils.storage.checkpoints import Link

LORA = LoraSettings(lora_rank=4, lora_alpha=8.0, lora_dropout=0.0)


@pytest.fixture(scope="module", params=list(tiny.CONFIGS))
def saved(request, tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / request.param, request.param)


def load(folder, quantization="none", **changes):
    link = resolve_chain(str(folder))[0]
    return load_base(link, ModelSettings(**vars(tiny.ON_CPU) | changes), quantization)


def test_every_architecture_loads_whole_and_frozen(saved):
    """Also those that share their embedding with the head, or leave its copy out of the file."""
    from transformers import AutoModelForCausalLM

    model, expected = load(saved), AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert set(model.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_every_architecture_loads_in_nf4(saved):
    model = load(saved, "nf4")
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all()


def test_every_architecture_takes_lora(saved):
    """In float32 also on a bfloat16 model; at the start it changes nothing."""
    model = load(saved, dtype="bfloat16")
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    adapted = add_lora(model, LORA)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert torch.equal(adapted(input_ids=ids).logits, before)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_biases_are_trained_in_the_dtype_of_the_model(tmp_path, quantization):
    model = load(tiny.save(tmp_path / "opt", "opt"), quantization, dtype="bfloat16")
    adapted = add_lora(model, LoraSettings(**vars(LORA) | {"lora_bias": "all"}))
    adapted(input_ids=torch.tensor([[5, 6, 7]])).logits.float().sum().backward()
    biases = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert biases and all(name.endswith("bias") and p.dtype == torch.bfloat16 for name, p in biases.items())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in biases.values())


def test_lora_goes_where_the_user_says(tiny_model):
    names = {
        ("all-linear",): {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ("o_proj", "up_proj"): {"o_proj", "up_proj"},
        None: {"q_proj", "v_proj"},
    }
    for targets, expected in names.items():
        arguments = LoraSettings(**vars(LORA) | {"lora_target_modules": targets and list(targets)})
        adapted = add_lora(load(tiny_model), arguments)
        assert {
            name.split(".lora_")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_" in name
        } == expected


def test_the_pad_token_is_the_users_choice(tiny_model):
    chain = resolve_chain(str(tiny_model))
    tokenizer = load_tokenizer(chain, set_pad_id=False)
    assert tokenizer.pad_token == tokenizer.eos_token  # it has none of its own
    tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(tiny_model.parent / "padded")
    padded = [Link(tiny_model.parent / "padded", "padded")]
    assert load_tokenizer(padded, set_pad_id=False).pad_token == "<s>"
    assert load_tokenizer(padded, set_pad_id=True).pad_token == "</s>"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_weights_have_the_chosen_type(tiny_model, dtype):
    assert load(tiny_model, dtype=dtype).dtype == getattr(torch, dtype)


def test_automatic_types_do_not_overflow(tiny_model):
    assert load(tiny_model, dtype="auto").dtype in (torch.bfloat16, torch.float32)


def test_one_model_on_all_gpus_is_never_spread_beyond_them(tiny_model, monkeypatch):
    """Without a GPU there is nothing to spread it on; where they are too small the rest would go to the slow CPU."""
    with pytest.raises(UserError, match="--device=balanced is not available on this machine"):
        load(tiny_model, device="balanced")
    monkeypatch.setattr(base, "pick_device", lambda name: name)
    with pytest.raises(UserError, match="tiny-llama does not fit the GPUs"):
        load(tiny_model, device="balanced")


def test_a_tokenizer_without_pad_and_end_pads_with_some_token(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for file in folder.glob("*token*.json"):
        settings = json.loads(file.read_text())
        for key in ("pad_token", "eos_token"):
            settings.pop(key, None)
        file.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(resolve_chain(str(folder)), False)
    assert tokenizer.eos_token is None and tokenizer.pad_token_id == 0


def test_of_several_processes_each_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == "cuda"
    state = Namespace(num_processes=2, device=torch.device("cuda", 1))
    monkeypatch.setattr("utils.distributed.PartialState", lambda: state)
    assert pick_device("auto") == pick_device("cuda") == "cuda:1"
    assert pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="start it with python, not accelerate launch"):
        pick_device("balanced")


def test_rows_and_prompt_must_fit_the_positions(tiny_model):
    model = load(tiny_model)
    check_length(model.config, 500, 12)
    with pytest.raises(UserError, match="the longest row has 501 tokens and the prompt 12, .* use --max_length=500"):
        check_length(model.config, 501, 12)


def test_folders_carry_the_base_model_s_name_in_lower_case(tiny_model, fine_tuned, monkeypatch):
    monkeypatch.chdir(tiny_model)
    names = {"meta-llama/Llama-2-7b-hf": "llama-2-7b-hf", f"{tiny_model}/": "tiny-llama", ".": "tiny-llama"}
    names |= {"a/Model.gguf": "model", str(fine_tuned): "tiny-llama"}
    assert {name: short_name(name) for name in names} == names


def test_attention_on_a_cpu(saved):
    """Ours takes the place of SDPA. Gemma-2 caps its scores, which only eager attention does."""
    model = load(saved)
    expected = "eager" if model.config.model_type == "gemma2" else GROUPED
    assert model.config._attn_implementation == expected


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """In half precision its layers make two answers of two roundings."""
    folder, config = tmp_path_factory.mktemp("deep") / "model", copy.deepcopy(tiny.CONFIGS["llama"])
    config.num_hidden_layers = 24
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 3000
        layer.self_attn.v_proj.weight.data *= 30
        layer.self_attn.o_proj.weight.data *= 10
    model.save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


def test_a_deep_model_in_half_precision_keeps_its_attention(deep_model):
    model = load(deep_model, dtype="bfloat16")
    assert model.config._attn_implementation == GROUPED
    batch = forward.trial_batch(model)
    with torch.no_grad():
        own = forward.completion_logits(model, batch)
        model.set_attn_implementation("sdpa")
        theirs = forward.completion_logits(model, batch)
    assert not forward.same_numbers(model, own, theirs)  # though neither is wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", ["numbers", "mask", "mask for generation"])
def test_attention_that_changes_a_models_numbers_is_not_taken(deep_model, monkeypatch, wrong, dtype):
    own = attention.grouped_attention
    if wrong == "numbers":
        larger = lambda *args, **kwargs: (own(*args, **kwargs)[0] * 1.01, None)  # noqa: E731
        monkeypatch.setitem(AttentionInterface._global_mapping, GROUPED, larger)
    else:

        def nothing(**sizes):
            skipped = wrong == "mask for generation" and attention._PADDED_BEHIND.get()
            return None if skipped else masking_utils.eager_mask(**sizes) * 0

        monkeypatch.setitem(AttentionMaskInterface._global_mapping, GROUPED, nothing)
    assert load(deep_model, dtype=dtype).config._attn_implementation == "sdpa"


def test_masks_that_a_layer_gets_as_copies(deep_model):
    """As with --device=balanced, where a layer on another GPU is given a copy of the mask: the trial knows it again."""
    model = load(deep_model, attn_implementation="sdpa")
    expected = forward.trial(model, "model")
    copied = lambda _, args, given: (args, given | {"attention_mask": copy.deepcopy(given["attention_mask"])})  # noqa: E731
    for layer in model.model.layers:
        layer.register_forward_pre_hook(copied, with_kwargs=True)
    assert forward.attention_agrees(model, GROUPED, expected)


def test_auto_leaves_the_attention_of_parts_alone():
    """A model within another may have none of ours, and parts that have one implementation only."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Gemma3Config(text_config={"hidden_size": 64, "num_hidden_layers": 1, "head_dim": 32}, vision_config=vision)
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    model.config.vision_config._attn_implementation = "eager"
    attention.set_attention(model, "auto", "cpu")
    assert model.config.vision_config._attn_implementation == "eager"


@pytest.mark.parametrize("choice", ["eager", "sdpa"])
def test_attention_as_asked_for(tiny_model, choice):
    link = resolve_chain(str(tiny_model))[0]
    model = load_base(link, ModelSettings(**vars(tiny.ON_CPU) | {"attn_implementation": choice}))
    assert model.config._attn_implementation == choice


def test_attention_that_is_not_there_is_refused(tiny_model, tmp_path):
    gemma = tiny.save(tmp_path / "gemma2", "gemma2")
    for folder, choice, sentence in (
        (tiny_model, "flash_attention_2", "needs a GPU"),
        (gemma, "sdpa", "gemma2 has no sdpa attention"),
    ):
        link = resolve_chain(str(folder))[0]
        with pytest.raises(UserError, match=sentence):
            load_base(link, ModelSettings(**vars(tiny.ON_CPU) | {"attn_implementation": choice}))


CLAIMS_AVX512 = '''
import importlib.machinery
import sys


class Finder:
    """Lets bitsandbytes find the processor that makes it ask the hub for a kernel."""

    def find_spec(self, name, path=None, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), setattr(module, "has_avx512bf16", lambda: True))
        return spec


sys.meta_path.insert(0, Finder())
'''


@pytest.mark.parametrize("installed", [True, False])
def test_importing_bitsandbytes_asks_no_hub_and_says_nothing(tmp_path, installed):
    (tmp_path / "sitecustomize.py").write_text(CLAIMS_AVX512, encoding="utf-8")
    if installed:
        (tmp_path / "kernels.py").write_text("get_kernel = lambda *_, **__: print('asked the hub')", encoding="utf-8")
    command = [sys.executable, "-c", "import utils.models"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{scripts.ROOT}"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=True)
    assert (ended.stdout, ended.stderr) == ("", "")


def test_importing_bitsandbytes_leaves_the_compiler_for_later():
    """Dynamo and Inductor are not imported, and torch.compile is afterwards what it was."""
    check = "import sys, torch; own = torch.compile; import utils.models; print(torch.compile is own)\n"
    check += "print([name for name in ('torch._dynamo', 'torch._inductor.compile_fx') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", check], cwd=scripts.ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split("\n")[:2] == ["True", "[]"]


def test_what_is_to_be_compiled_is_compiled_when_it_is_called(monkeypatch):
    made = []

    def compile_now(function, **options):
        made.append((function.__name__, options))
        return function

    monkeypatch.setattr(quiet, "_compile", compile_now)
    with_options, plain = quiet._compile_when_called(dynamic=False)(add), quiet._compile_when_called(add)
    assert made == [] and plain.__name__ == "add"
    assert [with_options(2, b=3), with_options(4), plain(1, 1)] == [5, 5, 2]
    assert made == [("add", {"dynamic": False}), ("add", {})]


def add(a, b=1):
    return a + b
