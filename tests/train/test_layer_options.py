"""Linear layers beside graph layers (--linear-skip), jumping knowledge (--jk) and graph layers without a bias."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from dibit.cli import main
from dibit.train import ModelSettings
from dibit.train.layerwise import layerwise
from dibit.train.models import LinearSkip, build_adjacency, build_model
from tests.train.conftest import small_arrays
from tests.train.test_loop import _task
from tests.unbiased import bias_of, gradient

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MODELS = ("gcn", "sage", "gin", "gat")
JKS = (None, "last", "cat", "max", "lstm")
EVERY = list(itertools.product(MODELS, JKS, (False, True)))
N, D, C = 60, 6, 3


def edges(seed: int = 0) -> Tensor:
    return torch.randint(N, (2, 6 * N), generator=torch.Generator().manual_seed(seed)).unique(dim=1)


def features(seed: int = 0) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def built(seed: int = 0, **settings: object) -> tuple[nn.Module, Tensor]:
    """A model with the adjacency that it takes."""
    chosen = ModelSettings(**{"layers": 3, "hidden": 8, "dropout": 0.0, **settings})  # type: ignore[arg-type]
    chosen.check()
    torch.manual_seed(seed)
    return build_model(chosen, D, C), build_adjacency(chosen, edges(), N, CPU)


@pytest.mark.parametrize("jk", [None, "last"])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_the_graph_layer_plus_a_linear_layer(name: str, jk: str | None) -> None:
    model, adjacency = built(model=name, linear_skip=True, jk=jk)
    assert len(model.convs) == 3
    for layer, width in zip(model.convs, (D, 8, 8), strict=True):
        x = torch.randn(N, width)
        assert isinstance(layer, LinearSkip)
        out = layer(x, adjacency)
        assert torch.equal(out, layer.conv(x, adjacency) + F.linear(x, layer.lin.weight, layer.lin.bias))
        assert out.shape == (N, C if layer is model.convs[-1] and jk is None else 8)


def test_what_goes_beside_the_adjacency_reaches_the_graph_layer() -> None:
    """Below FP32 gcn takes edges and their weights."""
    model, _ = built(model="gcn", linear_skip=True)
    weight, x = torch.rand(edges().shape[1]), features()
    layer = model.convs[0]
    assert torch.equal(layer(x, edges(), edge_weight=weight), layer.conv(x, edges(), weight) + layer.lin(x))
    assert not torch.equal(layer(x, edges(), edge_weight=weight), layer(x, edges()))


def test_weights_are_drawn_anew() -> None:
    model, _ = built(linear_skip=True)
    before = [p.clone() for p in model.convs[0].parameters()]
    model.reset_parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.convs[0].parameters(), strict=True))


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("linear_skip", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_jk_last_by_hand(name: str, linear_skip: bool, norm: str) -> None:
    """Norm, ReLU and dropout follow every graph layer, the last one too; then one linear layer."""
    model, adjacency = built(model=name, jk="last", linear_skip=linear_skip, norm=norm, dropout=0.5)
    model.train()
    x = features()
    torch.manual_seed(1)
    out = model(x, adjacency)
    torch.manual_seed(1)
    h = x
    for conv, layer_norm in zip(model.convs, model.norms, strict=True):
        h = torch.dropout(torch.relu(layer_norm(conv(h, adjacency))), 0.5, True)
    assert torch.equal(out, F.linear(h, model.lin.weight, model.lin.bias))
    kinds = {type(layer_norm).__name__ for layer_norm in model.norms}
    assert kinds == {{"none": "Identity", "batch": "BatchNorm", "layer": "LayerNorm"}[norm]}
    assert model.lin.weight.shape == (C, 8)


def test_gcn_with_jk_last_and_linear_skips_by_its_formula() -> None:
    """From the matrices alone: relu((D^-1/2 (A + I) D^-1/2) X W + X V + b)."""
    model, _ = built(model="gcn", jk="last", linear_skip=True, norm="none", layers=2)
    settings = ModelSettings(model="gcn")
    dense = torch.zeros(N, N, dtype=torch.float64)
    dense[edges()[1], edges()[0]] = 1
    dense.fill_diagonal_(1)
    scale = dense.sum(1).rsqrt()
    p = scale[:, None] * dense * scale
    h = features().double()
    model = model.double().eval()
    for layer in model.convs:
        w, v = layer.conv.lin.weight, layer.lin.weight
        h = (p @ h @ w.T + layer.conv.bias + h @ v.T + layer.lin.bias).relu()
    adjacency = build_adjacency(settings, edges(), N, CPU).double()
    torch.testing.assert_close(model(features().double(), adjacency), h @ model.lin.weight.T + model.lin.bias)


@pytest.mark.parametrize("linear_skip", [False, True])
@pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
def test_without_a_bias(name: str, linear_skip: bool) -> None:
    def biases(bias: bool) -> list[str]:
        model, adjacency = built(model=name, bias=bias, linear_skip=linear_skip, jk="last")
        assert model(features(), adjacency).shape == (N, C)
        layers = [layer.conv if linear_skip else layer for layer in model.convs]
        return [key for layer in layers for key, p in layer.named_parameters() if "bias" in key and p is not None]

    assert biases(False) == []
    assert len(biases(True)) == 3
    model, _ = built(model=name, bias=False, linear_skip=True, jk="last")
    assert all(layer.lin.bias is not None for layer in (*model.convs, model))  # the linear layers keep theirs


@pytest.mark.parametrize(("name", "jk", "linear_skip"), EVERY)
def test_compressed_forward_is_the_plain_one_and_a_step_trains(name: str, jk: str | None, linear_skip: bool) -> None:
    def step(recipe: str | None) -> tuple[Tensor, dict[str, Tensor], int]:
        model, adjacency = built(model=name, jk=jk, linear_skip=linear_skip, norm="layer")
        dibit.compress(model.train(), recipe)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        torch.manual_seed(1)
        with dibit.track(model) as saved:
            out = model(features(), adjacency)
        (out.log_softmax(1)[:, 0].sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        torch.optim.Adam(model.parameters(), lr=0.01).step()
        assert not any(torch.equal(p, before[key]) for key, p in model.named_parameters() if p.grad.any())
        return out.detach(), before, saved.total

    plain, weights, whole = step(None)
    for recipe in ("default", "iexact"):
        out, same, kept = step(recipe)
        assert all(torch.equal(same[key], p) for key, p in weights.items())
        assert torch.equal(out, plain)
        if recipe == "default":
            assert kept < whole


ROWS = dibit.Config(block=32, reduce=dibit.Sample(2))
CONFIGS = {"default": (dibit.recipe("default"), "last"), "iexact": (dibit.recipe("iexact"), "last")} | {
    f"rows, {jk}": (ROWS, jk) for jk in (None, "last", "cat")
}


@pytest.mark.parametrize(("config", "jk"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.statistics
def test_gradient_with_linear_skips_is_unbiased(name: str, config: dibit.Config, jk: str | None) -> None:
    model, adjacency = built(model=name, linear_skip=True, jk=jk, norm="layer")
    x, readout = features(), torch.randn(N, C)
    truth = gradient(model, x, readout, adjacency)
    dibit.compress(model, config)

    def draw(i: int) -> Tensor:
        torch.manual_seed(i)
        return gradient(model, x, readout, adjacency)

    bias = bias_of(draw, truth, 80)
    assert bias.unbiased, bias
    assert not bias.exact


@pytest.mark.parametrize("name", MODELS)
def test_models_with_linear_skips_can_be_pickled(name: str) -> None:
    model, adjacency = built(model=name, linear_skip=True, norm="layer")
    x = features()
    model.eval()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, adjacency), model(x, adjacency))


@pytest.mark.parametrize("linear_skip", [False, True])
@pytest.mark.parametrize("jk", [None, "last"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", [7, 1000])
def test_layerwise_inference_is_inference(small: Path, name: str, jk: str | None, linear_skip: bool, part: int) -> None:
    pytest.importorskip("pymetis")
    task = _task(small, model=name, jk=jk, linear_skip=linear_skip, layers=3, self_loops=True, loader="cluster")
    net = task.model(0).eval()
    with torch.no_grad():
        whole = net(task.x, task.adjacency)
    torch.testing.assert_close(layerwise(net, task.x, task.adjacency, task.device, part=part), whole)


@pytest.mark.parametrize("loader", ["neighbor", "cluster"])
def test_mini_batches_train(small: Path, tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pymetis")
    flags = "--linear-skip --jk last --no-bias --self-loops --epochs 2 --hidden 8 --layers 2 --device cpu --quiet"
    sizes = "--batch-size 20 --neighbors 3 --parts 6 --clusters 2"
    words = ["train", "--dataset", str(small), *f"{flags} {sizes} --loader {loader}".split()]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err


FLAGS = ("--model", "gat", "--linear-skip", "--jk", "last", "--no-bias", "--self-loops", "--undirected")


def test_going_on_gives_the_same_as_never_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command line: the folder knows every flag, and the split file may have moved."""
    np.savez(tmp_path / "g.npz", **small_arrays())
    parts = np.split(np.random.default_rng(0).permutation(60), (36, 48))
    np.savez(tmp_path / "split.npz", **dict(zip(("train", "valid", "test"), parts, strict=True)))

    def train(out: str, epochs: int, *words: str) -> dict[str, list[float]]:
        file = tmp_path / "result.json"
        common = ("--out", str(tmp_path / out), "--json", str(file), "--epochs", str(epochs), "--quiet")
        assert main(["train", *common, *words]) == 0, capsys.readouterr().err
        return json.loads(file.read_text())["runs"][0]

    split = ("--split-file", str(tmp_path / "split.npz"))
    first = ("--dataset", str(tmp_path / "g.npz"), "--hidden", "8", "--layers", "2", "--device", "cpu", *FLAGS)
    first = (*first, "--eval-every", "2")
    whole = train("whole", 6, *first, *split)
    train("parts", 2, *first, *split)
    text = (tmp_path / "parts" / "settings.yaml").read_text()
    for line in ("linear_skip: true", "jk: last", "bias: false", "self_loops: true", "split_file: "):
        assert f"\n{line}" in text
    (tmp_path / "split.npz").rename(tmp_path / "moved.npz")
    went_on = train("parts", 6, "--resume", "--split-file", str(tmp_path / "moved.npz"))
    for key in ("loss", "curve", "noise", "test", "val", "best_epoch", "saved_bytes"):
        assert went_on[key] == whole[key]
    assert [epoch for epoch, _ in whole["curve"]] == [2, 4, 6]

    def refused(*words: str) -> str:
        assert main(["train", "--resume", "--out", str(tmp_path / "parts"), "--epochs", "8", "--quiet", *words]) == 2
        return capsys.readouterr().err

    capsys.readouterr()
    moved = ("--split-file", str(tmp_path / "moved.npz"))
    assert "started with --linear-skip, and cannot go on with no --linear-skip" in refused(*moved, "--no-linear-skip")
    assert "started with --jk last, and cannot go on with --jk cat" in refused(*moved, "--jk", "cat")
    assert "--split-file" in refused("--split-file", "null")
    parts = np.split(np.arange(60), (36, 48))
    np.savez(tmp_path / "moved.npz", **dict(zip(("train", "valid", "test"), parts, strict=True)))
    assert "moved.npz has changed since" in refused(*moved)
