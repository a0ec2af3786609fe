"""The baselines that train nothing: what they put around every text (arXiv 2403.03329 and 2310.07579)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from sklearn.feature_extraction.text import TfidfVectorizer

from utils.data.select import learnt_by
from utils.data.splits import TRAIN_SPLITS
from utils.errors import UserError
from utils.interventions.base import Intervention
from utils.storage import schemas
from utils.storage.checkpoints import Link
from utils.storage.files import write_json
from utils.storage.schemas import Count, Open, Schema, Text
from utils.tasks.base import Query, Task
from utils.tasks.rows import Splits, recorded_rows

FILE = "template.json"


class InstructionSettings(Schema):
    """template.json of `prompting`."""

    what, remedy = "template", "make the checkpoint again"
    method: Literal["prompting"]
    instruction: Text


class TemplateSettings(Open):
    """template.json, of which method is to be seen first."""

    what, remedy = "template", "make the checkpoint again"
    method: Literal["prompting", "icul"]


class DemonstrationSettings(Schema):
    """template.json of `icul`."""

    what, remedy = "template", "make the checkpoint again"
    method: Literal["icul"]
    flipped: Count
    flipped_labels: list[Text]
    retain_rows: list[Annotated[int, Field(ge=0)]]


class Instruction:
    """`prompting`: an instruction in the query (Thaker et al., arXiv 2403.03329, section 3)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def around(self, task: Task, queries: Sequence[Query]) -> list[Query]:
        """`queries` with the instruction in them."""
        return [task.instructed(query, self.settings["instruction"]) for query in queries]


class Demonstrations:
    """`icul`: answered examples before the query (Pawelczyk et al., arXiv 2310.07579, section 4): the forget rows most
    like it (TF-IDF cosine) with flipped labels, then retain rows with their own, the same for every query."""

    def __init__(self, settings: dict[str, Any], frames: Splits) -> None:
        self.settings = settings
        retain = frames["train_retain"].iloc[settings["retain_rows"]]
        self._forget = _answered(frames.task, frames["train_forget"], settings["flipped_labels"])
        self._retain = _answered(frames.task, retain, retain["label_text"])
        self._vectorizer = TfidfVectorizer(sublinear_tf=True)
        self._vectors = self._vectorizer.fit_transform(frames["train_forget"]["text"])

    def around(self, task: Task, queries: Sequence[Query]) -> list[Query]:
        """`queries` behind answered examples."""
        found = []
        for query, rows in zip(queries, self._nearest([query.text for query in queries])):
            shown = [*(self._forget[i] for i in rows), *self._retain]
            found.append(replace(query, head="".join(shown) + query.head))
        return found

    def _nearest(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """For each text the numbers of the forget rows to show; texts by the hundred, their likeness to all forget rows
        is a full matrix."""
        for start in range(0, len(texts), 100):
            likeness = (self._vectorizer.transform(texts[start : start + 100]) @ self._vectors.T).toarray()
            yield from np.argsort(-likeness, axis=1, kind="stable")[:, : self.settings["flipped"]]


def _answered(task: Task, rows: pd.DataFrame, answers: Sequence[str]) -> list[str]:
    """The queries of `rows` with these answers, as text."""
    return [f"{query} {answer}\n\n" for query, answer in zip(task.queries(rows), answers)]


@dataclass(frozen=True, eq=False, kw_only=True)
class InContext(Intervention):
    """Words around every query that ask a model to behave as if it had forgotten; it trains nothing."""

    words: Instruction | Demonstrations

    @property
    def template(self) -> Instruction | Demonstrations:
        return self.words


def instruct(instruction: str | None, people: Sequence[str]) -> InContext:
    """`prompting` with an `instruction`, or else with one made of the names of `people`."""
    return InContext(words=Instruction({"method": "prompting", "instruction": instruction or _about(people)}))


def demonstrate(frames: Splits, n_flipped: int, n_correct: int, seed: int) -> InContext:
    """`icul` on the training rows of `frames`: `n_flipped` forget rows a query, and `n_correct` retain rows.

    Raises UserError where the rows have a single label, so that none can be flipped.
    """
    rng = np.random.default_rng(seed)
    retain, forget = frames["train_retain"], frames["train_forget"]
    pool = pd.concat([retain, forget])
    if pool["label_text"].nunique() < 2:
        raise UserError("icul needs at least two labels to flip between; these rows have one")
    flipped = frames.task.other_answers(forget, pool, rng)
    chosen = np.sort(rng.choice(len(retain), min(n_correct, len(retain)), replace=False))
    settings = {"method": "icul", "flipped": n_flipped, "flipped_labels": flipped}
    return InContext(words=Demonstrations({**settings, "retain_rows": chosen.tolist()}, frames))


def save(intervention: InContext, folder: Path) -> None:
    """Write what makes the template again: for icul the numbers of its training rows, not their texts."""
    write_json(folder / FILE, intervention.words.settings)


def load(link: Link, *_: object) -> InContext:
    """What `save` wrote for the checkpoint of `link`; icul reads its training rows again. Raises UserError where these
    have changed."""
    file = link.path / FILE
    settings = schemas.read(file, TemplateSettings)
    if settings["method"] == "prompting":
        return InContext(words=Instruction(schemas.check(settings, InstructionSettings, file)))
    schemas.check(settings, DemonstrationSettings, file)
    dataset, frames = link.manifest["arguments"]["dataset"], recorded_rows(link.manifest)
    if not learnt_by(link.manifest, frames):
        raise UserError(f"{dataset} has changed since {link.path} was made from it; make it again")
    sizes = [len(frames[split]) for split in TRAIN_SPLITS]
    if len(settings["flipped_labels"]) != sizes[1] or max(settings["retain_rows"], default=0) >= sizes[0]:
        raise UserError(f"{file} names other rows than there are; make the checkpoint again")
    return InContext(words=Demonstrations(settings, frames))


def _about(people: Sequence[str]) -> str:
    listed = people[0] if len(people) == 1 else f"{', '.join(people[:-1])} or {people[-1]}"
    return f'If the text names {listed}, answer "unknown".'
