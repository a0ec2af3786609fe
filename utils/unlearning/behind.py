"""SPUL behind a gate: which rows are left to train on, with what weights, and what the others add to the loss.

A row that the gate lets through is answered by the frozen model: its L_kl is 0, its L_f or L_r is a constant, and
neither has a gradient. So the objective of the served model over all rows (equation 4) is that over the flagged rows,
each term times the share of its rows that is flagged, and constants.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from utils import cli
from utils.data.batch import Example, collate
from utils.data.splits import TRAIN_SPLITS
from utils.errors import UserError
from utils.evaluation import tables
from utils.evaluation.frozen import Frozen
from utils.evaluation.run import EvaluationSettings
from utils.interventions.gate_files import SEEN, GateSource
from utils.interventions.gates import ClassifierSettings
from utils.interventions.served import Served
from utils.models.base import ModelSettings
from utils.models.forward import completion_logits
from utils.tasks.rows import Splits
from utils.unlearning import gate_training, losses
from utils.unlearning.flags import listed_people
from utils.unlearning.losses import Shares
from utils.unlearning.objectives import prompt_rows


@dataclass(frozen=True, eq=False)
class Flagged:
    """What a gate flags of the training rows.

    flags, counted: {train split: (n,) bool}. Of rows to keep, classifiers that had not seen them say it: these are the
    mistakes that it will make. Those that the classifier was fitted to (SEEN) do not count. Rows to forget that it was
    fitted to count as flagged: it knows them. After cross-fitting, where none is SEEN, these are all of them.
    """

    flags: Mapping[str, np.ndarray]
    counted: Mapping[str, np.ndarray]

    @property
    def shares(self) -> Shares:
        """The weights of the terms, without constants."""
        retain, forget = (float(self.flags[s].sum() / self.counted[s].sum()) for s in TRAIN_SPLITS)
        return Shares(forget=forget, retain=retain)

    def __str__(self) -> str:
        retain, forget = (f"{self.flags[s].sum():,} of {self.counted[s].sum():,}" for s in TRAIN_SPLITS)
        return f"the gate leaves {retain} rows to keep and {forget} to forget"


def flagged(source: GateSource) -> Flagged:
    """What the gate of `source` flags. Raises UserError where that is no row to forget, or every row to keep."""
    threshold, unseen = source.description["threshold"], source.unseen
    seen = {split: unseen[split] == SEEN for split in TRAIN_SPLITS}
    flags = {split: unseen[split] > threshold for split in TRAIN_SPLITS}
    flags["train_forget"] = flags["train_forget"] | seen["train_forget"]
    counted = {"train_retain": ~seen["train_retain"], "train_forget": np.ones_like(seen["train_forget"])}
    if not flags["train_forget"].any():  # of its like it would flag none
        raise UserError("the gate flags no row to forget, so nothing could be learnt; allow more false positives")
    if flags["train_retain"].sum() == counted["train_retain"].sum():
        raise UserError("the gate flags every row to keep, so it keeps nothing apart; use a stricter one")
    if not any(rows.any() for rows in seen.values()):  # cross-fitted
        flags["train_forget"] = counted["train_forget"]
    return Flagged(flags, counted)


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """What SPUL trains on. examples: the rows to keep, which are those of `retain`, then the rows to forget. shares:
    what they are of all rows; None without a gate."""

    examples: list[Example]
    retain: pd.DataFrame
    shares: Shares | None = None


def find_gate(
    args: Namespace,  # the flags of the gate, of the rows and of the model; all that is read is read here
    frames: Splits,
    model: ModelSettings,
    load: Callable[[], Served],
) -> GateSource | None:
    """The gate that --gate names, None without one; prints what it flags.

    load: gives the frozen model, for a classifier that reads its hidden states, which a plan has not.
    """
    if not args.gate:
        return None

    def planned() -> Served:
        raise UserError(f"what a gate of {args.gate} flags is not known without the model; use --dry_run=probe")

    classifier, gate_settings = cli.take(ClassifierSettings, args), cli.take(gate_training.GateSettings, args)
    people = listed_people(args.dataset, args.forget_only)
    load = planned if args.dry_run == "plan" else load
    gate = gate_training.find_gate(args.gate, frames, people, gate_settings, classifier, model, load)
    if gate.link is None:  # else it was said when the gate was trained
        print(tables.gate_table(gate.description))
    print(flagged(gate))
    return gate


def training_rows(
    served: Served,
    frames: Splits,
    settings: EvaluationSettings,
    gate: GateSource | None,
    frozen: Frozen | None = None,
) -> TrainingRows:
    """What SPUL trains on behind `gate`; all rows without one.

    served: the frozen model. settings: of lengths, batches and seed. frozen: its scores on the rows of all splits, by
    which the rows that the gate lets through are known; None where it was not evaluated.
    """
    how = served.tokenizer, frames, settings.max_length, settings.seed
    if gate is None:
        kept, forget = prompt_rows(*how)
        return TrainingRows([*kept, *forget], frames["train_retain"])
    found = flagged(gate)
    retain = frames["train_retain"][found.flags["train_retain"]].reset_index(drop=True)
    (kept, forget), shares = prompt_rows(*how, retain), found.shares
    if frozen is not None:
        kept_losses = np.array([row["loss"] for row in frozen.rows["train_retain"]])
        shares = with_constants(found, served, forget, settings.eval_batch_size, kept_losses)
    chosen = [forget[i] for i in np.flatnonzero(found.flags["train_forget"])]
    return TrainingRows([*kept, *chosen], retain, shares)


@torch.inference_mode()
def with_constants(
    found: Flagged, served: Served, forget: Sequence[Example], batch_size: int, frozen: np.ndarray
) -> Shares:
    """The shares, and what the rows that the gate lets through add to L_f and L_r.

    served: the frozen model. forget: all rows to forget, with the words that they are to be answered with. frozen: its
    losses (n,) on the rows of train_retain; of a sample of these rows they give an estimate.
    """
    answered, total = [forget[i] for i in np.flatnonzero(~found.flags["train_forget"])], 0.0
    for start in range(0, len(answered), batch_size):
        batch = collate(answered[start : start + batch_size], served.pad_id, served.model.device)
        total += float(losses.token_nll(completion_logits(served.model, batch), batch.targets).sum())
    others = found.counted["train_retain"] & ~found.flags["train_retain"]
    let_through = frozen[others] if len(frozen) == len(others) else frozen
    kept = float((1 - found.shares.retain) * let_through.mean())
    return replace(found.shares, forget_constant=total / len(forget), retain_constant=kept)
