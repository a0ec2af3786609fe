"""What the JSON in our files must look like: one schema per format, checked whenever the file is read."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from utils.cli import UserError
from utils.corruption import FAMILIES
from utils.reading import read_json
from utils.splits import SPLITS

Text = Annotated[str, Field(min_length=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
PlainName = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]  # of a layer; PEFT takes other texts for patterns


class Schema(BaseModel):
    """Every type as written: no text for a number, no truth value for one, no NaN, no field that is not known."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    what: ClassVar[str] = "file"
    remedy: ClassVar[str] = "restore it or train the checkpoint again"


class Open(Schema):
    """A schema of something that holds more than is read: what else there is differs between versions."""

    model_config = ConfigDict(extra="allow")


class Scores(Open):
    """Of one split: what every table shows."""

    accuracy: Share
    f1: Share
    out_of_label: Share


class Cost(Open):
    """utils.training.Training.cost."""

    steps: Count
    seconds_per_step: Amount | None
    peak_memory_bytes: Annotated[int, Field(ge=0)]


class Record(Open):
    """One evaluation, as utils.metrics.record writes it."""

    what = "record of scores"
    method: Text
    splits: dict[str, Scores]
    training: Cost | None = None

    @model_validator(mode="after")
    def _has_every_split(self) -> "Record":
        if missing := [split for split in SPLITS if split not in self.splits]:
            raise ValueError(f"{missing[0]} is missing")
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


class Manifest(Open):
    """manifest.json. Earlier versions lack `version`, `base`, `label_words` and `training`."""

    what, remedy = "manifest of this project", "train the checkpoint again"
    kind: Text
    version: Annotated[int, Field(ge=1, le=2)] = 1
    parent: Parent
    base: Text = ""
    arguments: Arguments
    data_fingerprint: Digest
    label_words: Annotated[list[Text], Field(min_length=1)] = []
    seed: Seed
    files: dict[Text, Digest]
    training: Cost | None = None
    metrics: list[Record] | None = None


class CorruptionSettings(Schema):
    family: Literal[tuple(FAMILIES)]
    strength: Amount
    dims: Count
    seed: Seed


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


class Vocabularies(RootModel[list[list[Text]]]):
    """vocabulary.json: the terms of the words and of the characters, each once, in the order of their columns."""

    model_config = ConfigDict(strict=True)
    what: ClassVar[str] = "vocabulary of a gate"
    remedy: ClassVar[str] = Schema.remedy

    @model_validator(mode="after")
    def _has_every_term_once(self) -> "Vocabularies":
        if len(self.root) != 2 or not all(terms and len(set(terms)) == len(terms) for terms in self.root):
            raise ValueError("it is not two lists of terms, each once")
        return self


class Records(RootModel[Annotated[list[Record], Field(min_length=1)]]):
    """metrics.json."""

    model_config = ConfigDict(strict=True)
    what: ClassVar[str] = "list of scores"
    remedy: ClassVar[str] = "delete its folder and start again"


class SearchScores(RootModel[dict[str, Scores] | None]):
    """What a run of utils.compare's search is remembered by: None where its loss was not finite."""

    model_config = ConfigDict(strict=True)
    what: ClassVar[str] = "result of a search"
    remedy: ClassVar[str] = "delete it and start again"


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


class LoraSettings(Open):
    """adapter_config.json of a LoRA adapter: what we set. utils.models refuses other fields unless they do nothing."""

    what = "configuration of a LoRA adapter"
    peft_type: Literal["LORA"]
    r: Count
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Annotated[list[PlainName], Field(min_length=1)] | Literal["all-linear"]
    fan_in_fan_out: bool = False


class PromptSettings(Open):
    """adapter_config.json of a prompt."""

    what = "configuration of a prompt"
    peft_type: Literal["P_TUNING", "PROMPT_TUNING"]
    num_virtual_tokens: Count
    token_dim: Count
    auto_mapping: None = None


class Schedule(Open):
    last_epoch: Annotated[int, Field(ge=0)]
    base_lrs: list[Amount]


class Line(Open):
    """One of the log: losses, or accuracies."""

    step: Count
    accuracy: dict[str, Share] = {}


class State(Schema):
    """The text in a training state. sha256: of its tensors."""

    what, remedy = "training state", "start over with --overwrite"
    settings: dict[str, Any]
    schedule: Schedule
    log: Annotated[list[Line], Field(min_length=1)]
    sha256: Digest

    @model_validator(mode="after")
    def _is_of_one_step(self) -> "State":
        if self.log[-1].step != self.schedule.last_epoch:
            raise ValueError("log and schedule are of different steps")
        return self


class Reference(Schema):
    """The text in a file of reference quantities. key: all that they depend on; sha256: of its tensors."""

    what, remedy = "file of reference logits", "delete it or pass another --logits_path"
    key: dict[str, Any]
    sha256: Digest


class Index(Open):
    """model.safetensors.index.json, which is not ours."""

    what, remedy = "index of weights", "restore it"
    weight_map: dict[Text, Text]


class ModelConfig(Open):
    """config.json of a model, which is not ours: only what would fetch something is looked at."""

    what, remedy = "configuration of a model", "restore it"
    model_type: Text | None = None
    transformers_weights: Text | None = None


def read(path: str | Path, schema: type[BaseModel]) -> Any:
    """The JSON in file `path`, as it stands there. Raises UserError where `schema` does not allow it."""
    return check(read_json(path), schema, path)


def read_foreign(path: str | Path, schema: type[BaseModel]) -> Any:
    """The same of a file of another project, whose JSON may hold Infinity, and a key twice."""
    return check(read_json(path, foreign=True), schema, path)


def check(value: Any, schema: type[BaseModel], path: str | Path) -> Any:
    """`value`, read from `path`, unchanged. Raises UserError where `schema` does not allow it."""
    try:
        schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        problem = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(f"{path} is no {schema.what} or is damaged ({problem}); {schema.remedy}") from None
    return value
