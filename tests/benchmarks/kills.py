"""Kills the scripts at random moments, starts them again, and looks at what is left.

python tests/benchmarks/kills.py --kills=100 --seed=0 --output_path=results/kills

Every script first runs undisturbed on a tiny model. Then it is killed (SIGKILL) after a random time and started again,
with --resume where it left a state: the weights must be the same bits, the user's files untouched, and nothing else
lie there. Writes kills.json. Needs fork: Linux or macOS.
"""

import collections
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, so that equal runs are equal bit by bit

import scripts  # noqa: E402
import tiny  # noqa: E402

from utils import cli  # noqa: E402
from utils.errors import UserError  # noqa: E402

TUNED, OUTPUT = "tuned", "out"
SHORT = ("--num_epochs=3", "--save_steps=2", f"--output_path={OUTPUT}", "--max_eval_samples=4")
RUNS = {
    "qlora": ("qlora", "--model_name=model", "--dataset=data", *scripts.QLORA, *SHORT),
    "spul": ("spul", f"--model_checkpoints={TUNED}", "--dataset=data", *scripts.SPUL, *SHORT),
    "full": ("baselines", f"--model_checkpoints={TUNED}", "--dataset=data", *scripts.BASELINES, *SHORT)
    + ("--unlearn_method=gradient_ascent_kl",),
    "lora": ("baselines", f"--model_checkpoints={TUNED}", "--dataset=data", *scripts.BASELINES, *SHORT)
    + ("--unlearn_method=npo", "--tune=lora"),
    "eco": ("baselines", f"--model_checkpoints={TUNED}", "--dataset=data", *scripts.ROWS, "--unlearn_method=eco")
    + ("--eco_strength=1", "--eco_max_fpr=0.1", "--max_eval_samples=4", f"--output_path={OUTPUT}"),
    "inference": ("inference_spul", f"--model_checkpoints={TUNED}", "--dataset=data", *scripts.ROWS)
    + ("--max_eval_samples=4", f"--output_path={OUTPUT}"),
}


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--kills", type=cli.positive_int, default=100, help="how many runs are killed")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the moments")
    parser.add_argument("--output_path", type=cli.path, default="results/kills", help="folder; must be new or empty")
    return parser.parse_args()


def main(args):
    folder = Path(args.output_path).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another --output_path")
    folder.mkdir(parents=True, exist_ok=True)
    inputs = prepare(folder / "inputs")
    expected, seconds = {}, {}
    for name in RUNS:
        start = time.perf_counter()
        code, said = in_child(RUNS[name], fresh(folder / name, inputs))
        if code:
            raise UserError(f"{name} fails undisturbed: {said[-300:]}")
        expected[name], seconds[name] = scripts.tree(folder / name), time.perf_counter() - start
    rng, found = random.Random(args.seed), []
    for i in range(args.kills):
        name = rng.choice(list(RUNS))
        after = rng.uniform(0, 1.05 * seconds[name])
        found.append(
            {"run": name, "after": round(after, 3)} | kill(name, after, folder / f"kill-{i}", inputs, expected[name])
        )
        print(json.dumps(found[-1]), flush=True)
    counts = collections.Counter(fault for entry in found for fault in entry["faults"] or ["right"])
    (folder / "kills.json").write_text(json.dumps({"counts": counts, "kills": found}, indent=2), encoding="utf-8")
    print(json.dumps(counts))


def prepare(folder: Path) -> Path:
    """A folder with what a user has: a model, data, a fine-tuned checkpoint, and files of their own."""
    folder.mkdir()
    tiny.save(folder / "model")
    tiny.save_splits(folder / "data")
    for name in ("out.old", "out.tmp", ".out.tmp"):
        (folder / name).mkdir()
        (folder / name / "mine.txt").write_text("mine", encoding="utf-8")
    tune = (*RUNS["qlora"], f"--output_path={TUNED}", "--max_eval_samples=0", "--num_epochs=1")
    code, said = in_child(tune, folder)
    assert code == 0, said
    return folder


def fresh(folder: Path, inputs: Path) -> Path:
    """A new `folder` whose files are those of `inputs`, as hard links: enough, since nothing of them may be written."""
    for path in sorted(inputs.rglob("*")):
        target = folder / path.relative_to(inputs)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.link(path, target)
    return folder


def kill(name: str, after: float, folder: Path, inputs: Path, expected: dict) -> dict:
    """Kill run `name` after so many seconds, start it again; {"left": what the kill left, "faults": [...]}."""
    fresh(folder, inputs)
    mine = scripts.tree(folder)
    child = start_child(RUNS[name], folder)
    child.join(after)
    ended = child.exitcode is not None
    if not ended:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    left = sorted(set(scripts.tree(folder)) - set(mine))
    faults = [f"touched {path}" for path, digest in mine.items() if scripts.tree(folder).get(path, 0) != digest]
    resumed = (folder / f"{OUTPUT}.training.safetensors").exists() or (folder / OUTPUT).exists()
    again = ["--resume"] if resumed and name in ("qlora", "spul", "full", "lora") else ["--overwrite"]
    code, said = in_child((*RUNS[name], *again), folder)
    if code:
        faults.append(f"started again: {said.strip()[-200:]}")
    now = scripts.tree(folder)
    faults += [f"left over {path}" for path in sorted(set(now) - set(expected)) if "__pycache__" not in path]
    faults += [f"missing {path}" for path in sorted(set(expected) - set(now))]
    exact = [path for path in expected if path.endswith(".safetensors")] + list(mine)
    faults += [f"differs {path}" for path in exact if now.get(path) != expected.get(path) and path in now]
    return {"ended": ended, "left": left, "faults": faults}


def start_child(command: tuple, folder: Path) -> multiprocessing.Process:
    """The script in a forked process, which has all libraries already: a run takes a second, not ten."""
    child = multiprocessing.get_context("fork").Process(target=_run, args=(command, folder, folder.parent / "said"))
    child.start()
    return child


def in_child(command: tuple, folder: Path) -> tuple[int, str]:
    """(exit code, what it said on stderr) of the script in a forked process."""
    child = start_child(command, folder)
    child.join()
    return child.exitcode, (folder.parent / "said").read_text(encoding="utf-8")


def _run(command, folder, said):
    result = scripts.call(folder, *command)
    said.write_text(result.stderr, encoding="utf-8")
    os._exit(result.code)


if __name__ == "__main__":
    for module in ("qlora", "spul", "baselines", "inference_spul"):
        __import__(module)
    from utils import compare, plan  # noqa: F401
    from utils.evaluation import figures, tables  # noqa: F401
    from utils.unlearning import eco_search  # noqa: F401

    cli.run(parse_args, main)
