"""What surrounds a run: closed and full streams, Ctrl-C, variables of another launch, `~` in paths."""

import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import scripts
from accelerate import PartialState
from scripts import ROOT, tree

from utils import cli, distributed

pytestmark = pytest.mark.slow

ROWS = "".join(f"film {i} {'of Ann Lee' if i % 3 else ''},{i % 2}\n" for i in range(24))
FLAGS = "--input=rows.csv", "--output_path=out", "--forget_names=people.txt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where make_splits, the quickest of the scripts, has what it needs."""
    monkeypatch.syspath_prepend(ROOT / "data")
    (tmp_path / "rows.csv").write_text(f"text,label\n{ROWS}", encoding="utf-8")
    (tmp_path / "people.txt").write_text("Ann Lee\n", encoding="utf-8")
    return tmp_path


LEFTOVERS = {
    "LOCAL_RANK": {"LOCAL_RANK": "0"},
    "WORLD_SIZE": {"WORLD_SIZE": "2"},
    "several": {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    "no numbers": {
        "RANK": "", "LOCAL_RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"
    },
}  # fmt: skip


@pytest.mark.parametrize("found", LEFTOVERS.values(), ids=LEFTOVERS)
def test_what_another_launch_left_in_the_environment_starts_nothing(found, folder, monkeypatch):
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    PartialState._reset_state()
    result = scripts.done(scripts.call(folder, "make_splits", *FLAGS))
    assert result.stderr.startswith("note: ") and "in the environment ignored" in result.stderr
    assert PartialState().num_processes == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_launch_that_is_over_ends_in_a_sentence(rank, folder, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in zip(distributed.LAUNCHER, (rank, rank, "2", "127.0.0.1", str(port))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "GATHERING", timedelta(seconds=1))
    PartialState._reset_state()
    scripts.refused(folder, "the other processes of which the environment tells", "make_splits", *FLAGS)


def test_an_address_alone_is_no_leftover(folder, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    PartialState._reset_state()
    assert scripts.done(scripts.call(folder, "make_splits", *FLAGS)).stderr == ""


def test_a_closed_stdout_takes_nothing_away(folder):
    """Nor does a file that the run opens get what it prints."""
    command = scripts.command("data/make_splits", *FLAGS)
    result = subprocess.run(
        command, cwd=folder, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1), text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    for split in ("train_retain", "train_forget", "test_retain", "test_forget"):
        assert (folder / "out" / f"{split}.csv").read_text(encoding="utf-8").startswith("text,label,label_text\nfilm")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_a_full_stdout_is_one_sentence(folder):
    command = scripts.command("data/make_splits", *FLAGS)
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = subprocess.run(command, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("make_splits.py: error: the disk is full") and result.stderr.count("\n") == 1


def test_scripts_leave_the_imports_that_take_seconds_to_the_run():
    """Where Ctrl-C ends them without a traceback."""
    heavy = "torch", "numpy", "pandas", "sklearn", "transformers", "peft", "accelerate", "safetensors"
    code = f"import sys, qlora, spul, baselines, inference_spul; print(set({heavy}) & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.fixture
def interruptible():
    """Ctrl-C counts, though a shell that started the tests in its background has switched it off for them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_it_works(capsys):
    with pytest.raises(SystemExit) as error:
        cli.run(lambda: None, lambda args: os.kill(os.getpid(), signal.SIGINT))
    assert error.value.code == 130 and capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_it_imports():
    """An import that swallows whatever is raised does not swallow that."""
    stop = "try: os.kill(os.getpid(), signal.SIGINT)\n    except BaseException: pass"
    code = f"import os, signal\nfrom utils import cli\nwith cli.importing():\n    {stop}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stays_as_it_was():
    with cli.importing():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # in the background of a script
    with cli.importing():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_home_in_a_path(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "elsewhere").mkdir()
    flags = "--input=~/rows.csv", "--output_path=~/out", "--forget_names=~/people.txt"
    scripts.done(scripts.call(folder / "elsewhere", "make_splits", *flags))
    assert (folder / "out" / "train_forget.csv").is_file() and tree(folder / "elsewhere") == {}


@pytest.mark.parametrize("value", ["~nobody-of-that-name/out", ""])
def test_no_home_and_no_path(value, folder):
    flags = f"--output_path={value}", *FLAGS[::2]
    scripts.refused(folder, "argument --output_path: ", "make_splits", *flags)


@pytest.mark.parametrize("script", ["qlora", "spul", "baselines", "inference_spul", "make_splits"])
def test_every_path_flag_knows_home(script, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(cli.ArgumentParser, "parse_args", lambda self: asked.extend(self._actions) or sys.exit())
    scripts.call(folder, script)
    ends = (
        "_path",
        "_names",
        "_only",
        "_checkpoints",
        "_checkpoint",
        "_file",
        "dataset",
        "router",
        "model_name",
        "input",
    )
    no_path = ("label_names", "request_names")
    flags = [action for action in asked if action.dest.endswith(ends) and action.dest not in no_path]
    assert len(flags) > 2 and [action.dest for action in flags if action.type is not cli.path] == []
