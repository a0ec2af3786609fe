"""Multiple choice with four options: MMLU subsets, SciQ, WMDP (ECO, arXiv 2406.07933, section 4; SPUL, arXiv v2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from utils.data.splits import is_text, whole_number
from utils.errors import UserError
from utils.tasks.base import (
    PLAIN,
    Asked,
    Query,
    Scores,
    Task,
    TaskOptions,
    draw,
    missing,
    need,
    other_words,
    refuse_empty,
)
from utils.tasks.listed import listed
from utils.tasks.scores import LABELLED, SHARES, label_scores

LETTERS = ("A", "B", "C", "D")
OPENING = "The following are multiple choice questions (with answers)"
ANSWER = "\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """A question with four choices is answered with a letter (the MMLU form), and scored by whole choices, too."""

    kind: ClassVar[str] = "multiple_choice"
    categories: ClassVar[tuple[str, ...]] = ("multiple-choice",)
    columns: ClassVar[tuple[str, ...]] = ("question", "choices", "answer")
    options: ClassVar[tuple[str, ...]] = ("prompt_format",)
    headline: ClassVar[str] = "label_accuracy"
    shown: ClassVar[Mapping[str, str]] = {
        "label_accuracy": "best letter", "choice_accuracy": "best whole choice", "accuracy": "greedy answer",
    }  # fmt: skip
    compared: ClassVar[str] = "label_accuracy"
    searchable: ClassVar[tuple[str, ...]] = (*SHARES, "choice_accuracy")
    scored: ClassVar[tuple[str, ...]] = (*LABELLED, "choice_prediction", "choice_correct")
    taught: ClassVar[tuple[str, ...]] = ("unknown",)
    probed: ClassVar[bool] = True
    words: tuple[str, ...] = LETTERS
    refusals: tuple[str, ...] = ("unknown",)

    @classmethod
    def checked(cls, split: str, frame: pd.DataFrame, source: str) -> pd.DataFrame:
        need(frame, cls.columns, split, source)
        refuse_empty(frame, ("question",), split, source)
        choices, letters = [], []
        for number, (cell, answer) in enumerate(zip(frame["choices"], frame["answer"]), 1):
            found, place = listed(cell), f"{split} of {source}, row {number}"
            if found is None or len(found) != len(LETTERS):
                n = "no list" if found is None else f"a list of {len(found)}"
                raise UserError(f"{place}: choices is {n}; give a list of {len(LETTERS)} texts")
            if not all(map(is_text, found)) or len(set(found)) < len(found):
                raise UserError(f"{place}: a choice is empty, not text or there twice; fix the row")
            choices.append(found)
            letters.append(_letter(answer, found, place))
        columns = {"text": frame["question"], "choices": choices, "label_text": letters}
        columns["label"] = [LETTERS.index(letter) for letter in letters]
        if "subject" in frame:
            columns["subject"] = ["" if missing(cell) else str(cell).replace("_", " ") for cell in frame["subject"]]
        return frame.drop(columns=["question", "answer"]).assign(**columns).reset_index(drop=True)

    @classmethod
    def recorded(cls, words: Sequence[str], options: TaskOptions) -> "MultipleChoice":
        return cls(prompt_format=options.prompt_format or PLAIN)

    @property
    def tail(self) -> str:
        return ANSWER

    def queries(self, rows: pd.DataFrame) -> list[Query]:
        subjects = rows["subject"] if "subject" in rows else [""] * len(rows)
        choices = rows["choices"] if "choices" in rows else [[]] * len(rows)
        return [
            Query(
                f"{OPENING} about {subject}.\n\n" if subject else f"{OPENING}.\n\n",
                text,
                "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, options)) + ANSWER,
            )
            for text, subject, options in zip(rows["text"], subjects, choices)
        ]

    def unlearning_answers(self, rows: pd.DataFrame, seed: int) -> list[str]:
        """Letters at random: the target is chance."""
        return draw(LETTERS, len(rows), seed)

    def other_answers(self, rows: pd.DataFrame, pool: pd.DataFrame, rng: np.random.Generator) -> list[str]:
        return other_words(rows["label_text"], LETTERS, rng)

    def asks(self, rows: pd.DataFrame, score: str | None = None) -> list[dict[str, str]]:
        if score in SHARES:
            return super().asks(rows)
        return [dict(zip(LETTERS, choices)) for choices in rows["choices"]]

    def row_scores(self, row: Mapping[str, Any], asked: Mapping[str, Asked], answer: str | None) -> dict[str, Any]:
        if not asked:
            return {}
        means = {letter: said.mean for letter, said in asked.items()}
        best = max(means, key=means.get)
        return {"choice_prediction": best, "choice_correct": best == row["label_text"]}

    def split_scores(self, rows: pd.DataFrame) -> Scores:
        scores = label_scores(rows, self.words)
        if "choice_correct" in rows:
            scores["choice_accuracy"] = float(rows["choice_correct"].mean())
        return scores


def _letter(answer: object, choices: Sequence[str], place: str) -> str:
    """The letter that a cell names by itself, by its number from 0, or by the choice's text."""
    answer = answer.strip() if isinstance(answer, str) else answer
    if answer in LETTERS:
        return answer
    if (number := whole_number(answer)) is not None and 0 <= number < len(LETTERS):
        if answer in choices and choices[number] != answer:
            raise UserError(f"{place}: the answer {answer!r} may be a number from 0 or a choice; give a letter A to D")
        return LETTERS[number]
    if answer in choices:
        return LETTERS[choices.index(answer)]
    raise UserError(f"{place}: the answer {answer!r} is neither a letter A to D nor one of the choices; fix the row")
