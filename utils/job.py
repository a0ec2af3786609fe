"""What the scripts do alike: read their settings, and train what they have prepared."""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from utils import cli, plan
from utils.data.select import fingerprint
from utils.data.splits import TRAIN_SPLITS
from utils.evaluation.run import EvaluationSettings, Frames, accuracies
from utils.interventions.served import Served
from utils.models.base import ModelSettings
from utils.storage.outputs import Output, state_path
from utils.tasks.classification import label_words
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


def train(
    prepared: plan.Prepared,
    serve: Callable[[], Served],
    frames: Frames,
    output: Output,
    args: Namespace,  # the whole of it: a run that is resumed must have had the same arguments
    settings: Settings,
    *,
    warmup: float,
    trained_on: Sequence[str] = TRAIN_SPLITS,
    evaluations: int = 1,
) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """Train what `prepared` says: (log, cost). With --dry_run=probe only a few steps, and None.

    serve: the model as it is evaluated meanwhile. warmup: share of the steps. trained_on: splits.
    evaluations: how often the run evaluates, beside --eval_steps.
    """
    examples, parameters = prepared.examples, prepared.parameters
    print(f"training {sum(p.numel() for p in parameters.values()):,} parameters on {len(examples):,} rows")

    def evaluate() -> dict[str, float]:
        with prepared.numerics():
            return accuracies(serve(), frames, label_words(frames), settings.evaluation)

    training = Training(
        parameters=parameters,
        examples=examples,
        loss=prepared.loss,
        settings=settings.training,
        recorded=saved_arguments(args),
        state_path=state_path(output),
        fingerprint=fingerprint({split: frames[split] for split in trained_on}),
        chain=prepared.served.chain,
        warmup=warmup,
        evaluate=evaluate,
        log_path=None if args.dry_run else output.log_path,
    )
    if args.dry_run:
        plan.print_probe(training, prepared, serve(), frames, settings.evaluation, evaluations)
        return None
    print(f"the log grows in {os.path.relpath(output.log_path)}")
    log = training.run()
    return log, training.cost
