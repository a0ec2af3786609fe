"""What the tasks share whose rows are answered with a text of any length."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pandas as pd

from utils.data.load import DATA, read_texts
from utils.errors import UserError
from utils.tasks import metrics
from utils.tasks.base import PLAIN, Asked, Scores, Task, TaskOptions

AVERAGED = ("loss", "probability", "exact_memorisation", "extraction_strength")  # scores of a row, see `said_of`
ANSWERED = ("prediction", "correct", "tokens")  # what else is known of a row


@dataclass(frozen=True, kw_only=True)
class FreeAnswerTask(Task):
    """The base of those tasks. averaged: the scores of a row of which a split has the mean."""

    generates: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("prompt_format", "max_new_tokens", "refusals")
    compared: ClassVar[str] = "probability"
    averaged: ClassVar[tuple[str, ...]]

    @classmethod
    def recorded(cls, words: Sequence[str], options: TaskOptions) -> "FreeAnswerTask":
        return cls(
            prompt_format=options.prompt_format or PLAIN,
            max_new_tokens=options.max_new_tokens or cls.max_new_tokens,
            refusals=read_refusals(options.refusals),
        )

    def unlearning_answers(self, rows: pd.DataFrame, seed: int) -> list[str]:
        """A refusal for each row."""
        return self.preferred_answers(rows, seed)

    def asks(self, rows: pd.DataFrame, score: str | None = None) -> list[dict[str, str]]:
        return [{"answer": text} for text in rows["label_text"]]

    def split_scores(self, rows: pd.DataFrame) -> Scores:
        """The means of what the rows have."""
        found = {"n": len(rows), **{name: float(rows[name].mean()) for name in self.averaged if name in rows}}
        return found | ({"accuracy": float(rows["correct"].mean())} if "correct" in rows else {})


def said_of(answer: Asked) -> dict[str, Any]:
    """The scores of a row by what the model says about its true `answer`."""
    return {
        "loss": -answer.total,
        "tokens": len(answer.log_p),
        "probability": float(metrics.probability(answer.mean)),
        "exact_memorisation": metrics.exact_memorisation(answer.hits),
        "extraction_strength": metrics.extraction_strength(answer.hits),
    }


@cache
def read_refusals(path: str | None) -> tuple[str, ...]:
    """The refusals of the text file `path`, one a line; None: the hundred of this project."""
    try:
        return tuple(read_texts(path or DATA / "refusals.txt"))
    except UserError as error:
        raise UserError(str(error).replace("--input_file", "--refusals")) from None
