"""The benchmark runs, and its two paths do the same work; how fast they are is not for a test to say."""

import json
import re
import sys
from pathlib import Path

import pytest
import scripts

from utils.unlearning.methods import METHODS

pytestmark = [pytest.mark.slow, pytest.mark.long]

SMALL = ("--dtype=float32", "--batch_size=4", "--eval_rows=4", "--rounds=1", "--sweep_rounds=1", "--text_lengths=64")


@pytest.fixture(scope="module", autouse=True)
def benchmark_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
        yield


def test_both_paths_train_on_the_same_batches_with_the_same_loss(tmp_path, tiny_model, monkeypatch):
    import bench

    every = bench.baselines()
    assert len(every) == len(METHODS)
    # With retain rows; then with a second model's answers, and with its activations.
    some = {name: every[name] for name in ("GA+KL", "dpo", "rmu")}
    monkeypatch.setattr(bench, "baselines", lambda: some)
    parts = "--parts", "training", "fine_tuning", "baselines", "lengths"
    arguments = f"--model={tiny_model}", *parts, "--output_path=out"
    said = scripts.done(scripts.call(tmp_path, "bench", *SMALL, *arguments)).stdout
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    records = {(r["name"], r["path"], r["dtype"]): r for r in result["records"]}
    names = ["SPUL, p = 30", "LoRA", "QLoRA", *some, "SPUL, 64 tokens"]
    others = ["reference, 64 tokens", "inference, 64 tokens"]
    assert list(dict.fromkeys(name for name, _, _ in records)) == names + others
    assert all(record["error"] is None for record in records.values())
    for name in names:
        plain, ours = (records[name, path, "float32"] for path in ("plain", "ours"))
        assert plain["error"] is ours["error"] is None
        assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert plain["tokens"] == ours["tokens"]
        assert ours["rows"] == [4]
        assert ours["rows_per_second"] == pytest.approx(4 / ours["seconds"][0])
        assert ours["peak_bytes"] > 100e6
    assert records["SPUL, 64 tokens", "ours", "float32"]["tokens"] == [30 + 4 * 63]  # the label is not read
    expected = records["SPUL, p = 30", "plain", "float32"]["seconds"][0] / ours_seconds(records)
    assert result["ratios"][0]["times_faster"] == pytest.approx(expected)
    assert "times as fast as plain fp32" in said
    assert all(f"Times faster than plain fp32 in {task} by" in said for task in ("training", "reference", "inference"))
    assert (tmp_path / "out" / "bench.png").stat().st_size > 10_000


def test_estimates_stand_beside_what_a_run_took(tmp_path, tiny_model, small_data):
    import estimates

    whole, quarter = (estimates.cut_down(tiny_model, tmp_path / str(part), part, 0) for part in (1, 4))
    assert quarter < whole
    record = estimates.compare("SPUL", tmp_path / "4", [f"--dataset={small_data}", "--max_steps=2"], tmp_path)
    assert record["estimated_peak_gib"] == pytest.approx(record["measured_peak_gib"], rel=0.5)
    assert record.keys() == {f"{kind}_{what}" for kind in ("estimated", "measured") for what in ("peak_gib", "seconds")}
    said = estimates.sentence({**record, "kind": "SPUL", "weights": 2e6, "tokens": 64, "rows": 2})
    assert said.startswith("SPUL, 2 M weights, 2 rows of 64 tokens or more: estimated")


def test_the_tables_of_models_that_nobody_holds(tmp_path, monkeypatch):
    """One small model by its configuration alone; the rows of its steps are not read as one."""
    import estimates

    width, layers, inner, words = 1024, 4, 4096, 4000
    config = estimates.llama(width, layers, 8, inner, 8) | {"vocab_size": words}
    monkeypatch.setattr(estimates, "MODELS", {"small": config})
    monkeypatch.setattr(estimates, "GPUS", (1, 4))
    monkeypatch.setattr(estimates, "SHARDED", {name: estimates.SHARDED[name] for name in ("SPUL", "all parameters")})
    said = scripts.done(scripts.call(tmp_path, "estimates", "--table")).stdout
    first, second = said.strip().split("\n\n")
    header, _, row = first.splitlines()
    assert header == f"| model | weights | {' | '.join(estimates.KINDS)} |"
    name, weights, *cells = row.strip("| ").split(" | ")
    every = 2 * words * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width
    assert (name, weights) == ("small", f"{2 * every / 2**30:,.1f}")
    for plain, checkpointed in zip(cells[::2], cells[1::2]):
        assert float(plain) >= float(checkpointed) + 0.3  # three layers' inner values
    assert float(cells[5]) == pytest.approx(16 * every / 2**30, abs=0.2)  # parameters, two moments, gradients
    header, _, *rows = second.splitlines()
    assert header == "| model | what is trained | 1 | 4 |" and len(rows) == 2
    for row, alone in zip(rows, (cells[1], cells[5])):
        whole, part = row.strip("| ").split(" | ")[2:]
        assert whole == alone and float(part) < float(whole)
    assert scripts.tree(tmp_path) == {}


def test_bfloat16_is_timed_where_a_device_computes_in_it(monkeypatch):
    import bench

    monkeypatch.setattr(sys, "argv", ["bench.py"])
    args, parts = bench.parse_args(), {}
    for fast in (False, True):
        monkeypatch.setattr(bench, "computes_in_bfloat16", lambda _: fast)
        parts[fast] = {cell.part for cell in bench.cells(args) if any(v.dtype == "bfloat16" for v in cell.variants)}
    assert parts == {False: set(), True: {"training", "reference", "inference"}}


def ours_seconds(records):
    return records["SPUL, p = 30", "ours", "float32"]["seconds"][0]


def test_evaluation_and_the_fit(tmp_path, tiny_model, monkeypatch):
    import bench

    monkeypatch.setattr(bench, "computes_in_bfloat16", lambda _: True)
    arguments = f"--model={tiny_model}", "--parts", "rows", "reference", "inference", "--output_path=out"
    said = scripts.done(scripts.call(tmp_path, "bench", *SMALL, *arguments)).stdout
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [r["error"] for r in result["records"]] == [None] * 8
    assert [r["rows"] for r in result["records"]] == [[1, 2, 3, 4], *[[4]] * 7]
    assert [r["part"] for r in result["ratios"]] == ["reference"] * 2 + ["inference"] * 2
    assert result["linear_in_rows"].keys() == {"seconds", "seconds_per_row", "r_squared"}
    assert "Inference with the prompt takes" in said


@pytest.mark.parametrize("work", ["spul", "lora"])
def test_where_the_time_of_a_step_goes(tmp_path, tiny_model, work):
    how = f"--model={tiny_model}", f"--work={work}", "--rows=2", "--tokens=8", "--shortest=5", "--steps=1", "--shown=3"
    said = scripts.done(scripts.call(tmp_path, "operators", *how)).stdout.splitlines()
    assert re.fullmatch(r"\d+\.\d\d CPU seconds a step, (float32|bfloat16), 1 threads", said[0])
    shares = [float(re.search(r"([\d.]+) % +\d+ calls", line)[1]) for line in said[2:]]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100


def test_adapters_against_fine_tuning(tmp_path, tiny_model, monkeypatch):
    import bench

    every = bench.adapters()
    assert list(every) == ["LoRA fine-tuning", *METHODS]
    some = {name: every[name] for name in ("LoRA fine-tuning", "dpo", "rmu")}
    monkeypatch.setattr(bench, "adapters", lambda: some)
    arguments = f"--model={tiny_model}", "--parts", "adapters", "--output_path=out"
    said = scripts.done(scripts.call(tmp_path, "bench", *SMALL, *arguments)).stdout
    plain, *methods = json.loads((tmp_path / "out" / "bench.json").read_text())["records"]
    assert [r["error"] for r in (plain, *methods)] == [None] * 3
    assert len({tuple(r["tokens"]) for r in (plain, *methods)}) == 1  # the same rows
    most = max(methods, key=lambda r: r["peak_bytes"])
    assert f"{most['name']} takes the most memory: {most['peak_bytes'] / plain['peak_bytes']:.2f} times." in said


def test_a_path_that_fails_is_reported_and_the_others_go_on(tmp_path, tiny_model):
    """500 virtual tokens and the data's rows do not fit the tiny model's 512 positions, so spul.py refuses."""
    arguments = f"--model={tiny_model}", "--parts", "reference", "--prompt_length=500", "--output_path=out"
    said = scripts.done(scripts.call(tmp_path, "bench", *SMALL, *arguments)).stdout
    records = json.loads((tmp_path / "out" / "bench.json").read_text())["records"]
    assert records[0]["path"] == "plain" and len(records[0]["seconds"]) == 1
    assert "the model has 512 positions" in records[-1]["error"]
    assert said.count("failed: ") == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--text_lengths=1024"], "1054 tokens with the prompt are more than the model's 512 positions"),
        (["--model=nowhere/at/all"], "does not exist"),
        (["--dataset=nowhere"], "nor an existing folder"),
        (["--part=training"], "did you mean --parts?"),
        (["--rounds=0"], "not a whole number of at least 1"),
    ],
)
def test_refusals(tmp_path, tiny_model, arguments, sentence):
    scripts.refused(tmp_path, sentence, "bench", f"--model={tiny_model}", *arguments)
