"""Two processes that share the rows of every step end with what one process gives."""

import json
import re
import subprocess
import sys

import pytest
import scripts
import several
import torch
from safetensors.torch import load_file
from scripts import ROOT, done, is_progress_bar, numbers, tree

from utils import distributed
from utils.errors import UserError
from utils.storage import files
from utils.storage.outputs import state_path
from utils.training.loop import Training
from utils.training.state import read_state

pytestmark = pytest.mark.slow

# float32 sums in another order differ by about 1e-7; the optimiser's steps of up to 1e-2 multiply that.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-5
BUDGET = "--output_path=out", "--eval_steps=2", "--curve_samples=3", "--max_eval_samples=5"
CASES = {
    "a forget row on one of them": ("spul", *scripts.SPUL, "--forget_per_batch=1"),
    "fewer rows than processes": (
        "spul", *scripts.SPUL, "--train_batch_size=23", "--num_epochs=2", "--micro_batch_size=6"
    ),
    "all weights": ("baselines", *scripts.ROWS, "--unlearn_method=gradient_ascent_kl", "--train_batch_size=8"),
    "LoRA without dropout": ("qlora", *scripts.QLORA, "--lora_dropout=0", "--length_pool=1"),
}  # fmt: skip


def command(case, tiny_model, small_data):
    script, *arguments = CASES[case]
    model = f"--model_{'name' if script == 'qlora' else 'checkpoints'}={tiny_model}"
    rate = {"baselines": "--lr=1e-4", "qlora": "--lr=1e-3", "spul": "--lr=1e-2"}[script]
    return script, model, f"--dataset={small_data}", *arguments, *BUDGET, rate


@pytest.fixture(scope="module", params=CASES)
def alone(request, tiny_model, small_data, tmp_path_factory):
    """(the command, the folder in which one process ran it)."""
    cwd = tmp_path_factory.mktemp("alone")
    arguments = command(request.param, tiny_model, small_data)
    done(scripts.call(cwd, *arguments))
    return arguments, cwd


def read_log(cwd):
    return [json.loads(line) for line in (cwd / "out" / "training.jsonl").read_text().splitlines()]


def assert_same_run(cwd, other):
    """The same log and trained weights within the tolerances, the same scores, the same files."""
    logs = read_log(cwd), read_log(other)
    assert len(logs[0]) == len(logs[1]) > 2
    for line, expected in zip(*logs):
        assert line.pop("accuracy", None) == expected.pop("accuracy", None)
        assert line == pytest.approx(expected, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)
    weights, expected = (load_file(next((folder / "out").glob("*model.safetensors"))) for folder in (cwd, other))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=WEIGHT_TOLERANCE)
    scores = [json.loads((folder / "out" / "metrics.json").read_text())[-1]["splits"] for folder in (cwd, other)]
    assert scores[0].keys() == scores[1].keys()
    assert all(numbers(scores[0][s]) == pytest.approx(numbers(scores[1][s]), rel=1e-4) for s in scores[0])
    assert tree(cwd).keys() == tree(other).keys()


def test_two_processes_train_and_score_as_one(alone, tmp_path):
    arguments, cwd = alone
    main, second = several.call(tmp_path, 2, *arguments)
    assert done(main).stdout.endswith("wrote out\n")
    assert (second.code, second.stdout, second.stderr) == (0, "", "")
    assert_same_run(tmp_path, cwd)
    first, *_, last = (line["loss"] for line in read_log(cwd) if "loss" in line)
    assert first - last > 100 * LOSS_TOLERANCE  # or the comparison would compare nothing


@pytest.mark.parametrize("alone", ["a forget row on one of them"], indirect=True)
def test_an_error_of_one_process_ends_all_with_its_sentence_and_the_run_can_be_resumed(alone, tmp_path):
    arguments, cwd = alone
    step = Training.accumulate

    def fail_in_step_3(rank):
        calls = iter(range(1, 99))

        def failing(self, rows):
            if next(calls) == 3 and rank == 1:
                raise UserError("the second process has had enough")
            return step(self, rows)

        Training.accumulate = failing

    results = several.call(tmp_path, 2, *arguments, "--save_steps=2", before=fail_in_step_3)
    assert [result.code for result in results] == [2, 2]
    said = [line for result in results for line in sentences(result)]
    assert said == [f"{arguments[0]}.py: error: the second process has had enough"]
    assert not (tmp_path / "out").exists()
    assert read_state(state_path(tmp_path / "out"))["log"][-1]["step"] == 2
    main, _ = several.call(tmp_path, 2, *arguments, "--resume")
    assert "after step 2" in done(main).stdout
    assert_same_run(tmp_path, cwd)


def sentences(result):
    """What a process said on stderr beside its progress bars."""
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip()]
    return [line for line in lines if not is_progress_bar(line)]


@pytest.mark.parametrize("flag", ["--dataset=nowhere", "--lr=fast"])
def test_bad_input_is_said_once(flag, tiny_model, small_data, tmp_path):
    results = several.call(tmp_path, 2, *command("LoRA without dropout", tiny_model, small_data), flag)
    assert [result.code for result in results] == [2, 2]
    said = [line for result in results for line in sentences(result)]
    assert len(said) == 1 and said[0].startswith("qlora.py: error: ")
    assert not tree(tmp_path)


@pytest.mark.long
def test_accelerate_launch_starts_it_by_the_configuration(tiny_model, small_data, tmp_path):
    """The command of the README, on this CPU."""
    arguments = command("a forget row on one of them", tiny_model, small_data)
    configuration = ROOT / "data" / "accelerate" / "cpu.yaml"
    launch = sys.executable, "-m", "accelerate.commands.launch", f"--config_file={configuration}"
    launch = *launch, "--main_process_port=0", ROOT / f"{arguments[0]}.py", *arguments[1:]
    short = "--max_steps=1", "--max_eval_samples=0", "--beta=0"
    result = subprocess.run([*launch, *short], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote out") == 1
    assert len(read_log(tmp_path)) == 1


def test_an_output_that_another_run_writes_is_said_once(tiny_model, small_data, tmp_path):
    with files.workplace(tmp_path / "out"):
        results = several.call(tmp_path, 2, *command("LoRA without dropout", tiny_model, small_data))
    assert [result.code for result in results] == [2, 2]
    (said,) = [line for result in results for line in sentences(result)]
    assert " is writing out; wait for it" in said and not tree(tmp_path)


def test_gradients_are_added_in_buckets_whatever_a_process_lacks(monkeypatch):
    shapes = {"a": (3, 2), "b": (5,), "nobody": (4,), "half": (2, 2), "c": (7, 3)}
    own = [{"a": 1, "b": 2, "half": 3}, {"b": 4, "c": 5}]  # which process has which gradient, drawn by what seed
    monkeypatch.setattr(distributed, "BUCKET", 40)

    def gradients(rank):
        made = {}
        for name, seed in own[rank].items():
            dtype = torch.bfloat16 if name == "half" else torch.float32
            made[name] = torch.randn(shapes[name], generator=torch.Generator().manual_seed(seed)).to(dtype)
        return made

    def work(rank):
        distributed.start()
        mine = gradients(rank)
        parameters = {
            name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16 if name == "half" else torch.float32))
            for name, shape in shapes.items()
        }
        for name, gradient in mine.items():
            parameters[name].grad = gradient
        distributed.all_reduce_gradients(parameters.values())
        found = {name: p.grad if p.grad is None else p.grad.tolist() for name, p in parameters.items()}
        distributed.finish()
        return found

    first, second = map(gradients, range(2))
    expected = {name: first.get(name, 0) + second.get(name, 0) for name in [*first, *second]}
    expected = {name: gradient.tolist() for name, gradient in expected.items()} | {"nobody": None}
    assert several.each(2, work) == [expected, expected]
