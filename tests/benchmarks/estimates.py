r"""Compare what `--dry_run probe` says of a run with what the run then takes: peak memory and time, on two model sizes.

python tests/benchmarks/estimates.py --model=data/models/smollm2 --dataset=snippets

The second model is the first with a quarter of its layers, random weights and the same tokenizer. Each trains a prompt
on rows as they come, and on fewer rows that are longer. Writes estimates.json to --output_path.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import cli  # noqa: E402  (found on the path set above)

UNITS = {"s": 1, "min": 60, "h": 3600, "MiB": 2**-10, "GiB": 1}


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model", default="data/models/smollm2", help="a plain model: folder or hub id")
    parser.add_argument("--dataset", default="snippets", help="snippets, sst2, yelp, or a folder with the four splits")
    parser.add_argument("--tokens", type=cli.positive_int, default=256, help="at least so many in a long row")
    parser.add_argument("--steps", type=cli.positive_int, default=10, help="of each run")
    parser.add_argument("--train_batch_size", type=cli.positive_int, default=32, help="rows as they come in a step")
    parser.add_argument("--long_batch_size", type=cli.positive_int, default=4, help="long rows in a step")
    parser.add_argument("--seed", type=cli.seed, default=42, help="of rows and weights")
    parser.add_argument("--output_path", default="results/estimates", help="folder for estimates.json")
    return parser.parse_args()


def main(args):
    import rounds

    from utils import checkpoints, data, models

    chain = models.resolve_chain(args.model)
    if len(chain) > 1:
        raise cli.UserError(f"{args.model} is a checkpoint of this project; --model takes a plain model")
    frames, records = data.load_splits(args.dataset), []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        kept = {part: cut_down(chain[0].path, work / str(part), part, args.seed) for part in (1, 4)}
        for length, batch in ((None, args.train_batch_size), (args.tokens, args.long_batch_size)):
            sizes, losses = [batch] * args.steps, {"losses": {"retain": 1}}
            rows = work / f"rows-{length}"
            rounds.write_rows(frames, rounds.Cell("", "", "training", [], sizes, losses, length), rows, args.seed)
            for part, weights in kept.items():
                flags = [f"--model_checkpoints={work / str(part)}", f"--dataset={rows}", f"--train_batch_size={batch}"]
                flags += ["--max_length=2048", "--num_epochs=1", f"--max_steps={args.steps}", f"--seed={args.seed}"]
                flags += [f"--output_path={work / 'out'}", "--overwrite"]
                records.append({"weights": weights, "tokens": length, "rows": batch} | compare(flags, work))
                print(sentence(records[-1]), flush=True)
    folder = Path(args.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(folder / "estimates.json", {"settings": vars(args), "records": records})
    print(f"wrote {folder}/estimates.json")


def cut_down(source, folder, part, seed):
    """Write a float32 copy of the model; for part > 1 one of random weights with `1 / part` of its layers. Returns how
    many weights it has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    if part == 1:
        model = AutoModelForCausalLM.from_pretrained(source)
    else:
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(source)
        config.num_hidden_layers = max(1, config.num_hidden_layers // part)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def compare(flags, work):
    """Estimated and measured peak (GiB) and time (s, libraries and loading left out) of one run of spul.py."""
    reference = work / "reference.safetensors"
    reference.unlink(missing_ok=True)  # one that is there already would cost no time
    flags = [*flags, f"--logits_path={reference}"]
    started, probed, trained = (run(*flags, *more) for more in (["--dry_run"], ["--dry_run=probe"], []))
    memory = re.search(r"^memory +about ([\d.]+) (\w+)", started["printed"], re.M)
    if not memory:
        raise cli.UserError("the peak of this architecture cannot be estimated; choose another --model")
    spoken = re.search(r"^time +about (.+?) after loading", probed["printed"], re.M)[1]
    estimated = sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+) (\w+)", spoken))
    written = json.loads((work / "out" / "metrics.json").read_text())
    return {
        "estimated_peak_gib": float(memory[1]) * UNITS[memory[2]],
        "measured_peak_gib": max(record["peak_memory_bytes"] for record in written) / 2**30,
        "estimated_seconds": estimated,
        "measured_seconds": trained["seconds"] - started["seconds"],
    }


def run(*flags):
    """One run of spul.py: {"seconds", "printed"}. Raises UserError with its last words if it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "spul.py", *flags], capture_output=True, text=True)
    if done.returncode:
        raise cli.UserError(f"spul.py did not run ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
    return {"seconds": time.perf_counter() - start, "printed": done.stdout}


def sentence(record):
    work = f"{record['weights'] / 1e6:.0f} M weights, {record['rows']} rows"
    work += f" of {record['tokens']} tokens or more" if record["tokens"] else ""
    peak, seconds = (
        f"{record[f'estimated_{name}']:.{digits}f} {unit}, measured {record[f'measured_{name}']:.{digits}f} "
        f"({record[f'estimated_{name}'] / record[f'measured_{name}'] - 1:+.0%})"
        for name, digits, unit in (("peak_gib", 2, "GiB"), ("seconds", 0, "s"))
    )
    return f"{work}: estimated {peak}; estimated {seconds}"


if __name__ == "__main__":
    cli.run(parse_args, main)
