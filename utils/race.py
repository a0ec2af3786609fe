r"""Time to the goal: SPUL as published, SPUL, and SPUL behind a gate, from one fine-tuned model (`make race`).

python -m utils.race --model_checkpoints=[local path to checkpoints] --dataset=snippets --budget=15 \
    --rows="--max_length=128 --max_train_samples=512" --published="--settings=data/settings/demo/published.txt" \
    --spul="--forget_per_batch=4 --init_text='Answer unknown.' --lr=1.5e-3" --gated="--gate=tfidf --lr=1.5e-3"

The goal: accuracy on train_forget of at most --forget_accuracy, and on test_retain at most --retain_drop below that of
the fine-tuned model, on the same rows. Each route is one run of spul.py. It stops at the first point of its curve that
is at the goal, when its budget of minutes is over, or when its schedule ends.

What the clock counts: all that spul.py does from when it has its flags, that is loading the model, training the gate,
the reference pass of that route (none is shared), and every step. What it does not count: importing libraries, the
evaluation of curve points and of the end, saving. A run that was interrupted goes on with the time it had.

A curve point is an evaluation on --curve_samples rows a split, and a run stops at the first that is low enough, by luck
perhaps. So the end of each route is evaluated anew, on --max_eval_samples rows, against the fine-tuned model on these.

Writes race.json, metrics.json (the records of that evaluation), table.md and race.png to
results/race-<dataset>-<model>. Finished runs are kept under runs/ there, and recognised by their settings.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from utils import cli, runs
from utils.errors import note_once

WRITTEN = ("race.json", "metrics.json", "table.md", "race.png")
ROUTES = {"published": "SPUL as published", "spul": "SPUL", "gated": "SPUL behind a gate"}
OF_THE_RACE = (  # flags of spul.py that are the same for every route, or name its files
    "--model_checkpoints", "--dataset", "--seed", "--max_minutes", "--stop_at_forget_accuracy", "--resume",
    "--stop_at_retain_accuracy", "--output_path", "--logits_path", "--validation_share", "--final", "--dry_run",
)  # fmt: skip
WATCHED = ("train_forget", "test_retain")


def parse_args() -> Namespace:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model_checkpoints", type=cli.path, required=True, help="the fine-tuned model")
    parser.add_argument("--dataset", type=cli.path, default="snippets", help="as for the scripts")
    parser.add_argument("--seed", type=cli.seed, default=42, help="of every route")
    parser.add_argument(
        "--routes", nargs="+", choices=ROUTES, default=list(ROUTES), metavar="NAME", help="which to run"
    )
    parser.add_argument("--output_path", type=cli.path, help="folder (default: results/race-<dataset>-<model>)")
    group = parser.add_argument_group("the goal, and how it is measured")
    group.add_argument("--budget", type=cli.positive_float, default=15.0, metavar="MINUTES", help="of each route")
    group.add_argument("--forget_accuracy", type=cli.share, default=0.15, help="on train_forget, at most")
    group.add_argument(
        "--retain_drop", type=cli.share, default=0.01, help="on test_retain, below the fine-tuned model, at most"
    )
    group.add_argument("--curve_samples", type=cli.positive_int, default=150, help="rows a split of a curve point")
    group.add_argument(
        "--max_eval_samples", type=cli.positive_int, help="rows a split of the evaluation at the end (default: all)"
    )
    group = parser.add_argument_group("further flags of the scripts, as one text each")
    group.add_argument("--rows", type=cli.flags, default=[], help="of all: which rows, how long")
    group.add_argument("--published", type=cli.flags, default=[], help="of SPUL as published (default: none)")
    group.add_argument("--spul", type=cli.flags, default=[], help="of SPUL")
    group.add_argument("--gated", type=cli.flags, default=["--gate=tfidf"], help="of SPUL behind a gate")
    args = parser.parse_args()
    for name in ("rows", *args.routes):
        given = [word.split("=")[0] for word in getattr(args, name)]
        if flag := next((flag for flag in given if flag in OF_THE_RACE), None):
            parser.error(f"--{name} holds {flag}, which the race decides; leave it out")
    if "gated" in args.routes and not any(word.startswith("--gate") for word in args.gated):
        parser.error("--gated names no --gate; say which")
    return args


def main(args: Namespace) -> None:
    from utils.data.load import dataset_name
    from utils.evaluation import figures, tables
    from utils.models.chain import short_name
    from utils.storage import files

    folder = Path(args.output_path or f"results/race-{dataset_name(args.dataset)}-{short_name(args.model_checkpoints)}")
    with files.workplace(folder):  # held, so that no other race writes there
        runs.refuse_foreign(folder, WRITTEN, "race")
        race, records = run(Workplace(folder, args), args)
        table = tables.race_table(race)
        files.write_json(folder / "race.json", race)
        files.write_json(folder / "metrics.json", records)
        with files.new_file(folder / "table.md") as file:
            file.write_text(table + "\n", encoding="utf-8")
        figures.draw_race(race, path=folder / "race.png")
    print(table)
    print(f"wrote {folder}")


def run(work: "Workplace", args: Namespace) -> tuple[dict[str, Any], list[dict]]:
    """(what race.json says, the records of the evaluation at the end, the fine-tuned model's first).

    "routes": per route its "curve" [{"step", "seconds", train_forget and test_retain in [0, 1]}], which begins with the
    fine-tuned model at 0 s; "seconds_to_goal" or None; "ended" by `goal`, `budget` or `schedule`; "final", the two
    accuracies at the end on more rows, and whether they are at the goal, too ("confirmed").
    """
    start, before = work.evaluate("fine-tuned", args.model_checkpoints, args.curve_samples)
    full, record = work.evaluate("fine-tuned", args.model_checkpoints, args.max_eval_samples)
    kept = least_kept(start, args)
    note_if_coarse(rows_of(before)["test_retain"], args.retain_drop, "--curve_samples")
    note_if_coarse(rows_of(record)["test_retain"], args.retain_drop, "--max_eval_samples")
    routes, records = {}, [record]
    for name in args.routes:
        path = work.route(name, kept)
        final, record = work.evaluate(name, path, args.max_eval_samples)
        records.append({**record, "method": ROUTES[name]})
        routes[ROUTES[name]] = {
            **timed(work.log(path), start, args, work.task.compared),
            "final": final,
            "confirmed": reached(final, full, args),
            "checkpoint": str(path),
            "flags": getattr(args, name),
        }
    race = {
        "goal": {"train_forget": args.forget_accuracy, "test_retain": kept, "retain_drop": args.retain_drop},
        "score": work.task.compared,
        "budget_minutes": args.budget,
        "clock": "loading, gate, reference pass and steps; no imports, no evaluation, no saving",
        "rows": {"curve": rows_of(before), "final": rows_of(records[0])},
        "fine_tuned": {"curve": start, "final": full},
        "routes": routes,
    }
    return race, records


def timed(log: list[dict], start: dict[str, float], args: Namespace, score: str) -> dict[str, Any]:
    """What the log of a route tells of time, see `run`. start: the fine-tuned model's accuracies on the same rows.
    score: the name under which the log has accuracies."""
    points = [{"step": line["step"], "seconds": line["seconds"], **line[score]} for line in log if score in line]
    goal = next((point["seconds"] for point in points if reached(point, start, args)), None)
    steps = [line for line in log if "loss" in line]
    over = "budget" if steps[-1]["seconds"] >= 60 * args.budget else "schedule"
    return {
        "curve": [{"step": 0, "seconds": 0.0, **start}, *points],
        "seconds_to_goal": goal,
        "ended": over if goal is None else "goal",
        "first_step_done": steps[0]["seconds"],
        "seconds": steps[-1]["seconds"],
        "steps": len(steps),
    }


def reached(found: dict[str, float], tuned: dict[str, float], args: Namespace) -> bool:
    """Whether the accuracies `found` are at the goal, `tuned` being those of the fine-tuned model on the same rows."""
    return found["train_forget"] <= args.forget_accuracy and found["test_retain"] >= least_kept(tuned, args)


def least_kept(tuned: dict[str, float], args: Namespace) -> float:
    """The lowest accuracy on test_retain that is at the goal; a hair lower, since floats round."""
    return max(0.0, tuned["test_retain"] - args.retain_drop - 1e-9)


def note_if_coarse(n: int, drop: float, flag: str) -> None:
    """Say so where one of `n` rows of test_retain is more than the `drop` that is allowed: then none may be lost."""
    if n * drop < 1:
        lost = f"one of {n} rows of test_retain is {100 / n:.1f} points, more than --retain_drop ({100 * drop:g})"
        note_once(f"{lost}, so that not one may be lost; raise {flag}")


def rows_of(record: dict) -> dict[str, int]:
    """{split: number of rows} of an evaluation, for the two splits of the goal."""
    return {split: int(record["splits"][split]["n"]) for split in WATCHED}


class Workplace(runs.Workplace):
    """The runs of a race."""

    def __init__(self, folder: Path, args: Namespace) -> None:
        flags = [flag for name in ("rows", *ROUTES) for flag in getattr(args, name)]
        super().__init__(folder, args.dataset, args.model_checkpoints, flags)
        self.args = args

    def route(self, name: str, kept: float) -> str:
        """The folder of the finished run of a route. kept: the accuracy on test_retain that it may stop at."""
        args = self.args
        command = ["spul.py", f"--model_checkpoints={args.model_checkpoints}", *self._shared(), *getattr(args, name)]
        command += [f"--max_minutes={args.budget}", f"--stop_at_forget_accuracy={args.forget_accuracy}"]
        command += [f"--stop_at_retain_accuracy={kept}", f"--curve_samples={args.curve_samples}"]
        command += ["--curve_splits", *WATCHED, "--max_eval_samples=0"]
        if not any(word.startswith("--eval_steps") for word in command):
            command.append("--eval_steps=5")
        path = self._place("runs", name, command)
        reference = path.with_suffix(".safetensors")  # its own: the time to compute it counts
        path = self.trained(path, [*command, f"--logits_path={reference}"])
        reference.unlink(missing_ok=True)
        return path

    def evaluate(self, name: str, checkpoint: str, max_rows: int | None) -> tuple[dict[str, float], dict]:
        """(the score of the two splits of the goal, the record) of a checkpoint on at most so many rows a split."""
        command = ["inference_spul.py", f"--model_checkpoints={checkpoint}", *self._shared()]
        command += [f"--max_eval_samples={max_rows}"] if max_rows else []
        record = self.evaluated(self._place("evaluations", name, command), command)
        return {split: record["splits"][split][self.task.compared] for split in WATCHED}, record

    def log(self, path: str) -> list[dict]:
        """The lines of the log of a finished run."""
        return [json.loads(line) for line in (Path(path) / "training.jsonl").read_text(encoding="utf-8").splitlines()]

    def _shared(self) -> list[str]:
        return [f"--dataset={self.args.dataset}", *self.args.rows, f"--seed={self.args.seed}"]


if __name__ == "__main__":
    cli.run(parse_args, main)
