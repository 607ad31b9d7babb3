"""The GPU's kernels against the definition, code for code, in Triton's interpreter: `TRITON_INTERPRET=1 pytest`.

A run of its own: the switch is read when the kernels are defined, and such kernels cannot be compiled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

import torch_geometric.nn as g
from torch_geometric.nn import GraphSAGE
from torch_geometric.utils import erdos_renyi_graph, to_torch_csr_tensor

import dibit
import tests.gpu.interpreter  # noqa: F401
from dibit import Config, Project, Rows, Sample, decode, encode
from dibit.codec import Affine, dispatch
from dibit.codec.backends import reference
from dibit.codec.backends import triton as cuda
from dibit.codec.keep_probabilities import LEFT_OUT
from dibit.edges import functions, programs
from dibit.engine.keeper import inputs_kept_exactly
from dibit.recipes import RECIPES
from tests.gpu.cases import (
    BITS,
    Case,
    apart,
    codes,
    computed,
    edges,
    elementwise,
    expected,
    extremes,
    rows,
    sampling,
)

# NumPy warns of numbers that a GPU makes without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(cases: Iterator[Case]) -> None:
    several = list(cases)
    assert len(several) > 20
    for case in several:
        found = computed(cuda, case)
        assert apart(found, expected(case), case.tolerance) <= case.tolerance, case.title


@pytest.mark.parametrize("bits", BITS)
def test_codes(bits: int) -> None:
    check(codes(bits, 1))


@pytest.mark.parametrize("bits", BITS)
def test_rows_and_products(bits: int) -> None:
    check(rows(bits, 1))


def test_masks_and_dropout() -> None:
    check(elementwise(1))


def test_sums_over_edges() -> None:
    check(edges(1))


def test_extremes_over_edges() -> None:
    check(extremes(1))


def test_the_same_rows_are_picked() -> None:
    check(sampling(1))


def test_a_difference_is_seen() -> None:
    x = torch.tensor([1.0, float("nan"), 3.0])
    assert apart(x, x.clone(), 0.0) == 0
    for other in (x.bfloat16(), x[:2], torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, float("nan"), 3.0001])):
        assert apart(other, x, 0.0) == float("inf")
    assert 0 < apart(torch.tensor([1.0, float("nan"), 3.0001]), x, 1e-6) < 1e-4


@pytest.mark.parametrize("width", [1, 15, 40, 300])
def test_scores_of_rows(width: int) -> None:
    x = torch.randn(130, width) * torch.exp(10 * torch.randn(130, 1))
    x[3], x[4], x[5, 0], x[6, 0] = 0, 1e-30, float("nan"), float("inf")
    for own in (x, x.bfloat16()):
        found, plain = cuda.row_scores(own), reference.row_scores(own)
        assert ((found.int() - plain.int()).abs() <= 1).all()
        assert (found == plain).float().mean() > 0.95
        assert found[3] == found[4] == 0
        assert found[5] == found[6] == LEFT_OUT
    assert cuda.row_scores(torch.empty(4, 0)).tolist() == [0] * 4


@pytest.fixture
def interpreted() -> Iterator[None]:
    """The CPU's tensors go through the GPU's kernels."""
    with dispatch.using_backend("cpu", cuda):
        yield


CONFIGS = {
    **RECIPES,
    "rows": Config(block=Rows(2)),
    "whole": Config(block="tensor", bits=4),
    "dither": Config(rounding="dither", block=100),
    "nearest": Config(rounding="nearest", block=100),
    "normal": Config(levels="normal", bits=4, block=64),
    "project": Config(reduce=Project(4)),
    "sample": Config(reduce=Sample(3, by="norm"), stats=torch.float32),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.usefixtures("interpreted")
def test_the_codec_on_these_kernels(config: Config) -> None:
    x = torch.randn(150, 16)
    function = Affine(x.mean(0), x.std(0), from_statistics=True)
    for affine in (None, function):
        own = encode(x, config, 3, affine)
        value = decode(own)
        with dispatch.using_backend("cpu", reference):
            plain = encode(x, config, 3, affine)
            assert apart(value, decode(plain), 0.0) == 0
        assert apart(own.tensors, plain.tensors, 0.0) == 0


class Noted:
    """The GPU's kernels; remembers those that were asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        found = getattr(cuda, name)
        self.names.add(name)
        return found


LAYERS = {
    "SAGE": (lambda: g.SAGEConv(8, 16), "add_neighbours"),
    "GCN": (lambda: g.GCNConv(8, 16), "add_neighbours"),
    "GAT": (lambda: g.GATConv(8, 8, heads=2), "add_scaled edge_products"),
    "GATv2": (lambda: g.GATv2Conv(8, 8, heads=2), "add_scaled edge_products edge_signs add_signed"),
    "Transformer": (lambda: g.TransformerConv(8, 8, heads=2), "add_scaled edge_products"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_message_passing_on_these_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe lossless: results and gradients are plain torch's, but for the order of sums."""
    monkeypatch.setattr(functions, "MIN_DEFERRED_ELEMENTS", 1)
    x, edges = torch.randn(30, 8, requires_grad=True), erdos_renyi_graph(30, 0.1)
    build, kernels = LAYERS[name]
    layer, found, noted = build().train(), [], Noted()
    for compressed in (False, True):
        with dispatch.using_backend("cpu", noted):
            y = (dibit.compress(layer, "lossless") if compressed else layer)(x, edges)
            grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        found.append((y.detach(), *grads))
    assert noted.names >= {*kernels.split()}
    for own, other in zip(*found, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-6)


class MeshBlock(nn.Module):
    """New edges from both ends and the old ones, and new nodes from their sums."""

    def __init__(self) -> None:
        super().__init__()
        self.edges, self.nodes = mlp(24, 8), mlp(16, 8)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        e = torch.linspace(-1, 1, 8 * len(source)).view(-1, 8)
        e = e + self.edges(torch.cat([x[target], x[source], e], -1))
        total = x.new_zeros(x.shape).index_add_(0, target, e)
        return x + self.nodes(torch.cat([x, total], -1))


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


PROGRAMS = {
    "EdgeConv, max": (lambda: g.EdgeConv(mlp(16, 16)), "edge_extremes edge_winners add_winners add_neighbours"),
    "EdgeConv, sum": (lambda: g.EdgeConv(mlp(16, 16), aggr="sum"), "add_neighbours"),
    "mesh": (MeshBlock, "add_neighbours"),
    "SAGE, max of few": (lambda: Rounded("max"), "edge_extremes edge_winners add_winners"),
    "SAGE, min of few": (lambda: Rounded("min"), "edge_extremes edge_winners add_winners"),
}


class Rounded(nn.Module):
    """Extremes among whole numbers, of which many tie."""

    def __init__(self, aggr: str) -> None:
        super().__init__()
        self.lin, self.conv = nn.Linear(8, 16), g.SAGEConv(16, 16, aggr=aggr)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.lin(x)
        return self.conv(h - h.detach() + h.detach().round(), edge_index)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_and_extremes_on_these_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results have plain torch's bits, the gradients are its own, but for the order of sums."""
    monkeypatch.setattr(functions, "MIN_DEFERRED_ELEMENTS", 1)
    monkeypatch.setattr(programs, "CHUNK", 64)
    torch.manual_seed(1)
    x = torch.randn(30, 8, requires_grad=True)
    edges = erdos_renyi_graph(30, 0.1 if name.startswith("SAGE") else 0.2)
    build, kernels = PROGRAMS[name]
    model, found, noted = build().train(), [], Noted()
    for compressed in (False, True, True):  # what the first pass shows changes the second
        with dispatch.using_backend("cpu", noted), inputs_kept_exactly(), Chunks() as chunks:
            y = (dibit.compress(model) if compressed else model)(x, edges)
            grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
        found.append((y.detach(), *grads))
    assert noted.names >= {*kernels.split()}
    assert chunks.largest < edges.shape[1], "in chunks"
    for own in found[1:]:
        assert torch.equal(own[0], found[0][0])
        for a, b in zip(own, found[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-6)


class Chunks(TorchDispatchMode):
    """How many rows the largest input of a linear layer has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.linear):
            self.largest = max(self.largest, args[1].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("recipe", ["default", "iexact"])
def test_a_training_step_on_these_kernels(recipe: str) -> None:
    """The gradients of a whole model, to float32's rounding those of the other backend."""
    config = RECIPES[recipe]
    if recipe == "default":
        config = Config(block=32, reduce=Sample(4, by="gradient"), norm=Config(reduce=Sample(3, by="gradient")))
    torch.manual_seed(1)
    edges = erdos_renyi_graph(60, 0.1)
    adjacency = to_torch_csr_tensor(edges, size=(60, 60))
    x = torch.randn(60, 9)
    found: list[list[Tensor]] = []
    for backend in (cuda, reference):
        with dispatch.using_backend("cpu", backend):
            torch.manual_seed(2)
            model = dibit.compress(GraphSAGE(9, 16, 2, 3, dropout=0.5, norm="batch_norm"), config)
            optimiser = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(2):
                optimiser.zero_grad()
                model(x, adjacency).square().mean().backward()
                optimiser.step()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 8
    for own, other in zip(*found, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-6)
