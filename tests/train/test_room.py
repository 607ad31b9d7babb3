"""No room on the disk, limits, kills in the middle of a write: one sentence, and the last file is whole."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dibit.bench import command as bench
from dibit.cli import main
from dibit.reproduce.store import Store
from dibit.tools.files import write_atomically
from dibit.train import checkpoint

FAST = (
    "--hidden",
    "16",
    "--layers",
    "2",
    "--device",
    "cpu",
    "--recipe",
    "default",
    "--quiet",
    "--checkpoint-every",
    "1",
)


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may grow beyond this (ulimit -f)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint, not for two."""
    path = tmp_path / "tiny"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("dibit: ")
    assert error.count("\n") == 1, error
    return error


def test_a_limit_anywhere_in_a_run(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole"
    words = ["train", "--dataset", str(small), *FAST]
    assert main([*words, "--epochs", "2", "--out", str(whole)]) == 0
    size = (whole / "checkpoint.pt").stat().st_size
    before = (whole / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    for number, limit in enumerate((30, 250, 700, 1500, size // 4, size - 1)):
        with limited(limit):
            assert main([*words, "--epochs", "2", "--out", str(tmp_path / f"new{number}")]) == 1
        assert "File too large" in said(capsys)
        assert not list(tmp_path.glob(f"new{number}/*.part"))
        with limited(limit):
            assert main(["train", "--resume", "--out", str(whole), "--epochs", "4", "--quiet"]) == 1
        assert "File too large" in said(capsys)
        assert (whole / "checkpoint.pt").read_bytes() == before
    assert main(["train", "--resume", "--out", str(whole), "--epochs", "4", "--quiet"]) == 0
    assert checkpoint.load(whole / "checkpoint.pt")["state"]["epoch"] == 4


def test_a_full_disk(small: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--dataset", str(small), *FAST, "--out", str(tiny / "run")]
    assert main([*words, "--epochs", "1"]) == 0
    filled = tiny / "filled"
    with open(filled, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    capsys.readouterr()
    before = (tiny / "run" / "checkpoint.pt").read_bytes()
    assert main(["train", "--resume", "--out", str(tiny / "run"), "--epochs", "3", "--quiet"]) == 1
    assert "No space left on device" in said(capsys)
    assert (tiny / "run" / "checkpoint.pt").read_bytes() == before
    assert main([*words[:-1], str(tiny / "second"), "--epochs", "1"]) == 1
    assert "No space left on device" in said(capsys)
    filled.unlink()
    assert main(["train", "--resume", "--out", str(tiny / "run"), "--epochs", "3", "--quiet"]) in (0, 1)
    assert checkpoint.load(tiny / "run" / "checkpoint.pt")["state"]["epoch"] >= 1


def test_a_folder_that_cannot_be_written(small: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--dataset", str(small), *FAST, "--out", str(tiny / "run"), "--epochs"]
    assert main([*words, "1"]) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    capsys.readouterr()
    for more in (["2", "--resume"], ["1", "--overwrite"], ["1"]):
        assert main([*words, *more]) == 2
        assert "cannot be written: Read-only file system" in said(capsys)
    assert main(["train", "--dataset", str(small), *FAST, "--out", str(tiny / "new"), "--epochs", "1"]) == 2
    assert "cannot be written: Read-only file system" in said(capsys)


def test_results_that_cannot_be_written(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--dataset", str(small), *FAST, "--epochs", "1"]
    assert main([*words, "--out", str(tmp_path / "a"), "--json", "/dev/full"]) == 1
    captured = capsys.readouterr()
    assert "test accuracy" in captured.out  # what was measured is not lost
    assert captured.err == "dibit: error: /dev/full cannot be read or written: No space left on device.\n"
    assert main([*words, "--out", str(tmp_path / "b"), "--json", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_a_bench_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: {"elements": 1, "rows": []})
    monkeypatch.setattr("dibit.bench.show.show", lambda content: print("shown"))
    path = tmp_path / "result.json"
    path.write_text("old")
    with limited(20):
        assert main(["bench", "codec", "--json", str(path), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("shown\n", 1)
    assert f"{path} cannot be read or written: File too large" in captured.err
    assert path.read_text() == "old"


def test_a_measurement_that_cannot_be_written(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        store.open()
        store.unit({"what": "x"}, lambda: 1)
        with limited(200), pytest.raises(OSError, match="File too large"):
            store.unit({"what": "y"}, lambda: [0.5] * 100)
        assert store.unit({"what": "x"}, lambda: 2)[0] == 1
        assert store.unit({"what": "y"}, lambda: 3)[0] == 3
        assert not list(store.path.rglob("*.part"))


def test_what_is_printed_into_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["--version"]) == 1
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert "No space left on device" in said(capsys)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_write(how: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"number": 0, "weights": torch.zeros(1000)})
    last = 0
    for i in range(12):
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: a parallel operation would wait for ever
            number = last
            try:
                while True:
                    number += 1
                    checkpoint.save(path, {"number": number, "weights": torch.full((200_000,), float(number))})
            except BaseException:  # Ctrl-C
                os._exit(0)
        time.sleep(0.02 + 0.013 * i)
        os.kill(child, how)
        ends = time.monotonic() + 10
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > ends:  # it waits for a lock that another thread held at the fork
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        found = checkpoint.load(path)
        assert found["number"] >= last
        assert (found["weights"] == found["number"]).all()
        last = found["number"]
        assert {p.name for p in tmp_path.iterdir()} <= {"checkpoint.pt", ".checkpoint.pt.part"}
    assert last > 0


def test_files_of_the_users_own(tmp_path: Path) -> None:
    """A link is written through, as every tool does; a name of full length is allowed."""
    target, link, long = tmp_path / "target", tmp_path / "link", tmp_path / ("x" * 255)
    target.write_text("old")
    link.symlink_to(target)
    write_atomically(link, b"new")
    write_atomically(long, b"new")
    assert link.is_symlink()
    assert (target.read_text(), long.read_text()) == ("new", "new")
    ours: Any = write_atomically
    ours(link, b"ours", alone=True)
    assert not link.is_symlink()
    assert target.read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 3
