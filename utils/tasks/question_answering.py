"""Question answering with free answers: TOFU (arXiv 2401.06121) and any table of questions and answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from utils.data.splits import is_text
from utils.errors import UserError
from utils.tasks import metrics
from utils.tasks.base import CHAT, Asked, Query, Recorded, Scores, missing, need, refuse_empty
from utils.tasks.free_answers import ANSWERED, AVERAGED, FreeAnswerTask, said_of
from utils.tasks.listed import listed

UTILITY_SETS = {  # {TOFU's name: ours}
    "retain": "train_retain",
    "real_authors": "real_authors",
    "world_facts": "world_facts",
}
OPTIONAL = ("paraphrased_question", "paraphrased_answer")


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(FreeAnswerTask):
    """A question is answered with a sentence, `Question: {q}\\nAnswer: {a}`."""

    kind: ClassVar[str] = "question_answering"
    categories: ClassVar[tuple[str, ...]] = ("question-answering",)
    columns: ClassVar[tuple[str, ...]] = ("question", "answer")
    headline: ClassVar[str] = "rouge_l_recall"
    searchable: ClassVar[tuple[str, ...]] = ("probability", "rouge_l_recall", "truth_score", "exact_memorisation")
    generated: ClassVar[tuple[str, ...]] = ("rouge_l_recall",)
    shown: ClassVar[Mapping[str, str]] = {
        "probability": "probability", "rouge_l_recall": "ROUGE-L recall", "truth_score": "truth ratio score",
    }  # fmt: skip
    averaged: ClassVar[tuple[str, ...]] = (*AVERAGED, "rouge_l_recall", "rouge_l_f1")
    scored: ClassVar[tuple[str, ...]] = (*ANSWERED, *averaged, "truth_ratio_geometric", "truth_ratio_arithmetic")
    max_new_tokens: int = 200  # TOFU, ECO

    @classmethod
    def checked(cls, split: str, frame: pd.DataFrame, source: str) -> pd.DataFrame:
        need(frame, cls.columns, split, source)
        refuse_empty(frame, cls.columns, split, source)
        columns = {"text": frame["question"], "label": 0, "label_text": [text.strip() for text in frame["answer"]]}
        for column in frame.columns.intersection(OPTIONAL):
            bad = [not (missing(cell) or is_text(cell)) for cell in frame[column]]
            if any(bad):
                raise UserError(f"{split} of {source}, row {bad.index(True) + 1}: {column} is not text; fix the row")
            columns[column] = [None if missing(cell) else cell.strip() for cell in frame[column]]
        if "perturbed_answer" in frame:
            columns["perturbed_answer"] = [
                _perturbed(cell, f"{split} of {source}, row {number}")
                for number, cell in enumerate(frame["perturbed_answer"], 1)
            ]
        return frame.drop(columns=list(cls.columns)).assign(**columns).reset_index(drop=True)

    @property
    def tail(self) -> str:
        return "" if self.prompt_format == CHAT else "\nAnswer:"

    def queries(self, rows: pd.DataFrame) -> list[Query]:
        head = "" if self.prompt_format == CHAT else "Question: "
        return [Query(head, text, self.tail) for text in rows["text"]]

    def alternate_answers(self, rows: pd.DataFrame, seed: int) -> list[str]:
        """One of a row's wrong answers where it has some."""
        own = list(rows["perturbed_answer"]) if "perturbed_answer" in rows else [None] * len(rows)
        rng, others = np.random.default_rng(seed), own if all(own) else super().alternate_answers(rows, seed)
        return [str(rng.choice(wrong)) if wrong else other for wrong, other in zip(own, others)]

    def asks(self, rows: pd.DataFrame, score: str | None = None) -> list[dict[str, str]]:
        """Wrong answers are asked about for the truth ratio, and where there is no paraphrase for the probability."""
        found = []
        for row in rows.to_dict("records"):
            asked, paraphrased = {"answer": row["label_text"]}, not missing(row.get("paraphrased_answer"))
            if score in (None, "truth_score") or (score == "probability" and not paraphrased):
                wrong = row.get("perturbed_answer")
                wrong = wrong if isinstance(wrong, list) else []  # of several frames put together some have none
                asked |= {"paraphrase": row["paraphrased_answer"]} if paraphrased else {}
                asked |= {f"perturbed {number}": text for number, text in enumerate(wrong)}
            found.append(asked)
        return found

    def row_scores(self, row: Mapping[str, Any], asked: Mapping[str, Asked], answer: str | None) -> dict[str, Any]:
        own, wrong = asked["answer"], [said.mean for name, said in asked.items() if name.startswith("perturbed")]
        found = said_of(own)
        if wrong:
            right = asked.get("paraphrase", own).mean
            for mean in ("geometric", "arithmetic"):
                found[f"truth_ratio_{mean}"] = float(metrics.truth_ratio(right, wrong, mean))
            if "paraphrase" not in asked:
                found["probability"] = float(metrics.normalised_probability(own.mean, wrong))
        if answer is not None:
            recall, f1 = metrics.rouge_l(answer, row["label_text"])
            found |= {"prediction": answer, "correct": answer == row["label_text"]}
            found |= {"rouge_l_recall": recall, "rouge_l_f1": f1}
        return found

    def split_scores(self, rows: pd.DataFrame) -> Scores:
        found = super().split_scores(rows)
        score = metrics.truth_score_forget if "forget" in rows["split"].iloc[0] else metrics.truth_score
        for mean, suffix in (("geometric", ""), ("arithmetic", "_arithmetic")):
            ratios = rows.get(f"truth_ratio_{mean}", pd.Series(dtype=float)).dropna()
            if len(ratios):
                found[f"truth_score{suffix}"] = score(ratios.to_numpy())
                found["truth_ratio_n"] = len(ratios)
        return found

    def summary(self, splits: Mapping[str, Recorded]) -> Scores:
        """TOFU's model utility, where the three sets that it is about are there."""
        sets = {name: splits.get(split, {}) for name, split in UTILITY_SETS.items()}
        complete = all(score in scores for scores in sets.values() for score in self.shown)
        return {"model_utility": metrics.model_utility(sets)} if complete else {}

    def distance(self, rows: pd.DataFrame, retain: pd.DataFrame) -> Scores:
        """Forget quality, both variants, where there are truth ratios."""
        found = {}
        own, other = (frame[frame["split"] == "train_forget"] for frame in (rows, retain))
        if "truth_ratio_geometric" in own:
            pair = [frame["truth_ratio_geometric"].dropna().to_numpy() for frame in (own, other)]
            if min(map(len, pair)):
                found["forget_quality"] = metrics.forget_quality(*pair, on="ratio")
                found["forget_quality_folded"] = metrics.forget_quality(*pair, on="folded")
        return found


def _perturbed(cell: object, place: str) -> list[str] | None:
    """The wrong answers of a cell, None where it has none."""
    found = listed(cell)
    if found == [] or (found is None and missing(cell)):
        return None
    if found is None or not all(map(is_text, found)):
        raise UserError(f"{place}: perturbed_answer is no list of texts; give wrong answers or leave it empty")
    return found
