"""What the JSON of every checkpoint and record must look like. Other formats lie beside the code that reads them."""

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, RootModel, model_validator

from utils.storage.schemas import Amount, Count, Digest, Open, Schema, Seed, Share, Text

SPLITS = ("train_retain", "train_forget", "test_retain", "test_forget")


class Scores(Open):
    """Of one split. Of label words: all three; of free answers only how many are exactly right. Earlier versions lack
    the interval of the accuracy."""

    accuracy: Share
    accuracy_ci: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    f1: Share | None = None
    out_of_label: Share | None = None


class Cost(Open):
    """What a training cost: `cost` of utils.training.loop.Training."""

    steps: Count
    seconds_per_step: Amount | None
    peak_memory_bytes: Annotated[int, Field(ge=0)]


class Record(Open):
    """One evaluation, as utils.evaluation.record.make_record gives it."""

    what = "record of scores"
    method: Text
    headline: Text = "accuracy"
    splits: dict[str, Scores]
    training: Cost | None = None

    @model_validator(mode="after")
    def _has_every_split(self) -> "Record":
        if missing := [split for split in SPLITS if split not in self.splits]:
            raise ValueError(f"{missing[0]} is missing")
        needed = ("f1", "out_of_label") if self.headline == "accuracy" else (self.headline,)
        for split in SPLITS:
            scores = self.splits[split].model_dump()
            if absent := [name for name in needed if scores.get(name) is None]:
                raise ValueError(f"splits.{split}.{absent[0]} is missing")
            if not isinstance(scores.get(self.headline), float | int):
                raise ValueError(f"splits.{split}.{self.headline} is no number")
        return self


class Parent(Schema):
    path: Text
    sha256: Digest


class Arguments(Open):
    """The command's own; those that are used again."""

    dataset: Text
    exclude_forget: bool = False
    unlearn_method: Text | None = None
    eco_classifier: Text = "tfidf"
    forget_size: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_train_samples: Count | None = None
    forget_share: Annotated[float, Field(gt=0, le=1)] | None = None
    forget_only: Text | None = None
    rows_seed: Seed | None = None
    validation_share: Annotated[float, Field(gt=0, le=1)] | None = None
    final: bool | None = None
    shadow: Annotated[int, Field(ge=0)] | None = None


class Manifest(Open):
    """manifest.json. Earlier versions lack `version`, `base`, `label_words`, `training` and `task`."""

    what, remedy = "manifest of this project", "train the checkpoint again"
    kind: Text
    version: Annotated[int, Field(ge=1, le=2)] = 1
    parent: Parent
    base: Text = ""
    arguments: Arguments
    data_fingerprint: Digest
    task: Text | None = None
    label_words: list[Text] = []
    seed: Seed
    files: dict[Text, Digest]
    training: Cost | None = None
    metrics: list[Record] | None = None

    @model_validator(mode="after")
    def _has_words(self) -> "Manifest":
        if self.task in (None, "classification") and "label_words" in self.model_fields_set and not self.label_words:
            raise ValueError("label_words is empty")
        return self


class Records(RootModel[Annotated[list[Record], Field(min_length=1)]]):
    """metrics.json."""

    model_config = ConfigDict(strict=True)
    what: ClassVar[str] = "list of scores"
    remedy: ClassVar[str] = "delete its folder and start again"


class Index(Open):
    """model.safetensors.index.json, which is not ours."""

    what, remedy = "index of weights", "restore it"
    weight_map: dict[Text, Text]


class SearchScores(RootModel[dict[str, Scores] | None]):
    """What a run of the search of `utils.compare` is remembered by: None where its loss was not finite."""

    model_config = ConfigDict(strict=True)
    what: ClassVar[str] = "result of a search"
    remedy: ClassVar[str] = "delete it and start again"
