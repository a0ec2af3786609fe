"""Time to the goal on the tiny model: what a race runs, when its routes stop, what it says of time."""

import contextlib
import json
import sys
from argparse import Namespace
from unittest import mock

import pytest
import scripts
from scripts import done, stop_at

from utils import race
from utils.errors import note_once
from utils.storage.outputs import state_path
from utils.training.state import read_state

pytestmark = [pytest.mark.slow, pytest.mark.long]

TINY = "--ptuning_num_tokens=4 --ptuning_hidden_size=16 --train_batch_size=8 --lr=1e-2"
FLAGS = {
    "rows": "--max_length=96 --dtype=float32",
    "published": f"{TINY} --eval_steps=1",
    "spul": f"{TINY} --forget_per_batch=2 --init_text=Beware. --eval_steps=2 --max_steps=2",
    "gated": f"{TINY} --gate=tfidf --eco_max_fpr=0.3 --eval_steps=1",
    "curve_samples": "4",
}


@pytest.fixture
def run(fine_tuned, small_data, tmp_path):
    """run(*flags) races in `tmp_path`, the scripts in this process: (race.json, the commands that were called)."""

    def start(*more):
        def call(self, command):
            called.append(command)
            result = scripts.call(tmp_path, command[0].removesuffix(".py"), *command[1:])
            return result.code, result.stderr

        called, flags = [], [f"--{name}={value}" for name, value in FLAGS.items()]
        command = ["race", f"--model_checkpoints={fine_tuned}", f"--dataset={small_data}", *flags, "--output_path=out"]
        with (
            contextlib.chdir(tmp_path),
            mock.patch.object(race.Workplace, "_run", call),
            mock.patch.object(sys, "argv", [*command, *more]),
        ):
            race.main(race.parse_args())
        return json.loads((tmp_path / "out" / "race.json").read_text()), called

    return start


def test_a_race(run, tmp_path, capsys):
    """A goal that every point is at: the first point ends a route."""
    goal = "--forget_accuracy=1", "--retain_drop=1"
    found, called = run(*goal)
    routes = found["routes"]
    assert list(routes) == ["SPUL as published", "SPUL", "SPUL behind a gate"]
    assert [route["steps"] for route in routes.values()] == [1, 2, 1]
    for route in routes.values():
        assert route["ended"] == "goal" and route["confirmed"]
        first, *points = route["curve"]
        assert (first["step"], first["seconds"]) == (0, 0) and first.keys() == points[0].keys()
        assert 0 < route["first_step_done"] <= route["seconds_to_goal"] == points[-1]["seconds"] == route["seconds"]
        assert first["train_forget"] == found["fine_tuned"]["curve"]["train_forget"] == 1  # memorised
    assert found["rows"] == {
        "curve": {"train_forget": 4, "test_retain": 4}, "final": {"train_forget": 8, "test_retain": 6}
    }  # fmt: skip
    (one,) = {word for command in called if command[0] == "spul.py" for word in command if "curve_samples" in word}
    references = {word for command in called for word in command if word.startswith("--logits_path")}
    assert one == "--curve_samples=4" and len(references) == 3  # each route computes its own
    assert not list((tmp_path / "out").glob("runs/*.safetensors"))
    assert (tmp_path / "out" / "race.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "table.md").read_text()
    assert len(table.splitlines()) == 2 + 4 + 2 and table in capsys.readouterr().out
    records = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [record["method"] for record in records[1:]] == list(routes)

    again, called = run(*goal)
    assert called == [] and again == found  # everything is recognised

    found, called = run("--forget_accuracy=0", "--retain_drop=0", "--budget=1e-5", "--routes", "spul")
    routes = found["routes"]
    assert {route["ended"] for route in routes.values()} == {"budget"} and len(called) == 2
    assert {(route["steps"], route["seconds_to_goal"]) for route in routes.values()} == {(1, None)}
    assert (tmp_path / "out" / "table.md").read_text().count("not within 1e-05 min") == 1


def test_when_a_route_is_at_the_goal():
    """By hand: forgetting alone is not enough, nor is keeping; the later points do not count."""

    def point(step, seconds, forget, retain):
        return {"step": step, "accuracy": {"train_forget": forget, "test_retain": retain}, "seconds": seconds}

    log = [{"step": i, "loss": 1.0, "seconds": 10.0 + i} for i in (1, 2, 3, 4)]
    points = point(1, 11.0, 0.5, 0.9), point(2, 12.0, 0.1, 0.88), point(3, 13.0, 0.15, 0.89), point(4, 14.0, 0.0, 0.9)
    args, start = Namespace(forget_accuracy=0.15, retain_drop=0.01, budget=1.0), {"train_forget": 1, "test_retain": 0.9}
    assert race.reached({"train_forget": 0.15, "test_retain": 0.57}, {"test_retain": 0.58}, args)  # whatever floats say
    found = race.timed([*log, *points], start, args, "accuracy")
    assert (found["seconds_to_goal"], found["ended"], found["first_step_done"]) == (13.0, "goal", 11.0)
    assert race.timed([*log, *points[:2]], start, args, "accuracy")["ended"] == "schedule"
    args.budget = 0.2
    assert race.timed([*log, *points[:2]], start, args, "accuracy")["ended"] == "budget"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--rows=--seed=3"], "--rows holds --seed, which the race decides; leave it out"),
        (["--spul=--max_minutes 3"], "--spul holds --max_minutes"),
        (["--gated=--lr=1e-3"], "--gated names no --gate"),
        (["--budget=0"], "'0' is not a number above 0"),
    ],
)
def test_a_race_is_the_same_for_every_route(flags, sentence, capsys):
    with (
        mock.patch.object(sys, "argv", ["race", "--model_checkpoints=m", *flags]),
        pytest.raises(SystemExit, match="2"),
    ):
        race.parse_args()
    assert sentence in capsys.readouterr().err


def log_of(folder):
    return [json.loads(line) for line in (folder / "out" / "training.jsonl").read_text().splitlines()]


def test_a_resumed_run_keeps_its_clock(fine_tuned, small_data, tmp_path):
    """And stops by it; its curve has the splits that were asked for."""
    budget = "--max_minutes=60", "--max_steps=4", "--num_epochs=9", "--save_steps=2", "--eval_steps=1"
    more = *budget, "--curve_splits", "test_retain", "--max_eval_samples=0", "--output_path=out", "--curve_samples=2"
    arguments = f"--model_checkpoints={fine_tuned}", f"--dataset={small_data}", *scripts.SPUL, *more
    stop_at(tmp_path, 3, "spul", *arguments)
    saved = read_state(state_path(tmp_path / "out"))["log"]
    done(scripts.call(tmp_path, "spul", *arguments, "--resume"))
    log = log_of(tmp_path)
    assert log[: len(saved)] == saved and len(log) == 2 * len(saved) == 8
    seconds = [line["seconds"] for line in log]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert all(line["accuracy"].keys() == {"test_retain"} for line in log if "accuracy" in line)
    assert [line["seconds"] for line in log if "accuracy" in line] == seconds[::2]  # evaluation takes no time


def test_a_run_stops_only_while_it_keeps_the_others(fine_tuned, small_data, tmp_path):
    more = "--max_steps=3", "--num_epochs=9", "--eval_steps=1", "--curve_samples=2", "--max_eval_samples=0"
    more = *more, "--stop_at_forget_accuracy=1", "--output_path=out", "--overwrite"
    steps = {}
    for retain in ("0.0", "1.0"):
        done(scripts.spul(tmp_path, fine_tuned, small_data, *more, "--lr=1e-7", f"--stop_at_retain_accuracy={retain}"))
        steps[retain] = log_of(tmp_path)[-1]["step"]
        kept = log_of(tmp_path)[-1]["accuracy"]["test_retain"]
    assert steps == {"0.0": 1, "1.0": 1 if kept == 1 else 3}


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--stop_at_retain_accuracy=0.5"], "--stop_at_retain_accuracy goes with --stop_at_forget_accuracy"),
        (["--stop_at_forget_accuracy=0.5"], "--stop_at_forget_accuracy needs --eval_steps"),
        (
            ["--stop_at_forget_accuracy=0.5", "--eval_steps=1", "--curve_splits", "test_retain"],
            "a run that stops by train_forget needs it among --curve_splits",
        ),
    ],
)
def test_a_run_that_could_not_stop_is_refused(flags, sentence, tmp_path):
    scripts.refused(tmp_path, sentence, "spul", "--model_checkpoints=m", *flags)


def test_a_goal_finer_than_a_row_is_noted(capsys):
    note_once.cache_clear()
    race.note_if_coarse(100, 0.01, "--curve_samples")
    assert capsys.readouterr().err == ""
    race.note_if_coarse(48, 0.01, "--curve_samples")
    assert "one of 48 rows of test_retain is 2.1 points, more than --retain_drop (1)" in capsys.readouterr().err
