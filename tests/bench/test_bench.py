"""`dibit bench` at sizes that say nothing about speed: every kind runs, and what it writes is what it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dibit
from dibit.bench import codec, footprint, speed
from dibit.bench.workload import ORDERS, SETTINGS, TrainingStep, Workload
from dibit.cli import main
from dibit.experiments.shapes import MODELS

pytestmark = pytest.mark.slow

TINY = ["--shape", "arxiv", "--scale", "0.002", "--hidden", "16"]


def run(words: list[str], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "result.json"
    assert main(["bench", *words, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["bench"] == words[0]
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert "torch" in content["versions"]
    return content["results"]


def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [name for name in SETTINGS if name != "compile"]  # half a minute of compiling
    found = run(["speed", *TINY, "--rounds", "2", "--settings", *settings], tmp_path)
    rows = {row["setting"]: row for row in found["rows"]}
    assert list(rows) == settings
    assert rows["plain"]["ratio"] == 1
    for name in ("plain", "checkpoint", "exact", "iexact", "default"):
        row = rows[name]
        assert 0 < row["forward"] < row["seconds"]
        assert row["low"] <= row["ratio"] <= row["high"]
    printed = capsys.readouterr()
    assert "default" in printed.out
    assert "threads" in printed.out


def test_a_setting_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TrainingStep) -> None:
        raise RuntimeError("no such kernel\nmore")

    workload = Workload(scale=0.002, hidden=8)
    plain = TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda self: broken(self) if self.autocast else plain(self))
    found = speed.measure(workload, ("plain", "bf16"), 1, lambda _: None)
    assert found["rows"][1] == {"setting": "bf16", "failed": "RuntimeError: no such kernel"}
    assert "seconds" in found["rows"][0]


def test_memory(tmp_path: Path) -> None:
    words = ["memory", *TINY, "--scale", "0.05", "--layers", "2", "--settings", "plain", "checkpoint", "default"]
    found = run(words, tmp_path)
    rows = {(row["layers"], row["setting"]): row for row in found["rows"]}
    plain, kept, checkpoint = (rows[2, name] for name in ("plain", "default", "checkpoint"))
    assert kept["ledger"] < plain["ledger"]
    assert kept["peak"] < plain["peak"]
    assert plain["saved"] == pytest.approx(plain["ledger"], rel=0.05), "the allocator is the ledger's witness"
    assert checkpoint["saved"] < plain["saved"]
    assert checkpoint["ledger"] is None


def test_gradient(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / "small.npz"
    np.savez(
        path,
        x=generator.normal(size=(300, 20)).astype(np.float32),
        y=generator.integers(4, size=300),
        edge_index=generator.integers(300, size=(2, 1500)),
    )
    settings = ["iexact", "default", "2 bit", "gradient 1/2 + 1/6"]
    words = ["gradient", str(path), "--epochs", "0", "2", "--draws", "3", "--settings", *settings]
    figure = tmp_path / "error.svg"
    found = run([*words, "--figure", str(figure)], tmp_path)
    (graph,) = found["graphs"]
    rows = {row["setting"]: row for row in graph["rows"]}
    assert list(rows) == settings
    assert all(set(row["errors"]) == {"0", "2"} for row in rows.values())
    assert b"small, epoch 2" in figure.read_bytes()
    assert rows["2 bit"]["errors"]["0"] < rows["iexact"]["errors"]["0"]
    assert rows["gradient 1/2 + 1/6"]["bytes_per_node"] < rows["iexact"]["bytes_per_node"]
    assert all(set(row["bytes"]) == {"0", "2"} for row in rows.values())
    assert all(row["bytes"]["0"] == row["bytes_per_node"] for row in rows.values())
    assert len({*rows["iexact"]["bytes"].values()}) == 1


def test_codec(tmp_path: Path) -> None:
    found = run(["codec", "--elements", "100000", "--rounds", "2"], tmp_path)
    rows = {row["kernel"]: row for row in found["rows"]}
    assert rows["copy"]["share"] == 1
    assert rows["copy"]["bytes"] == 800_000
    ranges = 4 * -(-100_000 // 1024)
    assert rows["quantise + pack, 2 bit"]["bytes"] == 400_000 + 25_000 + ranges
    assert rows["unpack, 2 bit"]["bytes"] == rows["quantise + pack, 2 bit"]["bytes"]
    assert rows["pack a mask"]["bytes"] == 400_000 + 12_500
    assert all(row["gb_s"] > 0 for row in rows.values())
    assert codec.ELEMENTS == 1 << 24


@pytest.mark.parametrize(
    "how",
    [
        *({"model": name} for name in MODELS),
        {"model": "mesh", "shape": "mesh"},
        *({"form": "edge_index", "order": order} for order in ORDERS),
        *({"model": name, "loader": "neighbor", "scale": 0.02} for name in ("sage", "gcn", "gat")),
    ],
    ids=str,
)
def test_every_workload_computes_what_the_plain_model_computes(how: dict[str, Any]) -> None:
    workload = Workload(**{"hidden": 16, "scale": 0.002, "layers": 2} | how)
    losses = []
    for setting in ("plain", "lossless", "default"):
        step = TrainingStep(*workload.build(), setting)
        torch.manual_seed(5)
        losses.append(step.forward().item())
        step.optimizer.zero_grad()
        step()
        assert all(p.grad is not None for p in step.model.parameters())
    assert losses[0] == losses[1], "the recipe lossless has torch's own masks of dropout"


def test_batches_of_other_sizes_have_graphs_of_their_own() -> None:
    found = speed.measure(
        Workload(shape="cora", model="gcn", loader="neighbor"), ("plain", "default"), 2, lambda _: None
    )
    assert all("seconds" in row for row in found["rows"])


def test_a_setting_that_fails_in_a_later_round_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TrainingStep.forward

    def failing(self: TrainingStep) -> torch.Tensor:
        if self.autocast and self.optimizer.state:
            raise RuntimeError("no memory is left")
        return forward(self)

    monkeypatch.setattr(TrainingStep, "forward", failing)
    found = speed.measure(Workload(scale=0.002, hidden=8, form="edge_index"), ("plain", "bf16"), 2, lambda _: None)
    assert found["rows"][1] == {"setting": "bf16", "failed": "RuntimeError: no memory is left"}
    assert "seconds" in found["rows"][0]


def test_edges_come_in_the_order_that_was_asked_for() -> None:
    target, source, shuffled = (
        Workload(form="edge_index", scale=0.01, order=order).batches()[0].graph for order in ORDERS
    )
    assert bool((target[1].diff() >= 0).all())
    assert bool((source[0].diff() >= 0).all())
    assert not bool((shuffled.diff() >= 0).all(1).any())
    nodes = int(target.max()) + 1
    same = [(graph[0] * nodes + graph[1]).sort().values for graph in (target, source, shuffled)]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])


def test_batches_are_what_a_loader_gives() -> None:
    batches = Workload(scale=0.1, loader="neighbor").batches()
    assert len(batches) == 8
    for batch in batches:
        assert batch.train.tolist() == list(range(1024)) == list(range(len(batch.y)))
        assert int(batch.graph.max()) < len(batch.x)
        assert int(batch.graph[1].bincount().max()) <= 15
    assert not torch.equal(batches[0].x[:1024], batches[1].x[:1024])


def test_a_model_that_nobody_has_divided_is_not_checkpointed() -> None:
    found = speed.measure(Workload(scale=0.002, model="transformer"), ("plain", "checkpoint"), 1, lambda _: None)
    assert "TransformerNetwork" in found["rows"][1]["failed"]


@pytest.mark.parametrize("name", sorted({*MODELS} - {"transformer", "mesh"}))
def test_a_checkpointed_model_computes_what_the_model_computes(name: str) -> None:
    workload = Workload(model=name, hidden=16, scale=0.002, layers=3)
    losses, grads = [], []
    for setting in ("plain", "checkpoint"):
        step = TrainingStep(*workload.build(), setting)
        torch.manual_seed(5)
        loss = step.forward()
        losses.append(loss.item())
        loss.backward()
        grads.append([p.grad for p in step.model.parameters()])
    assert losses[0] == losses[1]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_inputs_are_all_that_lives_between_two_steps() -> None:
    workload = Workload(hidden=16, scale=0.002)
    step = TrainingStep(*workload.build(), "plain")
    parameters = sum(p.nbytes for p in step.model.parameters())
    data = step.input_bytes()
    step()
    counters = len([*step.model.parameters()]) * 4
    assert step.input_bytes() == data + 3 * parameters + counters  # a gradient and two moments


def test_the_resident_peak_can_be_begun_anew() -> None:
    if not footprint._reset_peak():
        pytest.skip("the system does not tell the peak of the resident set")
    before = footprint._status("VmHWM")
    x = torch.ones(30_000_000)
    assert footprint._status("VmHWM") >= before + 0.9 * x.nbytes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "What to measure is missing; expected one of speed, memory, gradient, noise, codec."),
        (["sped"], "expected speed, memory, gradient, noise, codec. Did you mean 'speed'?"),
        (
            ["speed", "--shape", "arxive"],
            "expected arxiv, flickr, products-small, cora, mesh. Did you",
        ),
        (["speed", "--order", "sources"], "--order has 'sources', expected target, source, shuffled. Did you"),
        (["speed", "--order", "shuffled"], "--order shuffled is for --form edge_index on the full graph."),
        (
            ["speed", "--model", "gcn2", "--loader", "neighbor"],
            "--model gcn2 takes the graph as csr, on the full graph.",
        ),
        (["memory", "--loader", "cluster"], "--loader has 'cluster', expected full, neighbor."),
        (["speed", "--model", "sgae"], "Did you mean 'sage' or 'gat'?"),
        (["speed", "--settings", "plain", "defualt"], "Did you mean 'default'?"),
        (["speed", "--rounds", "0"], "--rounds is 0, expected a whole number of at least 1."),
        (["speed", "--scale", "0"], "--scale is 0.0, expected a number above 0."),
        (["speed", "--json", "/no/such/folder/x.json"], "the folder /no/such/folder does not exist"),
        (["memory", "--layers", "0"], "--layers is 0"),
        (["codec", "--elements", "x"], "--elements is 'x', expected a whole number."),
        (["gradient"], "arguments are required: GRAPH"),
        (["gradient", "no-such-graph", "--settings", "2 bits"], "Did you mean '2 bit' or '8 bit'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words, *(["--quiet"] if words else [])]) == 2
    assert sentence in capsys.readouterr().err


def test_recipes_are_settings() -> None:
    assert set(dibit.recipes.RECIPES) <= set(SETTINGS)


def test_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "noise",
        "--graphs",
        "planted:300",
        "--models",
        "gat",
        "--norms",
        "layer",
        "l2",
        "--layers",
        "2",
        "--draws",
    ]
    words += ["2", "--epochs", "0", "1", "--residual", "without", "--figure", str(tmp_path / "map.svg")]
    found = run(words, tmp_path)
    assert len(found["rows"]) == 2 * 2 * 2  # norms, epochs, settings
    for row in found["rows"]:
        assert row["error"] > 0
        assert row["bytes"] > 0
        assert ("predicted" in row) == (row["setting"] == "default")
    assert "<svg" in (tmp_path / "map.svg").read_text()
    assert "gat on planted" in capsys.readouterr().out
    kept = json.loads((tmp_path / "result.json").read_text())
    kept["results"]["rows"] = [{**row, "error": 7.0} for row in kept["results"]["rows"][:5]]
    (tmp_path / "part.json").write_text(json.dumps(kept))
    again = run([*words, "--resume", str(tmp_path / "part.json")], tmp_path)
    assert [row["error"] == 7.0 for row in again["rows"]] == [True] * 5 + [False] * 3
    (tmp_path / "part.json").write_text("{}")
    assert main(["bench", *words, "--resume", str(tmp_path / "part.json")]) == 2
    assert "expected a file that dibit bench noise" in capsys.readouterr().err
