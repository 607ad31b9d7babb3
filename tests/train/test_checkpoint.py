"""A checkpoint that is damaged, foreign or another training's is refused in one sentence, and nothing is written."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dibit.cli import main
from dibit.train import Settings, UserError, checkpoint

FAST = ("--hidden", "8", "--layers", "2", "--device", "cpu", "--recipe", "none", "--quiet")


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"weights": {f"layer {i}": torch.randn(5, 7) for i in range(6)}, "epoch": 3, "loss": [0.5, 0.25]}


@pytest.fixture(scope="module")
def content(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    checkpoint.save(path, state)
    return path.read_bytes()


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_and_torch_reads_it_too(state: dict[str, Any], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    for found in (checkpoint.load(path), torch.load(path, weights_only=True)):
        assert found["epoch"] == 3
        assert all(torch.equal(found["weights"][name], value) for name, value in state["weights"].items())
    assert zipfile.ZipFile(path).testzip() is None


def test_every_flipped_bit_is_found(content: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    for place in [*range(0, len(content), 37), *range(len(content) - 120, len(content))]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        refused(tmp_path / "checkpoint.pt", bytes(damaged))


def test_what_is_cut_off_or_goes_on_is_found(content: bytes, tmp_path: Path) -> None:
    rng = random.Random(1)
    lengths = [0, 1, 21, 22, len(content) - 1, *(rng.randrange(len(content)) for _ in range(30))]
    for length in lengths:
        assert "cannot be read" in refused(tmp_path / "checkpoint.pt", content[:length])
    for tail in (b"\0", b"more", content):
        refused(tmp_path / "checkpoint.pt", content + tail if tail is not content else content[100:] + content[:100])


class Code:
    """A pickle that runs code."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("it-ran",)


def foreign() -> dict[str, bytes]:
    """What is no checkpoint of a training."""

    def saved(value: Any, sealed: bool = False, **how: Any) -> bytes:
        if sealed:
            path = Path("sealed.tmp")
            checkpoint.save(path, value)
            return (path.read_bytes(), path.unlink())[0]
        file = io.BytesIO()
        torch.save(value, file, **how)
        return file.getvalue()

    arrays = io.BytesIO()
    np.savez(arrays, x=np.zeros(3))
    other = {"state_dict": torch.nn.Linear(2, 2).state_dict()}
    return {
        "empty": b"",
        "text": b"hello world",
        "zeros": bytes(5000),
        "npz": arrays.getvalue(),
        "pickle": pickle.dumps({"model": 1}),
        "code": pickle.dumps(Code()),
        "code in an archive": saved({"model": Code()}),
        "code with a digest": saved({"model": Code()}, sealed=True),
        "a list": saved([1]),
        "a list with a digest": saved([1], sealed=True),
        "a dict of something else": saved(other),
        "a dict with a digest": saved(other, sealed=True),
        "a module": saved(torch.nn.Linear(2, 2)),
        "the old format": saved(other, _use_new_zipfile_serialization=False),
        "another format": saved({"format": checkpoint.FORMAT + 1}, sealed=True),
    }


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): (
            os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        )
        for path in sorted(folder.rglob("*"))
    }


class Resumed:
    """`--resume` in a copy of a finished run, one of its files changed."""

    def __init__(self, run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self.work, self.capsys = run, work, capsys

    def __call__(self, change: Callable[[Path], None], *flags: str) -> str:
        out = self.work / "copy"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.run, out)
        change(out)
        before = snapshot(out)
        self.capsys.readouterr()
        status = main(["train", "--resume", "--out", str(out), "--epochs", "8", "--quiet", *flags])
        error = self.capsys.readouterr().err
        assert (status, error.count("\n")) == (2, 1), error
        assert snapshot(out) == before
        return error


@pytest.fixture
def resumed(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Resumed:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert main(["train", "--dataset", str(small), *FAST, "--epochs", "3", "--out", str(run)]) == 0
    return Resumed(run, tmp_path, capsys)


def test_resume_refuses_what_is_no_checkpoint(resumed: Resumed, tmp_path: Path) -> None:
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    rng = random.Random(2)
    damaged = foreign() | {f"bit {i}": whole for i in range(8)} | {"half": whole[: len(whole) // 2]}
    for name, content in damaged.items():
        if name.startswith("bit"):
            place = rng.randrange(len(content))
            content = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        error = resumed(lambda out, content=content: (out / "checkpoint.pt").write_bytes(content))
        assert "cannot be read" in error, name
    assert not Path("it-ran").exists()

    def folder(out: Path) -> None:
        (out / "checkpoint.pt").unlink()
        (out / "checkpoint.pt").mkdir()

    def link(out: Path) -> None:
        (out / "checkpoint.pt").unlink()
        (out / "checkpoint.pt").symlink_to("nowhere")

    assert "checkpoint.pt is no file; move it away" in resumed(folder)
    assert "checkpoint.pt is a link to nowhere, through which dibit train does not write" in resumed(link)
    shutil.copy(tmp_path / "run" / "best.pt", tmp_path / "best.pt")
    assert "cannot be read" in resumed(lambda out: shutil.copy(tmp_path / "best.pt", out / "checkpoint.pt"))


OTHER_RUNS: dict[str, tuple[str, ...]] = {
    "--lr 0.5": ("--lr", "0.5"),
    "--model gcn": ("--model", "gcn"),
    "--hidden 16": ("--hidden", "16"),
    "--seed 1": ("--seed", "1"),
    "--recipe iexact": ("--recipe", "iexact"),
    "--dropout 0.2": ("--dropout", "0.2"),
    "--clip 0.5": ("--clip", "0.5"),
    "--standardize": ("--standardize",),
    "planted:100": ("--dataset", "planted:100"),
}


@pytest.mark.slow
def test_resume_refuses_the_checkpoint_of_another_run(resumed: Resumed, small: Path, tmp_path: Path) -> None:
    for what, flags in OTHER_RUNS.items():
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        assert main(["train", "--dataset", str(small), *FAST, "--epochs", "1", "--out", str(other), *flags]) == 0
        error = resumed(lambda out, other=other: shutil.copy(other / "checkpoint.pt", out / "checkpoint.pt"))
        assert what in error
        now = what.split()[0] if "planted" not in what else str(small)
        assert error.count(now) >= 2 if "planted" not in what else now in error


def test_resume_refuses_other_settings(resumed: Resumed) -> None:
    for what, flags in OTHER_RUNS.items():
        error = resumed(lambda out: None, *flags)
        assert what in error
        assert "was started with" in error


def test_resume_refuses_settings_that_were_changed_in_the_file(resumed: Resumed) -> None:
    """settings.yaml says what is trained; the checkpoint remembers."""

    def change(out: Path) -> None:
        path = out / "settings.yaml"
        path.write_text(path.read_text().replace("lr: 0.01", "lr: 0.02"))

    error = resumed(change)
    assert "--lr 0.01" in error
    assert "--lr 0.02" in error


def now_of(settings: Settings) -> dict[str, Any]:
    own = {"recipe": "none", "seed": 0, "config": "None", "graph": "g", "split": "s"}
    return {**own, "settings": settings.flat()}


@pytest.mark.parametrize(
    "name", [name for name in Settings().flat() if name not in ("recipe", "seed", "seeds", "compare")]
)
def test_each_setting_but_the_free_ones(name: str, tmp_path: Path) -> None:
    """Whatever settings there will be."""
    before = Settings().updated(epochs=5)
    value = before.flat()[name]
    other = not value if isinstance(value, bool) else "other" if isinstance(value, str | None) else value + 1
    now = now_of(before.updated(**{name: other}))
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"format": checkpoint.FORMAT, **now_of(before), "state": {"epoch": 3}})
    if name in checkpoint.FREE:
        assert checkpoint.of_this_training(path, now) is not None
        return
    with pytest.raises(UserError, match="was made with") as caught:
        checkpoint.of_this_training(path, now)
    flag = "--" + name.replace("_", "-")
    assert str(caught.value).count(flag) == 2
    assert str(other) in str(caught.value) or isinstance(value, bool)


@pytest.mark.parametrize("what", ["recipe", "seed", "config", "graph", "split"])
def test_what_else_a_training_is_made_of(what: str, tmp_path: Path) -> None:
    now = now_of(Settings())
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"format": checkpoint.FORMAT, **now, "state": {"epoch": 3}})
    assert checkpoint.of_this_training(path, now) is not None
    with pytest.raises(UserError, match="9"):
        checkpoint.of_this_training(path, {**now, what: "99"})


def test_a_checkpoint_that_has_gone_further(tmp_path: Path) -> None:
    now = now_of(replace(Settings()).updated(epochs=10))
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"format": checkpoint.FORMAT, **now, "state": {"epoch": 11}})
    with pytest.raises(UserError, match="after epoch 11; expected at least as many --epochs, not 10"):
        checkpoint.of_this_training(path, now)
