"""Classification of a text: template, label words, and the words that unlearning teaches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd

from utils.data.splits import SPLITS, TRAIN_SPLITS, UNLEARNING_LABELS, whole_number
from utils.errors import UserError
from utils.tasks.base import PLAIN, Frames, Query, Scores, Task, TaskOptions, draw, need, refuse_empty
from utils.tasks.scores import LABELLED, SHARES, label_scores

TEMPLATE_HEAD = "### Text: "
TEMPLATE_TAIL = "\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment:"
PLACE, QUESTION = "{text}", "### Question: "


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """A text gets one of a few label words. head, end: what stands around it."""

    kind: ClassVar[str] = "classification"
    categories: ClassVar[tuple[str, ...]] = ("text-classification",)
    columns: ClassVar[tuple[str, ...]] = ("text", "label", "label_text")
    options: ClassVar[tuple[str, ...]] = ("template", "prompt_format")
    searchable: ClassVar[tuple[str, ...]] = SHARES
    scored: ClassVar[tuple[str, ...]] = LABELLED
    taught: ClassVar[tuple[str, ...]] = UNLEARNING_LABELS
    refusals: tuple[str, ...] = UNLEARNING_LABELS[1:]
    head: str = TEMPLATE_HEAD
    end: str = TEMPLATE_TAIL

    @classmethod
    def checked(cls, split: str, frame: pd.DataFrame, source: str) -> pd.DataFrame:
        need(frame, cls.columns, split, source)
        refuse_empty(frame, ("text", "label_text"), split, source)
        labels = [whole_number(cell) for cell in frame["label"]]
        if None in labels:
            row = labels.index(None) + 1
            raise UserError(f"{split} of {source}, row {row}: label is not a whole number of 64 bits; fix the row")
        words = [word.strip() for word in frame["label_text"]]
        return frame.assign(label=labels, label_text=words).reset_index(drop=True)

    @classmethod
    def of(cls, frames: Frames, options: TaskOptions) -> "Classification":
        _check_labels(frames)
        return cls.recorded(label_words(frames), options)

    @classmethod
    def recorded(cls, words: Sequence[str], options: TaskOptions) -> "Classification":
        around = {}
        if options.template is not None:
            head, place, end = options.template.partition(PLACE)
            if not place or PLACE in end or not end.strip():
                raise UserError(
                    f"--template={options.template!r} must hold {PLACE} once and something behind it, which the "
                    "label word answers"
                )
            around = {"head": head, "end": end.rstrip()}
        return cls(words=tuple(words), prompt_format=options.prompt_format or PLAIN, **around)

    @property
    def tail(self) -> str:
        return self.end

    def queries(self, rows: pd.DataFrame) -> list[Query]:
        return [Query(self.head, text, self.end) for text in rows["text"]]

    def instructed(self, query: Query, instruction: str) -> Query:
        if QUESTION not in query.tail:
            return super().instructed(query, instruction)
        return replace(query, tail=query.tail.replace(QUESTION, f"{QUESTION}{instruction} "))

    def unlearning_answers(self, rows: pd.DataFrame, seed: int) -> list[str]:
        return draw_unlearning_labels(len(rows), seed)

    def split_scores(self, rows: pd.DataFrame) -> Scores:
        return label_scores(rows, self.words)


def classification(words: Sequence[str]) -> Classification:
    """The task of the published template with these label words."""
    return Classification(words=tuple(words))


def label_words(frames: Frames) -> list[str]:
    """The answers that count as in-label, ordered by label number."""
    pairs = pd.concat([frames[split][["label", "label_text"]] for split in TRAIN_SPLITS]).drop_duplicates()
    return list(pairs.sort_values("label")["label_text"])


def draw_unlearning_labels(n: int, seed: int) -> list[str]:
    """y~ of L_f: n words drawn once, uniformly from {neutral, unknown}, by `seed`."""
    return draw(UNLEARNING_LABELS, n, seed)


def _check_labels(frames: Mapping[str, pd.DataFrame]) -> None:
    """Every label has one word, every word one label, and the test splits use no label that train lacks."""
    words = {}
    for split in SPLITS:
        for label, word in sorted(set(zip(frames[split]["label"], frames[split]["label_text"]))):
            if split not in TRAIN_SPLITS and (label, word) not in words.items():
                raise UserError(f"{split} has the unknown label {label} ({word!r}); the train splits have {words}")
            if words.setdefault(label, word) != word or list(words.values()).count(word) > 1:
                raise UserError(f"{split}: label {label} and the word {word!r} do not pair one to one in {words}")
    clash = set(words.values()) & set(UNLEARNING_LABELS)
    if clash:
        raise UserError(f"the label word {clash.pop()!r} is one that unlearning answers with; rename it in the data")
