"""A gate on the disk: the folder `gate` of whatever checkpoint is served behind one, safetensors and JSON alone."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file

from utils.errors import UserError
from utils.interventions import gates
from utils.models.base import FrozenModel
from utils.storage import schemas
from utils.storage.checkpoints import GATE, Link
from utils.storage.files import write_json
from utils.storage.reading import Like, read_tensors
from utils.storage.schemas import Amount, Count, Open, Share

FILE, EARLIER_FILE, UNSEEN = "gate.json", "eco.json", "unseen.safetensors"
SEEN = -1.0  # in place of the probability of a row that the classifier was fitted to

Pair = Annotated[list[Share], Field(min_length=2, max_length=2)]
Unseen = dict[str, np.ndarray]
"""{train split: (n,) probabilities of its rows by a classifier that was not fitted to them, SEEN where there is none}.

What the gate will do on queries like them: its own probabilities of rows that it was fitted to flatter it.
"""


class Rewritten(Open):
    """Of the rows of a split that a rewriting applies to: how many there are, and the share that is flagged."""

    flagged: Share
    rows: Count


class Roc(Open):
    """Pairs of false positive rate and recall: the curve, and where the threshold lies."""

    curve: list[Pair]
    at_threshold: Pair


class GateFile(Open):
    """gate.json, or eco.json of earlier versions, which have `evasion` instead of what is said of rewritings.

    A threshold of 1 is above every probability: nothing is flagged. Of a gate trained without rewritten rows there are
    the fields that end in `_plain`, where there is one beside it.
    """

    what = "description of a gate"
    classifier: Literal[tuple(gates.CLASSIFIERS)]
    threshold: Annotated[float, Field(ge=0, lt=1)]
    calibration: dict[str, Amount]
    rates: dict[str, Share | dict[str, Share]]
    evasion: dict[str, dict[str, Share]] = {}
    augmented: bool = False
    names_by: Literal["list", "capitals", "none"] = "list"
    rewritings: dict[str, dict[str, Rewritten]] = {}
    rewritings_plain: dict[str, dict[str, Rewritten]] = {}
    roc: dict[str, Roc] = {}
    roc_plain: dict[str, Roc] = {}


class GateSource(Protocol):
    """A gate and what is known of it. description: gate.json. link: of the checkpoint that it comes from."""

    description: dict[str, Any]
    unseen: Unseen
    link: Link | None

    def gate(self, served: FrozenModel) -> gates.Gate:
        """The gate itself, in front of the model of `served`."""
        ...


@dataclass(frozen=True, eq=False)
class StoredGate:
    """The gate of the checkpoint `link`, which is loaded when it is asked for. sizes: {train split: its rows}."""

    link: Link
    sizes: dict[str, int]
    trust_remote_code: bool
    max_length: int

    @cached_property
    def description(self) -> dict[str, Any]:
        return _read(self.link.path)[1]

    @cached_property
    def unseen(self) -> Unseen:
        """Raises UserError where the checkpoint is of a version that did not keep them, and where they are damaged."""
        folder, _ = _read(self.link.path)
        file, what = folder / UNSEEN, "scores of these rows"
        if not file.exists():
            raise UserError(f"the gate of {self.link.name} is of an earlier version; train it again")
        tensors = read_tensors(file, {split: Like((n,), ("float64",)) for split, n in self.sizes.items()}, what)
        if any(not (((values >= 0) & (values <= 1)) | (values == SEEN)).all() for values in tensors.values()):
            raise UserError(f"{file} holds no {what} (one is no probability); train the checkpoint again")
        return {split: tensor.numpy() for split, tensor in tensors.items()}

    def gate(self, served: FrozenModel) -> gates.Gate:
        return load(self.link.path, served, self.trust_remote_code, self.max_length)


def save(gate: gates.Gate, description: dict[str, Any], unseen: Unseen, folder: Path) -> None:
    """Write a gate into the checkpoint `folder`."""
    inner = folder / GATE
    inner.mkdir()
    gate.classifier.save(inner)
    write_json(inner / FILE, description)
    save_file({split: torch.tensor(values) for split, values in unseen.items()}, inner / UNSEEN)


def load(folder: Path, served: FrozenModel, trust_remote_code: bool, max_length: int) -> gates.Gate:
    """The Gate of the checkpoint `folder`. Raises UserError if its files are missing or damaged."""
    inner, settings = _read(folder)
    classifier = gates.CLASSIFIERS[settings["classifier"]].load(inner, served, trust_remote_code, max_length)
    return gates.Gate(classifier, settings["threshold"])


def has_gate(link: Link) -> bool:
    """Whether the checkpoint is served behind a gate of its own."""
    return link.manifest is not None and (link.kind == "eco" or (link.path / GATE).is_dir())


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(where the gate of a checkpoint lies, its description); in earlier ECO checkpoints among the other files."""
    inner = folder / GATE
    if inner.is_dir() or not (folder / EARLIER_FILE).exists():
        return inner, schemas.read(inner / FILE, GateFile)
    return folder, schemas.read(folder / EARLIER_FILE, GateFile)
