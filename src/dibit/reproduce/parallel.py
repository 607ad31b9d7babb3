"""Trainings side by side: a process each, on one thread."""

from __future__ import annotations

import _thread
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

from dibit.tools.errors import Interrupted, TrainingError

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

Compute: TypeAlias = Callable[[Callable[[str], None]], Any]  # it is given a function that takes how far it is
Running: TypeAlias = dict[Connection, tuple[str, Any]]  # a job's name and its process, by the line to it


def run(
    jobs: Mapping[str, Compute], processes: int, note: Callable[[str, str], None], begin: Callable[[str], None]
) -> Generator[tuple[str, Any, float], None, None]:
    """Run jobs, so many at a time, each in a process of its own.

    Whatever ends the iteration early stops the jobs that still run: each finishes its epoch and writes its checkpoint.
    Close the iterator (`contextlib.closing`) where its consumer may fail.

    Args:
        jobs: what to compute, by name, in the order in which they begin; each can be pickled, and so can its value.
        processes: how many run at a time, at least 1.
        note: called with a job's word on how far it is, and its name.
        begin: called with the name of a job before it begins.

    Yields:
        A job's name, its value and the seconds it took, as jobs end.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once every process has come to its own end.
        TrainingError: a process was lost.
        Exception: what a job raised.
    """
    waiting, running = list(jobs.items())[::-1], Running()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, compute = waiting.pop()
                begin(name)
                start(running, name, compute)
            for line in wait(list(running)):
                assert isinstance(line, Connection)
                name = running[line][0]
                kind, *payload = _received(line, name)
                if kind == "note":
                    note(payload[0], name)
                    continue
                running.pop(line)[1].join()
                line.close()
                if kind == "stopped":  # by a signal of its own
                    raise KeyboardInterrupt
                if kind == "failed":
                    raise payload[0] from RuntimeError(f"in the process of {name}:\n{payload[1]}")
                yield name, *payload
    finally:
        _stop(running)


def start(running: Running, name: str, compute: Compute) -> None:
    """Start a process that gets no Ctrl-C from the terminal: this one says when to stop, so that it is said once."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, compute), daemon=True)
    before = {variable: os.environ.get(variable) for variable in _THREADS}
    resource_tracker.ensure_running()  # which unblocks Ctrl-C when it begins, in Python 3.11
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a new process inherits
    try:
        os.environ.update(dict.fromkeys(_THREADS, "1"))  # read when a process loads its libraries
        process.start()
        running[ours] = name, process
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None) if value is None else os.environ.update({variable: value})
        theirs.close()  # else its end would not be seen here
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _received(line: Connection, name: str) -> tuple[Any, ...]:
    try:
        return line.recv()
    except (EOFError, OSError) as error:
        raise TrainingError(
            f"the process of a training ended before the training did ({name}): the system may have been out of "
            "memory; what was measured is kept, and the same command goes on; give fewer --jobs"
        ) from error


def _stop(running: Running) -> None:
    """Let every process finish its epoch; Ctrl-C meanwhile stops them at once, at the last checkpoint."""
    for end in (_say_stop, _say_stop, _kill):
        try:
            for line, (_, process) in running.items():
                end(line, process)
            for _, process in running.values():
                process.join()
            return
        except KeyboardInterrupt:
            continue


def _say_stop(line: Connection, process: Any) -> None:
    with contextlib.suppress(OSError):  # it has ended
        line.send("stop")


def _kill(line: Connection, process: Any) -> None:
    process.kill()


def _work(line: Connection, compute: Compute) -> None:
    """A job's process. It sends ("note", text), and at the end one of ("done", value, seconds), ("stopped",) and
    ("failed", exception, its traceback)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have started the command without it
    try:
        threading.Thread(target=_listen, args=(line,), daemon=True).start()
        answer = _computed(line, compute)
    except (KeyboardInterrupt, Interrupted):
        answer = ("stopped",)
    except Exception as error:
        answer = ("failed", _sendable(error), traceback.format_exc())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # nobody waits for it
        line.send(answer)


def _sendable(error: Exception) -> Exception:
    """The error itself, where it comes through to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _computed(line: Connection, compute: Compute) -> tuple[Any, ...]:
    import torch

    torch.set_num_threads(1)
    start, last = time.perf_counter(), 0.0

    def note(text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            line.send(("note", text))

    value = compute(note)
    return "done", value, time.perf_counter() - start


def _listen(line: Connection) -> None:
    """Stop the job when it is said, as Ctrl-C would; end the process when there is nobody any more to say it."""
    while True:
        try:
            line.recv()
        except (EOFError, OSError):
            os._exit(1)
        _thread.interrupt_main()
