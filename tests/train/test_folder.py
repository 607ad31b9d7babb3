"""The folder of a run: what may be removed, who is in it, what a kill leaves."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dibit.cli import main
from dibit.reproduce.store import Store
from dibit.tools.files import part
from dibit.tools.lock import NAME, Lock
from dibit.tools.manifest import Manifest
from dibit.train import Settings, UserError
from dibit.train.run_folder import MANIFEST, SETTINGS, RunFolder

FAST = ("--hidden", "8", "--layers", "2", "--device", "cpu", "--recipe", "default", "--quiet")
MADE = ("checkpoint.pt", "best.pt", "events.out.tfevents.0000000001.0")


def folder_of(out: Path, **settings: Any) -> RunFolder:
    return RunFolder(Settings().updated(out=str(out), **settings))


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything below a folder: a link's target, a file's content, True for a folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
    return found


def make_run(out: Path) -> list[Path]:
    """What a run of several trainings writes."""
    with folder_of(out) as folder:
        folder.check()
        folder.open()
        files = [
            out / recipe / f"seed{seed}" / name for recipe in ("none", "small") for seed in (0, 1) for name in MADE
        ]
        for file in files:
            folder.note(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"ours")
        part(files[0]).write_bytes(b"half of it")  # a kill
    return [*files, part(files[0])]


def overwrite(out: Path) -> None:
    with folder_of(out, overwrite=True) as folder:
        folder.check()
        folder.open()


@pytest.mark.parametrize("seed", range(12))
def test_overwrite_removes_what_the_run_made_and_nothing_else(seed: int, tmp_path: Path) -> None:
    rng, out, outside = random.Random(seed), tmp_path / "run", tmp_path / "outside"
    ours = make_run(out)
    for name in ("seed0", "deep/seed1", "."):
        (outside / name).mkdir(parents=True, exist_ok=True)
        for file in (*MADE, ".checkpoint.pt.part", ".a-b", "thesis.tex"):
            (outside / name / file).write_bytes(b"precious")
    # other people's things, named as ours are
    folders = [out, out / "none", out / "none" / "seed0", out / "mine", out / "mine" / "seed0", out / "small" / "seed7"]
    theirs: list[Path] = []
    for i in range(rng.randrange(3, 12)):
        at = rng.choice(folders)
        at.mkdir(parents=True, exist_ok=True)
        path = at / rng.choice((f"notes{i}", f".a-{i}", f"seed{i + 2}", "events.out.tfevents.9.mine", "best.pt.old"))
        if os.path.lexists(path):
            continue
        theirs.append(path)
        kind = rng.randrange(4)
        if kind == 0:
            path.symlink_to(outside)
        elif kind == 1:
            path.symlink_to(outside / "thesis.tex")
        elif kind == 2:
            path.mkdir()
            (path / "checkpoint.pt").write_bytes(b"theirs")
        else:
            path.write_bytes(b"theirs")
    moved = rng.choice((None, out / "none", out / "none" / "seed1", ours[3]))
    if moved is not None:  # to another disk, with a link in its place
        shutil.move(moved, outside / "moved")
        moved.symlink_to(outside / "moved")
    before, elsewhere = snapshot(out), snapshot(outside)
    overwrite(out)
    assert snapshot(outside) == elsewhere
    after = snapshot(out)
    through = tuple(str(path.relative_to(out)) for path in (moved,) if path is not None and path.is_symlink())
    for name, was in before.items():
        path = out / name
        reached = any(name == each or name.startswith(each + "/") for each in through)
        if path in ours and not reached:
            assert name not in after
        elif name not in (SETTINGS, MANIFEST) and not (was is True and name not in after):
            assert after[name] == was, name
    for path in theirs:
        assert os.path.lexists(path)
    for name, was in before.items():  # a folder goes only if it was ours alone
        if was is True and name not in after:
            assert not any(str(path).startswith(str(out / name) + "/") for path in theirs)


@pytest.mark.slow
def test_a_real_run_is_replaced_whole(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "--dataset", str(small), *FAST, "--epochs", "1", "--compare", "--seeds", "2", "--out", str(out)]
    assert main(words) == 0
    listed = json.loads((out / MANIFEST).read_text())["files"]
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found - {MANIFEST} <= set(listed)
    assert sum("tfevents" in name for name in found) == 4
    (out / "default" / "seed0" / "notes.txt").write_text("mine")
    assert main(["train", "--dataset", str(small), *FAST, "--epochs", "1", "--out", str(out), "--overwrite"]) == 0
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert left == {SETTINGS, MANIFEST, "checkpoint.pt", "best.pt", "default/seed0/notes.txt"}


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b"[]",
        b"3",
        b"{}",
        b'{"made by": "dibit train"}',
        b'{"files": 3}',
        b'{"files": [3]}',
        b'{"files": ["../outside/thesis.tex"]}',
        b'{"files": ["/etc/passwd"]}',
        b'{"files": ["a/../../outside/thesis.tex"]}',
        b'{"files": ["."]}',
        b'{"files": [""]}',
        b'{"files": ["a\\u0000b"]}',
    ],
)
@pytest.mark.parametrize("command", ["train", "reproduce"])
def test_without_a_list_nothing_is_removed(command: str, content: bytes | None, tmp_path: Path) -> None:
    """Of an older version, damaged, or made up by someone."""
    out = tmp_path / "run"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "thesis.tex").write_text("precious")
    out.mkdir()
    (out / SETTINGS).write_text("lr: 0.1\n")
    manifest = out / (MANIFEST if command == "train" else "reproduce.json")
    if content is not None:
        manifest.write_bytes(content)
    elif command == "reproduce":
        manifest.write_bytes(b'{"made by": "dibit reproduce"}\n')
    before = snapshot(tmp_path)
    made = folder_of(out, overwrite=True) if command == "train" else Store(out, overwrite=True)
    with made, pytest.raises(UserError, match="give another --out") as caught:
        made.check()
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_folder_in_the_place_of_a_file_stays(tmp_path: Path) -> None:
    out = tmp_path / "run"
    file = make_run(out)[0]
    file.unlink()
    file.mkdir()
    (file / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"cannot be written: Is a directory .*checkpoint.pt"):
        overwrite(out)
    assert (file / "thesis.tex").read_text() == "precious"


def test_overwrite_begun_anew_after_a_kill_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, counted = os.unlink, [0]

    class Killed(BaseException):
        pass

    def unlink(*args: Any, **kwargs: Any) -> None:
        counted[0] -= 1
        if not counted[0]:
            raise Killed
        remove(*args, **kwargs)

    for after in range(1, 9):
        out = tmp_path / f"run{after}"
        ours = make_run(out)
        (out / "notes.txt").write_text("mine")
        counted[0] = after
        monkeypatch.setattr(os, "unlink", unlink)
        with pytest.raises(Killed):
            overwrite(out)
        monkeypatch.undo()
        overwrite(out)
        assert not any(path.exists() for path in ours)
        assert (out / "notes.txt").read_text() == "mine"


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with folder_of(out) as first:
        first.check()
        first.open()
        for changes in ({}, {"resume": True}, {"overwrite": True}):
            with folder_of(out, **changes) as second, pytest.raises(UserError) as caught:
                second.check()
            assert f"in use by process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    assert not (out / NAME).exists()
    with folder_of(out, resume=True) as again:
        again.check()


def test_both_have_looked_before_one_of_them_writes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with folder_of(out) as first, folder_of(out) as second:
        first.check()
        second.check()
        first.open()
        with pytest.raises(UserError, match="in use by process"):
            second.open()
    with folder_of(out) as third, pytest.raises(UserError, match="holds a run already"):
        third.open()


_HOLDS = """
import sys, time
from pathlib import Path
from dibit.tools.lock import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire()
print("locked", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.slow
def test_a_kill_leaves_no_lock(how: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        lock = Lock(tmp_path)
        with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
            lock.acquire()
        process.send_signal(how)
        process.wait()
    assert (tmp_path / NAME).exists()
    lock.acquire()
    lock.release()
    assert not (tmp_path / NAME).exists()


def test_a_worker_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    parent = os.fork()
    if not parent:
        (tmp_path / "other").mkdir()
        (tmp_path / "one").mkdir()
        Lock(tmp_path / "one").acquire()
        lock = Lock(tmp_path / "other")
        lock.acquire()
        if os.fork():
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / "child").touch()
        time.sleep(5)
        os._exit(0)
    os.waitpid(parent, 0)
    until = time.monotonic() + 20
    while not (tmp_path / "child").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    lock = Lock(tmp_path / "other")
    lock.acquire()
    lock.release()


def test_a_lock_whose_file_goes_while_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    flock = fcntl.flock

    def late(file: int, how: int) -> None:
        first.release()  # the file that was opened has no name any more
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second.acquire()
    monkeypatch.undo()
    with pytest.raises(UserError, match="in use by process"):
        Lock(tmp_path).acquire()


def test_only_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    """The file of the lock comes and goes meanwhile."""
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            status = 0
            for _ in range(150):
                lock = Lock(tmp_path)
                try:
                    lock.acquire()
                except UserError:
                    continue
                try:
                    os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))
                    os.unlink(tmp_path / "inside")
                except FileExistsError:
                    status = 1
                lock.release()
            os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / NAME).symlink_to(tmp_path / "precious")
    with folder_of(tmp_path / "run") as folder, pytest.raises(UserError, match="cannot be written"):
        folder.open()
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_killed_before_its_settings_can_be_started_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with folder_of(out) as folder:
        folder.open()
    (out / SETTINGS).unlink()
    with folder_of(out) as folder:
        folder.check()
        folder.open()
    assert (out / SETTINGS).exists()


def test_a_list_is_whole_whatever_is_added(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "list.json", "a test")
    for i in range(5):
        manifest.add(tmp_path / f"file {i}\n", tmp_path / "a" / "b")
        again = Manifest(tmp_path, "list.json", "a test")
        again.read()
        assert again._files == manifest._files
    assert len(manifest._files or []) == 12
