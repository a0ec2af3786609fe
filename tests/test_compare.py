"""The comparison's pipeline on the tiny model: what it runs, what it keeps, what it writes."""

import json
import shutil
import sys
from unittest import mock

import pandas as pd
import pytest
import scripts

from utils import cli, compare

METHODS = ("spul", "gradient_ascent", "npo", "prompting", "eco")
FLAGS = {
    "rows": "--max_length=200 --dtype=float32 --max_train_samples 20",
    "fine_tune": "--quantization=none --train_batch_size=8 --num_epochs=2 --lr=2e-3",
    "spul": "--train_batch_size=8 --num_epochs=1 --ptuning_num_tokens=4 --ptuning_hidden_size=16",
    "rivals": "--train_batch_size=8 --num_epochs=3",
    "with_retain": "--max_steps=3",
    "prompting": "--instruction=Beware.",
    "eco": "--eco_strength=1",
}


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_model, small_data):
    """Runs the comparison in `tmp_path`, its scripts in this process; returns the commands that it called."""

    def call(self, command):
        called.append(command)
        result = scripts.call(tmp_path, command[0].removesuffix(".py"), *command[1:])
        return result.code, result.stderr

    called = []
    monkeypatch.setattr(compare.Workplace, "_run", call)
    monkeypatch.chdir(tmp_path)

    def start(*more):
        called.clear()
        flags = [f"--{name}={value}" for name, value in FLAGS.items()]
        command = ["compare", f"--model_name={tiny_model}", f"--dataset={small_data}", *flags, *more]
        command += ["--grid", "1e-4", "1e30", "--output_path=out", "--methods", *METHODS]
        with mock.patch.object(sys, "argv", command):
            compare.main(compare.parse_args())
        return list(called)

    return start


def test_the_whole_comparison(run, tmp_path):
    commands = run()
    records = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = ["base", "fine-tuned", "retrained", "SPUL", "gradient_ascent", "npo", "prompting", "eco", "SPUL + router"]
    assert [record["method"] for record in records] == rows
    table = (tmp_path / "out" / "table.md").read_text()
    assert len(table.splitlines()) == 2 + len(rows) and "retrained (target)" in table
    assert (tmp_path / "out" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    by_method = {record["method"]: record for record in records}
    target = by_method["retrained"]["distance_to_retrained"]
    assert target == {"accuracy": 0, "js_train_forget": 0, "js_test_forget": 0}
    assert by_method["base"]["distance_to_retrained"]["js_train_forget"] > 0
    for method in ("gradient_ascent", "npo"):
        search = by_method[method]["search"]
        assert search["lr"] == 1e-4 and search["grid"]["1e+30"] is None  # diverged, which ends no comparison
        assert by_method[method]["training"]["peak_memory_bytes"] > 0
    assert "search" not in by_method["SPUL"]
    searched = [command for command in commands if any("search-data" in argument for argument in command)]
    assert len(searched) == 4 and not any("max_train_samples" in " ".join(command) for command in searched)

    assert run() == []  # everything is recognised
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == records

    evaluation = next((tmp_path / "out" / "evaluations").glob("npo-*"))
    shutil.rmtree(evaluation)
    again = run()
    assert [command[0] for command in again] == ["inference_spul.py"] and "npo" in " ".join(again[0])


def test_the_search_never_sees_test_rows(run, tmp_path, small_data):
    run()
    folder = next((tmp_path / "out").glob("search-data-*"))
    held_out = texts(folder, "test_retain") | texts(folder, "test_forget")
    trained = texts(folder, "train_retain") | texts(folder, "train_forget")
    assert held_out and not trained & held_out
    assert trained | held_out <= texts(small_data, "train_retain") | texts(small_data, "train_forget")


def test_a_search_that_fails_for_another_reason_ends_the_comparison(run, tmp_path):
    """And leaves nothing behind that would count as a result."""
    with pytest.raises(cli.UserError, match="baselines.py ended with exit code 2; finished runs are kept"):
        run("--rivals=--train_batch_size=8 --num_epoch=3")
    assert not list((tmp_path / "out" / "search").glob("*.json"))
    run()


def test_another_model_under_the_same_path_is_another_run(run, tiny_model, tmp_path, monkeypatch):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    assert run(f"--model_name={model}")
    assert run(f"--model_name={model}") == []
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert [command[0] for command in run(f"--model_name={model}")][:2] == ["qlora.py", "qlora.py"]


def test_what_a_process_says(tmp_path, capfdbinary):
    work = compare.Workplace.__new__(compare.Workplace)
    code, said = work._run(["qlora.py", "--model_name=none/at/all", "--lora_fropout=x"])
    assert code == 2 and "lora_fropout" in said.strip().split("\n")[-1]


def texts(folder, split):
    return set(pd.read_csv(folder / f"{split}.csv")["text"])
