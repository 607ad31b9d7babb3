"""Tuned baselines: statistics by other formulas, and the command on a tiny graph: whole, stopped, killed, gone on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import scipy.stats

from dibit.cli import main
from dibit.reproduce import parallel, tuned
from dibit.reproduce.plan import Reproduction, ReproductionPlan
from dibit.reproduce.store import Store
from dibit.reproduce.tuned import _epochs_ratio, _together, cells, table, verdict
from dibit.tools.errors import UserError
from dibit.tools.statistics import paired_difference
from dibit.train.settings import RECIPES
from tests.reproduce import tiny
from tests.reproduce.test_parallel import ROOT, children, in_a_group, wait_for

pytestmark = pytest.mark.slow

# ---- statistics ----


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.0020, 0.0040, "harmless"),
        (0.0010, 0.0040, "harmless"),
        (-0.0029, 0.0000, "harmless"),
        (-0.0030, 0.0100, "undecided"),
        (-0.0100, 0.0100, "undecided"),
        (-0.0100, 0.0000, "undecided"),
        (-0.0100, -0.0001, "harmful"),
        (-0.0020, -0.0001, "harmful"),  # small, and certain
        (None, None, None),
    ],
)
def test_verdict(low: float | None, high: float | None, said: str | None) -> None:
    assert verdict({"mean": 0.0, "low": low, "high": high}) == said


def test_no_verdict_without_a_difference() -> None:
    assert verdict(None) is None
    assert verdict(paired_difference([0.01])) is None


def row(values: list[float], ratio: float | None = None) -> dict[str, Any]:
    return {"difference": {**paired_difference(values), "values": values}, "epochs_ratio": ratio}


def normal(count: int, mean: float, deviation: float, seed: int) -> list[float]:
    return np.random.default_rng(seed).normal(mean, deviation, count).tolist()


def test_one_cell_alone_has_students_interval() -> None:
    values = normal(10, -0.001, 0.004, 0)
    found = _together([row(values)])
    own = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found is not None
    assert (found["cells"], found["mean"]) == (1, pytest.approx(np.mean(values)))
    assert (found["low"], found["high"]) == (pytest.approx(own.low), pytest.approx(own.high))


@pytest.mark.parametrize(("counts", "spreads"), [((10, 5), (0.001, 0.01)), ((2, 7), (0.3, 0.1)), ((5, 5), (1, 1))])
def test_two_cells_have_welchs_interval(counts: tuple[int, int], spreads: tuple[float, float]) -> None:
    """(a + b) / 2 is half the difference of a and -b, of which SciPy knows the interval."""
    a, b = (normal(n, 0.01 * i, s, i) for i, (n, s) in enumerate(zip(counts, spreads, strict=True)))
    own = scipy.stats.ttest_ind(a, np.negative(b), equal_var=False).confidence_interval(0.95)
    found = _together([row(a), row(b)])
    assert found is not None
    assert found["mean"] == pytest.approx((statistics.fmean(a) + statistics.fmean(b)) / 2)
    assert (found["low"], found["high"]) == (pytest.approx(own.low / 2), pytest.approx(own.high / 2))


def test_three_cells_by_hand() -> None:
    """Variances 1, 4, 9 of means of 2, 4, 3 values: 0.5 + 1 + 3 = 4.5; freedom 4.5^2 / (0.25/1 + 1/3 + 9/2) = 3.984."""
    values = [[-(0.5**0.5), 0.5**0.5], [1 - 3**0.5, 1 - 3**0.5, 1 + 3**0.5, 1 + 3**0.5], [-1.0, 2.0, 5.0]]
    assert [statistics.variance(each) for each in values] == [pytest.approx(v) for v in (1, 4, 9)]
    found = _together([row(each) for each in values])
    assert found is not None
    assert found["cells"] == 3
    assert found["mean"] == pytest.approx((0 + 1 + 2) / 3)
    half = scipy.stats.t.ppf(0.975, 4.5**2 / (0.25 + 1 / 3 + 4.5)) * math.sqrt(4.5) / 3
    assert (found["low"], found["high"]) == (pytest.approx(1 - half), pytest.approx(1 + half))


def test_coverage_is_as_said() -> None:
    """Of 2,000 draws of three unlike cells without an effect, the interval holds 0 in about 95 %."""
    rng = np.random.default_rng(0)
    hit = 0
    for _ in range(2000):
        found = _together([row(rng.normal(0, s, n).tolist()) for n, s in ((10, 0.002), (5, 0.01), (5, 0.004))])
        assert found is not None
        hit += found["low"] <= 0 <= found["high"]
    assert abs(hit / 2000 - 0.95) < 0.02


def test_what_has_no_interval_is_left_out() -> None:
    values = normal(5, 0, 0.01, 0)
    single = {"difference": {**paired_difference([0.5]), "values": [0.5]}, "epochs_ratio": None}
    assert _together([]) is None
    assert _together([single, {"difference": None, "epochs_ratio": None}]) is None
    assert _together([single, row(values)]) == _together([row(values)])
    same = _together([row([0.25, 0.25]), row([0.75, 0.75])])
    assert same == {"cells": 2, "mean": 0.5, "low": 0.5, "high": 0.5, "epochs_ratio": None}


def test_ratios_of_epochs_are_averaged_where_they_are_known() -> None:
    found = _together([row([0.0, 0.1], 1.5), row([0.0, 0.1], None), row([0.0, 0.1], 1.0)])
    assert found is not None
    assert found["epochs_ratio"] == 1.25


@pytest.mark.parametrize(
    ("own", "ratio"),
    [
        ([[2, 0.5], [8, 0.7921], [20, 0.9]], 8 / 4),  # 0.99 * 0.8 = 0.792
        ([[2, 0.5], [8, 0.7919], [20, 0.9]], 20 / 4),
        ([[2, 0.8]], 2 / 4),
        ([[2, 0.5], [40, 0.79]], None),
        ([], None),
    ],
)
def test_epochs_to_nearly_the_best(own: list[list[float]], ratio: float | None) -> None:
    plain = {"val": 0.8, "improvements": [[2, 0.6], [4, 0.795], [10, 0.8]]}
    assert _epochs_ratio({"val": 0.9, "improvements": own}, plain) == ratio
    assert _epochs_ratio(plain, plain) == 1


# ---- cells and units ----


@pytest.fixture
def tiny_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "CELLS", tiny.CELLS)
    monkeypatch.setattr(tuned, "FIRST", tiny.FIRST)


def planned(out: Path, **plan: Any) -> list[Any]:
    return tuned.measurements(Reproduction(ReproductionPlan(**plan), Store(out)))


@pytest.mark.parametrize("name", tuned.CELLS)
def test_each_published_cell_can_be_trained(name: str) -> None:
    cell = tuned.CELLS[name]
    assert cell.name == name
    settings = cell.train_settings("DATA")
    settings.check()
    assert (settings.data.root, settings.data.undirected, settings.data.self_loops) == ("DATA", True, True)
    assert settings.data.dataset == cell.graph
    file = f"DATA/{cell.graph.replace('-', '_')}_tuned_split.npz"
    assert settings.data.split_file == (file if cell.split else None)
    assert settings.optimisation.epochs == cell.settings["epochs"]
    assert cell.train_settings("DATA", 3) == settings.updated(epochs=3)
    assert set(cell.recipes) <= set(RECIPES)
    assert all(seeds and set(seeds) <= set(cell.recipes["none"]) for seeds in cell.recipes.values())


def test_published_settings() -> None:
    """As in the study's own lists (arXiv:2406.08993)."""
    gcn = tuned.CELLS["amazon-computers-gcn"].train_settings("DATA")
    assert (gcn.model.model, gcn.model.hidden, gcn.model.layers) == ("gcn", 512, 3)
    assert (gcn.model.norm, gcn.model.dropout, gcn.model.jk, gcn.model.linear_skip) == ("layer", 0.5, "last", False)
    assert (gcn.optimisation.lr, gcn.optimisation.weight_decay, gcn.optimisation.epochs) == (1e-3, 5e-5, 1000)
    gat = tuned.CELLS["pubmed-gat"].train_settings("DATA")
    assert (gat.model.heads, gat.model.bias, gat.model.hidden, gat.model.norm) == (1, False, 512, "none")
    assert (gat.optimisation.lr, gat.optimisation.weight_decay, gat.optimisation.epochs) == (1e-2, 5e-4, 500)


def test_every_cell_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "reproduce.md").read_text()
    assert [name for name in tuned.CELLS if f"`{name}`" not in text] == []


def test_cells_by_name() -> None:
    assert [cell.name for cell in cells(())] == list(tuned.FIRST)
    assert [cell.name for cell in cells(("all",))] == list(tuned.CELLS)
    assert [cell.name for cell in cells(("cora-gcn", "all"))] == list(tuned.CELLS)
    assert [cell.name for cell in cells(("pubmed-gcn", "cora-gcn", "pubmed-gcn"))] == ["pubmed-gcn", "cora-gcn"]
    with pytest.raises(UserError, match="There is no cell 'cora'"):
        cells(("all", "cora"))


def test_units_and_what_they_depend_on(tiny_cells: None, tmp_path: Path) -> None:
    first = planned(tmp_path)
    assert [unit.key["what"] for unit in first] == [f"tuned-{name}" for name in tiny.UNITS]
    assert len({unit.name for unit in first}) == len({Store.name(unit.key) for unit in first}) == 4
    assert all(len(unit.files) == 2 and tmp_path / "runs" in unit.files[0].parents for unit in first)

    def keys(**plan: Any) -> list[Any]:
        return [unit.key for unit in planned(tmp_path, **plan)]

    every = [unit.key for unit in first]
    assert keys(root="elsewhere", jobs=7, seeds=9, epochs=9) == every
    assert keys(tuned_seeds=1) == [every[0], every[1], every[3]]
    assert keys(tuned_seeds=9) == every
    assert keys(recipes=("none",)) == [every[0], every[2], every[3]]
    assert keys(recipes=("none", "default")) == every
    assert keys(cells=("tiny-gcn-public",)) == [every[3]]
    fewer = keys(tuned_epochs=5)
    assert [key["what"] for key in fewer] == [key["what"] for key in every]
    assert not any(key in every for key in fewer)
    assert json.loads(json.dumps(every)) == every  # as a file gives it back


def value(test: float, val: float = 0.8, noise: float | None = None, seconds: float = 1.0) -> dict[str, Any]:
    memory = {"saved_mb": 2.0, "plain_mb": 4.0, "peak_mb": 8.0, "improvements": [[2, 0.6], [4, val]]}
    reached = {"graph": "g", "test": test, "val": val, "best_epoch": 4, "epochs": 300}
    return {**reached, **memory, "noise": noise, "seconds": seconds}


def test_table_of_what_is_there(tiny_cells: None, tmp_path: Path) -> None:
    run = Reproduction(ReproductionPlan(), Store(tmp_path))
    assert table(run, {}) == {"rows": [], "together": {}}
    done = {"tiny-sage default seed 0": value(0.75, noise=0.5)}
    (only,) = table(run, done)["rows"]
    assert (only["recipe"], only["seeds"], only["test"]) == ("default", [0], [0.75])
    assert (only["difference"], only["verdict"], only["epochs_ratio"], only["noise"]) == (None, None, None, 0.5)
    done["tiny-sage none seed 1"] = value(0.25)  # of another seed: no pair
    assert [found["difference"] for found in table(run, done)["rows"]] == [None, None]
    done["tiny-sage none seed 0"] = value(0.5)
    plain, other = table(run, done)["rows"]
    assert (plain["cell"], plain["published"], plain["layers"], plain["epochs"]) == ("tiny-sage", 93.0, 2, 300)
    assert (plain["seeds"], plain["test"], plain["difference"]) == ([0, 1], [0.5, 0.25], None)
    assert other["difference"] == {"mean": 0.25, "low": None, "high": None, "pairs": 1, "values": [0.25]}
    assert (other["verdict"], other["epochs_ratio"]) == (None, 1.0)
    assert table(run, done)["together"] == {}
    done["tiny-gcn-public none seed 0"] = value(0.5)
    assert [found["cell"] for found in table(run, done)["rows"]] == ["tiny-sage", "tiny-sage", "tiny-gcn-public"]


def test_table_of_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cell = replace(tiny.CELLS["tiny-sage"], recipes={"none": (0, 1, 2), "default": (0, 1, 2), "iexact": (0, 2)})
    monkeypatch.setattr(tuned, "CELLS", {cell.name: cell})
    tests = {"none": (0.5, 0.6, 0.7), "default": (0.501, 0.602, 0.703), "iexact": (0.4, None, 0.5)}
    done = {
        f"{cell.name} {recipe} seed {seed}": value(own[seed], seconds=1 + seed**2)
        for recipe, own in tests.items()
        for seed in cell.recipes[recipe]
    }
    found = table(Reproduction(ReproductionPlan(), Store(tmp_path)), done)
    plain, default, iexact = found["rows"]
    assert default["difference"]["values"] == pytest.approx([0.001, 0.002, 0.003])
    assert default["difference"]["low"] == pytest.approx(0.002 - 4.302653 * 0.001 / 3**0.5, abs=1e-8)
    assert (default["verdict"], iexact["verdict"]) == ("harmless", "undecided")
    assert iexact["difference"]["values"] == pytest.approx([-0.1, -0.2])
    assert iexact["difference"]["pairs"] == 2
    assert plain["seconds"] == 2.0  # the median of 1, 2 and 5
    assert set(found["together"]) == {"default", "iexact"}
    assert found["together"]["default"]["mean"] == pytest.approx(0.002)


# ---- the command ----


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tuned") / "data"
    tiny.write_graph(root)
    return root


def words(root: Path, out: Path, *more: str) -> list[str]:
    return ["reproduce", "tuned", "--root", str(root), "--out", str(out), "--quiet", "--jobs", "2", *more]


@pytest.fixture(scope="module")
def done(root: Path) -> Path:
    """The folder of a whole run that nothing disturbed."""
    out = root.parent / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "CELLS", tiny.CELLS)
        patch.setattr(tuned, "FIRST", tiny.FIRST)
        assert main(words(root, out)) == 0
    return out


def results(out: Path) -> dict[str, Any]:
    """The units' files by what they measured, without times."""
    found = {}
    for path in (out / "units").iterdir():
        unit = json.loads(path.read_text())
        assert path.name == f"{Store.name(unit['key'])}.json"
        assert unit.pop("seconds") > 0
        assert unit["value"].pop("seconds") > 0
        found[unit["key"]["what"].removeprefix("tuned-")] = unit
    return found


def test_a_file_a_training_and_a_table(done: Path) -> None:
    found = results(done)
    assert set(found) == set(tiny.UNITS)
    assert not (done / "runs").exists()
    for what, unit in found.items():
        own = unit["value"]
        assert own["epochs"] == 300
        assert 0 <= own["test"] <= 1
        assert 0 < own["saved_mb"] <= own["plain_mb"]
        assert (own["saved_mb"] < own["plain_mb"]) == ("default" in what) == (own["noise"] is not None)
        epochs, values = zip(*own["improvements"], strict=True)
        assert list(epochs) == sorted(set(epochs))
        assert list(values) == sorted(set(values))
        assert (epochs[-1], values[-1]) == (own["best_epoch"], pytest.approx(own["val"], abs=1e-6))
        assert all(epoch % 2 == 0 for epoch in epochs)
    graphs = [found[what]["value"]["graph"] for what in tiny.UNITS]
    assert graphs[0] == graphs[1] == graphs[2] != graphs[3]  # the authors' split, and the public one
    section = json.loads((done / "tuned.json").read_text())
    assert section["finished"]
    given = {"root": str(done.parent / "data"), "jobs": 2}
    assert section["settings"] == {"full": False, "cells": [], "recipes": [], "seeds": None, "epochs": None, **given}
    assert section["machine"]["threads"] == 1
    assert [(each["cell"], each["recipe"]) for each in section["results"]["rows"]] == [
        *(("tiny-sage", "none"), ("tiny-sage", "default"), ("tiny-gcn-public", "none")),
    ]
    assert 'id="fig-tuned"' in (done / "report.html").read_text()


def test_a_process_trains_what_this_one_would(done: Path, root: Path, tmp_path: Path) -> None:
    import torch

    settings = tiny.CELLS["tiny-sage"].train_settings(str(root))
    notes: list[str] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        own = tuned.train(settings, "default", 0, tmp_path / "run", notes.append)
    finally:
        torch.set_num_threads(before)
    assert own.pop("seconds") > 0
    assert own == results(done)["tiny-sage-default-0"]["value"]
    assert notes[-1] == "epoch 300/300"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best.pt", "checkpoint.pt"]


def test_a_training_goes_on_from_its_checkpoint(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dibit.train.task import Task

    cell, folder = tiny.CELLS["tiny-sage"], tmp_path / "run"
    tuned.train(cell.train_settings(str(root), 6), "none", 0, folder, lambda _: None)
    notes: list[str] = []
    step, steps = Task.step, []
    monkeypatch.setattr(Task, "step", lambda *args: steps.append(1) or step(*args))
    moved = tmp_path / "another name"
    moved.symlink_to(root)  # the data may have moved
    found = tuned.train(cell.train_settings(str(moved), 9), "none", 0, folder, notes.append)
    assert len(steps) == 3
    assert notes == ["epoch 7/9", "epoch 8/9", "epoch 9/9"]
    assert found["improvements"][0][0] == 2


@pytest.fixture
def copy(done: Path, tmp_path: Path, tiny_cells: None) -> Path:
    """Of the whole run's folder."""
    return shutil.copytree(done, tmp_path / "copy")


def test_the_same_command_again_computes_nothing(
    copy: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(parallel, "start", fail)
    gone = root.parent / "gone"  # not even the graph is needed
    before = results(copy)
    assert main(words(gone, copy)) == 0
    captured = capsys.readouterr()
    assert "tiny-sage, 2 × 16, norm layer, 300 epochs" in captured.out
    assert captured.err == ""
    assert main(words(gone, copy, "--cell", "tiny-sage", "--recipe", "none", "--seeds", "1")) == 0
    assert [each["seeds"] for each in json.loads((copy / "tuned.json").read_text())["results"]["rows"]] == [[0]]
    assert results(copy) == before
    assert not gone.exists()
    with pytest.raises(AssertionError, match="computed again"):
        main(words(root, copy, "--epochs", "2"))
    with pytest.raises(AssertionError, match="computed again"):
        main(words(root, copy, "--overwrite"))


def test_what_a_kill_left_of_a_training_goes_when_its_result_is_there(copy: Path, root: Path) -> None:
    store = Store(copy)
    unit = tuned.measurements(Reproduction(ReproductionPlan(root=str(root)), store))[0]
    store.manifest.add(*unit.files)
    for file in unit.files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    assert main(words(root, copy)) == 0
    assert not (copy / "runs").exists()


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tiny.npz", None, "There is no data set 'tiny'"),
        ("tiny_tuned_split.npz", None, "_tuned_split.npz does not exist; expected a split as .npz."),
        ("tiny_tuned_split.npz", {"train": np.arange(3)}, "has no array 'val'"),
        ("tiny.npz", "no masks", "tiny has no published split in --root"),
    ],
)
def test_what_cannot_be_trained_on_is_said_before_anything_is_written(
    file: str,
    content: Any,
    sentence: str,
    tiny_cells: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny.write_graph(tmp_path / "data")
    path = tmp_path / "data" / file
    if content == "no masks":
        with np.load(path) as arrays:
            np.savez(path, **{name: arrays[name] for name in arrays if not name.endswith("_mask")})
    elif content is None:
        path.unlink()
    else:
        np.savez(path, **content)
    assert main(words(tmp_path / "data", tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dibit: error: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_all_is_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dibit.reproduce import command

    ran: list[str] = []
    monkeypatch.setattr(command, "measure_section", lambda run, section: ran.append(section))
    monkeypatch.setattr(Reproduction, "graphs", lambda self: [])
    assert main(["reproduce", "all", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert ran == ["memory", "blocks", "variance", "distribution", "accuracy"]


def started(root: Path, out: Path, *more: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return in_a_group("-m", "tests.reproduce.tiny", *words(root, out, *more))


def checkpoint(out: Path) -> list[Path]:
    """Of the compressed training, which goes on for seconds after its first one."""
    return list(out.glob("runs/tuned-tiny-sage-default-0-*/checkpoint.pt"))


def trainings(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


ONE = ("--recipe", "default", "--cell", "tiny-sage")


def goes_on(root: Path, out: Path, done: Path, *more: str) -> None:
    """The same command ends, with the results of one that was never stopped."""
    assert main(words(root, out, *more)) == 0
    found, whole = results(out), results(done)
    assert set(found) == ({"tiny-sage-default-0"} if more else set(tiny.UNITS))
    assert found == {what: whole[what] for what in found}
    assert not (out / "runs").exists()
    assert children() == []


def test_ctrl_c_keeps_checkpoints_and_the_result_is_the_same(
    done: Path, root: Path, tmp_path: Path, tiny_cells: None
) -> None:
    out = tmp_path / "out"
    with started(root, out) as process:
        wait_for(lambda: checkpoint(out) or process.poll() is not None)
        own = trainings(process)
        pressed = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.startswith("dibit: interrupted; what was measured is kept, go on with: dibit reproduce tuned --root ")
    assert err.count("\n") == 1
    assert time.monotonic() - pressed < 30
    assert psutil.wait_procs(own, timeout=1)[1] == []
    assert checkpoint(out)
    assert len(list((out / "units").iterdir())) < len(tiny.UNITS)
    goes_on(root, out, done)


def test_ctrl_c_before_the_first_epoch(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(root, out) as process:
        wait_for(lambda: process.poll() is not None or ((out / "units").exists() and trainings(process)))
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.startswith("dibit: interrupted; ")
    assert err.count("\n") == 1
    assert list((out / "units").iterdir()) == []


def test_a_training_that_is_killed(done: Path, root: Path, tmp_path: Path, tiny_cells: None) -> None:
    out = tmp_path / "out"
    with started(root, out, *ONE) as process:
        wait_for(lambda: checkpoint(out) or process.poll() is not None)
        (own,) = trainings(process)
        own.kill()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert err.startswith("dibit: the process of a training ended before the training did (tiny-sage default seed 0)")
    assert err.count("\n") == 1
    assert checkpoint(out)
    goes_on(root, out, done, *ONE)


def test_the_command_that_is_killed(done: Path, root: Path, tmp_path: Path, tiny_cells: None) -> None:
    out = tmp_path / "out"
    with started(root, out, *ONE) as process:
        wait_for(lambda: checkpoint(out) or process.poll() is not None)
        own = trainings(process)
        assert own
        process.kill()
        assert psutil.wait_procs(own, timeout=10)[1] == []
    assert checkpoint(out)
    goes_on(root, out, done, *ONE)


def test_an_error_does_not_wait_for_other_trainings(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(root, out, "--cell", "tiny-sage-long", "tiny-sage-diverges") as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert err.startswith("dibit: the loss of none, seed 0, is nan in epoch ")
    assert err.count("\n") == 1
