"""Trainings side by side: a process each, on one thread."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeAlias

from dibit.train.errors import Interrupted, TrainingError

_channel: Any = None  # in a worker: where notes go
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


Compute: TypeAlias = Callable[[Callable[[str], None]], Any]  # it is given a function that takes how far it is


def run(
    jobs: Mapping[str, Compute], processes: int, note: Callable[[str, str], None], begin: Callable[[str], None]
) -> Iterator[tuple[str, Any, float]]:
    """Run jobs in so many processes.

    Args:
        jobs: what to compute, by name, in the order in which they begin; each can be pickled, and so can its value.
        processes: at least 1.
        note: called with a job's word on how far it is, and its name.
        begin: called with the name of a job before it begins.

    Yields:
        A job's name, its value and the seconds it took, as jobs end.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once every process has come to its own end.
        TrainingError: a process was lost.
    """
    context = multiprocessing.get_context("spawn")
    channel = context.Queue()
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # read when a process loads its libraries
    waiting, running = list(jobs)[::-1], dict[Future[Any], str]()
    pool = ProcessPoolExecutor(processes, context, _prepare, (channel,))
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name = waiting.pop()
                begin(name)
                running[pool.submit(_run, name, jobs[name])] = name
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            _tell(channel, note)
            for future in done:
                name = running.pop(future)
                value, seconds = future.result()
                yield name, value, seconds
    except BrokenProcessPool as error:
        names = ", ".join(running.values()) or "one of them"
        raise TrainingError(
            f"a process ended before its training did ({names}): the system may have been out of memory; what was "
            "measured is kept, and the same command goes on; give fewer --jobs"
        ) from error
    except Interrupted as stop:
        raise KeyboardInterrupt from stop
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _tell(channel: Any, note: Callable[[str, str], None]) -> None:
    while True:
        try:
            note(*channel.get_nowait())
        except queue.Empty:
            return


def _prepare(channel: Any) -> None:
    """A worker begins."""
    import torch

    global _channel
    _channel = channel
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(name: str, compute: Compute) -> tuple[Any, float]:
    parent, last = os.getppid(), 0.0

    def note(text: str) -> None:
        nonlocal last
        if os.getppid() != parent:
            os._exit(1)  # nobody waits for the result
        if time.monotonic() - last > 1:
            last = time.monotonic()
            _channel.put((text, name))

    start = time.perf_counter()
    try:
        value = compute(note)
    except KeyboardInterrupt as stop:
        raise Interrupted("interrupted") from stop  # which a pool hands on, where it does not survive the other
    return value, time.perf_counter() - start
