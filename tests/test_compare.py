"""The comparison's pipeline on the tiny model: what it runs, what it keeps, what it writes."""

import contextlib
import functools
import json
import shutil
import sys
from unittest import mock

import pandas as pd
import pytest
import scripts

from utils import compare, runs
from utils.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.long]

METHODS = ("spul", "spul-gate", "gradient_ascent", "npo", "prompting", "eco", "refusal")
FLAGS = {
    "rows": "--max_length=200 --dtype=float32 --max_train_samples 20",
    "fine_tune": "--quantization=none --train_batch_size=8 --num_epochs=2 --lr=2e-3",
    "spul": "--ptuning_num_tokens=4 --ptuning_hidden_size=16",
    "with_retain": "--forget_per_batch=2",
    "prompting": "--instruction=Beware.",
    "eco": "--eco_start=3 --eco_steps=0 --eco_bisect=0 --eco_max_fpr=0.3",
    "budget_rows": "24",
    "batch_size": "8",
    "validation_share": "0.25",
}


@pytest.fixture(scope="module")
def compared(tiny_model, small_data):
    """compared(folder, *flags) compares there, the scripts in this process; returns the commands that were called."""

    def start(folder, *more):
        def call(self, command):
            called.append(command)
            result = scripts.call(folder, command[0].removesuffix(".py"), *command[1:])
            return result.code, result.stderr

        called, flags = [], [f"--{name}={value}" for name, value in FLAGS.items()]
        command = ["compare", f"--model_name={tiny_model}", f"--dataset={small_data}", *flags, *more]
        command += ["--grid", "1e-4", "1e30", "--spul_grid", "1e-2", "1e-3", "--output_path=out", "--methods", *METHODS]
        with (
            contextlib.chdir(folder),
            mock.patch.object(compare.Workplace, "_run", call),
            mock.patch.object(sys, "argv", command),
        ):
            compare.main(compare.parse_args())
        return called

    return start


@pytest.fixture(scope="module")
def finished(compared, tmp_path_factory):
    """(folder of a whole comparison, the commands that it called)."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, compared(folder)


@pytest.fixture
def run(finished, compared, tmp_path):
    """run(*flags) goes on in a copy of the finished comparison, `tmp_path`."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return functools.partial(compared, tmp_path)


def test_the_whole_comparison(run, tmp_path):
    records = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = ["base", "fine-tuned", "retain model", "SPUL", "SPUL behind a gate", "gradient_ascent", "npo", "prompting"]
    rows += ["eco", "refusal", "SPUL + router"]
    assert [record["method"] for record in records] == rows
    table, below = (tmp_path / "out" / "table.md").read_text().split("\n\n")
    assert len(table.splitlines()) == 2 + len(rows) and "retain model (target)" in table
    tested = [line for line in below.splitlines() if "against fine-tuned (McNemar): test_retain p = " in line]
    assert [line[2:].split(" against ")[0] for line in tested] == rows[2:]
    assert all("accuracy_ci" in scores for record in records for scores in record["splits"].values())
    assert all(0 <= record["overall"]["score"] <= 1 for record in records)
    assert (tmp_path / "out" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    by_method = {record["method"]: record for record in records}
    target = by_method["retain model"]["distance_to_retain_model"]
    assert target == dict.fromkeys(("accuracy_forget", "accuracy_retain", "js_train_forget", "js_test_forget"), 0)
    assert by_method["base"]["distance_to_retain_model"]["js_train_forget"] > 0
    for method in ("gradient_ascent", "npo"):
        search = by_method[method]["search"]
        assert search["lr"] == 1e-4 and search["grid"]["1e+30"] is None  # diverged, which ends no comparison
        assert by_method[method]["training"]["peak_memory_bytes"] > 0
    assert set(by_method["SPUL"]["search"]["grid"]) == {"0.01", "0.001"}
    assert len(list((tmp_path / "out" / "runs").glob("spul-42-*/manifest.json"))) == 1  # of the two only the better
    gated = [
        next((tmp_path / "out" / "runs").glob(f"{name}-*/gate/gate.json")) for name in ("eco", "spul-gate", "refusal")
    ]
    assert len({file.read_text() for file in gated}) == 1  # the same gate

    assert run() == []  # everything is recognised
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == records

    evaluation = next((tmp_path / "out" / "evaluations").glob("npo-*"))
    shutil.rmtree(evaluation)
    again = run()
    assert [command[0] for command in again] == ["inference_spul.py"] and "npo" in " ".join(again[0])


def flags_of(command):
    """The flags of a command as {name: value}, the last one where it is given twice, as argparse takes it."""
    return dict((*word.split("=", 1), "")[:2] for word in command if word.startswith("--"))


def test_every_method_has_the_same_budget(finished):
    """As many settings, rows a run and rows a step; an epoch of 5 + 9 rows ends with a small step."""
    folder, commands = finished
    budgeted = [flags for flags in map(flags_of, commands) if "--max_rows" in flags]
    methods = [flags.get("--unlearn_method", "spul-gate" if "--gate" in flags else "spul") for flags in budgeted]
    assert methods == [method for method in METHODS[:4] for _ in range(2)]
    same = {name: {flags[name] for flags in budgeted} for name in ("--max_rows", "--train_batch_size", "--num_epochs")}
    assert same == {"--max_rows": {"24"}, "--train_batch_size": {"8"}, "--num_epochs": {"24"}}
    assert not any(flags.keys() & {"--max_steps", "--final"} for flags in budgeted)
    for method, steps in {"spul": 3, "gradient_ascent": 4, "npo": 3}.items():  # 8 + 5 + 8 rows, or 5 + 5 + 5 + 5
        (log,) = (folder / "out" / "runs").glob(f"{method}-42-*/training.jsonl")
        assert sum("loss" in json.loads(line) for line in log.read_text().splitlines()) == steps


def test_test_rows_are_read_after_all_choices(finished, small_data):
    folder, commands = finished
    final = ["--final" in command for command in commands]
    assert final == sorted(final) and all(
        (command[0] == "inference_spul.py") == is_last for command, is_last in zip(commands, final)
    )
    assert {flags_of(command)["--validation_share"] for command in commands} == {"0.25"}
    rows = pd.read_json(next((folder / "out" / "evaluations").glob("eco-*")) / "predictions.jsonl", lines=True)
    for split, found in rows.groupby("split")["text"]:
        assert set(found) <= texts(small_data, split)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--spul_grid", "1e-3"], "--grid has 2 learning rates and --spul_grid 1; give as many to both"),
        (["--budget_rows=7"], "--budget_rows=7 is less than one step"),
        (["--spul=--max_steps 300"], "--spul holds --max_steps, which is the same for every method"),
        (["--training=--train_batch_size=4"], "--training holds --train_batch_size"),
        (["--rows=--final"], "--rows holds --final"),
    ],
)
def test_no_method_gets_another_budget(flags, sentence, capsys):
    command = ["compare", "--model_name=m", "--grid", "1e-5", "1e-4", *flags]
    with mock.patch.object(sys, "argv", command), pytest.raises(SystemExit, match="2"):
        compare.parse_args()
    assert sentence in capsys.readouterr().err


def test_a_search_that_fails_for_another_reason_ends_the_comparison(run, tmp_path):
    """And leaves nothing behind that would count as a result."""
    with pytest.raises(UserError, match="baselines.py ended with exit code 2; finished runs are kept"):
        run("--baselines=--num_epoch=3")
    assert run() == []


def test_another_model_under_the_same_path_is_another_run(tiny_model, small_data, tmp_path):
    def places():
        command = ["compare", f"--model_name={model}", f"--dataset={small_data}", f"--eco=--eco_names={names}"]
        with mock.patch.object(sys, "argv", command):
            work = compare.Workplace(tmp_path, compare.parse_args())
        return work._place("runs", "npo", ["baselines.py"])

    model, names = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "names.txt"
    names.write_text("Ann Lee\n")
    found = [places(), places()]
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    found.append(places())
    names.write_text("Ann Lee\nJo Woo\n")
    assert len({*found, places()}) == 3 and found[0] == found[1]


def test_what_a_process_says(tmp_path, capfdbinary):
    work = compare.Workplace.__new__(compare.Workplace)
    code, said = work._run(["qlora.py", "--model_name=none/at/all", "--lora_fropout=x"])
    assert code == 2 and "lora_fropout" in said.strip().split("\n")[-1]


def texts(folder, split):
    return set(pd.read_csv(folder / f"{split}.csv")["text"])


def test_a_comparison_replaces_no_table_of_the_users(tmp_path):
    (tmp_path / "table.md").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="table.md was written by no comparison; choose another --output_path"):
        runs.refuse_foreign(tmp_path, compare.WRITTEN, "comparison")
    (tmp_path / "metrics.json").write_text('[{"method": "base", "checkpoint": "a", "splits": {}}]', encoding="utf-8")
    runs.refuse_foreign(tmp_path, compare.WRITTEN, "comparison")
