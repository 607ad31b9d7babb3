"""Nothing is gone on with, replaced or removed that the run has not made, and nothing is written through a link."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dibit.cli import main
from dibit.reproduce.store import Store
from dibit.tools.files import json_path
from dibit.tools.lock import NAME, Lock
from dibit.train import UserError, loop
from tests.train.test_folder import FAST, folder_of, snapshot

WHERE = ("default", "default/seed0", "none", "none/seed1")
FILES = ("checkpoint.pt", "best.pt", ".checkpoint.pt.part", ".best.pt.part")


def obstacles(outside: Path) -> Iterator[tuple[str, Any]]:
    """What may be in the place of what a run of several trainings is about to write."""
    for where in WHERE:
        yield f"{where} linked", lambda out, where=where: link(out / where, outside)
        yield f"{where} linked to nothing", lambda out, where=where: link(out / where, outside / "nowhere")
        yield f"{where} a file", lambda out, where=where: content(out / where)
    for where in ("default/seed0", "none/seed1"):
        for name in FILES:
            path = f"{where}/{name}"
            yield f"{path} foreign", lambda out, path=path: content(out / path)
            yield f"{path} of another run", lambda out, path=path: copied(out, out / path)
            yield f"{path} linked", lambda out, path=path: link(out / path, outside / "best.pt")
            yield f"{path} linked to nothing", lambda out, path=path: link(out / path, outside / "nowhere")
            yield f"{path} a folder", lambda out, path=path: (out / path).mkdir(parents=True)
    yield "settings.yaml linked", lambda out: moved(out / "settings.yaml", outside)
    yield "manifest.json linked", lambda out: moved(out / "manifest.json", outside)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def content(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"precious")


def copied(out: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(out / "checkpoint.pt", path)


def moved(path: Path, outside: Path) -> None:
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)


def test_overwrite_replaces_only_what_the_run_has_made(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--dataset", str(small), *FAST, "--epochs", "1", "--out"]
    run, outside = tmp_path / "run", tmp_path / "outside"
    assert main([*words, str(run)]) == 0
    again = [*words, str(tmp_path / "out"), "--compare", "--seeds", "2", "--overwrite"]
    trained: list[str] = []
    monkeypatch.setattr(loop, "train_one", lambda *_, **__: trained.append("reached"))
    for name, put in obstacles(outside):
        for folder in (outside, tmp_path / "out"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run, tmp_path / "out")
        for place in (outside, outside / "seed0"):
            place.mkdir()
            for file in ("best.pt", "checkpoint.pt"):
                shutil.copy(run / file, place / file)
        put(tmp_path / "out")
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main(again) == 2, name
        said = capsys.readouterr().err
        assert (said.count("\n"), "give another --out" in said) == (1, True), (name, said)
        assert snapshot(tmp_path) == before, name
    assert not trained


def test_a_run_that_is_replaced_begins_at_its_first_epoch(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["train", "--dataset", str(small), *FAST, "--out", str(out), "--overwrite", "--json"]
    for epochs in (4, 2):
        assert main([*words, str(tmp_path / f"{epochs}.json"), "--epochs", str(epochs)]) == 0
        assert len(json.loads((tmp_path / f"{epochs}.json").read_text())["runs"][0]["loss"]) == epochs


def test_a_run_of_an_older_version_without_a_list_goes_on(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["train", "--dataset", str(small), *FAST, "--out", str(out), "--epochs", "2"]) == 0
    (out / "manifest.json").unlink()
    assert main(["train", "--resume", "--out", str(out), "--epochs", "3", "--quiet"]) == 0
    listed = set(json.loads((out / "manifest.json").read_text())["files"])
    assert {"settings.yaml", "checkpoint.pt", "best.pt"} <= listed


@pytest.mark.parametrize("seed", range(4))
def test_what_comes_while_a_run_is_in_its_folder(seed: int, tmp_path: Path) -> None:
    """Each file is looked at again before it is written."""
    rng, out, outside = random.Random(seed), tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    with folder_of(out, compare=True) as folder:
        folder.check()
        folder.open()
        name, put = rng.choice([each for each in obstacles(outside) if each[0].endswith(("linked", "foreign"))][:-2])
        put(out)
        before = snapshot(outside)

        def write() -> None:
            for where in ("default/seed0", "none/seed1"):
                for file in (out / where / "checkpoint.pt", out / where / "best.pt"):
                    folder.note(file)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(b"ours")

        with pytest.raises(UserError, match="move it away, or give another --out"):
            write()
        assert snapshot(outside) == before, name


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "where", ["units/x.json", "runs/a/checkpoint.pt", "memory.json", "report.html", "units", "runs"]
)
@pytest.mark.parametrize("linked", [False, True])
def test_a_reproduction_replaces_only_its_own(where: str, linked: bool, overwrite: bool, tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    with Store(out) as store:
        store.check()
        store.open()
        (out / "units").rmdir()
    outside.mkdir()
    (outside / "x.json").write_text("precious")
    if linked:
        link(out / where, outside if "." not in where else outside / "x.json")
    elif "." in where:
        content(out / where)
    else:
        return
    before = snapshot(tmp_path)
    with Store(out, overwrite) as store, pytest.raises(UserError, match="move it away, or give another --out"):
        store.check()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("first", "second"), [("a", "a/default/seed0"), ("a/default/seed0", "a"), ("a/b", "a")])
def test_a_run_above_or_below_another(first: str, second: str, tmp_path: Path) -> None:
    (tmp_path / first).mkdir(parents=True)
    (tmp_path / second).mkdir(parents=True, exist_ok=True)
    one, other = Lock(tmp_path / first), Lock(tmp_path / second)
    one.acquire()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
        other.acquire()
    assert not (tmp_path / second / NAME).exists()
    one.release()
    other.acquire()
    other.release()
    beside = Lock(tmp_path / "beside")
    (tmp_path / "beside").mkdir()
    one.acquire()
    beside.acquire()
    for lock in (one, beside):
        lock.release()


def test_a_new_folder_within_that_of_a_run_is_not_made(tmp_path: Path) -> None:
    with folder_of(tmp_path / "run") as folder:
        folder.open()
        before = snapshot(tmp_path)
        with folder_of(tmp_path / "run" / "default" / "seed0") as inner, pytest.raises(UserError, match="in use by"):
            inner.check()
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"[" * 1000,
        b'{"a":' * 166,
        b'{"process":1e400,"host":"h"}',
        b'{"process":NaN,"host":"h"}',
        b'{"process":-1,"host":"h"}',
        b'{"process":true,"host":"h"}',
        b'{"process":"1","host":"h"}',
        b'{"process":1,"host":3}',
        b'{"process":' + b"9" * 900 + b',"host":"h"}',
        b'{"process":1}',
        b"\xff\xfe",
        random.Random(0).randbytes(2000),
    ],
)
def test_a_lock_that_another_program_holds(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    file = os.open(tmp_path / NAME, os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        for folder in (tmp_path, tmp_path / "below"):
            folder.mkdir(exist_ok=True)
            with pytest.raises(UserError, match="in use by another process; wait"):
                Lock(folder).acquire()
    finally:
        os.close(file)
    Lock(tmp_path / "below").acquire()


def test_names_that_cannot_be_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train_one", lambda *_, **__: pytest.fail("the training has begun"))
    (tmp_path / "dangling").symlink_to(tmp_path / "missing" / "x")
    long, deep = "a" * 300, "x/" * 2100 + "y"
    outs = [long, f"new/{long}", f"new/{long}/more", deep, "/dev/null", "/dev/null/x", f"{small}/x", str(small)]
    files = [long, f"{small}/x", "nodir/x", ".", "/proc/x", "/sys/x", "dangling", f"/{'x/' * 2100}y"]
    words = ["train", "--dataset", str(small), *FAST, "--epochs", "1"]
    before = snapshot(tmp_path)
    for more in (*(["--out", out] for out in outs), *(["--out", "new", "--json", file] for file in files)):
        assert main([*words, *more]) == 2, more[-1][:50]
        said = capsys.readouterr().err
        assert (said.count("\n"), len(said) < 600) == (1, True), said
        assert snapshot(tmp_path) == before, more[-1][:50]


def test_a_drive_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "drive"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        (path / "old.json").write_text("old")
        assert json_path(str(path / "new.json")) == path / "new.json"
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        for name in ("old.json", "new.json"):
            with pytest.raises(UserError, match=f"--json .*{name} cannot be written: Read-only file system"):
                json_path(str(path / name))
        assert os.listdir(path) == ["old.json"]
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
