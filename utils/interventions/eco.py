"""ECO (arXiv 2406.07933) as it is saved and loaded: a gate, and corrupted embeddings behind it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from utils.data.names import Person, spans
from utils.errors import UserError
from utils.interventions import gates
from utils.interventions.corruption import Corruption, CorruptionSettings
from utils.storage import schemas
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


class EcoSettings(Open):
    """eco.json. Earlier versions store [person, pattern] as `names`: a pattern may never end, so none is used."""

    what = "description of an ECO gate"
    classifier: Literal["tfidf", "features", "encoder"]
    threshold: Annotated[float, Field(ge=0, lt=1)]  # no probability is above 1: a gate that flags nothing
    calibration: dict[str, Amount]
    corruption: CorruptionSettings
    tokens: Literal["all", "entities"]
    names: list[Listed] | list[Pattern]
    token_classifier: Text | None
    metric: Text
    target: Share | None
    curve: list[Point]
    rates: dict[str, Share | dict[str, Share]]
    evasion: dict[str, dict[str, Share]]

    @model_validator(mode="after")
    def _uses_no_pattern(self) -> "EcoSettings":
        by_list = self.tokens == "entities" and not self.token_classifier
        if by_list and not self.names:
            raise ValueError("it finds people by a list that is empty")
        if by_list and not isinstance(self.names[0], Listed):
            raise ValueError("an earlier version stored the people as patterns")
        return self


FILE, TAGGER = "eco.json", "token_classifier"


class Marks:
    """Which prompt tokens are corrupted. `entities` None: all but the last; else function(texts) -> spans a text."""

    def __init__(self, entities=None):
        self.entities = entities

    def spans(self, texts):
        """For each text None (all prompt tokens but the last) or the [(start, end), ...] of its names; a text without
        any name counts as None, as in the authors' code: a flagged query is never left as it is."""
        return [None] * len(texts) if self.entities is None else [found or None for found in self.entities(texts)]


class Tagger:
    """Finds names with a token classifier: function(texts) -> for each text the (start, end) spans of its entities."""

    def __init__(self, name, source, loaded, args):
        """name: what the user calls it. source: folder that holds it. loaded: the language model, for the device."""
        from transformers import AutoModelForTokenClassification, pipeline

        model, tokenizer = gates.load_classifier(AutoModelForTokenClassification, source, args)
        if not any("TokenClassification" in kind for kind in model.config.architectures or ()):
            raise UserError(f"{name} was not trained to classify tokens; use a model that was, or --eco_names")
        device = loaded.model.device
        options = {"model": model, "tokenizer": tokenizer, "aggregation_strategy": "simple", "device": device}
        self._pipeline, self._known = pipeline("token-classification", **options), {}

    def __call__(self, texts):
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for text, found in zip(new, self._pipeline(new) if new else ()):
            self._known[text] = [(item["start"], item["end"]) for item in found]
        return [self._known[text] for text in texts]

    def save(self, folder):
        self._pipeline.model.save_pretrained(folder)
        self._pipeline.tokenizer.save_pretrained(folder)


def save(loaded, settings, folder):
    """Write gate and settings into `folder`: safetensors and JSON, no pickle; the curve also as a picture."""
    loaded.gate.classifier.save(folder)
    if isinstance(loaded.marks.entities, Tagger):
        loaded.marks.entities.save(folder / TAGGER)
    write_json(folder / FILE, settings)
    if settings["curve"]:
        _draw(settings, folder / "strength.png")


def load_gate(link, loaded, args):
    """The Gate of the ECO checkpoint `link`. Raises UserError if its files are missing or damaged."""
    settings = schemas.read(Path(link.path) / FILE, EcoSettings)
    classifier = gates.CLASSIFIERS[settings["classifier"]].load(Path(link.path), loaded=loaded, args=args)
    return gates.Gate(classifier, settings["threshold"])


def load(link, loaded, args):
    """`loaded`, the model under the ECO checkpoint `link`, with its gate and corruption."""
    gate = load_gate(link, loaded, args)
    settings, marks = schemas.read(Path(link.path) / FILE, EcoSettings), Marks()
    if settings["tokens"] == "entities" and settings["token_classifier"]:
        marks = Marks(Tagger(f"{link.path}/{TAGGER}", Path(link.path) / TAGGER, loaded, args))
    elif settings["tokens"] == "entities":
        marks = Marks(by_list(_people(settings["names"], link.path)))
    return dataclasses.replace(loaded, gate=gate, marks=marks, corruption=Corruption(**settings["corruption"]))


def _people(listed: list[dict], folder: Path) -> list[Person]:
    try:
        return [Person(**parts) for parts in listed]
    except ValueError as error:
        raise UserError(f"{folder}/{FILE} is damaged ({error}); train the checkpoint again")


def by_list(names):
    return lambda texts: [found_names(text, names) for text in texts]


def found_names(text, names):
    """The [(start, end), ...] of the names in `text`, in order; where two overlap, one that covers both."""
    found = []
    for start, end in sorted(span for person in names for span in spans(text, person)):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _draw(settings, path):
    from utils.evaluation.figures import draw_strength

    strength = settings["corruption"]["strength"]
    draw_strength(settings["curve"], settings["metric"], settings["target"], strength, path=path)
