"""ECO (arXiv 2406.07933) as it is saved and loaded: a gate, and corrupted embeddings behind it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from utils.data.batch import Example
from utils.data.names import Person, spans
from utils.errors import UserError
from utils.interventions import gate_files, gates
from utils.interventions.base import Intervention, Spans
from utils.interventions.corruption import Corruption, CorruptionSettings
from utils.models.base import FrozenModel, ModelSettings
from utils.storage import schemas
from utils.storage.checkpoints import Link
from utils.storage.files import write_json
from utils.storage.schemas import Amount, Open, Schema, Share, Text


class Listed(Schema):
    """A person, as in a list of names."""

    name: str
    spellings: Annotated[list[Text], Field(min_length=1)]
    excluded: list[Text] = []


Pattern = Annotated[list[str], Field(min_length=2, max_length=2)]


class Point(Schema):
    strength: Amount
    metric: Amount


class EcoFile(Open):
    """eco.json. Earlier versions describe the gate here, too (utils.interventions.gate_files), and store [person,
    pattern] as `names`: a pattern may never end, so none is used."""

    what = "description of ECO"
    corruption: CorruptionSettings
    tokens: Literal["all", "entities"]
    names: list[Listed] | list[Pattern]
    token_classifier: Text | None
    metric: Text
    target: Share | None
    curve: list[Point]

    @model_validator(mode="after")
    def _uses_no_pattern(self) -> "EcoFile":
        by_list = self.tokens == "entities" and not self.token_classifier
        if by_list and not self.names:
            raise ValueError("it finds people by a list that is empty")
        if by_list and not isinstance(self.names[0], Listed):
            raise ValueError("an earlier version stored the people as patterns")
        return self


FILE, TAGGER = "eco.json", "token_classifier"


Finder = Callable[[Sequence[str]], list[list[tuple[int, int]]]]  # of texts: the names in each


class Marks:
    """Which prompt tokens are corrupted. `entities` None: all but the last; else function(texts) -> spans a text."""

    def __init__(self, entities: Finder | None = None) -> None:
        self.entities = entities

    def spans(self, texts: Sequence[str]) -> list[Spans]:
        """For each text None (all prompt tokens but the last) or the [(start, end), ...] of its names; a text without
        any name counts as None, as in the authors' code: a flagged query is never left as it is."""
        return [None] * len(texts) if self.entities is None else [found or None for found in self.entities(texts)]


class Tagger:
    """Finds names with a token classifier: function(texts) -> for each text the (start, end) spans of its entities."""

    def __init__(self, name: str, source: Path, device: torch.device, trust_remote_code: bool) -> None:
        """name: what the user calls it. source: folder that holds it."""
        from transformers import AutoModelForTokenClassification, pipeline

        model, tokenizer = gates.load_classifier(AutoModelForTokenClassification, source, trust_remote_code)
        if not any("TokenClassification" in kind for kind in model.config.architectures or ()):
            raise UserError(f"{name} was not trained to classify tokens; use a model that was, or --eco_names")
        options = {"model": model, "tokenizer": tokenizer, "aggregation_strategy": "simple", "device": device}
        self._pipeline = pipeline("token-classification", **options)
        self._known: dict[str, list[tuple[int, int]]] = {}

    def __call__(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for text, found in zip(new, self._pipeline(new) if new else ()):
            self._known[text] = [(item["start"], item["end"]) for item in found]
        return [self._known[text] for text in texts]

    def save(self, folder: Path) -> None:
        self._pipeline.model.save_pretrained(folder)
        self._pipeline.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, eq=False, kw_only=True)
class CorruptedEmbeddings(Intervention):
    """ECO: the embeddings of a flagged query are corrupted at the tokens that `marks` names (section 3.2)."""

    corruption: Corruption
    marks: Marks

    def spans(self, texts: Sequence[str]) -> list[Spans]:
        return self.marks.spans(texts)

    def applied(self, model: torch.nn.Module, examples: Sequence[Example]) -> AbstractContextManager:
        return self.corruption.applied(model, examples)


def save(intervention: CorruptedEmbeddings, settings: dict[str, Any], folder: Path) -> None:
    """Write all but the gate into `folder`: safetensors and JSON, no pickle."""
    if isinstance(intervention.marks.entities, Tagger):
        intervention.marks.entities.save(folder / TAGGER)
    write_json(folder / FILE, settings)


def load(link: Link, served: FrozenModel, model_settings: ModelSettings, max_length: int) -> CorruptedEmbeddings:
    """What the ECO checkpoint `link` puts in front of the model of `served`."""
    trusted, settings, marks = model_settings.trust_remote_code, schemas.read(link.path / FILE, EcoFile), Marks()
    gate = gate_files.load(link.path, served, trusted, max_length)
    if settings["tokens"] == "entities" and settings["token_classifier"]:
        marks = Marks(Tagger(f"{link.path}/{TAGGER}", link.path / TAGGER, served.model.device, trusted))
    elif settings["tokens"] == "entities":
        marks = Marks(by_list(_people(settings["names"], link.path)))
    return CorruptedEmbeddings(corruption=Corruption(**settings["corruption"]), marks=marks, gate=gate)


def _people(listed: list[dict], folder: Path) -> list[Person]:
    try:
        return [Person(**parts) for parts in listed]
    except ValueError as error:
        raise UserError(f"{folder}/{FILE} is damaged ({error}); train the checkpoint again")


def by_list(names: Sequence[Person]) -> Finder:
    """The Finder of listed people."""
    return lambda texts: [found_names(text, names) for text in texts]


def found_names(text: str, names: Sequence[Person]) -> list[tuple[int, int]]:
    """The [(start, end), ...] of the names in `text`, in order; where two overlap, one that covers both."""
    found = []
    for start, end in sorted(span for person in names for span in spans(text, person)):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
