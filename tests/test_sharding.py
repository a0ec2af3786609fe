"""Two processes that hold a part of every layer each end with what one process with the whole model gives."""

import json

import pytest
import scripts
import several
import torch
from safetensors.torch import load_file
from scripts import done, numbers

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
BUDGET = "--output_path=out", "--max_steps=3", "--max_eval_samples=5"
FEW = "--train_batch_size=5", "--micro_batch_size=3", "--retain_ratio=1"  # one process makes fewer passes
CASES = {
    "spul": ("spul", *scripts.SPUL, "--lr=1e-2", "--forget_per_batch=1", "--logit_chunk=4"),
    "lora": ("qlora", *scripts.QLORA, "--lr=1e-2", "--lora_dropout=0", "--length_pool=1", "--eval_steps=2"),
    "full": ("baselines", *scripts.BASELINES, "--unlearn_method=gradient_ascent_descent", "--lr=1e-4", *FEW),
    "npo": ("baselines", *scripts.BASELINES, "--unlearn_method=npo", "--lr=1e-4", "--gradient_checkpointing"),
    "rmu": ("baselines", *scripts.BASELINES, "--unlearn_method=rmu", "--lr=1e-4", "--rmu_layer=2"),
}


def command(case, tiny_model, small_data, *more):
    script, *arguments = CASES[case]
    model = f"--model_{'name' if script == 'qlora' else 'checkpoints'}={tiny_model}"
    return script, model, f"--dataset={small_data}", *arguments, *BUDGET, *more


@pytest.fixture(scope="module")
def runs(tiny_model, small_data, tmp_path_factory):
    """{case: (the folder in which one process ran it, that of two with --shard)}."""
    folders = {case: tuple(tmp_path_factory.mktemp(f"{case}-{n}") for n in (1, 2)) for case in CASES}
    for case, (alone, _) in folders.items():
        done(scripts.call(alone, *command(case, tiny_model, small_data)))
    sharded = [(folder, *command(case, tiny_model, small_data, "--shard")) for case, (_, folder) in folders.items()]
    main, second = several.calls(2, sharded)
    for result, other in zip(main, second):
        done(result)
        assert (other.code, other.stdout, other.stderr) == (0, "", "")
    return folders


def assert_same(folder, other):
    """The same log, trained weights and scores but for the order of float additions; returns the weights."""
    logs = [list(map(json.loads, (place / "out/training.jsonl").read_text().splitlines())) for place in (folder, other)]
    assert len(logs[0]) == len(logs[1]) >= 3
    for line, expected in zip(*logs):
        assert line.pop("accuracy", None) == expected.pop("accuracy", None)
        assert line == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    (file,) = (folder / "out").glob("*model.safetensors")
    weights, expected = load_file(file), load_file(other / "out" / file.name)
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=TOLERANCE)
    scores = [json.loads((place / "out/metrics.json").read_text())[-1]["splits"] for place in (folder, other)]
    assert scores[0].keys() == scores[1].keys()
    assert all(numbers(scores[0][s]) == pytest.approx(numbers(scores[1][s]), rel=1e-4) for s in scores[0])
    return expected


@pytest.mark.parametrize("case", CASES)
def test_shards_train_and_score_as_the_whole_model(case, runs):
    alone, sharded = runs[case]
    assert_same(sharded, alone)
    assert scripts.names(sharded / "out") == scripts.names(alone / "out")
