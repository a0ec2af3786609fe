"""What the scripts do alike: read their settings, and train what they have prepared."""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from utils import cli, plan
from utils.data.select import fingerprint
from utils.data.splits import TRAIN_SPLITS
from utils.evaluation.frozen import Frozen
from utils.evaluation.run import EvaluationSettings, accuracies, check_rows, note_other_length
from utils.interventions.served import Served, load_served
from utils.models.base import ModelSettings
from utils.models.chain import refuse_prompted, resolve_chain
from utils.storage.outputs import Output, state_path
from utils.tasks.rows import Splits, refuse_other_form
from utils.training.loop import Training, TrainingSettings
from utils.training.state import saved_arguments


@dataclass(frozen=True)
class Settings:
    """The settings of a command, by what they are about."""

    model: ModelSettings
    training: TrainingSettings
    evaluation: EvaluationSettings


def settings_of(args: Namespace) -> Settings:
    """The Settings that a command's `args` give; the only place that reads all of them for all three."""
    return Settings(*(cli.take(kind, args) for kind in (ModelSettings, TrainingSettings, EvaluationSettings)))


def load_frozen(name: str, parent: str | None, settings: Settings, frames: Splits, p: int = 0) -> Served:
    """The model `name`, which must be one that can be unlearnt and that the rows of `frames` fit, with `p`
    virtual tokens in front. parent: where its parent lies, if it was moved. Raises UserError otherwise."""
    chain = resolve_chain(name, settings.model.trust_remote_code, parent)
    refuse_prompted(chain)
    refuse_other_form(chain[-1].manifest, frames.task, name)
    served, length = load_served(name, settings.model, parent), settings.evaluation.max_length
    check_rows(served.model.config, served.tokenizer, frames, length, p)
    note_other_length(served, pd.concat(frames.values()), frames.task, length)
    return served


def train(
    prepared: plan.Prepared,
    serve: Callable[[], Served],
    frames: Splits,
    output: Output,
    args: Namespace,  # the whole of it: a run that is resumed must have had the same arguments
    settings: Settings,
    *,
    warmup: float,
    trained_on: Sequence[str] = TRAIN_SPLITS,
    evaluates_before: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """Train what `prepared` says: (log, cost). With --dry_run=probe only a few steps, and None.

    serve: the model as it is evaluated meanwhile. warmup: share of the steps. trained_on: splits.
    evaluates_before: whether the run also evaluates the frozen model.
    """
    examples, parameters = prepared.examples, prepared.parameters
    print(f"training {sum(p.numel() for p in parameters.values()):,} parameters on {len(examples):,} rows")

    known = Frozen()

    def evaluate() -> dict[str, float]:
        with prepared.numerics():
            return accuracies(serve(), frames, frames.task, settings.evaluation, known)

    training = Training(
        parameters=parameters,
        examples=examples,
        loss=prepared.loss,
        settings=settings.training,
        recorded=saved_arguments(args),
        state_path=state_path(output),
        fingerprint=fingerprint({split: frames[split] for split in trained_on}),
        chain=[*prepared.served.chain, *prepared.beside],
        warmup=warmup,
        evaluate=evaluate,
        measured=frames.task.compared,
        log_path=None if args.dry_run else output.log_path,
        whole_step=prepared.whole_step,
        buffers=prepared.buffers,
        after_step=prepared.after_step,
    )
    if args.dry_run:
        plan.print_probe(training, prepared, serve(), frames, settings.evaluation, evaluates_before)
        return None
    print(f"the log grows in {os.path.relpath(output.log_path)}")
    log = training.run()
    return log, training.cost
