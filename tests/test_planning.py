"""--dry_run: what it counts is what the run does, its memory is what the equation says, and it leaves no trace."""

import dataclasses
import re
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import scripts
import tiny
import torch
from marks import mostly_long
from scripts import done, refused, tree

from utils import distributed, plan
from utils.data.batch import Example
from utils.evaluation.run import EvaluationSettings
from utils.interventions.prompt_encoders import EncoderSettings, build_encoder
from utils.models.adapters import LoraSettings, add_lora
from utils.models.base import ModelSettings
from utils.training.loop import TrainingSettings
from utils.unlearning.methods import METHODS, MethodSettings
from utils.unlearning.objectives import FineTuning, PromptTuning, objective_of
from utils.unlearning.tuning import trainable

ROWS = tuple(Example((5 + i,) * 40, (7,), forget=i > 5) for i in range(8))


def of_prompt(served, load, beta=0.5, rows=ROWS, chunk=0):
    """What spul.py prepares: 4 virtual tokens by an encoder of width 16."""
    settings = EncoderSettings(ptuning_num_tokens=4, ptuning_hidden_size=16)
    encoder = build_encoder(served, settings)
    retain = [i for i, row in enumerate(rows) if not row.forget]
    compared = load(served, rows, retain, {}) if beta else None
    objective = PromptTuning(served.model, encoder, rows, 1, compared, 0.5, beta, logit_chunk=chunk)
    return plan.Prepared(served=served, learner=encoder, objective=objective, examples=list(rows))


def of_lora(served, _, rows=ROWS, chunk=0):
    """What qlora.py prepares: r = 4 on q."""
    model = add_lora(served.model, LoraSettings(lora_rank=4, lora_dropout=0.0, lora_target_modules=["q_proj"])).train()
    adapted = dataclasses.replace(served, model=model)
    objective = FineTuning(model, rows, 1, chunk)
    return plan.Prepared(served=adapted, learner=model, objective=objective, examples=list(rows))


def of_method(name, layer=None, rows=ROWS, chunk=0):
    """What baselines.py prepares, all weights trained."""
    every = list(rows)

    def prepare(served, load):
        method = METHODS[name]
        asked = MethodSettings(unlearn_method=name, rmu_layer=layer, retain_loss="none", logit_chunk=chunk)
        model = trainable(served.model, None, method, asked)
        rows = SimpleNamespace(trained=every, all=every, alternative={}, referred=lambda *_: [])
        adapted, frames = dataclasses.replace(served, model=model), {"train_retain": None}
        objective = objective_of(method)(method, adapted, rows, frames, asked, "", load)
        return plan.Prepared(served=adapted, learner=model, objective=objective, examples=every)

    return prepare


def sizes(prepare, config=tiny.CONFIGS["llama"], full=False, quantization="none", after_another=False, **changes):
    """The bytes of one step of 8 rows of 40 tokens, and of an evaluation of as many."""
    model = ModelSettings(**{"device": "cpu", "dtype": "float32"} | changes)
    parts = plan.Run(
        name="tiny", prepare=prepare, model=model, training=TrainingSettings(), evaluation=EvaluationSettings(),
        full=full, quantization=quantization,
    )  # fmt: skip
    tokenizer, link = SimpleNamespace(pad_token_id=1), SimpleNamespace(kind="model", sha256="0")
    found, prepared = plan._on_meta(parts, config, tokenizer, [link])
    n = len(prepared.examples)
    length = max(map(len, prepared.examples))
    return found | plan._alive(prepared, list(range(n)), (8, length, 1), found, after_another)


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
    ("method", "vectors"),
    [("undial", 8), ("npo --retain_loss=none", 8), ("dpo", 16), ("gradient_ascent_kl", 16), ("wga", 0), ("rmu", None)],
)
def test_the_reference_of_a_method(method, vectors, tiny_model, small_data, tmp_path):
    """One token a label: of 8 forget rows (dpo: twice), of 16 retain rows; rmu: at every token of those."""
    command = f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *scripts.BASELINES, "--dry_run=probe"
    said = done(scripts.call(tmp_path, "baselines", *command, *f"--unlearn_method={method}".split())).stdout
    assert ("reference" in said.split("after loading")[1]) == (vectors != 0)
    if vectors == 0:
        assert "of reference" not in said
    elif vectors:
        assert f"{vectors * 128 * 4 / 2**20:.1f} MiB of reference" in said
    else:
        assert float(re.search(r"([\d.]+) MiB of reference", said)[1]) > 16 * 20 * 128 * 4 / 2**20


def test_retain_ratio_shortens_the_epochs(tiny_model, small_data, tmp_path):
    said = done(scripts.spul(tmp_path, tiny_model, small_data, "--dry_run", "--retain_ratio=1")).stdout
    assert numbers(said, "rows") == [24, 16, 8]
    assert numbers(said, "steps") == [2, 8, 16]  # 8 of the 16 rows to keep


def test_a_plan_of_several_processes_is_about_the_share_of_one(tiny_model, small_data, tmp_path):
    whole = "--eval_batch_size=1", "--micro_batch_size=8"
    alone = done(scripts.spul(tmp_path, tiny_model, small_data, "--dry_run", *whole)).stdout
    with mock.patch.object(distributed, "world_size", lambda: 4):
        shared = done(scripts.spul(tmp_path, tiny_model, small_data, "--dry_run", *whole)).stdout
    real, padding = zip(*(numbers(said, "tokens")[:2] for said in (alone, shared)))
    assert real[0] == real[1] and padding[0] > padding[1]  # a process pads to the longest row of its own
    steps = [float(re.search(r"step ([\d.]+) MiB", said)[1]) for said in (alone, shared)]
    assert steps[0] > steps[1]


def test_a_plan_with_shards_is_about_each_process(tiny_model, small_data, tmp_path):
    with mock.patch.object(distributed, "world_size", lambda: 4):
        said = done(scripts.spul(tmp_path, tiny_model, small_data, "--dry_run", "--shard", "--device=cpu")).stdout
    assert re.search(r"^memory +about .* on cpu, in each of 4 processes: .*weights .*, gathered ", said, re.M)


@pytest.mark.long
def test_what_lies_in_shards_by_hand(monkeypatch):
    """4 processes; d = 128, 4 layers; LoRA on q, which is whole."""
    layer, outside = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128, 2 * 2000 * 128 + 128
    everything = of_method("gradient_ascent")
    whole = sizes(everything, full=True)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    prompt, lora = sizes(of_prompt, shard=True), sizes(of_lora, shard=True)
    full, rmu = (sizes(prepare, full=True, shard=True) for prepare in (everything, of_method("rmu", 1)))
    assert prompt["weights"] == lora["weights"] == 4 * (outside + layer)  # 4 layers, a quarter of each
    assert prompt["gathered"] == lora["gathered"] == 3 * 4 * layer
    assert lora["trained"] == 12 * lora["parameters"]
    assert full["trained"] == 12 * (outside + layer) and full["weights"] == 0
    assert full["gathered"] == 5 * 4 * layer
    assert full["step"] == whole["step"]  # which is largest before there are gradients; with one short row after all
    short = of_method("gradient_ascent", rows=(Example((5,) * 3, (7,), forget=True),))
    assert sizes(short, full=True)["step"] - sizes(short, full=True, shard=True)["step"] == 4 * 3 * layer
    assert full["output"] == whole["output"] and plan.disk_line(full) == plan.disk_line(whole)
    assert (rmu["trained"], rmu["weights"]) == (12 * layer // 2, 4 * (outside + layer // 2))


def test_a_plan_reads_no_weights(tiny_model, small_data, tmp_path):
    """Not even those of a checkpoint's parent, which are not hashed either."""
    model = tiny.save(tmp_path / "model")
    for run in (scripts.qlora, scripts.spul):
        (model / "model.safetensors").write_bytes(b"no weights")
        assert "dry run" in done(run(tmp_path, model, small_data, "--dry_run")).stdout
        (model / "model.safetensors").unlink()
        assert "dry run" in done(run(tmp_path, model, small_data, "--dry_run")).stdout


def test_tokens_and_padding_are_those_of_the_batches(tiny_model, small_data, tmp_path):
    """Counted by hand from the batches. Pools of similar lengths have less padding, and so have parts of a batch."""

    def plan(*flags):
        return numbers(done(scripts.qlora(tmp_path, tiny_model, small_data, "--dry_run", *flags)).stdout, "tokens")

    tokens = [plan(f"--length_pool={pool}", "--micro_batch_size=8") for pool in (0, 3)]
    assert tokens[0][0] == tokens[1][0] and tokens[0][1] > tokens[1][1]
    assert plan("--length_pool=0")[0] == tokens[0][0] and plan("--length_pool=0")[1] < tokens[0][1]
    from utils.data.batch import epoch_batches
    from utils.data.splits import TRAIN_SPLITS
    from utils.models.base import load_tokenizer
    from utils.models.chain import resolve_chain
    from utils.tasks.encode import tokenize
    from utils.tasks.rows import load_splits

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
    every_weight = of_method("gradient_ascent")
    prompt, lora, full = sizes(of_prompt), sizes(of_lora), sizes(every_weight, full=True)
    assert prompt["all parameters"] == lora["all parameters"] == full["all parameters"] == every
    assert prompt["weights"] == lora["weights"] == 4 * every and full["weights"] == 0
    assert prompt["parameters"] == 4 * 128 + (128 * 16 + 16) + (16 * 16 + 16) + (16 * 128 + 128)
    assert lora["parameters"] == 4 * 4 * 256 and full["parameters"] == every
    assert full["trained"] == 12 * every  # parameter and two moments; the gradient is in the step
    assert full["step"] > 4 * every
    assert sizes(of_prompt, dtype="bfloat16")["weights"] == 2 * every
    rmu = sizes(of_method("rmu", 1), full=True)
    assert prompt["output"] == 4 * prompt["parameters"] and full["output"] == rmu["output"] == 4 * every
    assert (
        sizes(every_weight, full=True, dtype="bfloat16")["output"] == 2 * every
    )  # learnt in float32, written as it came
    assert rmu["trained"] == 12 * 2 * layer and rmu["weights"] == 4 * (every - 2 * layer)
    assert rmu["step"] < full["step"] / 2  # two of four layers, and no head
    linear = 4 * (layer - 2 * 128)
    assert sizes(of_lora, quantization="nf4")["weights"] == int(linear * (0.5 + 1 / 16)) + 4 * (every - linear)


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
    alike = partial(of_prompt, beta=0, rows=[Example(tuple(range(2, 42)), (5,))] * 8)
    estimated = sizes(alike, attn_implementation="eager")["step"]
    assert estimated == pytest.approx(counted, rel=0.05)


def test_a_later_part_of_a_step_comes_on_top_of_the_gradients():
    """Those of the part before it are there from its beginning, and it adds to them in place."""
    whole = of_method("gradient_ascent")
    first, later = (sizes(whole, full=True, after_another=another) for another in (False, True))
    assert first["step"] + 0.5 * 4 * first["parameters"] < later["step"] <= first["step"] + 4 * first["parameters"]


@pytest.mark.long
def test_what_makes_a_step_larger_or_smaller():
    step = sizes(of_prompt)["step"]
    assert sizes(partial(of_prompt, rows=ROWS * 2))["step"] == pytest.approx(2 * step, rel=0.1)
    by_layers, selective = (sizes(of_prompt, gradient_checkpointing=kind)["step"] for kind in ("layers", "selective"))
    assert by_layers < step / 2
    assert by_layers < selective < step
    assert sizes(of_lora)["step"] > 0
    long = partial(of_prompt, rows=[dataclasses.replace(row, prompt=row.prompt * 10) for row in ROWS])
    eager = sizes(long, attn_implementation="eager")["step"]
    assert sizes(long, attn_implementation="sdpa")["step"] < 0.7 * eager


LONG = tuple(Example((5 + i,) * 10, tuple(range(7 + i, 107 + i)), forget=i > 3) for i in range(8))  # 800 to predict


@pytest.mark.long
@pytest.mark.parametrize(
    "prepare", [partial(of_prompt, rows=LONG), partial(of_lora, rows=LONG)], ids=["prompt", "adapter"]
)
def test_a_step_over_long_answers_needs_less_in_pieces(prepare):
    """The difference is in logits: what is left of those of 800 tokens, in float32, with 100 at a time."""
    whole, parts, other = (sizes(partial(prepare, chunk=chunk), attn_implementation="sdpa") for chunk in (0, 100, 800))
    logits = 800 * 2000 * 4
    assert whole["step"] == other["step"]
    assert whole["step"] - parts["step"] > 1.5 * logits
    assert sizes(partial(prepare, chunk=50), attn_implementation="sdpa")["step"] < parts["step"]


@pytest.mark.parametrize("method", mostly_long(["gradient_ascent", "ceu", "wga"], "ceu"))
def test_so_does_a_method(method):
    whole, parts = (sizes(of_method(method, rows=LONG, chunk=chunk), full=True)["step"] for chunk in (0, 100))
    assert parts < whole - 800 * 2000 * 4


@pytest.mark.slow
@pytest.mark.parametrize("method", mostly_long(METHODS, "gradient_ascent_descent", "npo", "rmu"))
def test_every_method_is_planned_by_its_own_objective(method, tiny_model, small_data, tmp_path):
    """Nothing in it depends on numbers that fake tensors do not have, so that the step of every method is known."""
    for tune in ("full", "lora"):
        flags = f"--unlearn_method={method}", f"--tune={tune}", "--dry_run"
        command = f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *scripts.BASELINES, *flags
        said = done(scripts.call(tmp_path, "baselines", *command)).stdout
        assert float(re.search(r"(?:step|evaluation) ([\d.]+) MiB", said)[1]) > 1


def test_the_peak_is_the_sum_of_its_parts():
    known = {"process": 100, "weights": 20, "trained": 3, "reference": 1, "heap": 2, "step": 50, "evaluation": 40}
    known["gathered"] = 10
    assert plan.peak(known) == 234
    assert plan.peak(known | {"evaluation": 60}) == 254
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
