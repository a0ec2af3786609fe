r"""Every method on the same rows, from the same checkpoint, in one table (`make compare`).

python -m utils.compare --model_name=data/models/smollm2 --dataset=snippets --seeds 42 \
    --rows="--max_length=128 --max_train_samples=512" --fine_tune="--lr=1e-3" --spul="--lr=1.5e-3"

For each seed: fine-tunes once, fine-tunes once more without the forget rows (the target), trains SPUL and every rival
with the project's own scripts, and evaluates all of them. Each rival's learning rate is searched on rows cut from
train. Writes table.md, metrics.json and tradeoff.png to results/compare-<dataset>-<model>; finished runs are kept under
runs/ there and recognised by their settings, so that an interrupted comparison continues where it stopped.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from utils import cli
from utils.methods import IN_CONTEXT, METHODS

ROOT = Path(__file__).resolve().parents[1]
CUT = 0.2  # share of the train rows that a search puts aside to score what it has trained on the others


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model_name", type=cli.path, required=True, help="hub id, model folder or .gguf file")
    parser.add_argument("--dataset", type=cli.path, default="snippets", help="as for the scripts")
    parser.add_argument("--seeds", type=cli.seed, nargs="+", default=[42], help="one comparison for each")
    known = ["spul", *METHODS, *IN_CONTEXT, "eco"]
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="NAME", help="what to compare")
    parser.add_argument("--rows", type=shlex.split, default=[], help="flags of every script: which rows, how long")
    parser.add_argument("--fine_tune", type=shlex.split, default=[], help="further flags of qlora.py")
    parser.add_argument("--spul", type=shlex.split, default=[], help="further flags of spul.py")
    parser.add_argument("--rivals", type=shlex.split, default=[], help="further flags of baselines.py")
    parser.add_argument("--without_retain", type=shlex.split, default=[], help="... for methods without a retain loss")
    parser.add_argument("--with_retain", type=shlex.split, default=[], help="... for methods with one")
    parser.add_argument(
        "--in_context", type=shlex.split, default=[], help="... for prompting and icul, and in evaluation"
    )
    parser.add_argument("--eco", type=shlex.split, default=[], help="... for eco")
    parser.add_argument("--prompting", type=shlex.split, default=[], help="... for prompting alone")
    parser.add_argument("--grid", type=cli.positive_float, nargs="+", default=[1e-5, 3e-5, 1e-4], help="learning rates")
    parser.add_argument("--max_eval_samples", type=cli.positive_int, help="rows a split in the final evaluation")
    parser.add_argument("--output_path", type=cli.path, help="folder (default: results/compare-<dataset>-<model>)")
    return parser.parse_args()


def main(args):
    from utils import data, models, report

    name = f"compare-{data.dataset_name(args.dataset)}-{models.short_name(args.model_name)}"
    work = Workplace(Path(args.output_path or f"results/{name}"), args)
    records = [record for seed in args.seeds for record in compare(work, args, seed)]
    report.write_comparison(work.folder, records)
    print((work.folder / "table.md").read_text(encoding="utf-8"))
    print(f"wrote {work.folder}")


def compare(work, args, seed):
    """One record per method for this seed, distances to the retrained model included."""
    from utils import metrics

    tuned = work.run("qlora", f"fine-tuned-{seed}", [], [f"--seed={seed}"])
    retrained = work.run("qlora", f"retrained-{seed}", [], [f"--seed={seed}", "--exclude_forget"])
    checkpoints, searches = {"base": args.model_name, "fine-tuned": tuned, "retrained": retrained}, {}
    for method in args.methods:
        if method == "spul":
            checkpoints["SPUL"] = work.run("spul", f"spul-{seed}", [tuned], [f"--seed={seed}"])
            continue
        flags = [f"--unlearn_method={method}", f"--seed={seed}"]
        if method in METHODS:
            searches[method] = search(work, args, tuned, flags)
            flags.append(f"--lr={searches[method]['lr']}")
        checkpoints[method] = work.run("baselines", f"{method}-{seed}", [tuned], flags)
    evaluated = {name: work.evaluate(name, path, seed) for name, path in checkpoints.items()}
    if {"SPUL", "eco"} <= set(checkpoints):
        router = [f"--router={checkpoints['eco']}"]
        evaluated["SPUL + router"] = work.evaluate("SPUL + router", checkpoints["SPUL"], seed, router)
    records = [
        {**record, "seed": seed, **({"search": searches[name]} if name in searches else {})}
        for name, (record, _) in evaluated.items()
    ]
    return metrics.with_distances(records, [predictions for _, predictions in evaluated.values()])


def search(work, args, tuned, flags):
    """{"grid": {lr: score}, "lr": the best}: trained on a part of the train rows, scored on train rows alone.

    score = accuracy on retain rows put aside - mean accuracy on the forget rows trained on and put aside; None where
    the loss was not finite.
    """
    scores = {}
    for lr in args.grid:
        splits = work.try_out([*flags, f"--lr={lr}"], tuned)
        if splits is not None:
            accuracy = {split: splits[split]["accuracy"] for split in ("test_retain", "train_forget", "test_forget")}
            forget = (accuracy["train_forget"] + accuracy["test_forget"]) / 2
            scores[lr] = round(accuracy["test_retain"] - forget, 4)
        else:
            scores[lr] = None
    finite = {lr: score for lr, score in scores.items() if score is not None}
    if not finite:
        raise cli.UserError(f"{flags[0]} failed at every learning rate of --grid, as said above; try smaller ones")
    return {"grid": scores, "lr": max(finite, key=lambda lr: (finite[lr], -lr))}


class Workplace:
    """Runs the scripts, each once: a run is recognised by the hash of its command, its data and its parents."""

    def __init__(self, folder, args):
        from utils import data

        self.folder, self.args = folder, args
        frames = data.load_splits(args.dataset)
        self._data = [data.fingerprint(frames), *_marks(frames), *_contents(args)]
        self._parts = _cut(frames, args.rows)
        self._digest = hashlib.sha256(json.dumps(data.fingerprint(self._parts)).encode()).hexdigest()[:8]

    def run(self, script, name, parents, flags):
        """The folder of a finished run of `script`, trained first if it is not there yet."""
        command = [*self._command(script, parents), f"--dataset={self.args.dataset}", *self.args.rows]
        command += [*self._settings(script, flags), "--max_eval_samples=0", *flags]
        path = self._place("runs", name, command)
        if not (path / "manifest.json").exists():
            self._call([*command, f"--output_path={path}", *_resume(path)])
        return str(path)

    def try_out(self, flags, tuned):
        """Scores {split: ...} of one run of a search, or None if its loss was not finite. Only the scores are kept."""
        from utils.checkpoints import write_json

        _, rows = _selection(self.args.rows)  # the search's folder holds the selected ones
        command = [*self._command("baselines", [tuned]), f"--dataset={self._search_data()}", *rows]
        command += [*self._settings("baselines", flags), "--max_eval_samples=100", *flags]
        path = self._place("search", flags[0].split("=")[1], command)
        scores = path.with_suffix(".json")
        if not scores.exists():
            finite = self._call([*command, f"--output_path={path}", *_resume(path)], or_not_finite=True)
            splits = json.loads((path / "metrics.json").read_text(encoding="utf-8"))[-1]["splits"] if finite else None
            write_json(scores, splits)
            shutil.rmtree(path, ignore_errors=True)
        return json.loads(scores.read_text(encoding="utf-8"))

    def evaluate(self, name, checkpoint, seed, flags=()):
        """(record, predictions) of one checkpoint on the four splits; the predictions as a DataFrame."""
        import pandas as pd

        command = ["inference_spul.py", "--model_checkpoints", checkpoint, f"--dataset={self.args.dataset}"]
        command += [*self.args.rows, f"--seed={seed}", *flags]
        if name in IN_CONTEXT:
            command += self.args.in_context
        if self.args.max_eval_samples:
            command.append(f"--max_eval_samples={self.args.max_eval_samples}")
        path = self._place("evaluations", f"{name.replace(' + ', '-')}-{seed}", command)
        if not (path / "metrics.json").exists():
            self._call([*command, f"--output_path={path}", "--overwrite"])
        record = json.loads((path / "metrics.json").read_text(encoding="utf-8"))[-1]
        predictions = pd.read_json(path / "predictions.jsonl", lines=True)
        predictions = predictions[predictions["method"] == record["method"]].reset_index(drop=True)
        return {**record, "method": name}, predictions

    def _command(self, script, parents):
        model = f"--model_name={self.args.model_name}" if script == "qlora" else f"--model_checkpoints={parents[0]}"
        return [f"{script}.py", model]

    def _settings(self, script, flags):
        """The flags that the user gave for this script, and in baselines.py for the kind of method."""
        if script != "baselines":
            return {"qlora": self.args.fine_tune, "spul": self.args.spul}[script]
        method = flags[0].split("=")[1]
        if method == "eco":
            return self.args.eco
        if method in IN_CONTEXT:
            return [*self.args.in_context, *(self.args.prompting if method == "prompting" else [])]
        kind = self.args.without_retain if METHODS[method].retain_loss == "none" else self.args.with_retain
        return [*self.args.rivals, *kind]

    def _place(self, room, name, command):
        digest = hashlib.sha256(json.dumps([command, self._data]).encode()).hexdigest()[:8]
        return self.folder / room / f"{name}-{digest}"

    def _search_data(self):
        from utils.splits import write_splits

        folder = self.folder / f"search-data-{self._digest}"
        if not (folder / "test_forget.csv").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_splits(self._parts, folder)
        return folder

    def _call(self, command, or_not_finite=False):
        """Run a script; True if it ended well. A loss that was not finite gives False if that is allowed, and anything
        else raises UserError."""
        print("$ python", shlex.join(command), flush=True)
        code, said = self._run(command)
        if code == 2 and or_not_finite and "not finite" in said.strip().split("\n")[-1]:
            return False
        if code:
            raise cli.UserError(f"{command[0]} ended with exit code {code}; finished runs are kept, start again")
        return True

    def _run(self, command):
        """(exit code, the end of what it said on stderr) of a script in a process of its own."""
        started = [sys.executable, str(ROOT / command[0]), *command[1:]]
        with subprocess.Popen(started, stderr=subprocess.PIPE) as process:
            said = b""
            while part := process.stderr.read1(4096):
                sys.stderr.buffer.write(part)
                sys.stderr.flush()
                said = (said + part)[-4096:]
        return process.returncode, said.decode(errors="replace")


def _marks(frames):
    """The names_other columns, which scores depend on and the fingerprint of texts and labels leaves out."""
    return [frame["names_other"].tolist() for frame in frames.values() if "names_other" in frame]


def _contents(args):
    """Hashes of the base model and of the files that flags name: a path alone does not say what lies there."""
    from utils import checkpoints, data

    flags = [*args.rows, *args.fine_tune, *args.spul, *args.rivals, *args.in_context, *args.prompting, *args.eco]
    paths = [args.model_name, data.SNIPPETS_FOLDER / "forget_names.txt", *(flag.split("=", 1)[-1] for flag in flags)]
    found = [Path(path) for path in paths if os.path.exists(path)]  # a text longer than a file name does not
    return [checkpoints.weights_sha256(p) if p.is_dir() else checkpoints.file_sha256(p) for p in found]


def _cut(frames, rows):
    """Four splits made of the selected train rows alone: the share CUT of them, by label, stands in for test."""
    import pandas as pd

    from utils import data
    from utils.splits import split_rows

    selection, _ = _selection(rows)
    frames = data.select_rows(frames, 1.0, selection.max_train_samples, selection.forget_share, selection.forget_only)
    kept = [frames[split].assign(forget=split == "train_forget") for split in data.TRAIN_SPLITS]
    parts = split_rows(pd.concat(kept, ignore_index=True), CUT, data.SUBSET_SEED)
    empty = [split for split, frame in parts.items() if not len(frame)]
    if empty:
        raise cli.UserError("there are too few train rows to put some aside for the search; use more rows")
    return parts


def _selection(rows):
    """(the flags of `rows` that select train rows, the other flags)."""
    known = cli.ArgumentParser("")
    known.add_argument("--max_train_samples", type=cli.positive_int)
    known.add_argument("--forget_share", type=cli.fraction)
    known.add_argument("--forget_only")
    return known.parse_known_args(rows)


def _resume(path):
    """How to start a run that may have been interrupted: go on from its state, else replace what is left of it."""
    state = Path(f"{path}.training.safetensors")
    return ["--overwrite", *(["--resume"] if state.exists() else [])]


if __name__ == "__main__":
    cli.run(parse_args, main)
