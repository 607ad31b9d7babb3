"""Jobs in processes of their own: values, errors, stopping, and that nothing outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from dibit.reproduce import parallel
from dibit.tools.errors import TrainingError, UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Note = Callable[[str], None]


# ---- jobs; a process imports them from this file ----


def threads(note: Note) -> list[Any]:
    import torch

    return [os.getpid(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["NUMBA_NUM_THREADS"]]


def noted(note: Note) -> str:
    note("half")
    note("too soon after it")
    return "value"


def deaf_to_the_terminal(note: Note) -> str:
    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C in the terminal, which every process of the group gets
    time.sleep(0.5)
    return "finished"


def raising(error: BaseException, note: Note) -> None:
    raise error


class Odd(Exception):
    """Cannot be pickled: its constructor takes two."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(a)


def raising_odd(note: Note) -> None:
    raise Odd("what it was about", "b")


def dying(note: Note) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped_by_itself(note: Note) -> None:
    raise KeyboardInterrupt


def working(folder: Path, stubborn: int, note: Note) -> None:
    """Until it has been told to stop so many times and once more; it writes down what happens."""
    told = 0
    while True:
        try:
            (folder / f"{os.getpid()}.{told}").touch()
            for _ in range(3000):  # a minute
                time.sleep(0.02)
            return
        except KeyboardInterrupt:
            told += 1
            (folder / f"{os.getpid()}.{told}").touch()
            if told > stubborn:
                raise


# ---- tests ----


def run(jobs: dict[str, parallel.Compute], processes: int = 2, **more: Any) -> list[tuple[str, Any, float]]:
    return list(parallel.run(jobs, processes, more.get("note", lambda *_: None), more.get("begin", lambda _: None)))


def children() -> list[psutil.Process]:
    """Of this process, but for Python's own tracker of resources, which stays."""
    found = psutil.Process().children(recursive=True)
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_in_a_process_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    begun: list[str] = []
    notes: list[tuple[str, str]] = []
    jobs: dict[str, parallel.Compute] = {"a": threads, "b": threads, "c": noted}
    found = run(jobs, begin=begun.append, note=lambda *told: notes.append(told))
    values = {name: value for name, value, _ in found}
    assert set(values) == set(jobs)
    assert begun == ["a", "b", "c"]
    assert values["a"][1:] == values["b"][1:] == [1, "1", "1"]
    assert len({os.getpid(), values["a"][0], values["b"][0]}) == 3
    assert values["c"] == "value"
    assert notes == [("half", "c")]  # at most one a second
    assert all(0 <= seconds < 60 for *_, seconds in found)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "NUMBA_NUM_THREADS" not in os.environ
    assert children() == []


def test_so_many_at_a_time(tmp_path: Path) -> None:
    running: set[str] = set()
    most = 0

    def begin(name: str) -> None:
        nonlocal most
        running.add(name)
        most = max(most, len(running))

    for name, _, _ in parallel.run(dict.fromkeys("abc", noted), 1, lambda *_: None, begin):
        running.remove(name)
    assert most == 1
    assert running == set()
    assert run({}) == []


def test_ctrl_c_in_the_terminal_is_for_the_command_alone() -> None:
    assert run({"a": deaf_to_the_terminal})[0][1] == "finished"


def test_it_works_where_ctrl_c_is_ignored(tmp_path: Path) -> None:
    """As in the background of a shell's script: an error still stops the others."""
    jobs = {"a": partial(working, tmp_path, 0), "b": partial(raising, UserError("no such graph"))}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match="no such graph"):
            run(jobs)
    finally:
        signal.signal(signal.SIGINT, before)
    assert children() == []


@pytest.mark.parametrize(
    "error", [UserError("no such graph"), TrainingError("not finite"), OSError(28, "No space left", "f"), KeyError("k")]
)
def test_an_error_is_raised_here_and_stops_the_others(tmp_path: Path, error: Exception) -> None:
    start = time.monotonic()
    jobs = {"long": partial(working, tmp_path, 0), "wrong": partial(raising, error), "never": dying}
    with pytest.raises(type(error)) as caught:
        run(jobs)
    assert caught.value.args[:2] == error.args[:2]
    assert "in raising" in str(caught.value.__cause__)  # where it happened
    assert "wrong" in str(caught.value.__cause__)
    assert children() == []
    assert time.monotonic() - start < 50  # the other one would go on for a minute


def test_an_error_that_cannot_be_sent() -> None:
    with pytest.raises(RuntimeError, match="what it was about") as caught:
        run({"a": raising_odd})
    assert "in raising_odd" in str(caught.value.__cause__)


def test_a_process_that_is_lost_is_named() -> None:
    with pytest.raises(TrainingError, match=r"ended before the training did \(b\).*the same command goes on"):
        run({"a": noted, "b": dying}, processes=1)
    assert children() == []


def test_a_job_that_is_stopped_stops_all() -> None:
    with pytest.raises(KeyboardInterrupt):
        run({"a": stopped_by_itself})


def test_closing_stops_what_runs(tmp_path: Path) -> None:
    jobs: dict[str, parallel.Compute] = {"a": partial(working, tmp_path, 0), "b": noted}
    with closing(parallel.run(jobs, 2, lambda *_: None, lambda _: None)) as results:
        assert next(results)[0] == "b"
        wait_for(lambda: list(tmp_path.glob("*.0")))
        assert len(children()) == 1
    assert children() == []
    assert len(list(tmp_path.glob("*.1"))) == 1  # it was told, and not killed


PROGRAM = """
import sys
from functools import partial
from pathlib import Path
from dibit.reproduce import parallel
from tests.reproduce.test_parallel import working
folder, stubborn = Path(sys.argv[1]), int(sys.argv[2])
try:
    list(parallel.run(dict.fromkeys("ab", partial(working, folder, stubborn)), 2, print, print))
except KeyboardInterrupt:
    sys.exit(130)
"""


@contextmanager
def in_a_group(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Python in a process group of its own, as a shell starts a command; nothing of it is left behind."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def started(folder: Path, stubborn: int) -> Iterator[subprocess.Popen[str]]:
    """A command of which two jobs run by now."""
    with in_a_group("-c", PROGRAM, str(folder), str(stubborn)) as process:
        wait_for(lambda: len(list(folder.glob("*.0"))) == 2 or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        yield process


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
def test_ctrl_c_is_said_once(tmp_path: Path, whole_group: bool) -> None:
    with started(tmp_path, stubborn=1) as process:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        wait_for(lambda: len(list(tmp_path.glob("*.1"))) == 2)
        time.sleep(0.5)
        assert list(tmp_path.glob("*.2")) == []
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert len(list(tmp_path.glob("*.2"))) == 2  # the second one reaches the jobs, too
    assert process.returncode == 130
    assert err == ""


def test_the_third_ctrl_c_kills(tmp_path: Path) -> None:
    with started(tmp_path, stubborn=1000) as process:
        jobs = [psutil.Process(int(path.stem)) for path in tmp_path.glob("*.0")]
        for count in (1, 2):
            os.killpg(process.pid, signal.SIGINT)
            wait_for(lambda count=count: len(list(tmp_path.glob(f"*.{count}"))) == 2)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    assert psutil.wait_procs(jobs, timeout=10)[1] == []


def test_jobs_end_when_the_command_is_killed(tmp_path: Path) -> None:
    with started(tmp_path, stubborn=0) as process:
        jobs = [psutil.Process(int(path.stem)) for path in tmp_path.glob("*.0")]
        process.kill()
        _, alive = psutil.wait_procs(jobs, timeout=10)
        assert alive == []
        assert list(tmp_path.glob("*.1")) == []
