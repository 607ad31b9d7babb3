"""Whatever is typed ends in one sentence, not in a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from dibit.cli import main
from dibit.train import loop
from tests.train.conftest import small, small_arrays

__all__ = ["small"]  # a fixture

HUGE = "9" * 30
NUMBERS = (
    "0",
    "-1",
    "-1e-3",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e-999",
    HUGE,
    "1" * 5000,
    "",
    " ",
    "x",
    "1.5",
    "0x10",
    "½",
    "[" * 3000,
    "null",
    "true",
    "1,2",
    "2147483648",
    "9223372036854775807",
)
TEXTS = (
    "",
    " ",
    "x",
    "\n",
    "\udcff",
    "[/]",
    "[" * 3000,
    "a" * 5000,
    "null",
    "{}",
    "&a [*a]",
    "../..",
    "/",
    "//",
    "planted:",
    "planted:0",
    "planted:-5",
    "planted:1e5",
    f"planted:{HUGE}",
    "planted:999999999999",
    f"planted:{'9' * 5000}",
    "planted:²³⁴",
    ".npz",
    "cora.npz/",
    "/dev/null",
    "/dev/zero",
    "cuda:-1",
    "cuda:99",
    "cpu:5",
    "meta",
    "mps",
    "cuda:x",
)


@pytest.mark.parametrize(
    "flag",
    [
        "svd",
        "split",
        "layers",
        "hidden",
        "dropout",
        "heads",
        "alpha",
        "theta",
        "epochs",
        "lr",
        "clip",
        "weight-decay",
        "patience",
        "eval-every",
        "batch-size",
        "parts",
        "clusters",
        "walk-length",
        "steps",
        "depth",
        "workers",
        "bits",
        "block",
        "seed",
        "seeds",
        "checkpoint-every",
        "neighbors",
    ],
)
def test_numbers(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _try(flag, NUMBERS, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    "flag",
    ["dataset", "model", "norm", "aggr", "precision", "loader", "recipe", "levels", "device", "config", "json", "out"],
)
def test_texts(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _try(flag, TEXTS, tmp_path, monkeypatch, capsys)


def _try(
    flag: str,
    values: tuple[str, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused in one line with nothing written, or let through to the training."""

    class Reached(BaseException):
        """The training would begin."""

    def begin(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(loop, "train_one", begin)
    monkeypatch.chdir(folder)
    for value in values:
        words = [] if flag == "dataset" else ["--dataset", "planted:200"]
        try:
            status = main(["train", *words, f"--{flag}={value}", "--quiet"])
        except Reached:
            continue
        said = capsys.readouterr().err
        assert status in (1, 2), (flag, value[:50])
        assert said.count("\n") == 1, (flag, value[:50], said)
        assert said.startswith("dibit: error: ")
        assert len(said) < 900, (flag, value[:50])
        assert flag == "out" or os.listdir(folder) in ([], ["runs"]), (flag, value[:50])


def test_too_little_memory_is_a_sentence(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--dataset", str(small), "--quiet", "--out", str(tmp_path / "run")]
    errors = (
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    )
    for error in errors:

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(loop, "train_one", fail)
        assert main([*words, "--overwrite"]) == 1
        said = capsys.readouterr().err
        assert "not enough memory" in said
        assert said.count("\n") == 1
    monkeypatch.setattr(loop, "train_one", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):  # a fault of ours stays a traceback
        main([*words, "--overwrite"])


@pytest.mark.parametrize("loader", [("neighbor", "--batch-size", "1"), ("cluster", "--parts", "60", "--clusters", "1")])
@pytest.mark.slow
def test_a_batch_of_one_node_is_a_sentence(
    tmp_path: Path, loader: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "g.npz", **{**small_arrays(), "edge_index": np.array([[0], [1]])})
    words = ["train", "--dataset", str(tmp_path / "g.npz"), "--hidden", "8", "--quiet", "--out", str(tmp_path / "run")]
    assert main([*words, "--loader", *loader]) in (1, 2)  # 2: pymetis is not there
    said = capsys.readouterr().err
    assert "a batch has a single node" in said or "pip install" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("flag", ["lr", "weight-decay", "theta", "clip"])
def test_numbers_beyond_float32(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"--{flag}", "1e39"]) == 2
    assert f"--{flag} is 1e+39, expected a number of at most 1e+38." in capsys.readouterr().err


def test_trust_and_split_are_in_the_settings(small: Path, tmp_path: Path) -> None:
    words = ["train", "--dataset", str(small), "--hidden", "8", "--epochs", "1", "--quiet", "--trust"]
    assert main([*words, "--out", str(tmp_path / "run"), "--json", str(tmp_path / "x.json")]) == 0
    settings = json.loads((tmp_path / "x.json").read_text())["settings"]
    assert (settings["trust"], settings["split"]) == (True, None)
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--no-trust", "--epochs", "2", "--quiet"]) == 0
