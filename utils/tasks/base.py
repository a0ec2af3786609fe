"""What a task has to say: its columns, how a row becomes a query and an answer, and how answers become scores.

Losses, forward pass, gates, corruption and checkpoints know no task. They see what every task gives them: frames with
the columns text, label and label_text (the answer), `Query`s, and token ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from utils.data.splits import is_text
from utils.errors import UserError

Frames = Mapping[str, pd.DataFrame]
Scores = dict[str, int | float]
Recorded = dict[str, int | float | list[float]]  # Scores with "accuracy_ci", as a record holds them
PLAIN, CHAT = "plain", "chat"


@dataclass(frozen=True)
class Query:
    """What a model is asked: head + text + tail. Only the text may be cut."""

    head: str
    text: str
    tail: str

    def __str__(self) -> str:
        return self.head + self.text + self.tail


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says about any task: the flags of those names, where a task has its own default None."""

    template: str | None = None
    prompt_format: str | None = None
    max_new_tokens: int | None = None
    refusals: str | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "TaskOptions":
        """Those among the `arguments` of a command, or of a manifest, which may be older than a flag."""
        return cls(**{name: arguments.get(name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Asked:
    """What a model said about one completion. log_p: of each of its tokens, nats, (m,). hits: whether the arg max is
    that token, (m,)."""

    log_p: Sequence[float]
    hits: Sequence[bool]

    @property
    def total(self) -> float:
        return float(sum(self.log_p))

    @property
    def mean(self) -> float:
        """l(y | x): the mean log-probability of a token."""
        return self.total / len(self.log_p)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """The base of every task.

    words: all answers that there are, in the order of their labels; empty where any text can be one. refusals: what a
    forgotten row is answered with. prompt_format: `plain`, or `chat` for the model's own chat template.
    max_new_tokens: of a generated answer.
    """

    kind: ClassVar[str]
    categories: ClassVar[tuple[str, ...]] = ()  # how data cards name it
    columns: ClassVar[tuple[str, ...]]  # that a table of its rows must have
    options: ClassVar[tuple[str, ...]]  # the TaskOptions that it takes
    headline: ClassVar[str] = "accuracy"  # the score that curves and pictures show
    compared: ClassVar[str] = "accuracy"  # the score that ECO's search compares, where no other is asked for
    searchable: ClassVar[tuple[str, ...]]  # the scores that it may compare
    generated: ClassVar[tuple[str, ...]] = ()  # those that need a generated answer
    shown: ClassVar[Mapping[str, str]] = {}  # scores of a split in a table, and what they are called
    scored: ClassVar[tuple[str, ...]]  # what is known of a scored row, as far as it was asked for
    taught: ClassVar[tuple[str, ...]] = ()  # answers beside `words` that unlearning teaches
    generates: ClassVar[bool] = False  # whether a row is answered with a text of any length
    judged: ClassVar[bool] = False  # whether the frozen model's perplexity of generated answers is asked for
    probed: ClassVar[bool] = False  # whether `--probe` makes sense
    words: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    prompt_format: str = PLAIN
    max_new_tokens: int = 0

    @classmethod
    @abstractmethod
    def checked(cls, split: str, frame: pd.DataFrame, source: str) -> pd.DataFrame:
        """The table `frame` of `split`, as `source` has it, with the columns text, label and label_text (the answer),
        and those of the task's own that its scores need. Raises UserError on what it cannot be."""

    @classmethod
    def of(cls, frames: Frames, options: TaskOptions) -> "Task":
        """The task of checked `frames`. Raises UserError where rows contradict each other."""
        return cls.recorded((), options)

    @classmethod
    @abstractmethod
    def recorded(cls, words: Sequence[str], options: TaskOptions) -> "Task":
        """The task of a checkpoint that records the label words `words`."""

    @property
    def tail(self) -> str:
        """What stands behind the text of a plain query; the answer follows."""
        return ""

    def queries(self, rows: pd.DataFrame) -> list[Query]:
        """What the model is asked about each row: a frame that `checked` gave, or one with only a column text."""
        return [Query("", text, self.tail) for text in rows["text"]]

    def instructed(self, query: Query, instruction: str) -> Query:
        """`query` with an `instruction` to the model in it (the baseline `prompting`)."""
        return replace(query, head=f"{instruction}\n\n{query.head}")

    @abstractmethod
    def unlearning_answers(self, rows: pd.DataFrame, seed: int) -> list[str]:
        """y~ of L_f: what each of the forget `rows` is answered with once forgotten, drawn by `seed`."""

    def preferred_answers(self, rows: pd.DataFrame, seed: int) -> list[str]:
        """The refusal that each of the forget `rows` is to be answered with, drawn by `seed` where there are several
        (TOFU's IDK and DPO)."""
        return draw(self.refusals, len(rows), seed)

    def alternate_answers(self, rows: pd.DataFrame, seed: int) -> list[str]:
        """A wrong answer to each of the forget `rows` in the manner of the data, drawn by `seed` (AltPO). Raises
        UserError where all rows have the same answer."""
        return self.other_answers(rows, rows, np.random.default_rng(seed))

    def other_answers(self, rows: pd.DataFrame, pool: pd.DataFrame, rng: np.random.Generator) -> list[str]:
        """For each of `rows` a wrong answer in the manner of the data, drawn by `rng` from the answers of `pool`."""
        return other_words(rows["label_text"], sorted(set(pool["label_text"])), rng)

    def asks(self, rows: pd.DataFrame, score: str | None = None) -> list[dict[str, str]]:
        """For each row the completions whose log-probabilities its scores need: {name: text}. score: the one score of
        the split that is wanted; None: all."""
        return [{} for _ in range(len(rows))]

    def row_scores(self, row: Mapping[str, Any], asked: Mapping[str, Asked], answer: str | None) -> dict[str, Any]:
        """What is known of one row. answer: what the model generated, None where it was not asked to."""
        return {}

    @abstractmethod
    def split_scores(self, rows: pd.DataFrame) -> Scores:
        """The scores of scored rows; shares in [0, 1], loss in nats."""

    def summary(self, splits: Mapping[str, Recorded]) -> Scores:
        """What is said of all splits together."""
        return {}

    def distance(self, rows: pd.DataFrame, retain: pd.DataFrame) -> Scores:
        """How far scored rows are from those of the retain model: the same rows in the same order, with `split`."""
        return {}


def draw(answers: Sequence[str], n: int, seed: int) -> list[str]:
    """`n` of the `answers`, drawn uniformly and independently by `seed`."""
    return [answers[i] for i in np.random.default_rng(seed).integers(len(answers), size=n)]


def other_words(own: Sequence[str], words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """For each word of `own` another one of `words`. Raises UserError where there is none."""
    if len(set(words)) < 2:
        raise UserError("all rows have the same answer, so there is no other one; use more rows or another method")
    return [str(rng.choice([word for word in words if word != one])) for one in own]


def need(frame: pd.DataFrame, columns: Sequence[str], split: str, source: str) -> None:
    """Raise UserError unless the table `frame` of `split` has the `columns` and at least one row."""
    for column in columns:
        if column not in frame.columns:
            *others, last = columns
            listed = f"{', '.join(others)}, {last}" if others else last
            raise UserError(f"{split} of {source} has no column {column!r}; it needs {listed}")
    if not len(frame):
        raise UserError(f"{split} of {source} has no rows; every split needs at least one")


def refuse_empty(frame: pd.DataFrame, columns: Sequence[str], split: str, source: str) -> None:
    """Raise UserError where a cell of the `columns` is no text."""
    for column in columns:
        bad = [not is_text(cell) for cell in frame[column]]
        if any(bad):
            raise UserError(
                f"{split} of {source}, row {bad.index(True) + 1}: {column} is empty or not text; fix the row"
            )


def missing(cell: object) -> bool:
    """Whether a cell holds nothing: None, NaN or an empty text."""
    return cell is None or cell is pd.NA or (isinstance(cell, float) and cell != cell) or cell == ""
