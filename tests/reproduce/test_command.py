"""The command on a small graph: what it writes, bad input, stopping and going on."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dibit.cli import main
from dibit.recipes import RECIPES
from dibit.reproduce.variants import ACCURACY, BLOCKS, DISTRIBUTION
from dibit.tools.errors import install
from tests.train.conftest import command, small

pytestmark = pytest.mark.slow

__all__ = ["small"]  # a fixture

FAST = ("--epochs", "3", "--seeds", "2", "--rounds", "1", "--quiet")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`accuracy`, `variance` and `distribution` on a small graph, in one folder."""
    import numpy as np

    from tests.train.conftest import small_arrays

    folder = tmp_path_factory.mktemp("reproduce")
    graph = folder / "small.npz"
    np.savez(graph, **small_arrays(nodes=200))
    for section in ("accuracy", "variance", "distribution"):
        words = [
            "reproduce",
            section,
            "--out",
            folder / "out",
            "--dataset",
            graph,
            "--json",
            folder / "all.json",
            *FAST,
        ]
        assert main([str(word) for word in words]) == 0
    return {"folder": folder / "out", "graph": graph, "json": json.loads((folder / "all.json").read_text())}


def test_sections_end_up_in_one_page_and_one_file(done: dict[str, Any]) -> None:
    assert list(done["json"]) == ["variance", "distribution", "accuracy"]
    assert all(section["finished"] for section in done["json"].values())
    asked = {"full", "datasets", "root", "seeds", "epochs", "rounds", "draws"}
    assert all(set(section["settings"]) == asked for section in done["json"].values())
    page = (done["folder"] / "report.html").read_text()
    assert all(f'id="{name}"' in page for name in done["json"])
    assert not (done["folder"] / "runs").exists() or not list((done["folder"] / "runs").iterdir())


def test_accuracy(done: dict[str, Any]) -> None:
    results = done["json"]["accuracy"]["results"]
    assert [row["recipe"] for row in results["rows"]] == list(ACCURACY) * 4
    assert {row["model"] for row in results["rows"]} == {"sage", "gcn", "gcn2", "gat"}
    assert all(len(row["test"]) == 2 for row in results["rows"])
    assert all((row["difference"] is None) == (row["recipe"] == "FP32") for row in results["rows"])
    assert next(row for row in results["rows"] if row["model"] == "gcn2")["layers"] == 16
    assert all(row["mark"] == "remembered" for row in results["paper"])


def test_variance(done: dict[str, Any]) -> None:
    (measured,) = done["json"]["variance"]["results"]["measured"]
    # 8 activations in each of two settings, less two of EXACT: 8 features projected to 1 have no range to speak of
    assert len(measured["rows"]) == 14
    for row in measured["rows"]:
        for levels in ("uniform", "normal", "fitted"):
            found = row[levels]
            assert abs(found["monte_carlo"] - found["analytic"]) < 5 * found["error"]
        assert row["fitted"]["analytic"] <= row["uniform"]["analytic"] + 1e-12
        assert row["fitted"]["analytic"] <= row["normal"]["analytic"] + 1e-4  # the grid of candidates


def test_distribution(done: dict[str, Any]) -> None:
    results = done["json"]["distribution"]["results"]
    rows = results["graphs"][0]["rows"]
    assert {row["epoch"] for row in rows} == {0, 3}
    assert {row["setting"] for row in rows} == set(DISTRIBUTION)
    assert all(sum(row["histogram"]) == pytest.approx(1, abs=1e-4) for row in rows)
    assert all(set(row["divergence"]) - {"uniform"} == set(row["models"]) for row in rows)
    assert len(results["verdicts"]) >= len(DISTRIBUTION)


def test_the_same_command_again_measures_nothing(
    done: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dibit.reproduce import distribution

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(distribution, "measure", fail)
    words = ["reproduce", "distribution", "--out", done["folder"], "--dataset", done["graph"], *FAST]
    assert main([str(word) for word in words]) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(AssertionError, match="measured again"):
        main([str(word) for word in [*words, "--epochs", "4"]])


def test_blocks_without_the_timing(small: Path, tmp_path: Path) -> None:
    from dibit.reproduce import blocks
    from dibit.reproduce.plan import Reproduction, ReproductionPlan
    from dibit.reproduce.store import Store

    run = Reproduction(ReproductionPlan(datasets=(str(small),), seeds=1, epochs=2, draws=2), Store(tmp_path / "out"))
    run.store.open()
    timing, *units = blocks.measurements(run)
    assert timing.name == blocks.TIMING
    table = blocks.table(run, {unit.name: unit.compute(lambda _: None) for unit in units})
    (graph,) = table["graphs"]
    assert [row["setting"] for row in graph["rows"]] == list(BLOCKS)
    saved = [row["saved_mb"] for row in graph["rows"]]
    assert saved == sorted(saved, reverse=True)  # larger blocks, fewer bytes
    assert table["timing"] is None
    assert graph["rows"][0]["gradient_error"] == {}
    assert all(set(row["gradient_error"]) == {"0", "2"} for row in graph["rows"][1:])


def test_timing_is_interleaved_and_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    from dibit.experiments.shapes import Shape
    from dibit.reproduce import blocks

    shape = Shape("tiny", 300, 2000, 32, 32, 5, 2, 0.5, 100)
    found = blocks.time_steps(shape, 3, lambda _: None)
    rows = {row["setting"]: row for row in found["rows"]}
    assert tuple(rows) == BLOCKS
    assert rows["EXACT"]["to_exact"] == rows["FP32"]["to_fp32"] == 1
    assert all(0 < row["low"] <= row["to_exact"] <= row["high"] for row in rows.values())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["memry", "--out", "x"],
            "no section 'memry', expected memory, blocks, variance, distribution, accuracy, tuned or all",
        ),
        (["memory"], "--out is missing"),
        (["accuracy", "--out", "x", "--seeds", "0"], "--seeds is 0"),
        (["accuracy", "--out", "x", "--seeds", "two"], "--seeds is 'two', expected a whole number."),
        (["accuracy", "--out", "x", "--dataset", "coar"], "Did you mean 'cora'"),
        (
            ["memory", "--out", "x", "--json", "missing/x.json"],
            "--json missing/x.json: the folder missing does not",
        ),
        (["memory", "--out", "."], "holds something else (mine.txt), expected a new folder"),
        (["memory", "--out", "mine.txt"], "--out mine.txt is a file"),
        (["memory", "--ot", "x"], "There is no flag --ot. Did you mean '--out'"),
        (["accuracy", "--out", "x", "--cell", "cora-gcn"], "--cell does not apply to accuracy, only to tuned"),
        (["all", "--out", "x", "--recipe", "none"], "--recipe does not apply to all, only to tuned"),
        (["memory", "--out", "x", "--jobs", "2"], "--jobs does not apply to memory, only to tuned"),
        (
            ["tuned", "--out", "x", "--dataset", "cora"],
            "--dataset does not apply to tuned, whose graphs --cell chooses",
        ),
        (["tuned", "--out", "x", "--full"], "--full does not apply to tuned, whose graphs --cell chooses"),
        (
            ["tuned", "--out", "x", "--cell", "cora-gnc"],
            "There is no cell 'cora-gnc', expected amazon-computers-sage, ",
        ),
        (["tuned", "--out", "x", "--cell", "all", "crao-gcn"], "or all. Did you mean 'cora-gcn'"),
        (
            ["tuned", "--out", "x", "--recipe", "dflt"],
            f"--recipe is 'dflt', expected {', '.join(RECIPES)}, none",
        ),
        (
            ["tuned", "--out", "x", "--cell", "cora-gcn", "--recipe", "none", "exact"],
            "--recipe is exact, which none of these cells has; expected none, default.",
        ),
        (["tuned", "--out", "x", "--jobs", "0"], "--jobs is 0, expected a whole number of at least 1."),
        (["tuned", "--out", "x", "--jobs", "two"], "--jobs is 'two', expected a whole number."),
        (["tuned", "--out", "x", "--seeds", "-1"], "--seeds is -1, expected a whole number of at least 1."),
        (["tuned", "--out", "x", "--epochs", "0"], "--epochs is 0, expected a whole number of at least 1."),
        (["tuned", "--out", ".", "--root", "."], "holds something else (mine.txt), expected a new folder"),
        ([], "The following arguments are required: SECTION"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dibit: error: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("package", ["matplotlib", "markdown_it", "pydantic", "rich"])
def test_a_missing_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["reproduce", "memory", "--out", str(tmp_path / "out")]) == 2
    message = f"dibit: error: This needs {package}, which is not installed: {install('study')}\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()


def test_graphs_that_cannot_be_loaded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from dibit.reproduce import plan as module
    from dibit.reproduce.plan import Reproduction, ReproductionPlan
    from dibit.reproduce.store import Store
    from dibit.tools.errors import UserError

    def refuse(settings: Any, seed: int) -> Any:
        if settings.dataset.startswith("planted"):
            return planted(200, seed)
        raise UserError(f"no network for {settings.dataset}.")

    from dibit.train.data.generated import planted

    monkeypatch.setattr("dibit.experiments.data.load_raw", refuse)
    run = Reproduction(ReproductionPlan(), Store(tmp_path))
    (graph,) = run.graphs()
    assert graph.name.startswith("planted")
    assert set(run.missing) == set(module.SMALL)
    assert "cora is left out. no network for cora." in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(small: Path, tmp_path: Path) -> None:
    words = ["reproduce", "accuracy", "--out", tmp_path / "out", "--dataset", small, "--seeds", "2", "--epochs", "200"]
    with command(*words) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "accuracy.json").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with: dibit reproduce accuracy" in err
    assert "Traceback" not in err
    kept = len(list((tmp_path / "out" / "units").iterdir()))
    assert kept >= 1
    section = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert not section["finished"]
    assert section["section"] == "accuracy"
