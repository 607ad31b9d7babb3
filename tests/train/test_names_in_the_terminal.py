"""What a user has named appears as it is, whatever rich would read in it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from dibit.bench.show import show
from dibit.cli import main
from dibit.tools import progress as reproducing
from dibit.tools.errors import printable, shown
from dibit.train import progress as training
from tests.train.conftest import small_arrays

NAMES = (
    "a[b]",
    "[bold]x[",
    "[",
    "[]",
    "[red]",
    "x[0]y",
    ":warning:",
    "\\[b]",
    "[link=x]y",
    "a[b]c[",
    "[!]",
    "[@click=x]",
    "ü",
    "a b",
)


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        """It is."""
        return True


def terminals(monkeypatch: pytest.MonkeyPatch) -> dict[str, Terminal]:
    """Make both streams terminals of many columns and no colours."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    streams = {"stdout": Terminal(), "stderr": Terminal()}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    return streams


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_a_training(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminals(monkeypatch)
    folder = tmp_path / "x"
    folder.mkdir()
    np.savez(folder / f"{name}.npz", **small_arrays(nodes=24))
    words = ["train", "--dataset", str(folder / f"{name}.npz"), "--hidden", "8", "--layers", "1", "--epochs", "1"]
    assert main([*words, "--recipe", "none", "--out", str(tmp_path / name)]) == 0
    assert f"sage on {name} (24 nodes" in terminal["stdout"].getvalue()
    assert f", on {folder / name}.npz, 1 epochs" in terminal["stderr"].getvalue()


@pytest.mark.parametrize("name", [*NAMES, "[/]", "[/bold]", "[bold]x[/bold]"])
@pytest.mark.parametrize(
    "words",
    [
        ("--dataset", "{}.npz"),
        ("--dataset", "{}x"),
        ("--config", "{}.yaml"),
        ("--model", "{}"),
        ("--json", "{}x/y/z"),
        ("{}",),
    ],
    ids=" ".join,
)
def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: tuple[str, ...]) -> None:
    terminal = terminals(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["train", *(word.format(name) for word in words)]) == 2
    said = terminal["stderr"].getvalue()
    assert name in said or repr(name)[1:-1] in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", [*NAMES, "[/]", "[/bold]"])
def test_tables_of_measurements(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminals(monkeypatch)
    row = {"setting": name, "bytes_per_node": 1.0, "bytes": {"0": 1.0}, "errors": {"0": 0.5}}
    graph = {"graph": name, "nodes": 24, "rows": [row]}
    content = {
        "bench": "gradient",
        "machine": {"processor": f"cpu {name}", "threads": 1},
        "versions": dict.fromkeys(("torch", "torch_geometric", "numba"), "1"),
        "results": {"epochs": [0], "model": "sage", "graphs": [graph], "rows": [{"setting": name, "failed": name}]},
    }
    show(content)
    said = terminal["stdout"].getvalue()
    for line in (f"sage on {name} (24 nodes)", f"cpu {name}, 1 threads", f"{name} failed: {name}"):
        assert line in said
    assert said.count(name) == 5


@pytest.mark.parametrize("name", [*NAMES, "[/]", "[/bold]"])
def test_progress(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminals(monkeypatch)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "")
    with training.EpochProgress(name, 3, 0) as bar:
        bar.within(name, 1, 2)
        bar.say(name)
    with reproducing.MeasurementProgress(name, 3) as bar:
        bar.begin(name)
        bar.note(name)
    assert terminal["stderr"].getvalue().count(name) >= 4


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[31mb\nc\u202ed") == "a\\x1b[31mb\\nc\\u202ed"
    assert printable("[ü]") == "[ü]"
    assert shown("x" * 1000, 50).startswith("x" * 30 + "...")
    assert len(shown("x" * 1000, 50)) == 50


def test_a_name_that_the_terminal_cannot_show_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "ü日.npz", **small_arrays(nodes=24))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    words = [
        "train",
        "--dataset",
        str(tmp_path / "ü日.npz"),
        "--hidden",
        "8",
        "--layers",
        "1",
        "--epochs",
        "1",
        "--quiet",
    ]
    assert main([*words, "--recipe", "none", "--out", str(tmp_path / "run")]) == 0
    stream.flush()
    assert b"\\xfc\\u65e5" in stream.buffer.getvalue()
