"""The rows that a command works on, and the task that they are about."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from utils.data.card import categories
from utils.data.load import PARTS, read_splits
from utils.data.select import SELECTION, select_rows
from utils.data.splits import SPLITS, note_overlap, whole_number
from utils.errors import UserError, note_once
from utils.tasks.base import PLAIN, Task, TaskOptions
from utils.tasks.classification import Classification
from utils.tasks.continuation import Continuation
from utils.tasks.multiple_choice import MultipleChoice
from utils.tasks.question_answering import QuestionAnswering

TASKS: dict[str, type[Task]] = {
    task.kind: task for task in (Classification, MultipleChoice, QuestionAnswering, Continuation)
}

DATA_ARGUMENTS = (*TaskOptions.__dataclass_fields__, *itertools.chain(*PARTS.values()))


class Splits(dict[str, pd.DataFrame]):
    """{split: rows} and the `task` that they are about. The first four are those of every data set; what follows is
    only evaluated."""

    def __init__(self, frames: Mapping[str, pd.DataFrame], task: Task) -> None:
        super().__init__(frames)
        self.task = task

    def __or__(self, others: Mapping[str, pd.DataFrame]) -> "Splits":
        """These splits with `others` instead of those of their names."""
        return Splits({**self, **others}, self.task)


def load_splits(dataset: str, arguments: Mapping[str, Any] | None = None) -> Splits:
    """The splits of `dataset`, {split: DataFrame with the columns text, label, label_text, ...}, and their task.

    `dataset`: see `utils.data.load.read_splits`. arguments: those of the command, or those that a manifest recorded.
    Raises UserError on a missing split or column, an empty split, a cell that cannot be, and rows that contradict each
    other.
    """
    arguments = arguments or {}
    frames = read_splits(dataset, arguments)
    frames = {split: frames[split] for split in [*SPLITS, *frames]}
    kind = _find_task(frames[SPLITS[0]], dataset)
    checked = {
        split: common_columns(split, kind.checked(split, frame, dataset), dataset) for split, frame in frames.items()
    }
    return Splits(checked, kind.of(checked, _options(kind, arguments)))


def load_rows(arguments: Mapping[str, Any]) -> Splits:
    """The splits that a command works on. arguments: those of the command, or those that a manifest recorded.

    Says on stderr where one of the splits has texts of another.
    """
    chosen = {name: arguments[name] for name in SELECTION if arguments.get(name) is not None}
    if chosen.get("validation_share") and not chosen.get("final"):
        note_once("what is called test are the train rows that --validation_share put aside; --final shows test rows")
    loaded = load_splits(arguments["dataset"], arguments)
    frames = select_rows(loaded, **chosen)
    note_overlap(frames)
    return Splits(frames, loaded.task)


def recorded_task(manifest: Mapping[str, Any]) -> Task | None:
    """The task of the checkpoint that `manifest` describes; None where it records none."""
    words, kind = manifest.get("label_words") or (), manifest.get("task") or Classification.kind
    if kind == Classification.kind and not words:
        return None
    if kind not in TASKS:
        raise UserError(f"the checkpoint is about the unknown task {kind!r}; this version has {', '.join(TASKS)}")
    return TASKS[kind].recorded(words, _options(TASKS[kind], _reused(manifest)))


def recorded_rows(manifest: Mapping[str, Any]) -> Splits:
    """The rows that the checkpoint of `manifest` was trained on, as `load_rows` gives them."""
    return load_rows(_reused(manifest))


def _reused(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a checkpoint's training. Its --refusals are for training alone, and their file may have gone."""
    return {**manifest["arguments"], "refusals": None}


def data_arguments(manifest: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments about data and task that `manifest` records and that `arguments`, a command's, leave open."""
    recorded = manifest.get("arguments", {})
    return {name: recorded.get(name) for name in DATA_ARGUMENTS if name in arguments and arguments[name] is None}


def refuse_recorded(arguments: Mapping[str, Any]) -> None:
    """Raise UserError on one of a command's `arguments` that the checkpoint records, and that would be ignored."""
    given = [name for name in DATA_ARGUMENTS if name != "max_new_tokens" and arguments.get(name) is not None]
    if given:
        raise UserError(f"the checkpoint records its own --{given[0]}; leave it out with --text and --input_file")


def refuse_other_form(manifest: Mapping[str, Any] | None, task: Task, name: str) -> None:
    """Raise UserError where the checkpoint `name`, of that manifest, was made with its queries written in another form
    than `task` writes them: it would be asked in words that it has not learnt."""
    if not manifest:
        return
    arguments = manifest["arguments"]
    trained = arguments.get("prompt_format") or PLAIN
    if trained != task.prompt_format:
        raise UserError(
            f"{name} was trained with --prompt_format={trained}; give this command --prompt_format={trained}"
        )
    recorded, sample = recorded_task(manifest), pd.DataFrame({"text": ["text"]})
    if recorded and recorded.kind == task.kind and recorded.queries(sample) != task.queries(sample):
        template = arguments.get("template")
        remedy = f"give this command --template={template!r}" if template else "leave out --template"
        raise UserError(f"{name} was trained with another template; {remedy}")


def _options(kind: type[Task], arguments: Mapping[str, Any]) -> TaskOptions:
    """What `arguments` say about a task. Raises UserError on one that the task has no use for."""
    options = TaskOptions.of(arguments)
    for name in TaskOptions.__dataclass_fields__:
        if name not in kind.options and getattr(options, name) is not None:
            raise UserError(f"--{name} is not for {kind.kind.replace('_', ' ')}, which these rows are; leave it out")
    return options


def _find_task(frame: pd.DataFrame, dataset: str) -> type[Task]:
    """The kind of task that a table is about: by the data card of its folder, else by its columns."""
    named = categories(Path(dataset)) if Path(dataset).is_dir() else []
    by_card = [task for task in TASKS.values() if set(task.categories) & set(named)]
    if by_card:
        return by_card[0]
    fits = [task for task in TASKS.values() if set(task.columns) <= set(frame.columns)]
    if fits:
        return max(fits, key=lambda task: len(task.columns))  # multiple choice has the columns of a question, too
    likeness = {task: len(set(task.columns) & set(frame.columns)) / len(task.columns) for task in TASKS.values()}
    return max(TASKS.values(), key=likeness.get)  # whose check says what is missing


def common_columns(split: str, frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """`frame` with the columns checked that rows of every task may have: names_other, nested, paraphrase."""
    for column in frame.columns.intersection(["names_other", "nested"]):
        marks = [whole_number(cell) for cell in frame[column]]
        if not set(marks) <= {0, 1}:
            raise UserError(f"{split} of {source} has a {column} that is neither 0 nor 1; fix or drop the column")
        frame = frame.assign(**{column: marks})
    if "paraphrase" in frame:  # a row may have none: an empty cell, null or NaN
        bad = [not isinstance(cell, str | float | None) and cell is not pd.NA for cell in frame["paraphrase"]]
        if any(bad):
            raise UserError(f"{split} of {source}, row {bad.index(True) + 1}: paraphrase is not text; fix the row")
    return frame
