"""Runs the scripts by their command line: in this process, which is quick, or in one of their own, as a user does."""

import contextlib
import hashlib
import importlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from utils import cli
from utils.errors import note_once

ROOT = Path(__file__).resolve().parents[1]

# Budgets under which a run takes about a second. A flag given again overrides.
ROWS = ("--max_length=96", "--dtype=float32")
QLORA = (*ROWS, "--quantization=none", "--train_batch_size=8", "--num_epochs=1")
SPUL = (*ROWS, "--train_batch_size=8", "--num_epochs=1", "--ptuning_num_tokens=4", "--ptuning_hidden_size=16")
BASELINES = (*ROWS, "--train_batch_size=8", "--num_epochs=1")


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


def call(cwd, script, *arguments):
    """What `python <script>.py <arguments>` does in folder `cwd`, without the start of a process."""
    return call_module(cwd, f"{script}.py", importlib.import_module(script), *arguments)


def call_module(cwd, name, module, *arguments):
    """The same of a module that is the script `name`."""
    note_once.cache_clear()
    code, out, err = 0, io.StringIO(), io.StringIO()
    command = [name, *map(str, arguments)]
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with mock.patch.object(sys, "argv", command), contextlib.chdir(cwd), streams[0], streams[1]:
        try:
            cli.run(module.parse_args, module.main)
        except SystemExit as error:
            code = error.code
    return Result(code, out.getvalue(), err.getvalue())


def qlora(cwd, model, dataset, *arguments):
    return call(cwd, "qlora", f"--model_name={model}", f"--dataset={dataset}", *QLORA, *arguments)


def spul(cwd, parent, dataset, *arguments):
    return call(cwd, "spul", f"--model_checkpoints={parent}", f"--dataset={dataset}", *SPUL, *arguments)


def baselines(cwd, parent, dataset, method, *arguments):
    flags = f"--model_checkpoints={parent}", f"--dataset={dataset}", f"--unlearn_method={method}"
    return call(cwd, "baselines", *flags, *BASELINES, *arguments)


def start(cwd, script, *arguments, **options):
    """`python <script>.py <arguments>` in folder `cwd`, in a process of its own."""
    result = subprocess.run(
        command(script, *arguments), cwd=cwd, capture_output=True, text=True, check=False, **options
    )
    return Result(result.returncode, result.stdout, result.stderr)


def command(script, *arguments):
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]


def done(result):
    """`result`, which must be a success."""
    assert result.code == 0, result.stderr
    return result


def refused(cwd, sentence, script, *arguments, run=call):
    """The command says `sentence` in one line on stderr, exits 2 and leaves every file under `cwd` as it was."""
    before = tree(cwd)
    result = run(cwd, script, *arguments)
    assert result.code == 2, result
    said = [line for line in re.split(r"[\r\n]+", result.stderr) if line and not is_aside(line)]
    assert len(said) == 1, result.stderr
    assert said[0].startswith(f"{script}.py: error: ")
    assert sentence in said[0]
    assert tree(cwd) == before
    return result


def is_aside(line):
    """A progress bar, or a note on something else than what is refused."""
    return is_progress_bar(line) or line.startswith("note: ")


def is_progress_bar(line):
    return re.match(r"[\w -]+: +\d+%\|", line) is not None


def tree(folder):
    """{relative path: SHA-256, None for a folder} of what lies below `folder`, but for finished files of scores that a
    run has saved there for others."""
    saved = Path(folder) / "saved_scores"
    finished = {saved, *saved.glob("[!.]*.json")}
    paths = [path for path in sorted(Path(folder).rglob("*")) if path not in finished]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in paths
    }


def names(folder):
    """Of what lies in `folder`."""
    return {path.name for path in folder.iterdir()}


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def numbers(scores):
    """The scores of a split with the two ends of an interval as scores of their own, for pytest.approx."""
    ends = scores.get("accuracy_ci", [])
    return {name: value for name, value in scores.items() if name != "accuracy_ci"} | dict(zip(("low", "high"), ends))


def kill_after_a_state(cwd, script, *arguments):
    """Start the run in a process of its own and kill it without warning as soon as a state file has appeared."""
    process = subprocess.Popen(
        command(script, *arguments), cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(cwd.glob("*.training.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()


def stop_at(cwd, step, *words):
    """Interrupt the run, as Ctrl-C does, before it takes this step; exit code 130."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == step:
            raise KeyboardInterrupt
        return clip(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
        assert call(cwd, *words).code == 130
