r"""Compare what `--dry_run probe` says of a run with what the run then takes: peak memory and time, on two model sizes.

python tests/benchmarks/estimates.py --model=data/models/smollm2 --dataset=snippets
python tests/benchmarks/estimates.py --table

The second model is the first with a quarter of its layers, random weights and the same tokenizer. Each trains a prompt
on rows as they come, and on fewer rows that are longer; whatever else can be trained is trained on the first model and
rows as they come. Writes estimates.json to --output_path. --table prints the README's tables of models that no ordinary
machine holds, whole and with --shard.
"""

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import cli  # noqa: E402  (found on the path set above)
from utils.errors import UserError  # noqa: E402  (found on the path set above)


def llama(width, layers, heads, inner, groups):
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "num_key_value_heads": groups,
    }


KINDS = {  # what is trained: the script, its flags
    "SPUL": ("spul", []),
    "SPUL + checkpointing": ("spul", ["--gradient_checkpointing"]),
    "QLoRA": ("qlora", []),
    "QLoRA + checkpointing": ("qlora", ["--gradient_checkpointing"]),
    "all parameters": ("baselines", ["--unlearn_method=gradient_ascent_descent"]),
    "all parameters + checkpointing": (
        "baselines",
        ["--unlearn_method=gradient_ascent_descent", "--gradient_checkpointing"],
    ),
}
SHARDED = {  # what the second table is about, all with --shard and --gradient_checkpointing
    "SPUL": ("spul", []),
    "LoRA": ("qlora", ["--quantization=none"]),
    "all parameters": ("baselines", ["--unlearn_method=gradient_ascent_descent"]),
}
GPUS = (1, 2, 4, 8)
# Models that the tables are about: what their config.json says where it is not the default of their type.
MODELS = {
    "OPT-1.3B": {
        "model_type": "opt",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
        "word_embed_proj_dim": 2048,
    },
    "LLaMA-2-7B": llama(4096, 32, 32, 11008, 32),
    "LLaMA-2-13B": llama(5120, 40, 40, 13824, 40),
    "LLaMA-2-70B": llama(8192, 80, 64, 28672, 8),
}
ROWS, TOKENS = 32, 96  # of a step and of an evaluation batch, in the table
UNITS = {"s": 1, "min": 60, "h": 3600, "MiB": 2**-10, "GiB": 1}


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model", type=cli.path, default="data/models/smollm2", help="a plain model: folder or hub id")
    parser.add_argument(
        "--dataset", type=cli.path, default="snippets", help="snippets, sst2, yelp, or a folder with the four splits"
    )
    parser.add_argument("--tokens", type=cli.positive_int, default=256, help="at least so many in a long row")
    parser.add_argument("--steps", type=cli.positive_int, default=10, help="of each run")
    parser.add_argument("--train_batch_size", type=cli.positive_int, default=32, help="rows as they come in a step")
    parser.add_argument("--long_batch_size", type=cli.positive_int, default=4, help="long rows in a step")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--table", action="store_true", help="only print the tables of large models")
    parser.add_argument("--seed", type=cli.seed, default=42, help="of rows and weights")
    parser.add_argument("--output_path", type=cli.path, default="results/estimates", help="folder for estimates.json")
    return parser.parse_args()


def main(args):
    if args.table:
        return print("\n\n".join(tables()))
    import rounds

    from utils.models.chain import resolve_chain
    from utils.storage import files
    from utils.tasks.rows import load_splits

    folder = Path(args.output_path)
    files.try_to_write(folder / "estimates.json")
    chain = resolve_chain(args.model)
    if len(chain) > 1:
        raise UserError(f"{args.model} is a checkpoint of this project; --model takes a plain model")
    frames, records = load_splits(args.dataset), []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        kept = {part: cut_down(chain[0].path, work / str(part), part, args.seed) for part in (1, 4)}
        for length, batch in ((None, args.train_batch_size), (args.tokens, args.long_batch_size)):
            sizes, losses = [batch] * args.steps, {"losses": {"retain": 1}}
            rows = work / f"rows-{length}"
            rounds.write_rows(frames, rounds.Cell("", "", "training", [], sizes, losses, length), rows, args.seed)
            for part, weights in kept.items():
                flags = [f"--dataset={rows}", f"--train_batch_size={batch}", "--max_length=2048", "--num_epochs=1"]
                flags += [f"--max_steps={args.steps}", f"--seed={args.seed}"]
                for kind in args.kinds if part == 1 and length is None else {"SPUL"}.intersection(args.kinds):
                    entry = {"kind": kind, "weights": weights, "tokens": length, "rows": batch}
                    records.append(entry | compare(kind, work / str(part), flags, work))
                    print(sentence(records[-1]), flush=True)
    files.write_json(folder / "estimates.json", {"settings": vars(args), "records": records})
    print(f"wrote {folder}/estimates.json")


def cut_down(source, folder, part, seed):
    """Write a copy of the model; for part > 1 one of random weights with `1 / part` of its layers. Returns how many
    weights it has."""
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


def compare(kind, model, flags, work):
    """Estimated and measured peak (GiB) and time (s, libraries and loading left out) of one run that trains `kind`."""
    script, more = KINDS[kind]
    flags = [f"--{'model_name' if script == 'qlora' else 'model_checkpoints'}={model}", *flags, *more]
    flags += [f"--output_path={work / 'out'}", "--overwrite"]
    if script == "spul":
        reference = work / "reference.safetensors"
        reference.unlink(missing_ok=True)  # one that is there already would cost no time
        flags.append(f"--logits_path={reference}")
    started, probed, trained = (run(script, *flags, *more) for more in (["--dry_run"], ["--dry_run=probe"], []))
    memory = re.search(r"^memory +about ([\d.]+) (\w+)", started["printed"], re.M)
    if not memory:
        raise UserError("the peak of this architecture cannot be estimated; choose another --model")
    spoken = re.search(r"^time +about (.+?) after loading", probed["printed"], re.M)[1]
    estimated = sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+) (\w+)", spoken))
    written = json.loads((work / "out" / "metrics.json").read_text())
    return {
        "estimated_peak_gib": float(memory[1]) * UNITS[memory[2]],
        "measured_peak_gib": max(record["peak_memory_bytes"] for record in written) / 2**30,
        "estimated_seconds": estimated,
        "measured_seconds": trained["seconds"] - started["seconds"],
    }


def run(script, *flags):
    """One run of a script: {"seconds", "printed"}. Raises UserError with its last words if it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{script}.py did not run ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
    return {"seconds": time.perf_counter() - start, "printed": done.stdout}


def sentence(record):
    work = f"{record['kind']}, {record['weights'] / 1e6:.0f} M weights, {record['rows']} rows"
    work += f" of {record['tokens']} tokens or more" if record["tokens"] else ""
    peak, seconds = (
        f"{record[f'estimated_{name}']:.{digits}f} {unit}, measured {record[f'measured_{name}']:.{digits}f} "
        f"({record[f'estimated_{name}'] / record[f'measured_{name}'] - 1:+.0%})"
        for name, digits, unit in (("peak_gib", 2, "GiB"), ("seconds", 0, "s"))
    )
    return f"{work}: estimated {peak}; estimated {seconds}"


def tables():
    """Two in Markdown, by the configurations in MODELS: GiB of weights, and by KINDS of weights, what is trained and
    the larger of step and evaluation; and the same by SHARDED in each of GPUS processes. ROWS rows of TOKENS tokens a
    step, SDPA, bfloat16, without reference and what a process itself takes."""
    import rounds

    from utils.tasks.rows import load_splits

    lines = [f"| model | weights | {' | '.join(KINDS)} |", "|---" * (2 + len(KINDS)) + "|"]
    sharded = [f"| model | what is trained | {' | '.join(map(str, GPUS))} |", "|---" * (2 + len(GPUS)) + "|"]
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows"
        cell = rounds.Cell("", "", "training", [], [ROWS], {"losses": {"retain": 1}}, TOKENS)
        rounds.write_rows(load_splits("snippets"), cell, rows, 42)
        tokenizer = word_tokenizer(load_splits(str(rows)))
        for name, config in MODELS.items():
            folder = Path(work) / name
            tokenizer.save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps(config))
            planned = [planned_sizes(kind, folder, rows) for kind in KINDS.values()]
            cells = [2 * planned[0]["all parameters"], *map(on_gpu, planned)]  # the first: bytes in bfloat16
            lines.append(f"| {name} | {in_gib(cells)} |")
            for trained, (script, more) in SHARDED.items():
                kind = script, [*more, "--shard", "--gradient_checkpointing"]
                cells = [on_gpu(planned_sizes(kind, folder, rows, n)) for n in GPUS]
                sharded.append(f"| {name} | {trained} | {in_gib(cells)} |")
    return "\n".join(lines), "\n".join(sharded)


def on_gpu(sizes):
    """The peak in bytes without reference, on a GPU."""
    from utils import plan

    return plan.peak(sizes | {"process": 0, "reference": 0, "heap": 1})


def in_gib(cells):
    return " | ".join(f"{cell / 2**30:,.1f}" for cell in cells)


def word_tokenizer(frames):
    """A tokenizer that makes one token of every word, answers included. Rows differ in it: what a model would read
    alike is computed once."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from utils.data.splits import UNLEARNING_LABELS

    texts = [text for frame in frames.values() for column in ("label_text", "text") for text in frame[column]]
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = dict.fromkeys([*marks.values(), *UNLEARNING_LABELS, *" ".join(texts).split()])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def planned_sizes(kind, model, rows, processes=1):
    """The sizes, by the names in utils/plan.py, that a `--dry_run` of `kind`, (script, flags), on these rows comes to.

    processes: how many share the rows of a step.
    """
    from utils import distributed, plan

    script, more = kind
    command = [script, f"--{'model_name' if script == 'qlora' else 'model_checkpoints'}={model}", f"--dataset={rows}"]
    command += [f"--max_length={TOKENS + 1}"]  # the label, which is not read
    command += [f"--train_batch_size={ROWS}", f"--eval_batch_size={ROWS}", "--dry_run", "--attn_implementation=sdpa"]
    command += [f"--micro_batch_size={ROWS}"]  # as on a GPU; a CPU, which plans here, would cut the step
    command += ["--dtype=bfloat16", "--device=cpu", *more, f"--output_path={model}-out"]
    module = importlib.import_module(script)
    with mock.patch.object(sys, "argv", command):
        args = module.parse_args()
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    several = mock.patch.object(distributed, "world_size", return_value=processes)
    with mock.patch.object(plan, "memory_line", wraps=plan.memory_line) as line, several, silent[0], silent[1]:
        module.main(args)
    return line.call_args.args[1]


if __name__ == "__main__":
    cli.run(parse_args, main)
