"""Measuring: the rows of a cell, one process per path, and rounds that give each of them the same batch in turn."""

import multiprocessing
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import paths
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from utils.data.splits import SPLITS
from utils.errors import UserError
from utils.models.base import pick_device, pick_dtype
from utils.models.chain import resolve_chain
from utils.models.lengths import position_limit
from utils.tasks.rows import load_splits

# Processes are forked from one that has only imported the libraries: quick to start, and no threads or models in them.
# That one finds paths.py by the environment: it gets no sys.path before Python 3.13.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["paths"])

WARM_UP = 2  # rows
POOL = 8  # batches whose rows are sorted by length together
# Forward 2; backward through activations 2 more; gradients of the weights, where the model itself is trained, 2 more.
FLOP_PER_WEIGHT = {"training": 4, "reference": 2, "inference": 2}
FLOP_PER_TRAINED_WEIGHT = 6


@dataclass(frozen=True)
class Variant:
    """One path of a cell: `plain` or `ours`, its --dtype, and p virtual tokens (0: no prompt)."""

    path: str
    dtype: str
    p: int


@dataclass(frozen=True)
class Cell:
    """Variants that are measured on the same work: `sizes` are the rows of each pass, `length` the tokens of every row
    (None: rows as they come)."""

    part: str
    name: str
    task: str
    variants: list
    sizes: list
    training: dict
    length: int | None = None


class Bench:
    """The machine, the data and the model of a run; `measure` gives the records of a cell."""

    def __init__(self, args):
        self.args = args
        self.device = pick_device(args.device)
        self.frames = load_splits(args.dataset)
        chain = resolve_chain(args.model)
        if len(chain) > 1:
            raise UserError(f"{args.model} is a checkpoint of this project; --model takes a plain model")
        self.limit, self.weights = _count_weights(chain[0])
        self.dtype = str(pick_dtype(args.dtype, self.device)).removeprefix("torch.")
        rates = {dtype: matmul_rate(dtype, self.device) for dtype in {"float32", "bfloat16", self.dtype}}
        self.machine = {
            "processor": _processor(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "matmul_flop_per_second": rates,
            "model_weights": self.weights,
        }

    def measure(self, cell, folder):
        """A record per variant: seconds, loss and share of the floor of every pass, peak memory; or the error."""
        batches = write_rows(self.frames, cell, folder, self.args.seed)
        specs = [self._spec(cell, variant, batches, folder / str(i)) for i, variant in enumerate(cell.variants)]
        workers = [Worker(spec) for spec in specs]
        try:
            for worker in workers:
                worker.wait()
            for i in range(1 + len(cell.sizes)):
                for worker in workers if i % 2 else reversed(workers):  # no path always follows the same one
                    worker.step()
        finally:
            for worker in workers:
                worker.close()
        examples, _ = paths.examples_of(specs[0])
        return [self._record(cell, *pair, examples, batches) for pair in zip(cell.variants, workers)]

    def _spec(self, cell, variant, batches, work):
        args = self.args
        return {
            "task": cell.task,
            "path": variant.path,
            "sizes": [WARM_UP, *cell.sizes, WARM_UP],
            "dtype": self.dtype if variant.dtype == "auto" else variant.dtype,
            "p": variant.p,
            "batches": batches,
            "model": str(Path(args.model).resolve()) if Path(args.model).exists() else args.model,
            "data": str(work.parent),
            "work": str(work),
            "device": args.device,
            "seed": args.seed,
            "batch_size": args.batch_size,
            "max_length": cell.length or 1024,
            **cell.training,
        }

    def check_length(self, cell):
        """Raise UserError if the cell's rows do not fit the model."""
        longest = max(variant.p for variant in cell.variants) + (cell.length or 0)
        if self.limit and longest > self.limit:
            raise UserError(
                f"{longest} tokens with the prompt are more than the model's {self.limit} positions; "
                "lower --text_lengths or --prompt_lengths"
            )

    def _record(self, cell, variant, worker, examples, batches):
        dtype = worker.spec["dtype"]
        record = {
            "part": cell.part,
            "name": cell.name,
            "task": cell.task,
            "path": variant.path,
            "dtype": dtype,
            "p": variant.p,
            "length": cell.length,
            "rows": cell.sizes,
            "error": worker.error,
        }
        passes = worker.passes[1 : 1 + len(cell.sizes)]
        if worker.error or not passes:
            return record
        full = cell.training["script"] == "baselines" and "--tune=lora" not in cell.training["arguments"]
        trains_weights = cell.task == "training" and full
        flop = self.weights * (FLOP_PER_TRAINED_WEIGHT if trains_weights else FLOP_PER_WEIGHT[cell.task])
        tokens = [variant.p + sum(len(examples[i]) for i in batch) for batch in batches[1:-1]]
        seconds = [line["seconds"] for line in passes]
        rate = self.machine["matmul_flop_per_second"][dtype]
        share = median(flop * t / rate / s for t, s in zip(tokens, seconds))
        return record | {
            "seconds": seconds,
            "seconds_per_pass": median(seconds),
            "rows_per_second": median(n / s for n, s in zip(cell.sizes, seconds)),
            "tokens": tokens,
            "floor_share": None if cell.name == "rmu" else share,  # which runs and trains some layers only
            "peak_bytes": passes[-1]["peak_bytes"],
            "losses": [line["loss"] for line in passes],
        }


class Worker:
    """A process that works off one spec. A failure stays in `error`, and the other processes go on."""

    def __init__(self, spec):
        self.spec, self.passes, self.error = spec, [], None
        Path(spec["work"]).mkdir(parents=True)
        self.connection, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=paths.work, args=(spec, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def wait(self):
        """Until it is ready for the next pass."""
        self._receive()

    def step(self):
        """One pass; what it took is appended to `passes`."""
        if not self.error:
            self.connection.send("go")
            line = self._receive()
            if line:
                self.passes.append(line)
                self.wait()

    def _receive(self):
        if not self.error:
            try:
                return self.connection.recv()
            except (EOFError, ConnectionError):
                self.process.join()
                killed = self.process.exitcode == -9
                self.error = "killed, probably for lack of memory" if killed else self._last_words()
        return None

    def _last_words(self):
        lines = [text for text in (Path(self.spec["work"]) / "log.txt").read_text().splitlines() if text.strip()]
        return lines[-1] if lines else f"exit code {self.process.exitcode}"

    def close(self):
        self.connection.close()
        self.process.join()


def write_rows(frames, cell, folder, seed):
    """Write the cell's rows as a data folder; returns the row numbers of its passes, train_retain before train_forget.

    A pass of training has the cell's or the data's share of forget rows, at least one; the passes of evaluation all
    have the same retain rows. The first pass is for warming up; the last is never asked for, so that no process ends
    inside a measurement.
    """
    rng = np.random.default_rng(seed)
    sizes = [WARM_UP, *cell.sizes, WARM_UP]
    retain, forget = frames["train_retain"], frames["train_forget"]
    if cell.task == "training":
        retains = cell.training["losses"].keys() & {"retain", "kl"}
        share = cell.training.get("forget_share", len(forget) / (len(retain) + len(forget))) if retains else 1
        n_forget = [max(1, round(share * size)) for size in sizes]
        n_retain = [size - n for size, n in zip(sizes, n_forget)]
        starts = np.cumsum([0, *n_retain]), np.cumsum([sum(n_retain), *n_forget])
        spans = [zip(start, start[1:]) for start in starts]
        batches = [[*range(*map(int, r)), *range(*map(int, f))] for r, f in zip(*spans)]
        chosen = draw(retain, n_retain if retains else [1], POOL, rng), draw(forget, n_forget, POOL, rng)
    else:
        batches = [list(range(size)) for size in sizes]
        chosen = draw(retain, [max(sizes)], 1, rng), draw(forget, [1], 1, rng)
    folder.mkdir()
    for split, rows in zip(SPLITS, (*chosen, chosen[0].head(1), chosen[0].head(1))):  # test rows are not measured
        source = frames["train_forget" if split == "train_forget" else "train_retain"]["text"]
        text = rows["text"] if cell.length is None else [_continued(source, row, cell.length) for row in rows.index]
        rows[["text", "label", "label_text"]].assign(text=text).to_csv(folder / f"{split}.csv", index=False)
    return batches


def draw(frame, sizes, pool, rng):
    """So many rows of `frame` for each of `sizes`, one after the other, each time rows of similar length: out of
    `pool` times as many random ones, by length, at evenly spaced places."""
    chosen = []
    for i, size in enumerate(sizes):
        rows = np.resize(rng.permutation(len(frame)), pool * size)
        if pool > 1:
            rows = sorted(rows, key=lambda row: len(frame["text"].iloc[row]))
        start = round((len(rows) - size) * (i + 0.5) / len(sizes))
        chosen += list(rows[start : start + size])
    return frame.iloc[chosen]


def _continued(texts, row, n_words):
    """The text of that row and of as many after it as make `n_words` words, hence at least as many tokens."""
    words, i = [], row
    while len(words) < n_words:
        words += texts.iloc[i % len(texts)].split()
        i += 1
    return " ".join(words)


def matmul_rate(dtype: str, device: str) -> float:
    """Floating-point operations a second of a large square matrix product: the median of two seconds of them, since a
    processor may be faster for a moment than it can stay. The size grows while a product takes next to no time: a
    processor that only emulates bfloat16 needs minutes for a large one."""
    n, largest, times = 256, 2048 if device == "cpu" else 8192, []
    while len(times) < 6 or sum(times) < 2:
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds = time.perf_counter() - start
        if n < largest and seconds < 0.1:
            n *= 2
        else:
            times.append(seconds)
    return 2 * n**3 / median(times)


def _count_weights(link):
    """The model's positions (or None) and its weights outside embeddings and head, from the configuration alone."""
    config = AutoConfig.from_pretrained(link.path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    outside = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in outside)
    return position_limit(config), weights


def _processor(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"
