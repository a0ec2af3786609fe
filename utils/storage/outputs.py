"""Output folders: claimed when a run starts, replaced only where they are this project's own, written whole."""

import contextlib
import functools
import itertools
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.storage import checkpoints, files
from utils.storage.reading import read_json

READ = (  # arguments that may name a file or folder
    "model_name", "model_checkpoints", "init_checkpoint", "parent_path", "router", "requests", "gate", "dataset",
    "input", "input_file", "forget_only", "forget_names", "eco_names", "eco_classifier", "eco_token_classifier",
    "eco_target", "logits_path", "hide_like", "shadows",
)  # fmt: skip
BESIDE = {  # what outputs hold beside the files that a manifest lists
    checkpoints.MANIFEST, "metrics.json", "predictions.jsonl", "comparison.png", "false_positives.png",
    "training.jsonl", "training.png", "audit.json", "audit.png",
    "strength.png", "gate_roc.png", "README.md", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "model.safetensors.index.json", ".DS_Store",
}  # fmt: skip
LONGEST_STEM = 150  # characters


class Occupied(UserError):
    """There is something at that name already."""


@dataclass(frozen=True)
class Output(os.PathLike):
    """An output folder that this run has claimed. name: as the user wrote it; path: where that really is."""

    name: str
    checked: Callable[[str], None]

    def __str__(self) -> str:
        return self.name

    def __fspath__(self) -> str:
        return self.name

    @property
    def path(self) -> Path:
        return Path(os.path.realpath(self.name))

    @property
    def log_path(self) -> Path:
        """A file in which a running training can be watched; it goes when the run ends, however that is."""
        return files.workplace_of(self.path) / "training.jsonl"

    @contextlib.contextmanager
    def new_folder(self) -> Iterator[Path]:
        """Yields a folder that becomes the output when the block ends well; what was there goes, and so does the state
        of an interrupted run."""
        place = files.workplace_of(self.path)
        new = place / files.NEW
        new.mkdir()
        yield new
        self.checked(self.name)  # again: hours may have passed
        files.give_rights(new, place)
        if self.path.exists():
            shutil.copymode(self.path, new)
        files.replace(place, self.path)


@contextlib.contextmanager
def claim(
    names: Iterable[str | os.PathLike],
    args: Namespace,
    overwrite: bool | None = None,
    ours: Callable[[Path], set[str] | None] | None = None,
) -> Iterator[Output]:
    """Holds the first of `names` that is free as this run's output folder while the block runs.

    Every place is tried by writing to it, and nothing of that stays. With several processes the main one claims. All
    `args` of the command are needed, since several name what must not be replaced. overwrite: instead of
    args.overwrite. ours: instead of `written`. Raises UserError as `check` does for the last of the names, and where
    another run has claimed it or left a state.
    """
    from utils import distributed

    overwrite = getattr(args, "overwrite", False) if overwrite is None else overwrite
    checked = functools.partial(check, args=args, overwrite=overwrite, ours=ours or written)
    with contextlib.ExitStack() as stack:
        yield Output(distributed.on_main(lambda: _claim(names, args, overwrite, checked, stack)), checked)


def _claim(
    names: Iterable[str | os.PathLike],
    args: Namespace,
    overwrite: bool,
    checked: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> str:
    """The first free of `names`, whose workplace `stack` holds from now on. `args`: see `claim`."""
    refusal = None
    for name in map(str, map(Path, names)):  # without a slash behind it
        with contextlib.ExitStack() as tried:
            try:
                tried.enter_context(files.workplace(name))
                checked(name)
                if not overwrite:
                    _refuse_to_start_over(name, args)
            except (files.Taken, Occupied) as error:
                refusal = error
                continue
            files.sweep(name)
            stack.push(tried.pop_all())
            return name
    raise refusal


def check(name: str, args: Namespace, overwrite: bool, ours: Callable[[Path], set[str] | None]) -> None:
    """Raise UserError if `name` cannot become an output folder.

    What `overwrite` may replace is an empty folder or one that this project wrote and nobody has put anything into; and
    nothing that the run reads: what the command's `args` (READ) name, and what that was trained on. ours:
    function(folder) -> names of the files in it that this project wrote, None where it is none of the project's.
    """
    path = Path(os.path.realpath(name))
    for other in _inputs(args):
        if path == Path(other) or path in Path(other).parents:
            raise UserError(f"--output_path={name} would replace {other}, which this run reads; choose another one")
    if path.exists() and not overwrite:
        raise Occupied(f"{name} exists; choose another --output_path or add --overwrite")
    if path.exists():
        _refuse_foreign(name, path, ours)


def _refuse_to_start_over(name: str, args: Namespace) -> None:
    """Raise Occupied if an interrupted run would be lost without a word; `args` say whether the script has --resume."""
    if not getattr(args, "resume", True) and state_path(name).exists():
        raise Occupied(
            f"an interrupted run left {state_path(name)}; continue it with --resume or start over with --overwrite"
        )


def _refuse_foreign(name: str, path: Path, ours: Callable[[Path], set[str] | None]) -> None:
    """Raise UserError unless the existing `path` is a folder that can be replaced without a loss to the user."""
    if not path.is_dir():
        raise UserError(f"{name} is a file; choose another --output_path")
    if path.is_mount() or Path.cwd().is_relative_to(path):
        raise UserError(f"{name} is a mount point or where you are, and stays; choose a folder in it as --output_path")
    if not any(path.iterdir()):
        return
    known = ours(path)
    if known is None:
        raise UserError(f"{name} is no folder that this project wrote; --overwrite does not delete it")
    found = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir() or not any(file.iterdir()))
    foreign = [file for file in found if file.relative_to(path).as_posix() not in known and file.name not in BESIDE]
    if foreign:
        raise UserError(f"{foreign[0]} is not of this project and --overwrite would delete it; move it")


def written(folder: Path) -> set[str] | None:
    """The relative paths of files that a script wrote into its output `folder`; None if it is not one.

    Recognised by content: a manifest of ours, the records and predictions of an evaluation, or a report of an audit.
    What an evaluation exported bears the names of its records.
    """
    manifest = checkpoints.manifest_at(folder)
    if manifest is not None:
        return set(manifest["files"])
    records = records_in(folder / "metrics.json")
    if records and (folder / "predictions.jsonl").is_file():
        stems = exported_stems([str(record["method"]) for record in records])
        return {f"{stem}_{part}.json" for stem in stems for part in ("EVAL", "SUMMARY")}
    return set() if is_report(folder / "audit.json") else None


def exported_stems(methods: Sequence[str]) -> list[str]:
    """What the files about each of `methods` begin with: its letters, digits and `.+-`, others as `_`. Names that
    differ in nothing else, or only in capitals, get a number."""
    stems: list[str] = []
    for method in methods:
        plain = re.sub(r"[^\w.+-]+", "_", method, flags=re.ASCII).strip("._")[:LONGEST_STEM] or "model"
        names = itertools.chain([plain], (f"{plain}-{i}" for i in itertools.count(2)))
        taken = {stem.casefold() for stem in stems}
        stems.append(next(name for name in names if name.casefold() not in taken))
    return stems


def is_report(file: Path) -> bool:
    """Whether `file` is the report of an audit."""
    try:
        return {"version", "audits", "asks"} <= read_json(file).keys()
    except (UserError, AttributeError):
        return False


def records_in(file: Path) -> list[dict]:
    """The records of a metrics.json; an empty list if it holds anything else."""
    try:
        records = read_json(file)
        ours = all({"method", "checkpoint", "splits"} <= record.keys() for record in records)
    except (UserError, TypeError, AttributeError):
        return []
    return records if ours else []


def state_path(output: str | os.PathLike) -> Path:
    """Where the resumable state of the run that writes `output` lies: a file beside it."""
    path = Path(output)
    return files.state_of(path.resolve() if path.is_symlink() else path)


def _inputs(args: Namespace) -> list[str]:
    """The real paths that `args` name, and those of the parents that the manifests among them name."""
    values = [getattr(args, name, None) for name in READ]
    named = (path for value in values if value for path in (value if isinstance(value, list) else [value]))
    found = [os.path.realpath(str(path)) for path in named]
    for path in found:  # which grows
        manifest = checkpoints.manifest_at(path)
        parent = os.path.realpath(checkpoints.parent_path(path, manifest)) if manifest else path
        if parent not in found:
            found.append(parent)
    return found
