"""An interrupted run: where it lies, whose it is, and which output folder a run claims."""

import contextlib
import glob
import itertools
import json
import os
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open

from utils import distributed
from utils.errors import UserError, first_line
from utils.storage import checkpoints, outputs, schemas
from utils.storage.files import STATE, recover, workplace
from utils.storage.outputs import Output, state_path
from utils.storage.reading import parse_json, regular_file
from utils.storage.schemas import Amount, Count, Digest, Open, Schema, Share


class Schedule(Open):
    last_epoch: Annotated[int, Field(ge=0)]
    base_lrs: list[Amount]


class Line(Open):
    """One of the log: losses, or the score of each split that curves show."""

    step: Count
    accuracy: dict[str, Share] = {}
    label_accuracy: dict[str, Share] = {}
    probability: dict[str, Share] = {}
    seconds: Amount = 0.0


class State(Schema):
    """The text in a training state. sha256: of its tensors."""

    what, remedy = "training state", "start over with --overwrite"
    settings: dict[str, Any]
    schedule: Schedule
    log: Annotated[list[Line], Field(min_length=1)]
    sha256: Digest

    @model_validator(mode="after")
    def _is_of_one_step(self) -> "State":
        if self.log[-1].step != self.schedule.last_epoch:
            raise ValueError("log and schedule are of different steps")
        return self


PUBLISHED_SEED = 42
UNSAVED_ARGUMENTS = (  # change nothing in what is trained
    "resume", "overwrite", "output_path", "logits_path", "save_steps", "eval_batch_size", "max_eval_samples",
    "parent_path", "gradient_checkpointing", "dry_run", "fresh_scores", "shard",
)  # fmt: skip


@contextlib.contextmanager
def claim_run(args: Namespace, stem: str, timed: bool = False, trains: bool = True) -> Iterator[Output | None]:
    """Holds the output folder of a training run while the block runs: --output_path, else the published `stem`.

    timed: the time of the start is part of the default name. trains: float16 is refused. With --resume it is the folder
    of the interrupted run of this command; None, which is printed, if that has ended since. All `args` are needed,
    since a run that is resumed must have had the same. Raises UserError as `utils.storage.outputs.claim` does, and
    where there is no such run or there are several.
    """
    if trains:
        _refuse_float16(args)
    names = [args.output_path] if args.output_path else _default_names(stem, args.seed, timed)
    if args.resume:
        names = distributed.on_main(
            lambda: _to_resume(args, stem, None if timed and not args.output_path else [*names])
        )
    if not names:
        yield None
        return
    with outputs.claim(names, args) as output:
        if args.resume:
            state = state_path(output)
            refuse_other_settings(state, read_state(state), saved_arguments(args))
        yield output


def _refuse_float16(args: Namespace) -> None:
    """Raise UserError if the dtype in `args` is float16: small gradients become 0 in it unless the loss is scaled,
    which is not done here."""
    if args.dtype == "float16":
        raise UserError("--dtype=float16 loses small gradients in training; use --dtype=bfloat16, float32 or auto")


def _default_names(stem: str, seed: int, timed: bool) -> Iterable[str]:
    """The published name, or several to try in turn. Another seed than the published one is part of it.

    timed: so is the time, and a number for every further run of the same second.
    """
    name = stem if seed == PUBLISHED_SEED else f"{stem}-seed{seed}"
    if not timed:
        return [name]
    name = f"{name}_{time.strftime('%Y-%m-%d-%H-%M-%S')}"
    return itertools.chain([name], (f"{name}_{i}" for i in range(2, 1000)))


def _to_resume(args: Namespace, stem: str, names: list[str] | None) -> list[str]:
    """The output that --resume is about, among those that begin with `stem` if no `names` are given; an empty list if
    it is complete. It is known by its settings, which are all `args`."""
    (name,) = names or [_of_these_settings(stem, args)]
    recover(name)
    if not _is_complete(name, args):
        return [name]
    with workplace(name):
        state_path(name).unlink(missing_ok=True)
    print(f"{name} is complete, there is nothing to continue")
    return []


def _of_these_settings(stem: str, args: Namespace) -> str:
    """The output beginning with `stem` whose interrupted run had the settings `args`; else a complete one that had."""
    pattern = f"{glob.escape(stem)}*"
    states = sorted(map(Path, glob.glob(f"{pattern}{STATE}")), key=os.path.getmtime)
    found, refusal = [], UserError(f"there is no interrupted run to continue at {stem}*; leave out --resume")
    for state in states:
        try:
            refuse_other_settings(state, read_state(state), saved_arguments(args))
            found.append(str(state).removesuffix(STATE))
        except UserError as error:
            refusal = error
    if len(found) > 1:
        raise UserError(
            f"these interrupted runs all have these settings: {', '.join(found)}; name one by --output_path"
        )
    found += [path for path in sorted(glob.glob(pattern)) if _is_complete(path, args)]
    if not found:
        raise refusal
    return found[0]


def _is_complete(name: str, args: Namespace) -> bool:
    """Whether `name` is what a command with these `args` writes, and the state beside it, if any, of the same run."""
    manifest, state = checkpoints.manifest_at(name), state_path(name)
    if not manifest or any(manifest["arguments"].get(key) != value for key, value in saved_arguments(args).items()):
        return False
    if not state.exists():
        return True
    with contextlib.suppress(OSError, ValueError, UserError):
        log = [json.loads(line) for line in (Path(name) / "training.jsonl").read_text(encoding="utf-8").splitlines()]
        saved = read_state(state)["log"]
        return log[: len(saved)] == saved
    return False


def saved_arguments(args: Namespace) -> dict[str, Any]:
    """Those of all `args` that decide what a run computes (not UNSAVED_ARGUMENTS), as JSON gives them back."""
    kept = {key: value for key, value in vars(args).items() if key not in UNSAVED_ARGUMENTS}
    return json.loads(json.dumps(kept, default=str))


def refuse_other_settings(path: str | Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise UserError unless `state` (what `read_state` gave for `path`) was saved with these settings.

    settings: {name: value}, as `saved_arguments` gives them or Training.identity. The first that differs is named.
    """
    different = [key for key, value in settings.items() if state["settings"].get(key) != value]
    if different:
        key = different[0]
        raise UserError(
            f"{path} was saved with {key}={state['settings'].get(key)!r}, this command has {settings[key]!r}; "
            "resume with the same settings, or start over with --overwrite"
        )


def read_state(path: str | Path) -> dict[str, Any]:
    """The JSON part of a training state, as `State` has it. Raises UserError if it is missing or damaged."""
    if not Path(path).exists():
        raise UserError(f"there is no interrupted run to continue at {path}; leave out --resume to start one")
    try:
        with safe_open(regular_file(path), "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no training state or is damaged ({first_line(error)}); start over with --overwrite")
    return schemas.check({key: parse_json(value, path) for key, value in metadata.items()}, State, path)
