"""Continuation of a text: news, a book (ECO, arXiv 2406.07933, section 4; MUSE, arXiv 2407.06460)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from utils.tasks import metrics
from utils.tasks.base import Asked, Scores, need, refuse_empty
from utils.tasks.free_answers import ANSWERED, AVERAGED, FreeAnswerTask, said_of

SIMILARITIES = ("correct", "rouge_l_f1", "bleu")  # of which ECO's average similarity gap is made here


@dataclass(frozen=True, kw_only=True)
class Continuation(FreeAnswerTask):
    """The beginning of a text is continued with the rest of it."""

    kind: ClassVar[str] = "continuation"
    categories: ClassVar[tuple[str, ...]] = ("text-generation",)
    columns: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    headline: ClassVar[str] = "rouge_l_f1"
    searchable: ClassVar[tuple[str, ...]] = ("probability", "rouge_l_f1", "bleu", "exact_memorisation")
    generated: ClassVar[tuple[str, ...]] = ("rouge_l_f1", "bleu")
    shown: ClassVar[Mapping[str, str]] = {
        "rouge_l_f1": "ROUGE-L F1", "bleu": "BLEU", "extraction_strength": "extraction strength",
        "exact_memorisation": "exact memorisation",
    }  # fmt: skip
    judged: ClassVar[bool] = True
    averaged: ClassVar[tuple[str, ...]] = (
        *AVERAGED, "perplexity", "rouge_l_recall", "rouge_l_f1", "bleu", "unique_tokens", "generated_perplexity",
    )  # fmt: skip
    scored: ClassVar[tuple[str, ...]] = (*ANSWERED, *averaged)
    max_new_tokens: int = 256  # ECO

    @classmethod
    def checked(cls, split: str, frame: pd.DataFrame, source: str) -> pd.DataFrame:
        need(frame, cls.columns, split, source)
        refuse_empty(frame, cls.columns, split, source)
        columns = {"text": [text.rstrip() for text in frame["prompt"]], "label": 0}
        columns["label_text"] = [text.rstrip() for text in frame["completion"]]
        return frame.drop(columns=list(cls.columns)).assign(**columns).reset_index(drop=True)

    def row_scores(self, row: Mapping[str, Any], asked: Mapping[str, Asked], answer: str | None) -> dict[str, Any]:
        own = asked["answer"]
        found = said_of(own) | {"perplexity": metrics.perplexity(own.total, len(own.log_p))}
        if answer is not None:
            truth = row["label_text"].strip()
            found |= {"prediction": answer, "correct": answer == truth}
            found["rouge_l_recall"], found["rouge_l_f1"] = metrics.rouge_l(answer, truth, stemming=False)
            found["bleu"] = metrics.bleu(answer, truth)
            found["unique_tokens"] = metrics.unique_token_share(answer.split())
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
