r"""Time, memory and floor of this project against the plain path (PEFT and Trainer as published), both in one run.

python tests/benchmarks/bench.py --model=data/models/smollm2 --dataset=snippets

Every path runs in a process of its own; a round gives each of them the same batch in turn, and a ratio is the median
over rounds. Writes bench.json and bench.png to --output_path.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import cli  # noqa: E402  (found on the path set above)

PARTS = ("training", "fine_tuning", "baselines", "adapters", "prompts", "lengths", "rows", "reference", "inference")

# What is trained: the script and its flags, and how the plain path does the same: weighted losses (cross-entropy on
# forget and retain rows, KL on retain rows), and whether forget rows carry an unlearning word instead of their label.
SPUL = {
    "script": "spul",
    "arguments": [],
    "losses": {"forget": 1.0, "retain": 0.5, "kl": 0.5},
    "flipped": True,
}


# The published baselines by the paper's names; the plain path of every other one is that of its authors' code: its loss
# on logits of every position, and a second, frozen model where the loss compares with one.
PUBLISHED = {
    "gradient_ascent": ("GA", {"forget": -1.0}),
    "random_label": ("RL", {"forget": 1.0}),
    "gradient_ascent_kl": ("GA+KL", {"forget": -1.0, "kl": 1.0}),
    "gradient_ascent_descent": ("GA+GD", {"forget": -1.0, "retain": 1.0}),
}


def baselines():
    """Every baseline that trains, {name: training}."""
    from utils.unlearning.methods import METHODS

    found = {}
    for method in METHODS:
        name, losses = PUBLISHED.get(method, (method, _rows_of(method)))
        found[name] = _baseline(method, losses) | {"published": method in PUBLISHED}
    return found


def fine_tuning():
    """qlora.py, {name: training}: with the base as it is, and in 4 bits."""
    both = {"losses": {"forget": 1.0, "retain": 1.0}, "flipped": False}
    kinds = {"LoRA": "none", "QLoRA": "nf4"}
    return {k: {"script": "qlora", "arguments": [f"--quantization={q}"], **both} for k, q in kinds.items()}


def adapters():
    """What trains a LoRA adapter, {name: training}: fine-tuning, then every baseline, half of a batch to forget."""
    from utils.unlearning.methods import METHODS

    found = {"LoRA fine-tuning": fine_tuning()["LoRA"]}
    for method in METHODS:
        found[method] = _baseline(method, _rows_of(method))
        found[method]["arguments"].append("--tune=lora")
    return {name: {"flipped": False, "forget_share": 0.5, **training} for name, training in found.items()}


def _baseline(method, losses):
    arguments = [f"--unlearn_method={method}"]
    return {"script": "baselines", "arguments": arguments, "losses": losses, "flipped": method == "random_label"}


def _rows_of(method):
    """The kinds of rows that a baseline reads, as the keys of `losses` say it."""
    from utils.unlearning.methods import METHODS

    return {"forget": 1.0} if METHODS[method].retain_loss == "none" else {"forget": 1.0, "retain": 1.0}


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model", type=cli.path, default="data/models/smollm2", help="a plain model: folder or hub id")
    parser.add_argument(
        "--dataset", type=cli.path, default="snippets", help="snippets, sst2, yelp, or a folder with the four splits"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--batch_size", type=cli.positive_int, default=32, help="rows per step")
    parser.add_argument("--prompt_length", type=cli.positive_int, default=30, help="p of every part but `prompts`")
    parser.add_argument("--prompt_lengths", type=cli.positive_int, nargs="+", default=[10, 30, 50], help="of `prompts`")
    parser.add_argument(
        "--text_lengths", type=cli.positive_int, nargs="+", default=[32, 64, 128, 256, 512, 1024],
        help="tokens a row in `lengths`, template and label included",
    )  # fmt: skip
    parser.add_argument(
        "--length_tokens", type=cli.positive_int, default=2048,
        help="text tokens a batch in `lengths`: fewer rows, the longer they are, so that the plain path fits in memory",
    )  # fmt: skip
    parser.add_argument("--eval_rows", type=cli.positive_int, default=128, help="rows of `reference` and `inference`")
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="timed passes per path, after a small one")
    parser.add_argument("--sweep_rounds", type=cli.positive_int, default=2, help="the same in the parts that sweep")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="where to compute")
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32", "float16"], default="auto", help="of this project's path"
    )
    parser.add_argument("--seed", type=cli.seed, default=42, help="of rows, words and initialisation")
    parser.add_argument(
        "--output_path", type=cli.path, default="results/bench", help="folder for bench.json and bench.png"
    )
    return parser.parse_args()


def computes_in_bfloat16(device):
    """Whether --dtype=auto is bfloat16 there; a processor that only emulates it takes minutes for a step."""
    from utils.models.base import pick_device, pick_dtype

    return str(pick_dtype("auto", pick_device(device))) == "torch.bfloat16"


def cells(args):
    """Every Cell of the run in the order of PARTS; each begins with a pass over two rows that is not counted."""
    from rounds import Cell, Variant

    p, sweep = args.prompt_length, args.sweep_rounds
    plain, ours = Variant("plain", "float32", p), Variant("ours", args.dtype, p)
    batch = [args.batch_size]
    plain_ones = [plain, Variant("plain", "bfloat16", p)] if computes_in_bfloat16(args.device) else [plain]
    yield Cell("training", f"SPUL, p = {p}", "training", [*plain_ones, ours], batch * args.rounds, SPUL)
    for name, training in fine_tuning().items():
        variants = [Variant("plain", args.dtype, 0), Variant("ours", args.dtype, 0)]
        yield Cell("fine_tuning", name, "training", variants, batch * args.rounds, training)
    for name, training in baselines().items():
        variants = [Variant("plain", "float32", 0), Variant("ours", args.dtype, 0)]
        yield Cell("baselines", name, "training", variants, batch * sweep, training)
    for name, training in adapters().items():
        yield Cell("adapters", name, "training", [Variant("ours", args.dtype, 0)], batch * sweep, training)
    for n in args.prompt_lengths:
        variants = [Variant("plain", "float32", n), Variant("ours", args.dtype, n)]
        yield Cell("prompts", f"SPUL, p = {n}", "training", variants, batch * sweep, SPUL)
        yield Cell("prompts", f"inference, p = {n}", "inference", variants, batch * sweep, SPUL)
    for length in args.text_lengths:
        rows = min(args.batch_size, max(1, args.length_tokens // length))
        for task, name in (("training", "SPUL"), ("reference", "reference"), ("inference", "inference")):
            yield Cell("lengths", f"{name}, {length} tokens", task, [plain, ours], [rows] * sweep, SPUL, length)
    by_rows = [max(1, args.batch_size * quarter // 4) for quarter in (1, 2, 3, 4)]
    yield Cell("rows", "SPUL, 64 tokens", "training", [ours], by_rows * sweep, SPUL, length=64)
    passes = [args.eval_rows] * args.rounds
    yield Cell("reference", "reference pass", "reference", [*plain_ones, ours], passes, SPUL)
    without = Variant("ours", args.dtype, 0)
    yield Cell("inference", f"inference, p = {p}", "inference", [*plain_ones, without, ours], passes, SPUL)


def main(args):
    import rounds
    import summary

    from utils.storage import files

    folder, start = Path(args.output_path), time.perf_counter()
    files.try_to_write(folder / "bench.json")
    bench = rounds.Bench(args)
    todo, records = [cell for cell in cells(args) if cell.part in args.parts], []
    for cell in todo:
        bench.check_length(cell)
    with tempfile.TemporaryDirectory() as work:
        for i, cell in enumerate(todo):
            records += bench.measure(cell, Path(work) / str(i))
            print(summary.rows(records, cell, header=not i), flush=True)
    result = {
        "machine": bench.machine,
        "settings": vars(args),
        "seconds": time.perf_counter() - start,
        "records": records,
    }
    result |= {"ratios": summary.ratios(records), "linear_in_rows": summary.linear_fit(records)}
    files.write_json(folder / "bench.json", json.loads(json.dumps(result, default=str)))
    summary.draw(result, path=folder / "bench.png")
    print("\n".join(["", *summary.sentences(result)]))
    print(f"wrote {folder}/bench.json and bench.png")


if __name__ == "__main__":
    cli.run(parse_args, main)
