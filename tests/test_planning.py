"""--dry_run: what it counts is what the run does, its memory is what the equation says, and it leaves no trace."""

import re
from argparse import Namespace
from unittest import mock

import pytest
import scripts
import tiny
import torch
from scripts import done, refused, tree

from utils import distributed, plan
from utils.data.batch import Example
from utils.unlearning.methods import METHODS

ARGUMENTS = Namespace(
    device="cpu",
    dtype="float32",
    trust_remote_code=False,
    attn_implementation="auto",
    gradient_checkpointing=False,
    quantization="none",
    prompt_encoder="mlp",
    ptuning_num_tokens=4,
    ptuning_hidden_size=16,
    beta=0.5,
    lora_rank=4,
    lora_alpha=8,
    lora_dropout=0.0,
    lora_bias="none",
    lora_target_modules=["q_proj"],
)
SHAPES = (8, 40, 1), (8, 40, 1)  # rows, tokens, completion tokens


def sizes(kind, config=tiny.CONFIGS["llama"], shapes=SHAPES, **changes):
    return plan.memory(config, kind, Namespace(**vars(ARGUMENTS) | changes), *shapes)


def numbers(text, line):
    """The numbers in the plan's line of that name."""
    (found,) = re.findall(rf"^{line} +(.*)", text, re.MULTILINE)
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]*\d(?:\.\d+)?", found)]


@pytest.mark.parametrize("run, kind", [(scripts.spul, "prompt"), (scripts.qlora, "lora")])
@pytest.mark.parametrize("depth", ["plan", "probe"])
def test_a_dry_run_leaves_no_trace(run, kind, depth, tiny_model, small_data, tmp_path):
    before = tree(tiny_model.parent)
    said = done(run(tmp_path, tiny_model, small_data, "--num_epochs=2", f"--dry_run={depth}")).stdout
    assert tree(tmp_path) == {} and tree(tiny_model.parent) == before
    assert numbers(said, "rows") == [24, 16, 8]
    assert numbers(said, "steps") == [6, 8, 48]  # 24 rows in batches of 8, twice
    assert ("time" in said) == (depth == "probe")


@pytest.mark.parametrize(
    ("method", "tokens"),
    [("undial", 8), ("npo --retain_loss=none", 8), ("dpo", 16), ("gradient_ascent_kl", 16), ("wga", 0), ("rmu", None)],
)
def test_the_reference_of_a_rival(method, tokens, tiny_model, small_data, tmp_path):
    """One token a label: of 8 forget rows (dpo: twice), of 16 retain rows; rmu: at every token of those."""
    command = f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *scripts.BASELINES, "--dry_run=probe"
    said = done(scripts.call(tmp_path, "baselines", *command, *f"--unlearn_method={method}".split())).stdout
    assert ("reference" in said.split("after loading")[1]) == (tokens != 0)
    name, *more = method.split()
    args = Namespace(unlearn_method=name, retain_loss=METHODS[name].retain_loss)
    if more:
        args.retain_loss = "none"
    examples = [Example((1,) * 5, (2,), forget=i < 8) for i in range(24)]
    assert plan.reference_tokens("full", args, examples) == (16 * 5 if tokens is None else tokens)


def test_retain_ratio_shortens_the_epochs(tiny_model, small_data, tmp_path):
    said = done(scripts.spul(tmp_path, tiny_model, small_data, "--dry_run", "--retain_ratio=1")).stdout
    assert numbers(said, "rows") == [24, 16, 8]
    assert numbers(said, "steps") == [2, 8, 16]  # 8 of the 16 rows to keep


def test_a_plan_of_several_processes_is_about_the_share_of_one(tiny_model, small_data, tmp_path):
    alone = done(scripts.spul(tmp_path, tiny_model, small_data, "--dry_run", "--eval_batch_size=1")).stdout
    with mock.patch.object(distributed, "world_size", lambda: 4):
        shared = done(scripts.spul(tmp_path, tiny_model, small_data, "--dry_run", "--eval_batch_size=1")).stdout
    real, padding = zip(*(numbers(said, "tokens")[:2] for said in (alone, shared)))
    assert real[0] == real[1] and padding[0] > padding[1]  # a process pads to the longest row of its own
    steps = [float(re.search(r"step ([\d.]+) MiB", said)[1]) for said in (alone, shared)]
    assert steps[0] > steps[1]


def test_a_plan_reads_no_weights(tiny_model, small_data, tmp_path):
    """Not even those of a checkpoint's parent, which are not hashed either."""
    model = tiny.save(tmp_path / "model")
    for run in (scripts.qlora, scripts.spul):
        (model / "model.safetensors").write_bytes(b"no weights")
        assert "dry run" in done(run(tmp_path, model, small_data, "--dry_run")).stdout
        (model / "model.safetensors").unlink()
        assert "dry run" in done(run(tmp_path, model, small_data, "--dry_run")).stdout


def test_tokens_and_padding_are_those_of_the_batches(tiny_model, small_data, tmp_path):
    """Counted by hand from the batches; pools of similar lengths have less padding."""
    tokens = [
        numbers(
            done(scripts.qlora(tmp_path, tiny_model, small_data, "--dry_run", f"--length_pool={pool}")).stdout, "tokens"
        )
        for pool in (0, 3)
    ]
    assert tokens[0][0] == tokens[1][0] and tokens[0][1] > tokens[1][1]
    from utils.data.batch import epoch_batches
    from utils.data.load import load_splits
    from utils.data.splits import TRAIN_SPLITS
    from utils.models.base import load_tokenizer
    from utils.models.chain import resolve_chain
    from utils.tasks.encode import tokenize

    frames = load_splits(str(small_data))
    tokenizer = load_tokenizer(resolve_chain(str(tiny_model)), False)
    rows = [tokenize(tokenizer, frames[s]["text"], frames[s]["label_text"], 96) for s in TRAIN_SPLITS]
    lengths = [len(row) for split in rows for row in split]
    batches = epoch_batches([row for split in rows for row in split], 8, 42, 0)
    padding = sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)
    assert tokens[0][:2] == [sum(lengths), padding] and tokens[0][3] == max(lengths)


def test_weights_and_trained_parameters_by_hand():
    """d = 128, 4 layers; k and v have half the width. LoRA on q: r (d + d) a layer."""
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128
    every = 2 * 2000 * 128 + 4 * layer + 128
    prompt, lora, full = (sizes(kind) for kind in ("prompt", "lora", "full"))
    assert prompt["all parameters"] == lora["all parameters"] == full["all parameters"] == every
    assert prompt["weights"] == lora["weights"] == 4 * every and full["weights"] == 0
    assert prompt["parameters"] == 4 * 128 + (128 * 16 + 16) + (16 * 16 + 16) + (16 * 128 + 128)
    assert lora["parameters"] == 4 * 4 * 256 and full["parameters"] == every
    assert full["trained"] == 12 * every  # parameter and two moments; the gradient is in the step
    assert full["step"] > 4 * every
    assert sizes("prompt", dtype="bfloat16")["weights"] == 2 * every
    rmu = sizes("full", unlearn_method="rmu", rmu_layer=1)
    assert prompt["output"] == 4 * prompt["parameters"] and full["output"] == rmu["output"] == 4 * every
    assert sizes("full", dtype="bfloat16")["output"] == 2 * every  # learnt in float32, written as it came
    assert rmu["trained"] == 12 * 2 * layer and rmu["weights"] == 4 * (every - 2 * layer)
    assert rmu["step"] < full["step"] / 2  # two of four layers, and no head
    linear = 4 * (layer - 2 * 128)
    assert sizes("lora", quantization="nf4")["weights"] == int(linear * (0.5 + 1 / 16)) + 4 * (every - linear)


def test_the_step_is_what_a_real_step_allocates():
    """The same count on a real model with real numbers."""
    from utils.data.batch import Example, collate
    from utils.interventions.prompt_encoders import VirtualTokens
    from utils.models.forward import completion_logits, prompt_prefix

    model = tiny.build_model("llama").requires_grad_(False)
    encoder = VirtualTokens("mlp", 4, 128, 16)
    batch = collate([Example(tuple(range(2, 42)), (5,))] * 8, 1, "cpu")
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step():
        logits = completion_logits(model, batch, prompt_prefix(model, encoder()))
        torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum").backward()

    counted = plan._alive_at_most(step)
    estimated = sizes("prompt", beta=0, attn_implementation="eager")["step"]
    assert estimated == pytest.approx(counted, rel=0.05)


def test_what_makes_a_step_larger_or_smaller():
    step = sizes("prompt")["step"]
    assert sizes("prompt", shapes=((16, 40, 1), SHAPES[1]))["step"] == pytest.approx(2 * step, rel=0.1)
    assert sizes("prompt", gradient_checkpointing=True)["step"] < step / 2
    assert sizes("lora")["step"] > 0
    long = ((8, 400, 1), SHAPES[1])
    eager = sizes("prompt", shapes=long, attn_implementation="eager")["step"]
    assert sizes("prompt", shapes=long, attn_implementation="sdpa")["step"] < 0.7 * eager


def test_the_peak_is_the_sum_of_its_parts():
    known = {"process": 100, "weights": 20, "trained": 3, "reference": 1, "heap": 2, "step": 50, "evaluation": 40}
    assert plan.peak(known) == 224
    assert plan.peak(known | {"evaluation": 60}) == 244
    assert plan.peak(known | {"step": None}) is None


def test_a_dry_run_refuses_what_the_run_would(tiny_model, small_data, tmp_path):
    for more, sentence in (
        (["--dry_run=full"], "argument --dry_run: invalid choice"),
        (["--dry_run", "--max_length=9"], "--max_length=9 cannot hold template and label"),
        (["--dry_run", "--ptuning_num_tokens=510"], "the longest row has"),
    ):
        arguments = f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *scripts.SPUL, *more
        refused(tmp_path, sentence, "spul", *arguments)


def test_the_most_that_is_alive_at_once():
    """1,000 floats, then 2,000 while the first are still held, then 500 more when they are gone."""

    def work():
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        del first
        third = torch.zeros(500)
        return second, third

    assert plan._alive_at_most(work) == 4 * 3000
