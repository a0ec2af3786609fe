"""Runs a script in several processes that share the work by gloo, as `accelerate launch` starts them, on this CPU."""

import multiprocessing
import os
import socket

import scripts
from accelerate import PartialState

FORK = multiprocessing.get_context("fork")  # the libraries are loaded already


def call(cwd, n, script, *arguments, before=lambda rank: None):
    """What `accelerate launch --num_processes=<n> <script>.py <arguments>` does in `cwd`: a scripts.Result a process.

    before: function(rank) that each process runs first.
    """

    def work(rank):
        before(rank)
        return scripts.call(cwd, script, *arguments)

    return each(n, work)


def in_turn(n, jobs):
    """What each of `jobs`, functions that run a script, returns in each of `n` processes: a list a process. A job meets
    the others as those of a launch of its own do."""
    ports = [free_port() for _ in jobs]

    def work(rank):
        results = []
        for port, job in zip(ports, jobs):
            os.environ["MASTER_PORT"] = str(port)
            PartialState._reset_state()
            results.append(job())
        return results

    return each(n, work)


def each(n, work):
    """What `work(rank)` returns in each of `n` processes that a launcher has started."""
    ends, workers, port = [], [], free_port()
    for rank in range(n):
        end, other = FORK.Pipe()
        worker = FORK.Process(target=_work, args=(other, rank, n, port, work))
        worker.start()
        other.close()
        ends.append(end)
        workers.append(worker)
    try:
        assert all(end.poll(400) for end in ends), "a process hangs"
        return [end.recv() for end in ends]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _work(end, rank, n, port, work):
    PartialState._reset_state()  # that of the parent, which is alone
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    end.send(work(rank))
