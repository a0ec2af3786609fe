"""What an audit is: it looks at a subject and gives measures, each from rows, so that each has an interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from utils.data.names import Person
from utils.evaluation.frozen import Frozen
from utils.evaluation.run import RowSettings
from utils.evaluation.scores import score_rows
from utils.evaluation.statistics import Sample
from utils.interventions.served import Served
from utils.models.base import ModelSettings
from utils.tasks.base import Task
from utils.tasks.rows import Splits

ON, NO_GATE, OFF, NONE = "on", "without gate", "off", "none"  # what stands between a query and the frozen model


@dataclass(frozen=True, kw_only=True)
class AuditSettings(RowSettings):
    """How it is audited: the flags of those names.

    attack_steps, attack_lr, attack_share: of the audits that train; the share
    is that of the forget rows which the attacker has. samples: answers that are drawn for each question.
    """

    forget_only: str | None = None
    attack_steps: int = 20
    attack_lr: float = 1e-3
    attack_share: float = 0.1
    samples: int = 32
    shadows: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is audited. wrapper: `on` as it is served, `without gate`, `off` with the frozen model alone; `none`
    where the model has no wrapper. frozen: what tells one frozen model from another."""

    method: str
    checkpoint: str
    wrapper: str
    served: Served
    frozen: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.method if self.wrapper in (ON, NONE) else f"{self.method}, {self.wrapper}"

    @property
    def plain(self) -> "Subject":
        """The frozen model alone."""
        return replace(self, wrapper=OFF, served=self.served.plain)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number of one subject, of which more means that more leaks.

    sample: what it is computed from. neutral: what it is compared with; None: the same number of the retain-only model.
    compared: whether it says something about a leak at all; the share of rows that a gate flags does not. headline:
    whether it stands for its audit in table and picture.
    """

    name: str
    sample: Sample
    neutral: float | None = None
    compared: bool = True
    headline: bool = False


@dataclass(frozen=True)
class Passes:
    """What an audit of one subject costs. forward: rows that pass once, trained: rows that pass forward and back,
    generated: tokens that are drawn one by one, for one row each."""

    forward: int = 0
    trained: int = 0
    generated: int = 0


@dataclass(frozen=True, kw_only=True)
class Audit:
    """name: as --audit takes it. asks: its question, in a sentence. measure: function(subject, case) -> measures; none
    where it has nothing to say of such a subject. passes: what it costs on one subject. reads: the settings that are
    for it alone, or for it and a few others. dear: it runs only where it is named."""

    name: str
    asks: str
    measure: "Callable[[Subject, Case], list[Measure]]"
    passes: "Callable[[Case], Passes]"
    reads: tuple[str, ...] = ()
    dear: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all audits of a run share.

    frames: the rows of the four splits that are looked at, `whole` all of them. people: whom the forget rows name,
    where that is known. model: how models are loaded. notes: sentences for the report. kept: what an audit computes
    once for all subjects.
    """

    frames: Splits
    whole: Splits
    settings: AuditSettings
    model: ModelSettings
    people: Sequence[Person] = ()
    notes: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    _plain: dict[tuple[str, ...], Frozen] = field(default_factory=dict, init=False, repr=False)

    def note(self, sentence: str) -> None:
        """Put `sentence` into the report, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    @property
    def task(self) -> Task:
        return self.frames.task

    def scored(self, subject: Subject, label: str, frame: pd.DataFrame) -> pd.DataFrame:
        """`score_rows` of `frame` by `subject`, of the one score that its task compares. label: names the rows; rows of
        a label that a gate lets through have the frozen model's results, if that was asked about them before."""
        known = self._plain.setdefault(subject.frozen, Frozen()).of(label, len(frame))
        how = self.settings.max_length, self.settings.eval_batch_size
        rows = score_rows(subject.served, frame, self.task, *how, frozen=known, score=self.task.compared)
        return pd.concat([frame.drop(columns=rows.columns, errors="ignore").reset_index(drop=True), rows], axis=1)

    def knows(self, rows: pd.DataFrame) -> dict[str, np.ndarray]:
        """How far scored `rows` show that the model knows the true answers: {measure: (n,) in [0, 1]}; the first is the
        one that stands for the others."""
        if self.task.words:
            ranked = rows["label_prediction"] == rows["label_text"]
            return {"gives the answer": _numbers(rows["correct"]), "ranks it first": _numbers(ranked)}
        return {
            "probability of a token": _numbers(rows["probability"]),
            "tokens guessed": _numbers(rows["exact_memorisation"]),
        }

    def knowledge(self, subject: Subject, label: str, frame: pd.DataFrame) -> list[Measure]:
        """Measures of `knows` on `frame`; the first one is the headline."""
        found = self.knows(self.scored(subject, label, frame))
        return [
            Measure(name=name, sample=Sample(values), headline=i == 0) for i, (name, values) in enumerate(found.items())
        ]


def _numbers(column: pd.Series) -> np.ndarray:
    return column.to_numpy(dtype=float)
