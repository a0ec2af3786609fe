"""The optimisation loop that the training scripts share: one step, one log line, one resumable state file."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from utils import distributed, sharding
from utils.data.batch import Example, epoch_batches, micro_batches
from utils.distributed import peak_memory
from utils.errors import UserError, first_line, note_once
from utils.storage.checkpoints import Link
from utils.storage.files import new_file
from utils.storage.reading import Like, read_tensors, tensors_sha256
from utils.training.optimizer import decay_groups
from utils.training.state import State, read_state, refuse_other_settings


class Objective(Protocol):
    """The loss of one micro-batch. A call gives (scalar with gradient, {part: scalar}) of the row numbers `rows`.

    n_forget, n_retain: rows of each kind in the whole step, and step: their numbers (None: they are `rows`), so that
    micro-batches add up to the step exactly, in means over rows and over tokens. An objective may also have
    `whole_step`, `buffers` and `after_step`, which `Training` takes.
    """

    def __call__(
        self, rows: list[int], n_forget: int, n_retain: int, step: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train: the flags of those names. started: when they were read, by `time.perf_counter`; the clock of
    --max_minutes begins there, before all work."""

    lr: float = 1e-4
    train_batch_size: int = 32
    micro_batch_size: int | None = None
    num_epochs: int = 1
    max_steps: int | None = None
    max_rows: int | None = None
    weight_decay: float = 0.001
    max_grad_norm: float = 0.3
    length_pool: int | None = None
    eval_steps: int | None = None
    save_steps: int = 100
    resume: bool = False
    seed: int = 42
    forget_per_batch: int = 0
    retain_ratio: float | None = None
    stop_at_forget_accuracy: float | None = None
    stop_at_retain_accuracy: float = 0.0
    max_minutes: float | None = None
    started: float = field(default_factory=time.perf_counter, compare=False)


@dataclass
class Training:
    """What to train and how.

    parameters: {name: float32 Parameter}. examples: the training rows, whose numbers `loss` gets. recorded: the
    arguments by which a resumed run is known again (utils.training.state.saved_arguments). state_path: the file that
    holds everything needed to continue. fingerprint: the hash of the data (utils.data.select.fingerprint). chain: Links
    of the frozen model, and of all else that the run depends on. warmup: the share of the steps in which the learning
    rate rises. evaluate: function() -> {split: share}, called every settings.eval_steps steps. measured: the name of
    that share in the log. log_path: a file that gets each line of the log at once. whole_step: the context in which
    `loss` is called for the micro-batches of one step and their gradients are taken. buffers: scalars that
    `after_step` changes, which belong to the state. It is a function(parts of the step, share of the steps done) ->
    more for the log line. `cost`, after `run`: {"steps", "seconds_per_step" (median), "peak_memory_bytes"}.

    Started by `accelerate launch`, every process runs the same Training, and the rows of a step are shared out
    (utils.distributed). That changes only the order of float additions and the places that dropout draws.
    """

    parameters: dict[str, torch.nn.Parameter]
    examples: list[Example]
    loss: Objective
    settings: TrainingSettings
    recorded: dict[str, Any]
    state_path: Path
    fingerprint: str
    chain: list[Link]
    warmup: float
    evaluate: Callable[[], dict[str, float]] | None = None
    measured: str = "accuracy"
    log_path: Path | None = None
    whole_step: Callable[[], AbstractContextManager] = nullcontext
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    after_step: Callable[[dict[str, float], float], dict[str, float]] | None = None
    cost: dict[str, Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run: the arguments, the data and the model."""
        models = [link.sha256 for link in self.chain]
        return {**self.recorded, "data": self.fingerprint, "model": models}

    def total_steps(self) -> int:
        """The number of optimisation steps: all epochs, or fewer by settings.max_steps or settings.max_rows."""
        steps = self.settings.num_epochs * len(self._batches(0))
        limits = self.settings.max_steps, self._steps_in(self.settings.max_rows)
        return min([steps, *filter(None, limits)])

    def _steps_in(self, max_rows: int | None) -> int | None:
        """How many steps read at most so many rows, the first in any case: the last batch of an epoch may be small."""
        if max_rows is None:
            return None
        batches = itertools.chain.from_iterable(map(self._batches, itertools.count()))
        read = itertools.accumulate(len(rows) for rows in batches)
        return max(1, sum(1 for _ in itertools.takewhile(lambda rows: rows <= max_rows, read)))

    def steps_from(self, done: int) -> Iterator[tuple[int, list[int]]]:
        """(step, row numbers of its batch) for every step after `done`."""
        per_epoch, total = len(self._batches(0)), self.total_steps()
        for epoch in range(done // per_epoch, math.ceil(total / per_epoch)):
            for i, rows in enumerate(self._batches(epoch)):
                if done <= epoch * per_epoch + i < total:
                    yield epoch * per_epoch + i + 1, rows

    def _upcoming(self, done: int) -> Iterator[tuple[int, list[int]]]:
        """What `run` goes through; a benchmark puts its clock and its batches here."""
        yield from self.steps_from(done)

    def _batches(self, epoch: int) -> list[list[int]]:
        settings = self.settings
        return epoch_batches(
            self.examples,
            settings.train_batch_size,
            settings.seed,
            epoch,
            settings.forget_per_batch,
            settings.length_pool,
            settings.retain_ratio,
        )

    def run(self) -> list[dict[str, Any]]:
        """Train to the end; returns the log, a list of {"step", "lr", "loss", parts...} and {"step", `measured`}.

        With settings.max_minutes each also has "seconds": of preparation and of steps so far, those before an
        interruption included, without the evaluation on the way. Without it the log of every such run is the same.

        AdamW, cosine schedule with linear warm-up, gradient norm clipped (published: 0.3). Raises UserError on a
        non-finite loss, and on a state file that belongs to other settings.
        """
        settings = self.settings
        optimizer = self.optimizer()
        total = self.total_steps()
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(self.warmup * total), total)
        log = self._load(optimizer, schedule) if settings.resume else []
        self._show(*log)
        done = max((line["step"] for line in log), default=0)
        seen, ahead = (sum(len(rows) for _, rows in self.steps_from(start)) for start in (0, done))
        bar = tqdm(total=seen, initial=seen - ahead, desc="training", unit="row", dynamic_ncols=True, mininterval=1)
        rows = None
        seconds = []
        spent = log[-1].get("seconds", 0.0) if log else time.perf_counter() - settings.started
        for step, rows in self._upcoming(done):
            if self._may_stop(log):
                break
            start = time.perf_counter()
            distributed.draw_apart(settings.seed, step)
            line = {"step": step, "lr": schedule.get_last_lr()[0], **self.accumulate(rows)}
            self._refuse_non_finite(line)
            line["gradient_norm"] = self.update(optimizer, line)
            schedule.step()
            if self.after_step:
                line |= self.after_step(line, step / total)
            seconds.append(time.perf_counter() - start)
            clock = {}
            if settings.max_minutes:
                spent = distributed.broadcast(spent + seconds[-1])  # so that all processes stop at the same step
                clock = {"seconds": round(spent, 3)}
            line |= clock
            log.append(line)
            self._show(line)
            parts = {key: f"{value:.3f}" for key, value in line.items() if key[:2] in ("L_", "lo")}
            bar.set_postfix({"step": f"{step}/{total}", **parts}, refresh=False)
            bar.update(len(rows))
            if self.evaluate and settings.eval_steps and step % settings.eval_steps == 0:
                log.append({"step": step, self.measured: self.evaluate(), **clock})
                self._show(log[-1])
                shares = ", ".join(f"{split} {100 * share:.1f}" for split, share in log[-1][self.measured].items())
                bar.write(f"step {step}: {self.measured.replace('_', ' ')} in percent: {shares}")
            if step % settings.save_steps == 0 and step < total:
                self._save(optimizer, schedule, log)
        bar.close()
        if rows:
            with torch.no_grad():  # no logged loss has seen the last update; of an empty part see accumulate
                last = sum(float(self.loss(part or rows[:1], 1, 1)[0]) for part in self.micro_batches(rows)[:1])
            self._refuse_non_finite({"step": step, **distributed.all_reduce({"loss": last})})
            self._save(optimizer, schedule, log)  # evaluation is still to come
        self.cost = {
            "steps": max(line["step"] for line in log),
            "seconds_per_step": round(float(np.median(seconds)), 3) if seconds else None,
            "peak_memory_bytes": peak_memory(),
        }
        return log

    def _show(self, *lines: dict[str, Any]) -> None:
        """Append lines of the log to the file in which it can be watched; a run goes on without it."""
        if self.log_path and distributed.is_main():
            try:
                with open(self.log_path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
            except OSError as error:
                note_once(f"the log of the training cannot be watched ({first_line(error)})")
                self.log_path = None

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW over the parameters; `fused` goes over their numbers once."""
        groups = decay_groups(self.parameters.values(), self.settings.weight_decay)
        return torch.optim.AdamW(groups, lr=self.settings.lr, fused=True)

    def update(self, optimizer: torch.optim.Optimizer, line: dict[str, float]) -> float:
        """One step of the optimizer along the accumulated, clipped gradient, whose norm before clipping it returns."""
        norm = sharding.clip_grad_norm(self.parameters, self.settings.max_grad_norm)
        self._refuse_non_finite({**line, "gradient_norm": norm})
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def _may_stop(self, log: list[dict]) -> bool:
        """Whether --max_minutes are over, or the accuracies of --stop_at_forget_accuracy and --stop_at_retain_accuracy
        were reached."""
        settings, last = self.settings, log[-1] if log else {}
        if settings.max_minutes and last.get("seconds", 0.0) >= 60 * settings.max_minutes:
            return True
        if settings.stop_at_forget_accuracy is None or self.measured not in last:
            return False
        found = last[self.measured]
        forgotten = found["train_forget"] <= settings.stop_at_forget_accuracy
        return forgotten and found.get("test_retain", 1.0) >= settings.stop_at_retain_accuracy

    def accumulate(self, rows: list[int]) -> dict[str, float]:
        """Accumulate the gradient of one step over its micro-batches, those of all processes; returns the summed loss
        and parts as floats."""
        n_forget = sum(self.examples[i].forget for i in rows)
        logged: list[tuple[str, torch.Tensor]] = []
        with self.whole_step():
            for part in self.micro_batches(rows):
                loss, parts = self.loss(part or rows[:1], n_forget, len(rows) - n_forget, rows)
                if part:
                    loss.backward()
                    logged += ((key, value.detach()) for key, value in {"loss": loss, **parts}.items())
                else:
                    (0 * loss).backward()  # the others need this process's shards of the weights
        sums = _summed(logged)
        distributed.all_reduce_gradients(p for p in self.parameters.values() if not isinstance(p, DTensor))
        return distributed.all_reduce(sums)

    def micro_batches(self, rows: list[int]) -> list[list[int]]:
        """This process's share of the rows of a step, in the parts that are computed at once; some may be empty."""
        device = next(iter(self.parameters.values())).device.type

        def cut(share: list[int]) -> list[list[int]]:
            return micro_batches(share, self.examples, self.settings.micro_batch_size, device)

        return distributed.turns(rows, lambda i: len(self.examples[i]), cut)

    def _refuse_non_finite(self, line: dict[str, float]) -> None:
        bad = [key for key, value in line.items() if not math.isfinite(value)]
        if bad:
            saved = f"; the last saved state is {self.state_path}" if self.state_path.exists() else ""
            raise UserError(
                f"{bad[-1]} became {line[bad[-1]]} at step {line['step']}, the loss is not finite; "
                f"lower --lr (now {self.settings.lr}) or use --dtype=float32{saved}"
            )

    # The state is one safetensors file replaced in one step, so that a kill leaves the old one or the new one.

    def _save(self, optimizer: torch.optim.Optimizer, schedule: LambdaLR, log: list[dict]) -> None:
        sharded = any(isinstance(value, DTensor) for value in self.parameters.values())
        if not sharded and not distributed.is_main():
            return
        tensors = {f"parameter.{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"buffer.{name}": value for name, value in self.buffers.items()}
        states = optimizer.state_dict()["state"]
        for name, i in self._numbers(optimizer).items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in states.get(i, {}).items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        for key, value in tensors.items():
            whole = sharding.whole(value)
            tensors[key] = whole.cpu().contiguous() if distributed.is_main() else None
        if not distributed.is_main():
            return
        text = {"settings": self.identity, "schedule": schedule.state_dict(), "log": log}
        text["sha256"] = tensors_sha256(tensors)
        with new_file(self.state_path) as file:
            save_file(tensors, file, {key: json.dumps(value) for key, value in text.items()})

    def _numbers(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        """Under which number the optimizer keeps what it knows of each parameter, by the parameter's name."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {names[id(parameter)]: i for i, parameter in enumerate(ordered)}

    def _load(self, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> list[dict]:
        text = read_state(self.state_path)
        refuse_other_settings(self.state_path, text, self.identity)
        tensors = self._read_tensors(text["sha256"])
        states, numbers = {}, self._numbers(optimizer)
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "parameter":
                self.parameters[rest].data.copy_(sharding.placed_like(value, self.parameters[rest]))
            elif kind == "buffer":
                self.buffers[rest].copy_(value)
            elif kind == "optimizer":
                name, _, quantity = rest.rpartition(".")
                placed = value if quantity == "step" else sharding.placed_like(value, self.parameters[name])
                states.setdefault(numbers[name], {})[quantity] = placed
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        groups = len(optimizer.param_groups)  # which have one schedule; with shards there are more of them
        listed = {key: (groups * value)[:groups] for key, value in text["schedule"].items() if isinstance(value, list)}
        schedule.load_state_dict(text["schedule"] | listed)
        for group, lr in zip(optimizer.param_groups, schedule.get_last_lr()):
            group["lr"] = lr
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        print(f"continuing {self.state_path} after step {text['log'][-1]['step']}")
        return text["log"]

    def _read_tensors(self, sha256: str) -> dict[str, torch.Tensor]:
        """The tensors of the state: parameters and buffers, what AdamW keeps of those that had a gradient, the random
        state.

        sha256: what was recorded of them.
        """
        with safe_open(self.state_path, "pt") as file:
            found = set(file.keys())
        expected = {"rng.cpu": Like(tuple(torch.get_rng_state().shape), ("uint8",))}
        if "rng.cuda" in found:
            expected["rng.cuda"] = Like((None,), ("uint8",))
        for name, value in self.buffers.items():
            expected[f"buffer.{name}"] = Like(tuple(value.shape), (str(value.dtype).removeprefix("torch."),))
        for name, parameter in self.parameters.items():
            like = Like(tuple(parameter.shape), (str(parameter.dtype).removeprefix("torch."),))
            expected[f"parameter.{name}"] = like
            if f"optimizer.{name}.step" in found:
                expected |= {f"optimizer.{name}.{key}": like for key in ("exp_avg", "exp_avg_sq")}
                expected[f"optimizer.{name}.step"] = Like(())
        tensors = read_tensors(self.state_path, expected, "state of this training", State.remedy)
        if tensors_sha256(tensors) != sha256:
            raise UserError(f"{self.state_path} is damaged (its hash differs); start over with --overwrite")
        return tensors


def _summed(values: Sequence[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """{name: sum} of scalars (name, value), which come from their device together: the CPU waits for it once."""
    sums: dict[str, float] = {}
    together = torch.stack([value for _, value in values]).tolist() if values else []
    for (name, _), value in zip(values, together):
        sums[name] = sums.get(name, 0.0) + value
    return sums
