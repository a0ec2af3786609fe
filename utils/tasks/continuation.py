"""Continuation of a text: news, a book (ECO, arXiv 2406.07933, section 4; MUSE, arXiv 2407.06460)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from utils.tasks import metrics
from utils.tasks.base import PLAIN, Asked, Scores, TaskOptions, need, refuse_empty
from utils.tasks.question_answering import FreeAnswers
from utils.tasks.refusals import read_refusals

MAX_NEW_TOKENS = 256  # ECO
SIMILARITIES = ("correct", "rouge_l_f1", "bleu")  # of which ECO's average similarity gap is made here


@dataclass(frozen=True, kw_only=True)
class Continuation(FreeAnswers):
    """The beginning of a text is continued with the rest of it."""

    kind: ClassVar[str] = "continuation"
    categories: ClassVar[tuple[str, ...]] = ("text-generation",)
    columns: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    options: ClassVar[tuple[str, ...]] = ("prompt_format", "max_new_tokens", "refusals")
    headline: ClassVar[str] = "rouge_l_f1"
    compared: ClassVar[str] = "probability"
    searchable: ClassVar[tuple[str, ...]] = ("probability", "rouge_l_f1", "bleu", "exact_memorisation")
    generated: ClassVar[tuple[str, ...]] = ("rouge_l_f1", "bleu")
    shown: ClassVar[Mapping[str, str]] = {
        "rouge_l_f1": "ROUGE-L F1", "bleu": "BLEU", "extraction_strength": "extraction strength",
        "exact_memorisation": "exact memorisation",
    }  # fmt: skip
    judged: ClassVar[bool] = True
    scored: ClassVar[tuple[str, ...]] = (
        "prediction", "correct", "loss", "tokens", "probability", "perplexity", "rouge_l_recall", "rouge_l_f1", "bleu",
        "unique_tokens", "generated_perplexity", "exact_memorisation", "extraction_strength",
    )  # fmt: skip
    max_new_tokens: int = MAX_NEW_TOKENS

    @classmethod
    def checked(cls, split: str, frame: pd.DataFrame, source: str) -> pd.DataFrame:
        need(frame, cls.columns, split, source)
        refuse_empty(frame, cls.columns, split, source)
        columns = {"text": [text.rstrip() for text in frame["prompt"]], "label": 0}
        columns["label_text"] = [text.rstrip() for text in frame["completion"]]
        return frame.drop(columns=list(cls.columns)).assign(**columns).reset_index(drop=True)

    @classmethod
    def recorded(cls, words: Sequence[str], options: TaskOptions) -> "Continuation":
        return cls(
            prompt_format=options.prompt_format or PLAIN,
            max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS,
            refusals=read_refusals(options.refusals),
        )

    def asks(self, rows: pd.DataFrame) -> list[dict[str, str]]:
        return [{"answer": text} for text in rows["label_text"]]

    def row_scores(self, row: Mapping[str, Any], asked: Mapping[str, Asked], answer: str | None) -> dict[str, Any]:
        own = asked["answer"]
        found = {
            "loss": -own.total,
            "tokens": len(own.log_p),
            "probability": float(metrics.probability(own.mean)),
            "perplexity": metrics.perplexity(own.total, len(own.log_p)),
            "exact_memorisation": metrics.exact_memorisation(own.hits),
            "extraction_strength": metrics.extraction_strength(own.hits),
        }
        if answer is not None:
            truth = row["label_text"].strip()
            found |= {"prediction": answer, "correct": answer == truth}
            found["rouge_l_recall"], found["rouge_l_f1"] = metrics.rouge_l(answer, truth, stemming=False)
            found["bleu"] = metrics.bleu(answer, truth)
            found["unique_tokens"] = metrics.unique_token_share(answer.split())
        return found

    def split_scores(self, rows: pd.DataFrame) -> Scores:
        kept = [
            name
            for name in ("loss", "probability", "perplexity", "exact_memorisation", "extraction_strength", "correct",
                         "rouge_l_recall", "rouge_l_f1", "bleu", "unique_tokens", "generated_perplexity")
            if name in rows
        ]  # fmt: skip
        found = {"n": len(rows), **{name: float(rows[name].mean()) for name in kept}}
        if "correct" in found:
            found["accuracy"] = found.pop("correct")
        return found

    def distance(self, rows: pd.DataFrame, retain: pd.DataFrame) -> Scores:
        """ECO's average similarity gap to the retain model, in each of the forget splits."""
        found = {}
        for split in ("train_forget", "test_forget"):
            own, other = (frame[frame["split"] == split] for frame in (rows, retain))
            if all(name in own for name in SIMILARITIES):
                pair = [{name: float(frame[name].mean()) for name in SIMILARITIES} for frame in (own, other)]
                found[f"similarity_gap_{split}"] = metrics.similarity_gap(*pair)
        return found
