"""A gate is trained on the train splits, and its threshold set by rows that its classifier was not fitted to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from utils.data.names import Person
from utils.data.rewritings import augment
from utils.data.select import fingerprint
from utils.data.splits import TRAIN_SPLITS, split_rows
from utils.errors import UserError, note_once
from utils.interventions import gates
from utils.interventions.gate_files import SEEN, GateSource, StoredGate, Unseen, has_gate
from utils.models.base import FrozenModel, ModelSettings
from utils.models.chain import resolve_chain
from utils.unlearning import gate_report

Frames = Mapping[str, pd.DataFrame]
FOLDS = 5  # of the cross-fitting that sets the threshold


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Where a gate's threshold lies, and whether it is trained on rewritten rows, too: the flags of those names."""

    eco_threshold: float | None = None
    eco_conformal: float | None = None
    eco_max_fpr: float = 0.01
    gate_augment: bool = False
    seed: int = 42

    @property
    def rate(self) -> tuple[float, str]:
        """The share of retain rows that may be flagged, and the flag that says so."""
        flag = "eco_max_fpr" if self.eco_conformal is None else "eco_conformal"
        return getattr(self, flag), flag


@dataclass(frozen=True, eq=False)
class TrainedGate:
    """A gate that this command has trained, as a GateSource."""

    trained: gates.Gate
    description: dict[str, Any]
    unseen: Unseen
    link: None = None

    def gate(self, served: FrozenModel) -> gates.Gate:
        return self.trained


def find_gate(
    name: str | None,
    frames: Frames,
    names: Sequence[Person],
    settings: GateSettings,
    classifier: gates.ClassifierSettings,
    model: ModelSettings,
    load: Callable[[], FrozenModel],
) -> GateSource:
    """The gate of the checkpoint `name`. One that is trained here with these settings where there is no name, or where
    it is that of a classifier (gates.CLASSIFIERS).

    names: the people whose names rewritings change. load: gives the model, which only some classifiers need.
    Raises UserError where the checkpoint has no gate, one of other rows, or one that reads another model's states.
    """
    if name is None or name in gates.CLASSIFIERS:
        classifier = replace(classifier, eco_classifier=name or classifier.eco_classifier)
        kind = gates.CLASSIFIERS[classifier.kind]
        return train_gate(load() if kind.reads_states or kind.validates else None, frames, names, settings, classifier)
    *above, link = resolve_chain(name, model.trust_remote_code)
    if not has_gate(link):
        raise UserError(f"{name} has no gate; --gate takes tfidf, features, or what --unlearn_method=gate or eco wrote")
    if link.manifest["data_fingerprint"] != fingerprint({split: frames[split] for split in TRAIN_SPLITS}):
        raise UserError(
            f"the gate of {name} was trained on other data than the rows selected here; give this command the flags "
            "for rows that it was trained with, or train a gate on these"
        )
    sizes = {split: len(frames[split]) for split in TRAIN_SPLITS}
    found = StoredGate(link, sizes, model.trust_remote_code, classifier.max_length)
    if gates.CLASSIFIERS[found.description["classifier"]].reads_states and above[-1].sha256 != load().chain[-1].sha256:
        raise UserError(f"the gate of {name} reads the hidden states of another model; train one on this model")
    return found


def train_gate(
    served: FrozenModel | None,
    frames: Frames,
    names: Sequence[Person],
    settings: GateSettings,
    classifier: gates.ClassifierSettings,
) -> TrainedGate:
    """A gate from the train splits. A row that had a say in a classifier cannot calibrate it: one that has not seen it
    must score it. The description has "calibration": {"retain", "forget": rows that calibrate, "auc",
    "false_positives", "false_negatives" on them}.

    A classifier that is fitted in seconds is cross-fitted: five are trained on four fifths each, every row is scored by
    the one that did not see it, those scores set the threshold, and the one that is kept has seen all rows: it knows
    every forget row. For an encoder, and for a conformal threshold, whose guarantee is for the classifier that gave the
    calibration scores, a fifth is held out for good; of the rest an encoder holds out another fifth to pick the epoch.
    served: of a classifier that reads hidden states or needs its device, else it may be None.
    """
    fit = partial(gates.CLASSIFIERS[classifier.kind].fit, served=served, settings=classifier)
    validates, plain = gates.CLASSIFIERS[classifier.kind].validates, None
    if settings.gate_augment and validates:
        note_once("an encoder is not trained twice: the report says nothing of it without --gate_augment")
    elif settings.gate_augment:
        plain = _calibrated(frames, settings, fit, validates)
    rewriting = _augmented(fit, names, settings.seed) if settings.gate_augment else fit
    gate, unseen, calibration = _calibrated(frames, settings, rewriting, validates)
    description = {
        "classifier": classifier.kind,
        "threshold": gate.threshold,
        "augmented": settings.gate_augment,
        "calibration": calibration,
        "rates": gates.rates(gate, frames),
        **gate_report.describe(gate, plain and plain[0], frames, names, settings.seed),
    }
    if plain:
        description |= {"rates_plain": gates.rates(plain[0], frames), "calibration_plain": plain[2]}
    return TrainedGate(gate, description, unseen)


def _augmented(fit: Callable, names: Sequence[Person], seed: int) -> Callable:
    """`fit` on rewritten rows, too (--gate_augment). They are made of the rows that it is given, so that no row of
    another fold, and none that is held out, has a say; validation rows stay as they are."""

    def fitted(texts: Sequence[str], labels: np.ndarray, **extra: Any) -> gates.Classifier:
        return fit(*augment(texts, labels, names, seed), **extra)

    return fitted


def _calibrated(
    frames: Frames, settings: GateSettings, fit: Callable, validates: bool
) -> tuple[gates.Gate, Unseen, dict[str, float]]:
    """(Gate with its threshold, scores of rows that its classifier had not seen, "calibration"). Only the rows as they
    are set the threshold, however `fit` rewrites: the rate that is asked for is that of plain queries."""
    if validates or settings.eco_conformal is not None:
        gate, unseen = _split_fit(frames, settings, fit, validates)
    else:
        gate, unseen = _cross_fit(frames, settings, fit)
    retain, forget = (unseen[split][unseen[split] != SEEN] for split in TRAIN_SPLITS)
    if settings.eco_threshold is not None:
        gate.threshold = settings.eco_threshold
    else:
        gate.threshold = gates.threshold_for_rate(retain, *settings.rate)
    truth = np.r_[np.zeros(len(retain)), np.ones(len(forget))]
    return (
        gate,
        unseen,
        {
            "retain": len(retain),
            "forget": len(forget),
            "auc": float(roc_auc_score(truth, np.r_[retain, forget])),
            "false_positives": float((retain > gate.threshold).mean()),
            "false_negatives": float((forget <= gate.threshold).mean()),
        },
    )


def _refuse_few(settings: GateSettings, n: int) -> None:
    """Raise UserError, before a classifier is trained, if the scores of `n` retain rows cannot set the threshold."""
    if settings.eco_threshold is None:
        gates.threshold_rank(n, *settings.rate)


def _cross_fit(frames: Frames, settings: GateSettings, fit: Callable) -> tuple[gates.Gate, Unseen]:
    """(Gate fitted on all train rows, their scores by classifiers that had not seen them)."""
    texts, labels = _labelled(frames["train_retain"], frames["train_forget"])
    if min(np.bincount(labels)) < FOLDS:
        raise UserError(f"there are too few train rows to calibrate the classifier: {FOLDS} of each kind are needed")
    _refuse_few(settings, len(frames["train_retain"]))
    texts, scores = np.array(texts, dtype=object), np.empty(len(labels))
    for seen, held in StratifiedKFold(FOLDS, shuffle=True, random_state=settings.seed).split(texts, labels):
        fold = gates.Gate(fit(list(texts[seen]), labels[seen]))
        scores[held] = fold.probabilities(texts[held])
    gate = gates.Gate(fit(list(texts), labels))
    return gate, {"train_retain": scores[labels == 0], "train_forget": scores[labels == 1]}


def _split_fit(frames: Frames, settings: GateSettings, fit: Callable, validates: bool) -> tuple[gates.Gate, Unseen]:
    """(Gate fitted on four fifths of the train rows, the scores of those held out)."""
    seen, held = _hold_out(*(frames[split].assign(row=range(len(frames[split]))) for split in TRAIN_SPLITS), settings)
    _refuse_few(settings, len(held[0]))
    extra = {}
    if validates:
        seen, validation = _hold_out(*seen, settings)
        extra = {"validation": _labelled(*validation)}
    gate, unseen = gates.Gate(fit(*_labelled(*seen), **extra)), {}
    for split, rows in zip(TRAIN_SPLITS, held):
        unseen[split] = np.full(len(frames[split]), SEEN)
        unseen[split][rows["row"]] = gate.probabilities(rows["text"])
    return gate, unseen


def _hold_out(
    retain: pd.DataFrame, forget: pd.DataFrame, settings: GateSettings
) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """((retain, forget) for training, (retain, forget) held out: a fifth of each label's rows)."""
    rows = pd.concat([retain.assign(forget=False), forget.assign(forget=True)], ignore_index=True)
    parts = split_rows(rows, 0.2, settings.seed)
    pairs = [(parts[f"{phase}_retain"], parts[f"{phase}_forget"]) for phase in ("train", "test")]
    if min(len(frame) for pair in pairs for frame in pair) == 0:
        raise UserError("there are too few train rows to hold some out for the threshold; use more rows")
    return pairs


def _labelled(retain: pd.DataFrame, forget: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    texts = [*retain["text"], *forget["text"]]
    return texts, np.r_[np.zeros(len(retain), dtype=int), np.ones(len(forget), dtype=int)]
