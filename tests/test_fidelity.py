"""What the published code does where the paper is silent: defaults, warm-up, weight decay, folders, batches."""

import importlib
import sys
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from scripts import call, done
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from utils.data.batch import Example, epoch_batches
from utils.errors import UserError, note_once
from utils.interventions.prompt_encoders import VirtualTokens
from utils.training.loop import Training, TrainingSettings

COMMON = {"output_path": None}
TRAINING = COMMON | {
    "max_length": 1024, "set_pad_id": False, "lr": 1e-4, "train_batch_size": 32, "eval_batch_size": 32,
    "weight_decay": 0.001, "max_grad_norm": 0.3,
}  # fmt: skip
LORA = {"lora_rank": 16, "lora_alpha": 64, "lora_dropout": 0.1, "lora_bias": "none"}
SPUL = {"ptuning_num_tokens": 30, "ptuning_hidden_size": 128, "alpha": 0.5, "beta": 0.5}
REQUIRED = {
    "qlora": ["--model_name=m"],
    "spul": ["--model_checkpoints=m"],
    "baselines": ["--model_checkpoints=m", "--unlearn_method=gradient_ascent"],
    "inference_spul": ["--model_checkpoints=m"],
}
DEFAULTS = {
    "qlora": TRAINING | LORA | {"num_epochs": 10},
    "spul": TRAINING | SPUL | {"num_epochs": 10, "forget_size": 1.0, "logits_path": None},
    "baselines": TRAINING | {"num_epochs": 1, "logits_path": None},
    "inference_spul": COMMON | {"forget_size": 1.0, "logits_path": None},
}
WARMUP = {"qlora": 0.05, "spul": 0.1, "baselines": 0.05}


def parsed(script, *flags):
    with mock.patch.object(sys, "argv", [f"{script}.py", *REQUIRED[script], *flags]):
        return importlib.import_module(script).parse_args()


@pytest.mark.parametrize("script", DEFAULTS)
def test_published_flags_have_their_published_defaults(script):
    assert DEFAULTS[script].items() <= vars(parsed(script)).items()


@pytest.mark.parametrize("script", WARMUP)
def test_the_published_share_of_steps_warms_up(script, tiny_model, small_data, tmp_path, monkeypatch):
    def run(training):
        seen.append(training.warmup)
        raise UserError("far enough")

    seen = []
    monkeypatch.setattr(Training, "run", run)
    flags = [flag.replace("=m", f"={tiny_model}") for flag in REQUIRED[script]]
    call(tmp_path, script, *flags, f"--dataset={small_data}", "--max_length=96", "--max_eval_samples=0", "--device=cpu")
    assert seen == [WARMUP[script]]


def test_inference_takes_the_published_logits_path_and_says_what_becomes_of_it(fine_tuned, small_data, tmp_path):
    note_once.cache_clear()
    flags = f"--model_checkpoints={fine_tuned}", f"--dataset={small_data}", "--max_eval_samples=1", "--max_length=96"
    said = done(call(tmp_path, "inference_spul", *flags, "--logits_path=reference", "--dtype=float32"))
    assert "--logits_path is not used" in said.stderr
    assert not (tmp_path / "reference").exists()


def with_lora(architecture):
    model = tiny.build_model(architecture)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", bias="all"))


LEARNERS = {
    **{f"all of {name}": lambda name=name: tiny.build_model(name) for name in tiny.CONFIGS},
    **{f"LoRA on {name}": lambda name=name: with_lora(name) for name in ("llama", "gpt2", "opt")},
    **{kind: lambda kind=kind: VirtualTokens(kind, 3, 8, 4) for kind in ("mlp", "lstm", "embedding")},
}


@pytest.mark.parametrize("learner", LEARNERS)
def test_what_decays_is_what_trainer_lets_decay(learner, tmp_path):
    """Matrices; neither biases nor norms."""
    model = LEARNERS[learner]()
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = Trainer(model, TrainingArguments(tmp_path, use_cpu=True)).get_decay_parameter_names(model)
    optimizer = Training(
        learnt, [], None, TrainingSettings(lr=1.0, weight_decay=0.1), {}, None, "", [], 0.0
    ).optimizer()
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in learnt.items()} == {
        name: 0.1 if name in wanted else 0.0 for name in learnt
    }


def test_weight_decay_leaves_a_bias_where_it_is():
    learnt = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in (("a", 3), ("b", (3, 3)))}
    settings = TrainingSettings(lr=1.0, weight_decay=0.1)
    optimizer = Training(learnt, [], None, settings, {}, None, "", [], 0.0).optimizer()
    for parameter in learnt.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert learnt["a"].tolist() == [1, 1, 1]
    torch.testing.assert_close(learnt["b"], torch.full((3, 3), 0.9))


def padding(batches, lengths):
    return sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)


@pytest.mark.parametrize(("n", "batches_a_pool"), [(400, 12), (2000, 50), (20, 0)])
def test_batches_are_grouped_by_length_in_pools_of_the_published_size(n, batches_a_pool):
    lengths = np.random.default_rng(0).integers(1, 200, n)
    examples = [Example(tuple(range(length)), (1,), i % 10 == 0) for i, length in enumerate(lengths)]
    batches = epoch_batches(examples, 8, 1, 0, length_pool=None)
    assert batches == epoch_batches(examples, 8, 1, 0, length_pool=batches_a_pool)
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    theirs = get_length_grouped_indices(lengths.tolist(), 8, generator=torch.Generator().manual_seed(0))
    theirs = [theirs[i : i + 8] for i in range(0, n, 8)]
    if batches_a_pool:
        assert padding(batches, lengths) == pytest.approx(padding(theirs, lengths), rel=0.25)
        assert padding(batches, lengths) < padding(epoch_batches(examples, 8, 1, 0, length_pool=0), lengths) / 4


def test_the_default_is_the_published_grouping():
    assert {parsed(script).length_pool for script in WARMUP} == {None}
