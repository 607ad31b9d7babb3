"""DGL's layers: the plain model's bits, gradients without bias, and few bytes. Skipped where DGL is not installed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dibit
from dibit.tools.memory import allocated_bytes
from tests.unbiased import bias_of, gradient

os.environ.setdefault("DGLBACKEND", "pytorch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    dgl = pytest.importorskip("dgl")
    layers = pytest.importorskip("dgl.nn")

pytestmark = pytest.mark.filterwarnings("default")  # DGL uses what NumPy and torch will drop
N, E, D = 300, 2400, 32


def graph(nodes: int = N, edges: int = E) -> Any:
    """Parallel edges, self-loops, and ten nodes to which no edge leads."""
    generator = torch.Generator().manual_seed(0)
    return dgl.graph(tuple(torch.randint(0, nodes - 10, (2, edges), generator=generator)), num_nodes=nodes)


class Calls(nn.Module):
    """What a function of the graph and a tensor gives, as a layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.gate, self.weight = nn.Linear(D, 1), nn.Parameter(torch.rand(E, 1))

    def forward(self, g: Any, x: Tensor) -> Tensor:
        return self.function(self, g, x)


def _attention(self: Calls, g: Any, x: Tensor, by: str) -> Tensor:
    score = dgl.ops.u_add_v(g, self.gate(x), self.gate(x).tanh())
    return dgl.ops.u_mul_e_sum(g, x, dgl.nn.functional.edge_softmax(g, score, norm_by=by))


CONVS: dict[str, Callable[[], nn.Module]] = {
    "GraphConv": lambda: layers.GraphConv(D, D, allow_zero_in_degree=True),
    "GraphConv, right": lambda: layers.GraphConv(D, 8, norm="right", allow_zero_in_degree=True),
    "SAGEConv, mean": lambda: layers.SAGEConv(D, D, "mean"),
    "SAGEConv, gcn": lambda: layers.SAGEConv(D, D, "gcn"),
    "SAGEConv, pool": lambda: layers.SAGEConv(D, D, "pool"),
    "GINConv, sum": lambda: layers.GINConv(nn.Linear(D, D), "sum", learn_eps=True),
    "GINConv, mean": lambda: layers.GINConv(nn.Linear(D, D), "mean"),
    "GINConv, max": lambda: layers.GINConv(nn.Linear(D, D), "max"),
    "GATConv": lambda: layers.GATConv(D, 16, 2, allow_zero_in_degree=True),
    "GATv2Conv": lambda: layers.GATv2Conv(D, 16, 2, allow_zero_in_degree=True),
    "DotGatConv": lambda: layers.DotGatConv(D, 16, 2, allow_zero_in_degree=True),
    "EdgeConv": lambda: layers.EdgeConv(D, 16, allow_zero_in_degree=True),
    "weights that learn": lambda: Calls(lambda self, g, x: dgl.ops.u_mul_e_sum(g, x, self.weight)),
    "gates of nodes": lambda: Calls(lambda self, g, x: dgl.ops.u_mul_v(g, x, self.gate(x).sigmoid()).relu()),
    "gates of edges": lambda: Calls(
        lambda self, g, x: dgl.ops.u_mul_e_sum(g, x, dgl.ops.u_add_v(g, x, x.tanh()).sigmoid())
    ),
    "products of ends": lambda: Calls(lambda self, g, x: dgl.ops.u_dot_v(g, x, x)),
    "products with edges": lambda: Calls(
        lambda self, g, x: dgl.ops.e_dot_v(g, dgl.ops.u_sub_v(g, x, x.tanh()).sin(), x.cos())
    ),
    "elementwise with edges": lambda: Calls(
        lambda self, g, x: dgl.ops.v_mul_e(g, x, dgl.ops.copy_u(g, x.sin()).tanh())
    ),
    "quotients": lambda: Calls(lambda self, g, x: dgl.ops.u_div_e_sum(g, x, 1 + self.weight)),
    "sums with edges": lambda: Calls(lambda self, g, x: dgl.ops.u_add_e_sum(g, x.relu(), self.weight)),
    "maxima of products": lambda: Calls(
        lambda self, g, x: dgl.ops.u_mul_e_max(g, x, self.weight).nan_to_num(neginf=0.0).tanh()
    ),
    "minima of edges": lambda: Calls(
        lambda self, g, x: dgl.ops.copy_e_min(g, dgl.ops.u_add_v(g, x, x.tanh())).nan_to_num(posinf=0.0)
    ),
    "attention by target": lambda: Calls(lambda self, g, x: _attention(self, g, x, "dst")),
    "attention by source": lambda: Calls(lambda self, g, x: _attention(self, g, x, "src")),
    "readout": lambda: Calls(lambda self, g, x: dgl.ops.segment_reduce(torch.tensor([100, 0, 200]), x, "max")[::2]),
}


class Net(nn.Module):
    """A layer of DGL between two linear ones."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(D, D), CONVS[name]()

    def forward(self, x: Tensor, g: Any) -> Tensor:
        y: Tensor = self.layer(g, self.first(x))
        return y


@pytest.mark.parametrize("recipe", ["default", "exact", "lossless"])
@pytest.mark.parametrize("name", CONVS)
def test_result_has_the_plain_models_bits(name: str, recipe: str) -> None:
    model, x, g = Net(name).train(), torch.randn(N, D), graph()
    plain = model(x, g)
    dibit.compress(model, recipe)
    for _ in range(3):  # the first finds out what does not change
        y = model(x, g)
        assert torch.equal(y, plain)
        assert y.stride() == plain.stride()
        y.nan_to_num().sum().backward()


@pytest.mark.parametrize("name", CONVS)
def test_lossless_gradient_is_the_plain_one(name: str) -> None:
    model, x, g = Net(name).train(), torch.randn(N, D), graph()
    readout = torch.randn_like(model(x, g))
    truth = gradient(model, x, readout, g)
    dibit.compress(model, "lossless")
    for _ in range(2):
        torch.testing.assert_close(gradient(model, x, readout, g), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.statistics
@pytest.mark.parametrize("name", CONVS)
def test_gradient_is_unbiased(name: str) -> None:
    model, x, g = Net(name).train(), torch.randn(N, D), graph()
    readout = torch.randn_like(model(x, g))
    truth = gradient(model, x, readout, g)
    dibit.compress(model)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return gradient(model, x, readout, g)

    bias = bias_of(draw, truth, 100)
    assert bias.unbiased, bias


class TestExtremes:
    """Maxima and minima: DGL's own choice among equal neighbours, in a byte an element."""

    @pytest.mark.parametrize("kind", ["max", "min"])
    @pytest.mark.parametrize("of", ["copy_u", "copy_e"])
    @pytest.mark.parametrize("heads", [(), (3,)])
    @pytest.mark.parametrize("bits", [torch.int32, torch.int64])
    def test_ties_and_nodes_without_edges(self, kind: str, of: str, heads: tuple[int, ...], bits: torch.dtype) -> None:
        g = graph().int() if bits is torch.int32 else graph()
        rows = N if of == "copy_u" else E
        x, function = torch.randint(0, 3, (rows, *heads, D)).float(), getattr(dgl.ops, f"{of}_{kind}")
        layer = Calls(lambda self, g, x: function(g, x * 1))
        self.same(layer, g, x)

    def test_many_edges_to_one_node(self) -> None:
        source = torch.randint(0, N, (E,))
        g = dgl.graph((source, torch.zeros(E, dtype=torch.int64)), num_nodes=N)
        self.same(Calls(lambda self, g, x: dgl.ops.copy_u_max(g, x * 1)), g, torch.randn(N, D))

    @pytest.mark.parametrize("formats", ["coo", "csc", ["csr", "csc"]])
    def test_formats(self, formats: Any) -> None:
        layer = Calls(lambda self, g, x: dgl.ops.copy_u_max(g, x * 1))
        self.same(layer, graph().formats(formats), torch.randn(N, D))

    @staticmethod
    def same(layer: nn.Module, g: Any, x: Tensor) -> None:
        def both() -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            y = layer(g, leaf)
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
            assert leaf.grad is not None
            return [y.detach(), leaf.grad]

        plain = both()
        dibit.compress(layer.train())
        compressed = both()
        assert torch.equal(plain[0], compressed[0])
        torch.testing.assert_close(compressed[1], plain[1])


# Bytes a node at most, of plain ones at 14 edges a node; docs/dgl.md has the figures of 128 features.
KEPT = {"SAGEConv, mean": 0.1, "SAGEConv, pool": 0.15, "GINConv, max": 0.2, "GATConv": 0.25, "EdgeConv": 0.1}


@pytest.mark.parametrize("name", KEPT)
def test_bytes(name: str) -> None:
    """By the C allocator, and by the ledger."""
    model, x, g = Net(name).train(), torch.randn(4000, D), graph(4000, 14 * 4000)
    if allocated_bytes() is None:
        pytest.skip("the C library does not tell")

    def kept() -> int:
        for _ in range(2):
            model(x, g).sum().backward()
        before = allocated_bytes()
        y = model(x, g)
        return (allocated_bytes() or 0) - (before or 0) - y.nbytes  # type: ignore[no-any-return]

    plain = kept()
    dibit.compress(model)
    assert kept() < KEPT[name] * plain
    with dibit.track(model) as ledger:
        y = model(x, g)
    assert ledger.total < KEPT[name] * ledger.plain
    assert abs(ledger.plain - plain) < 0.05 * plain, (ledger.plain, plain)
    del y


def test_a_linear_layer_behind_a_mean_keeps_the_features() -> None:
    model, x, g = Net("SAGEConv, mean").train(), torch.randn(N, D), graph()
    dibit.compress(model)
    with dibit.track(model) as ledger:
        model(x, g)
    kept = {row.module: row for row in ledger.rows if row.operation == "linear"}
    assert kept["layer.fc_self"].kept + kept["layer.fc_neigh"].kept == max(
        kept["layer.fc_self"].kept, kept["layer.fc_neigh"].kept
    )


def test_second_derivatives_are_refused() -> None:
    model, x, g = Net("GATConv").train(), torch.randn(N, D), graph()
    dibit.compress(model)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(model(x, g).sum(), model.first.weight, create_graph=True)


def test_a_factor_may_change_after_the_product() -> None:
    """Plain DGL raises an error here; the compressed gradient is that of what was there."""

    class Changing(Calls):
        def forward(self, g: Any, x: Tensor) -> Tensor:
            weight = self.gate(x)[:, :1].repeat(8, 1)[:E].sigmoid()
            h = x * 2
            y = dgl.ops.u_mul_e_sum(g, h, weight)
            if self.changes:
                h.detach().zero_()
            return y

    model, x, g = Changing(lambda *_: x), torch.randn(N, D), graph()
    model.changes = False
    readout = torch.randn(N, D)

    def found() -> Tensor:
        leaf = x.clone().requires_grad_()
        (model.train()(g, leaf) * readout).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    truth = found()
    dibit.compress(model)
    model.changes = True

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return found()

    bias = bias_of(draw, truth, 60)
    assert bias.unbiased, bias
