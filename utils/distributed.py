"""Several processes that compute as one: what `accelerate launch` starts shares the rows of every step.

The gradient of a step is a sum over its rows, and so are the logged losses: each process adds up its share of the rows,
then the sums of all processes are added. They are added, not averaged, since every term is already divided by the
number of forget or retain rows of the whole step; a process without a forget row, or without any, adds zero. What
differs from one process is the order of float additions. Only dropout is drawn by each process for itself.

In a plain `python` run there is one process: nothing here communicates and there is no process group.
"""

import contextlib
import itertools
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from utils.errors import UserError, note_once

PATIENCE = timedelta(hours=6)  # a process may wait while the main one writes; the launcher ends it where that one fails
GATHERING = timedelta(minutes=10)  # processes of a launch start together
BUCKET = 32 * 2**20  # bytes of gradients that are added by one call
T = TypeVar("T")
HELPERS: list[Callable[[], None]] = []  # of every model in shards: takes part in a pass of another process
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start() -> None:
    """Join the other processes of an `accelerate launch`; does nothing in a plain run. Call it before anything else."""
    launched, cuda = _launched(), torch.cuda.is_available()
    both = "cuda:nccl,cpu:gloo"  # objects and CPU tensors go by gloo beside NCCL
    if launched and not dist.is_initialized():
        _join(both if cuda else "gloo")
    PartialState(cpu=not cuda, **({"backend": both} if launched and cuda else {}))


def _launched() -> bool:
    """Whether a launcher started this process: it sets all of LAUNCHER, and its numbers are numbers.

    Else what another launch has left is taken out of the environment, or accelerate would wait for processes without
    end.
    """
    found = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    numbers = [found.get(name, "") for name in LAUNCHER if name != "MASTER_ADDR"]
    if len(found) == len(LAUNCHER) and all(map(str.isdecimal, numbers)):
        return True
    for name in found:
        del os.environ[name]
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & found.keys():  # an address alone starts nothing
        note_once(
            f"{', '.join(found)} in the environment ignored: this run was not launched as one of several processes"
        )
    return False


def _join(backend: str) -> None:
    """Meet the other processes. Raises UserError where they do not come, as after a launch that is over."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=GATHERING))
    except (RuntimeError, ValueError):
        raise UserError(
            "the other processes of which the environment tells (RANK, WORLD_SIZE, MASTER_ADDR ...) do not come; "
            "start all of them by accelerate launch, or unset these variables"
        ) from None
    store.set_timeout(PATIENCE)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def finish() -> None:
    """Wait for the others, so that a failure of one is one of all, and leave them."""
    all_gather(None)
    PartialState().destroy_process_group()


def failed_first() -> bool:
    """Whether this process is the first that ends in an error. The others fail after it, and have nothing to say."""
    if not PartialState._shared_state or world_size() == 1:  # not even started, or alone
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store has gone with the process that failed first
        return False


@contextlib.contextmanager
def only_main_speaks() -> Iterator[None]:
    """While open, what the other processes print, progress bars and notices included, goes nowhere."""
    if is_main():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def world_size() -> int:
    """The number of processes."""
    return PartialState().num_processes


def own_gpu() -> str:
    """The name of this process's GPU, `cuda:<i>`."""
    return str(PartialState().device)


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return PartialState().is_main_process


def all_gather(value: T) -> list[T]:
    """The `value` of every process, in the order of the processes. All must call it."""
    while HELPERS and (number := announce(0)):
        HELPERS[number - 1]()
    return gather_object([value])


def add_helper(take_part: Callable[[], None]) -> int:
    """The number by which passes of a model in shards are announced (utils.sharding), to which each process must
    contribute. take_part: does so where this process has nothing to compute. All must call it."""
    HELPERS.append(take_part)
    return len(HELPERS)


def announce(number: int) -> int:
    """The largest `number` that a process announces: that of a helper before a pass, 0 of one that waits."""
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def broadcast(value: T) -> T:
    """The `value` of the main process. All must call it."""
    return all_gather(value)[0]


def on_main(function: Callable[[], T]) -> T:
    """What `function()` returns in the main process, in every process; a UserError of it is raised in every one."""
    value = error = None
    if is_main():
        try:
            value = function()
        except UserError as raised:
            error = raised
    value, error = broadcast((value, error))
    if error:
        raise error
    return value


def shares(rows: list[T], size: Callable[[T], int]) -> list[list[T]]:
    """The part of `rows` of every process: as many of each length as the others have. size: function(row) -> its
    length."""
    if world_size() == 1:
        return [rows]
    ordered = sorted(rows, key=size)
    return [ordered[i :: world_size()] for i in range(world_size())]


def turns(rows: list[T], size: Callable[[T], int], cut: Callable[[list[T]], list[list[T]]]) -> list[list[T]]:
    """This process's share of `rows`, in the parts into which `cut` puts it; where a model is in shards, behind them as
    many empty ones as it takes to have as many parts as any other process."""
    every = [cut(share) for share in shares(rows, size)]
    own = every[PartialState().process_index]
    return own + [[]] * (max(map(len, every)) - len(own)) if HELPERS else own


def deal(batches: Sequence[list[T]]) -> Iterator[tuple[list[T], int]]:
    """Yields (a batch of this process, number of rows that all processes do meanwhile) until all `batches` are done.

    Every process gets as many turns, so that they can `gather` in each; in the last the batch may be empty.
    """
    state = PartialState()
    for start in range(0, len(batches), state.num_processes):
        turn = batches[start : start + state.num_processes]
        own = turn[state.process_index] if state.process_index < len(turn) else []
        yield own, sum(map(len, turn))


def all_reduce(values: Mapping[str, float]) -> dict[str, float]:
    """{name: sum over the processes} of the floats `values` {name: float}, of which a process may lack some."""
    sums = {}
    for part in all_gather(values):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over the processes; where no process has one it stays None.

    Gradients of one dtype and device travel together, in buffers of about BUCKET bytes.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    graded = np.any(all_gather([p.grad is not None for p in parameters]), axis=0)
    kinds = {}
    for parameter in (p for p, somewhere in zip(parameters, graded) if somewhere):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        kinds.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    for gradients in kinds.values():
        ends = itertools.accumulate(gradient.nbytes for gradient in gradients)
        for _, pairs in itertools.groupby(zip(ends, gradients), key=lambda pair: pair[0] // BUCKET):
            bucket = [gradient for _, gradient in pairs]
            sums = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(sums)
            for gradient, part in zip(bucket, sums.split([gradient.numel() for gradient in bucket])):
                gradient.copy_(part.view_as(gradient))


def draw_apart(seed: int, step: int) -> None:
    """Give each process its own random numbers for this step (dropout), or all would drop the same places.

    The main process goes on with the state it has, so that a resumable state need hold no other.
    """
    index = PartialState().process_index
    if index:
        torch.manual_seed(int(np.random.SeedSequence([seed, step, index]).generate_state(1)[0]))


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes: on the GPUs that it used, else resident."""
    if on_gpus := sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())):
        return on_gpus
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
