"""How every script that makes a checkpoint ends: evaluate, record, write the folder, print the table."""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from utils import distributed
from utils.data.select import fingerprint
from utils.data.splits import TRAIN_SPLITS
from utils.evaluation import figures, saved, tables
from utils.evaluation.frozen import Frozen
from utils.evaluation.record import make_record
from utils.evaluation.run import EvaluationSettings, evaluate_splits
from utils.interventions.served import Served
from utils.storage import checkpoints
from utils.storage.outputs import Output
from utils.tasks.rows import Splits


def finish(
    output: Output,
    served: Served,
    frames: Splits,
    args: Namespace,  # the whole of it, since the manifest records every argument
    settings: EvaluationSettings,
    *,
    method: str,
    kind: str,
    write: Callable[[Path], None],
    before: list[dict] | None = None,
    trained_on: Sequence[str] = TRAIN_SPLITS,
    cost: dict[str, Any] | None = None,
    log: list[dict] | None = None,
    frozen: Frozen | None = None,
) -> None:
    """Evaluate `served` under the name `method` and write the Output, a checkpoint of this `kind`.

    write: function(folder) that puts the weights there. before: records that go in front of its own. trained_on: the
    splits. cost, log: of a utils.training.loop.Training, where there was one. frozen: what is known of the frozen model
    behind its interventions. Nothing is evaluated with settings.max_eval_samples = 0.
    """
    records, task = before, frames.task
    if settings.max_eval_samples != 0:
        start = perf_counter()
        splits, _ = evaluate_splits(served, frames, task, settings, method, frozen)
        entry = make_record(method, output, served.base_name, settings, task, splits, perf_counter() - start, cost)
        records = [*(before or []), entry]
    if not distributed.is_main():
        return
    used = fingerprint({split: frames[split] for split in trained_on})
    with output.new_folder() as folder:
        write(folder)
        checkpoints.write_manifest(folder, output, kind, served.chain, args, used, task, records, cost)
        if log:
            lines = "".join(json.dumps(line) + "\n" for line in log)
            (folder / "training.jsonl").write_text(lines, encoding="utf-8")
            figures.draw_curves(log, task.compared, path=folder / "training.png")
    if records:
        print(tables.table(records))
    print(f"wrote {output}")


def show_merged(served: Served, frames: Splits, settings: EvaluationSettings) -> tuple[list[dict], Frozen | None]:
    """Print the accuracy before and after LoRA was merged into the unquantised base: ([the merged model's record], its
    scores), or ([], None) with settings.max_eval_samples = 0."""
    if settings.max_eval_samples == 0:
        return [], None
    start, last, frozen = perf_counter(), served.chain[-1], saved.find(served, frames, settings)
    splits, _ = evaluate_splits(served, frames, frames.task, settings, "before SPUL", frozen)
    saved.keep(frozen, frames, settings)
    method = "merged" if last.kind == "lora" else "base"
    after = make_record(method, last.path, served.base_name, settings, frames.task, splits, perf_counter() - start)
    print(tables.table([*(served.manifest.get("metrics") or []), after]))
    return [after], frozen
