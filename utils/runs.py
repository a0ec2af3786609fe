"""Runs of the scripts, one after the other, that are recognised when they are asked for again.

`make compare` and `make race` run the scripts as a user does, each in a process of its own. What is finished is kept,
so that an interrupted command continues where it stopped.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parents[1]


class Workplace:
    """Runs the scripts, each once: a run is recognised by the hash of its command, its data and its parents.

    folder: where the runs lie. dataset, model: as the scripts take them. flags: all that the scripts may get, some of
    which name files. `task`: what the data asks.
    """

    def __init__(self, folder: Path, dataset: str, model: str, flags: Sequence[str]) -> None:
        from utils.data.select import fingerprint
        from utils.tasks.rows import load_splits

        self.folder = folder
        frames = load_splits(dataset)
        self.task = frames.task
        self._data = [fingerprint(frames), *_marks(frames), *_contents(model, flags)]

    def trained(self, path: Path, command: list[str]) -> str:
        """The folder `path`, which the command writes first if it is not there yet."""
        if not (path / "manifest.json").exists():
            self._call([*command, *output_flags(path)])
        return str(path)

    def evaluated(self, path: Path, command: list[str]) -> dict:
        """The last record in the folder `path`, which the command, an evaluation, writes first."""
        if not (path / "metrics.json").exists():
            self._call([*command, f"--output_path={path}", "--overwrite"])
        return last_record(path)

    def _place(self, room: str, name: str, command: list[str]) -> Path:
        digest = hashlib.sha256(json.dumps([command, self._data]).encode()).hexdigest()[:8]
        return self.folder / room / f"{name}-{digest}"

    def _call(self, command: list[str], or_not_finite: bool = False) -> bool:
        """Run a script; True if it ended well. A loss that was not finite gives False if that is allowed, and anything
        else raises UserError."""
        print("$ python", shlex.join(command), flush=True)
        code, said = self._run(command)
        if code == 2 and or_not_finite and "not finite" in said.strip().split("\n")[-1]:
            return False
        if code:
            raise UserError(f"{command[0]} ended with exit code {code}; finished runs are kept, start again")
        return True

    def _run(self, command: list[str]) -> tuple[int, str]:
        """(exit code, the end of what it said on stderr) of a script in a process of its own."""
        started = [sys.executable, str(ROOT / command[0]), *command[1:]]
        with subprocess.Popen(started, stderr=subprocess.PIPE) as process:
            said = b""
            while part := process.stderr.read1(4096):
                sys.stderr.buffer.write(part)
                sys.stderr.flush()
                said = (said + part)[-4096:]
        return process.returncode, said.decode(errors="replace")


def last_record(folder: Path) -> dict:
    """The last record of metrics.json in `folder`."""
    from utils.storage import schemas
    from utils.storage.formats import Records

    return schemas.read(folder / "metrics.json", Records)[-1]


def output_flags(path: Path) -> list[str]:
    """Where a run writes, and how it starts if it was interrupted: it goes on from its state, else replaces what is
    left of it."""
    from utils.storage.outputs import state_path

    return [f"--output_path={path}", "--overwrite", *(["--resume"] if state_path(path).exists() else [])]


def refuse_foreign(folder: Path, names: Sequence[str], what: str) -> None:
    """Raise UserError where `folder` holds files of these `names` and its metrics.json, if any, is none of ours.

    what: the kind of command that writes them.
    """
    from utils.storage import outputs

    there = [name for name in names if (folder / name).exists()]
    if there and not outputs.records_in(folder / "metrics.json"):
        raise UserError(f"{folder / there[0]} was written by no {what}; choose another --output_path")


def _marks(frames: "Mapping[str, pd.DataFrame]") -> list[list]:
    """The columns beside text and label that scores depend on, which the fingerprint leaves out."""
    marks = "names_other", "nested"
    return [frame[column].tolist() for frame in frames.values() for column in marks if column in frame]


def _contents(model: str, flags: Sequence[str]) -> list[str]:
    """Hashes of the model and of the files that flags name: a path alone does not say what lies there."""
    from utils.data.load import SNIPPETS_FOLDER
    from utils.storage import checkpoints

    paths = [model, SNIPPETS_FOLDER / "forget_names.txt", *(flag.split("=", 1)[-1] for flag in flags)]
    found = [Path(path) for path in paths if os.path.exists(path)]  # a text longer than a file name does not
    return [checkpoints.weights_sha256(p) if p.is_dir() else checkpoints.file_sha256(p) for p in found]
