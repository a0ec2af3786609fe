r"""Every method on the same rows, from the same checkpoint, with the same budget, in one table (`make compare`).

python -m utils.compare --model_name=data/models/smollm2 --dataset=snippets --seeds 42 \
    --rows="--max_length=128 --max_train_samples=512" --fine_tune="--lr=1e-3" --budget_rows=640 --grid 5e-5 2e-4 \
    --spul_grid 1.5e-3 5e-3

The rule, for each seed. A share of the train rows is put aside (--validation_share). A model is fine-tuned on the
others, and one on those of them that are to be kept: the target. SPUL and every baseline that trains then get the same
budget: so many learning rates each, and for each one run of --budget_rows rows in steps of --batch_size, whichever rows
the method takes. The run that scores best on the rows put aside goes into the table. ECO and the two baselines in the
context train no weights and have no learning rate; ECO's gate and strength come from train rows, its target from the
rows put aside. SPUL behind a gate (spul-gate) and refusal take ECO's gate, or without ECO one with default settings;
the rows that it lets through are not read. Test rows are read once, when all choices have been made. What is not
searched for, the weights of the losses say, is the authors' for the baselines, and for SPUL what --spul says.

How far each is from the target is said of forget rows and of retain rows apart: what does nothing is close to it on
retain rows, and on forget rows as far as the fine-tuned model, with which to compare.

Writes table.md, metrics.json and tradeoff.png to results/compare-<dataset>-<model>; finished runs are kept under runs/
there and recognised by their settings, so that an interrupted comparison continues where it stopped.
"""

import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils import cli, runs
from utils.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

WRITTEN = ("metrics.json", "table.md", "tradeoff.png")
OF_THE_RULE = (  # flags of the scripts that the rule above decides
    "--lr", "--train_batch_size", "--max_rows", "--max_steps", "--num_epochs", "--max_minutes",
    "--stop_at_forget_accuracy", "--stop_at_retain_accuracy", "--max_eval_samples", "--validation_share", "--final",
    "--seed", "--forget_size", "--output_path",
)  # fmt: skip
NAMES = {"spul": "SPUL", "spul-gate": "SPUL behind a gate"}  # of methods, in the table
TEXTS = (  # flags of this command that hold flags of the scripts
    "rows", "fine_tune", "training", "with_retain", "spul", "spul_gate", "baselines", "in_context", "prompting", "eco",
)  # fmt: skip


def parse_args() -> Namespace:
    from utils.unlearning.methods import IN_CONTEXT

    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model_name", type=cli.path, required=True, help="hub id, model folder or .gguf file")
    parser.add_argument("--dataset", type=cli.path, default="snippets", help="as for the scripts")
    parser.add_argument("--seeds", type=cli.seed, nargs="+", default=[42], help="one comparison for each")
    known = [*trained(), *IN_CONTEXT, "eco", "refusal"]
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="NAME", help="what to compare")
    parser.add_argument("--max_eval_samples", type=cli.positive_int, help="rows a split in the final evaluation")
    parser.add_argument("--output_path", type=cli.path, help="folder (default: results/compare-<dataset>-<model>)")
    group = parser.add_argument_group("the budget of SPUL and of every baseline that trains")
    group.add_argument("--budget_rows", type=cli.positive_int, default=1600, metavar="N", help="rows that a run reads")
    group.add_argument("--batch_size", type=cli.positive_int, default=16, help="of them in a step")
    group.add_argument(
        "--grid", type=cli.positive_float, nargs="+", default=[3e-5, 1e-4], help="learning rates of every baseline"
    )
    group.add_argument(
        "--spul_grid",
        type=cli.positive_float,
        nargs="+",
        default=[1.5e-3, 5e-3],
        help="learning rates of SPUL, as many",
    )
    group.add_argument(
        "--validation_share", type=cli.fraction, default=0.2, help="share of the train rows put aside to choose by"
    )
    group = parser.add_argument_group("further flags of the scripts, as one text each")
    group.add_argument("--rows", type=cli.flags, default=[], help="of all: which rows, how long")
    group.add_argument("--fine_tune", type=cli.flags, default=[], help="of qlora.py")
    group.add_argument("--training", type=cli.flags, default=[], help="of SPUL and every baseline that trains")
    group.add_argument("--with_retain", type=cli.flags, default=[], help="... of those with a retain loss, SPUL too")
    group.add_argument("--spul", type=cli.flags, default=[], help="... of SPUL alone")
    group.add_argument("--spul_gate", type=cli.flags, default=[], help="... of SPUL behind a gate alone")
    group.add_argument("--baselines", type=cli.flags, default=[], help="... of every baseline that trains")
    group.add_argument("--in_context", type=cli.flags, default=[], help="of prompting and icul, and their evaluation")
    group.add_argument("--prompting", type=cli.flags, default=[], help="of prompting alone")
    group.add_argument("--eco", type=cli.flags, default=[], help="of eco")
    args = parser.parse_args()
    refuse_unequal(parser, args)
    return args


def trained() -> list[str]:
    """The methods that train, in the order of the table."""
    from utils.unlearning.methods import METHODS

    return ["spul", "spul-gate", *METHODS]


def refuse_unequal(parser: cli.ArgumentParser, args: Namespace) -> None:
    """Exit 2 on what would give one method another budget than the others."""
    if len(args.grid) != len(args.spul_grid):
        parser.error(
            f"--grid has {len(args.grid)} learning rates and --spul_grid {len(args.spul_grid)}; give as many to both"
        )
    if args.budget_rows < args.batch_size:
        parser.error(f"--budget_rows={args.budget_rows} is less than one step; use at least --batch_size")
    for name in (name for name in TEXTS if name != "fine_tune"):
        given = [word.split("=")[0] for word in getattr(args, name)]
        if flag := next((flag for flag in given if flag in OF_THE_RULE), None):
            parser.error(f"--{name} holds {flag}, which is the same for every method; leave it out")


def main(args: Namespace) -> None:
    from utils.data.load import dataset_name
    from utils.evaluation import tables
    from utils.models.chain import short_name
    from utils.storage import files

    name = f"compare-{dataset_name(args.dataset)}-{short_name(args.model_name)}"
    folder = Path(args.output_path or f"results/{name}")
    with files.workplace(folder):  # held, so that no other comparison writes there
        runs.refuse_foreign(folder, WRITTEN, "comparison")
        work = Workplace(folder, args)
        records = [record for seed in args.seeds for record in compare(work, args, seed)]
        write_comparison(folder, records)
    print(tables.comparison(records))
    print(f"wrote {folder}")


def compare(work: "Workplace", args: Namespace, seed: int) -> list[dict]:
    """One record per method for this seed, distances to the retain model included."""
    from utils.evaluation.overall import with_overall
    from utils.evaluation.record import with_distances, with_mcnemar

    own = [f"--seed={seed}", "--max_eval_samples=0"]
    tuned = work.run("qlora", f"fine-tuned-{seed}", [], own)
    retain = work.run("qlora", f"retain-model-{seed}", [], [*own, "--exclude_forget"])
    checkpoints, searches = {"base": args.model_name, "fine-tuned": tuned, "retain model": retain}, {}
    checkpoints |= dict.fromkeys(args.methods)  # the order of the table
    ordered = sorted(args.methods, key=lambda method: (method in trained(), method != "eco"))  # what takes long is last
    gate = []
    for method in ordered:
        if method in ("refusal", "spul-gate") and not gate:
            alone = ["--unlearn_method=gate", *own]
            made = (
                checkpoints["eco"] if "eco" in args.methods else work.run("baselines", f"gate-{seed}", [tuned], alone)
            )
            gate = [f"--gate={made}"]
        if method in trained():
            checkpoints[method], searches[method] = search(work, args, method, tuned, seed, gate)
        else:
            flags = [f"--unlearn_method={method}", *own, *(gate if method == "refusal" else [])]
            checkpoints[method] = work.run("baselines", f"{method}-{seed}", [tuned], flags)
    evaluated = {method: work.evaluate(method, path, seed) for method, path in checkpoints.items()}
    if {"spul", "eco"} <= set(checkpoints):
        router = [f"--router={checkpoints['eco']}"]
        evaluated["SPUL + router"] = work.evaluate("SPUL + router", checkpoints["spul"], seed, router)
    records = [
        {**record, "method": NAMES.get(method, method), "seed": seed}
        | ({"search": searches[method]} if method in searches else {})
        for method, (record, _) in evaluated.items()
    ]
    predictions = [rows for _, rows in evaluated.values()]
    records = with_mcnemar(with_distances(records, predictions, work.task), predictions)
    return with_overall(records, predictions, work.task)


def search(
    work: "Workplace", args: Namespace, method: str, tuned: str, seed: int, gate: Sequence[str]
) -> tuple[str, dict]:
    """(the checkpoint, {"grid": {lr: score}, "lr": the best, "rows": read by each run}) of a method that trains.

    score = headline of the task (accuracy) on retain rows put aside - its mean on the forget rows trained on and put
    aside; None where the loss was not finite. Of the checkpoints only that of the best run is kept. gate: the flag that
    names it.
    """
    rates, gate = (args.spul_grid if method in NAMES else args.grid), (gate if method == "spul-gate" else [])
    runs = {lr: work.budgeted(method, tuned, seed, lr, gate) for lr in rates}
    scores = {lr: _score(work.scores(*run), work.task.headline) for lr, run in runs.items()}
    finite = {lr: score for lr, score in scores.items() if score is not None}
    if not finite:
        raise UserError(f"{method} failed at every learning rate, as said above; try smaller ones")
    best = max(finite, key=lambda lr: (finite[lr], -lr))
    for lr in set(runs) - {best}:
        shutil.rmtree(runs[lr][0], ignore_errors=True)
    return work.trained(*runs[best]), {"grid": scores, "lr": best, "rows": args.budget_rows}


def _score(splits: dict | None, headline: str) -> float | None:
    if splits is None:
        return None
    accuracy = {split: splits[split][headline] for split in ("test_retain", "train_forget", "test_forget")}
    return round(accuracy["test_retain"] - (accuracy["train_forget"] + accuracy["test_forget"]) / 2, 4)


class Workplace(runs.Workplace):
    """The runs of a comparison."""

    def __init__(self, folder: Path, args: Namespace) -> None:
        flags = [flag for text in TEXTS for flag in getattr(args, text)]
        super().__init__(folder, args.dataset, args.model_name, flags)
        self.args = args

    def run(self, script: str, name: str, parents: list[str], flags: list[str]) -> str:
        """The folder of a finished run of `script`, trained first if it is not there yet."""
        settings = self.args.fine_tune if script == "qlora" else self._untrained(flags)
        command = [*self._command(script, parents), *settings, *flags]
        return self.trained(self._place("runs", name, command), command)

    def budgeted(
        self, method: str, tuned: str, seed: int, lr: float, gate: Sequence[str] = ()
    ) -> tuple[Path, list[str]]:
        """(folder, command) of one run of a method that trains, by the rule of this module."""
        from utils.unlearning.methods import METHODS

        args, script = self.args, "spul" if method in NAMES else "baselines"
        with_retain = method == "spul" or (method in METHODS and METHODS[method].retain_loss != "none")
        command = [*self._command(script, [tuned]), *args.training, *(args.with_retain if with_retain else []), *gate]
        own = {"spul": args.spul, "spul-gate": args.spul_gate}
        command += own.get(method, [f"--unlearn_method={method}", *args.baselines])
        command += [f"--seed={seed}", f"--lr={lr}", f"--train_batch_size={args.batch_size}", "--max_eval_samples=100"]
        command += [f"--max_rows={args.budget_rows}", f"--num_epochs={args.budget_rows}"]  # an epoch has a row or more
        return self._place("runs", f"{method}-{seed}", command), command

    def scores(self, path: Path, command: list[str]) -> dict | None:
        """Scores {split: ...} of a budgeted run, or None if its loss was not finite; they outlive its folder."""
        from utils.storage import schemas
        from utils.storage.files import write_json
        from utils.storage.formats import SearchScores

        file = path.with_suffix(".json")
        if not file.exists():
            done = (path / "manifest.json").exists()
            finite = done or self._call([*command, *runs.output_flags(path)], or_not_finite=True)
            write_json(file, runs.last_record(path)["splits"] if finite else None)
        return schemas.read(file, SearchScores)

    def evaluate(self, name: str, checkpoint: str, seed: int, flags: Sequence[str] = ()) -> "tuple[dict, pd.DataFrame]":
        """(record, predictions) of one checkpoint on the four splits; the predictions as a DataFrame."""
        import pandas as pd

        from utils.unlearning.methods import IN_CONTEXT

        command = [*self._command("inference_spul", [checkpoint]), "--final", f"--seed={seed}", *flags]
        if name in IN_CONTEXT:
            command += self.args.in_context
        if self.args.max_eval_samples:
            command.append(f"--max_eval_samples={self.args.max_eval_samples}")
        path = self._place("evaluations", f"{name.replace(' + ', '-').replace(' ', '-')}-{seed}", command)
        record = self.evaluated(path, command)
        predictions = pd.read_json(path / "predictions.jsonl", lines=True)
        predictions = predictions[predictions["method"] == record["method"]].reset_index(drop=True)
        return record, predictions

    def _command(self, script: str, parents: list[str]) -> list[str]:
        """The script with its model and the rows of the comparison, on which every command works."""
        model = f"--model_name={self.args.model_name}" if script == "qlora" else f"--model_checkpoints={parents[0]}"
        rows = f"--dataset={self.args.dataset}", *self.args.rows, f"--validation_share={self.args.validation_share}"
        return [f"{script}.py", model, *rows]

    def _untrained(self, flags: list[str]) -> list[str]:
        """The flags that the user gave for a baseline that trains no weights."""
        method = flags[0].split("=")[1]
        if method == "eco":
            return self.args.eco
        if method in ("gate", "refusal"):
            return []
        return [*self.args.in_context, *(self.args.prompting if method == "prompting" else [])]


def write_comparison(folder: Path, records: list[dict]) -> None:
    """table.md, metrics.json and tradeoff.png: one record per method and seed."""
    from utils.evaluation.figures import draw_tradeoff
    from utils.evaluation.tables import comparison
    from utils.storage.files import new_file, write_json

    write_json(Path(folder) / "metrics.json", records)
    with new_file(Path(folder) / "table.md") as file:
        file.write_text(comparison(records) + "\n", encoding="utf-8")
    draw_tradeoff(records, path=Path(folder) / "tradeoff.png")


if __name__ == "__main__":
    cli.run(parse_args, main)
