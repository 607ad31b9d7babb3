"""Sums over edges without a tensor of one row an edge: torch's own bits, exact gradients, no bytes but the plan's."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as g
from torch import Tensor, nn
from torch_geometric.utils import scatter

import dibit
from dibit.codec import ops
from dibit.codec.backends import reference
from dibit.edges.plan import sort
from tests.unbiased import bias_of, gradient
from tests.watched import watched

N, E, D = 300, 4000, 32
ORDERS = ("shuffled", "by source", "by target")


def graph(order: str = "shuffled", nodes: int = N, edges: int = E) -> Tensor:
    """Parallel edges, self-loops and nodes without any edge among them."""
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(0, nodes - 10, (2, edges), generator=generator)
    if order == "shuffled":
        return edge_index
    return edge_index[:, edge_index[0 if order == "by source" else 1].argsort(stable=True)]


class TestOperators:
    @pytest.mark.parametrize("order", ORDERS)
    def test_sorting_is_stable(self, order: str) -> None:
        target = graph(order)[1]
        crow, rank = ops.sort_edges(target, N)
        known_crow, known_rank = reference.sort_edges(target, N)
        assert torch.equal(crow, known_crow)
        assert torch.equal(rank, known_rank)
        assert rank.dtype == crow.dtype == torch.int32

    @pytest.mark.parametrize("bad", [-1, N])
    def test_an_edge_without_a_node(self, bad: int) -> None:
        index = graph()[0].clone()
        index[7] = bad
        with pytest.raises(IndexError, match=f"expected numbers from 0 to {N - 1}"):
            ops.sort_edges(index, N)

    @pytest.mark.parametrize("width", [1, 8, 33])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("order", ORDERS)
    def test_sums_have_torchs_bits(self, order: str, weighted: bool, width: int) -> None:
        source, target = graph(order)
        x, out, weights = torch.randn(N, width), torch.randn(N, width), torch.randn(E)
        messages = x.index_select(0, source)
        messages = weights[:, None] * messages if weighted else messages
        plain = out.clone().scatter_add_(0, target[:, None].expand_as(messages), messages)
        crow, rank = ops.sort_edges(target, N)
        col = source[rank.long()].int()
        ops.add_neighbours(out, crow, col, weights[rank.long()] if weighted else None, x)
        assert torch.equal(out, plain)

    @pytest.mark.parametrize("shape", [(1, 32), (4, 8), (3, 5)])
    def test_heads(self, shape: tuple[int, int]) -> None:
        source, target = graph()
        x, scale = torch.randn(N, *shape), torch.randn(E, shape[0])
        out = torch.zeros(N, *shape)
        messages = scale[:, :, None] * x.index_select(0, source)
        plain = out.clone().scatter_add_(0, target[:, None, None].expand_as(messages), messages)
        crow, rank = ops.sort_edges(target, N)
        col = source[rank.long()].int()
        ops.add_scaled(out, crow, col, rank, scale, x)
        assert torch.equal(out, plain)
        products = ops.edge_products(crow, col, rank, plain, x)
        exact = (plain[target].double() * x[source].double()).sum(-1)
        size = (plain[target].double() * x[source].double()).abs().sum(-1)
        assert ((products - exact).abs() <= 1e-6 * size).all()

    @pytest.mark.parametrize("shape", [(1, 32), (4, 8), (3, 5), (2, 13)])
    @pytest.mark.parametrize("order", ORDERS)
    def test_signs(self, order: str, shape: tuple[int, int]) -> None:
        source, target = graph(order)
        a, b = torch.randn(N, *shape), torch.randn(N, *shape)
        a[:50], b[:50] = 0, 0  # a sum of zeros has the slope, as torch has it
        crow, rank = ops.sort_edges(target, N)
        col = source[rank.long()].int()
        signs = ops.edge_signs(crow, col, rank, a, b)
        assert torch.equal(signs, reference.edge_signs(crow, col, rank, a, b))
        scale = torch.randn(E, shape[0])
        z = (a[target] + b[source]).requires_grad_()
        (F.leaky_relu(z, 0.2) * scale[:, :, None]).sum().backward()
        truth = torch.zeros(N, *shape).index_add_(0, target, z.grad)
        ops.add_signed(out := torch.zeros(N, *shape), crow, rank, signs, scale, 0.2)
        assert torch.allclose(out, truth, rtol=1e-5, atol=1e-5)
        reference.add_signed(out.zero_(), crow, rank, signs, scale, 0.2)
        assert torch.allclose(out, truth, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.lin, self.conv = nn.Linear(D, D), conv

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv(self.lin(x).relu(), edge_index)


class WithFeatures(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv(x, edge_index, torch.linspace(-1, 1, 3 * edge_index.shape[1]).view(-1, 3))


CONVS: dict[str, Callable[[], nn.Module]] = {
    "SAGE": lambda: g.SAGEConv(D, D),
    "SAGE sum": lambda: g.SAGEConv(D, D, aggr="sum"),
    "SAGE from target": lambda: g.SAGEConv(D, D, flow="target_to_source"),
    "GCN": lambda: g.GCNConv(D, D),
    "GCN cached": lambda: g.GCNConv(D, D, cached=True),
    "GIN": lambda: g.GINConv(nn.Linear(D, D)),
    "Graph": lambda: g.GraphConv(D, D),
    "Cheb": lambda: g.ChebConv(D, D, 3),
    "TAG": lambda: g.TAGConv(D, D),
    "ARMA": lambda: g.ARMAConv(D, D),
    "SG": lambda: g.SGConv(D, D, 2),
    "APPNP": lambda: g.APPNP(3, 0.1),
    "gated": lambda: g.GatedGraphConv(D, 2),
    "cluster": lambda: g.ClusterGCNConv(D, D),
    "SAGE max": lambda: g.SAGEConv(D, D, aggr="max"),
    "SAGE min from target": lambda: g.SAGEConv(D, D, aggr="min", flow="target_to_source"),
    "SAGE with three": lambda: g.SAGEConv(D, D, aggr=["mean", "max", "min"]),
}
ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "GAT": lambda: g.GATConv(D, 8, heads=4),
    "GAT one head": lambda: g.GATConv(D, D),
    "GATv2": lambda: g.GATv2Conv(D, 8, heads=4),
    "GATv2 with one weight for both ends": lambda: g.GATv2Conv(D, 12, heads=3, share_weights=True),
    "Transformer": lambda: g.TransformerConv(D, 8, heads=4),
    "Transformer one head": lambda: g.TransformerConv(D, 20, heads=1),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "SAGE with a deviation": lambda: g.SAGEConv(D, D, aggr=["max", "std", "min"]),
    "GATv2 with edge features": lambda: WithFeatures(g.GATv2Conv(D, 8, heads=4, edge_dim=3)),
    "Transformer with edge features": lambda: WithFeatures(g.TransformerConv(D, 8, heads=4, edge_dim=3)),
    "Edge": lambda: g.EdgeConv(nn.Linear(2 * D, D)),
    "SuperGAT": lambda: g.SuperGATConv(D, 8, heads=4),
    "gates": lambda: g.ResGatedGraphConv(D, D),
    "GEN": lambda: g.GENConv(D, D),
    "FiLM": lambda: g.FiLMConv(D, D),
    "LE": lambda: g.LEConv(D, D),
    "FeaSt": lambda: g.FeaStConv(D, D),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*CONVS, *ATTENTION, *OTHERS])
def test_forward_is_the_plain_one(name: str, order: str, made: list[Any]) -> None:
    model, x, edge_index = Net((CONVS | ATTENTION | OTHERS)[name]()), torch.randn(N, D), graph(order)
    plain = model(x, edge_index)
    for _ in range(2):
        assert torch.equal(dibit.compress(model)(x, edge_index), plain)
    assert not any(made) or name in OTHERS


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CONVS)
def test_where_weights_are_constant_the_gradient_is_exact(name: str, order: str) -> None:
    x, edge_index = torch.randn(N, D), graph(order)
    model = Net(CONVS[name]())
    names = [path for path, part in model.named_modules() if isinstance(part, nn.Linear | g.Linear | nn.GRUCell)]
    found = []
    for config in (None, {**dict.fromkeys(names), "*": "default"}):
        own = copy.deepcopy(model)
        own.lin.weight.requires_grad_()
        y = dibit.compress(own, config)(x, edge_index)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        found.append(own.lin.weight.grad)
    assert torch.allclose(found[1], found[0], rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*CONVS, *ATTENTION, *OTHERS])
def test_lossless_is_the_plain_gradient(name: str, order: str) -> None:
    model, x, edge_index = Net((CONVS | ATTENTION | OTHERS)[name]()), torch.randn(N, D), graph(order)
    own = dibit.compress(copy.deepcopy(model), "lossless")
    readout = torch.randn_like(model(x, edge_index))
    for each in (model, own):
        (each(x, edge_index) * readout).sum().backward()
    truth, found = (
        torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]) for each in (model, own)
    )
    assert (found - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.statistics
@pytest.mark.parametrize("name", [*ATTENTION, "SAGE", "GCN"])
def test_gradient_is_unbiased(name: str) -> None:
    model, x, edge_index = Net((CONVS | ATTENTION)[name]()).train(), torch.randn(N, D), graph()
    readout = torch.randn_like(model(x, edge_index))
    truth = gradient(model, x, readout, edge_index)
    dibit.compress(model)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return gradient(model, x, readout, edge_index)

    bias = bias_of(draw, truth, 150)
    assert bias.unbiased, bias


def test_a_sum_keeps_the_plan_alone() -> None:
    """Which is that of the graph, not of a layer: the ledger has no bytes for it."""
    edge_index, x = graph(), torch.randn(N, D)
    model = dibit.compress(Net(g.SAGEConv(D, D, aggr="sum")))
    for _ in range(3):
        with dibit.track(model) as saved:
            model(x, edge_index).sum().backward()
    assert sum(row.kept for row in saved.rows if row.operation in ("scatter_add_", "index_select", "new_zeros")) == 0
    bytes_of_edges = E * D * 4
    assert sum(row.kept for row in saved.rows) < 0.1 * bytes_of_edges


def test_the_mean_of_features_keeps_nothing_of_them() -> None:
    edge_index, x = graph(), torch.randn(N, D)
    model = dibit.compress(g.SAGEConv(D, 16).train())
    for _ in range(3):
        with dibit.track(model) as saved:
            model(x, edge_index).sum().backward()
    assert {row.how for row in saved.rows if row.operation == "linear"} == {"aggregate of the source", "reference"}


class TestPlan:
    def test_one_serves_all_layers_and_passes(self) -> None:
        """Also one that every layer makes anew, by adding self-loops."""
        for model in (g.GraphSAGE(D, D, 3), g.GCN(D, D, 3)):
            dibit.compress(model.train())
            x, edge_index = torch.randn(N, D), graph()
            with watched(sort, note=operator.itemgetter("count")) as calls:
                for _ in range(3):
                    model(x, edge_index).sum().backward()
                assert calls == [N, N]
                model(x, edge_index.clone()).sum().backward()
                assert calls == [N, N]

    def test_a_graph_that_changes_gets_a_new_one(self) -> None:
        model, x, edge_index = g.GraphSAGE(D, D, 2).train(), torch.randn(N, D), graph()
        dibit.compress(model)
        with watched(sort) as calls:
            model(x, edge_index).sum().backward()
            edge_index[0, 5] = (edge_index[0, 5] + 1) % N
            y = model(x, edge_index)
        assert len(calls) == 4
        assert torch.equal(y, dibit.decompress(model)(x, edge_index))

    def test_the_gradient_is_that_of_the_graph_that_was_summed(self) -> None:
        """Even if the caller writes to it before the backward pass: plain torch would refuse."""
        model = Net(g.SAGEConv(D, D, aggr="sum", root_weight=False)).train()
        x, edge_index = torch.randn(N, D), graph()
        plain = torch.autograd.grad(model(x, edge_index).square().sum(), model.lin.weight)[0]
        dibit.compress(model, {"lin": None, "conv.lin_l": None, "*": "default"})
        y = model(x, edge_index)
        edge_index.zero_()
        found = torch.autograd.grad(y.square().sum(), model.lin.weight)[0]
        assert torch.allclose(found, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))

    def test_it_goes_with_the_graph(self) -> None:
        from dibit.api import state_of
        from dibit.edges.plan import known_plans

        model, x = g.GraphSAGE(D, D, 2).train(), torch.randn(N, D)
        dibit.compress(model)
        for edges in (1000, 2000, 3000):
            model(x, graph(edges=edges)).sum().backward()
        state = state_of(model)
        assert state is not None
        assert len(known_plans(state)) == 1


def test_bad_edges_are_plain_torchs_error() -> None:
    edge_index = graph()
    edge_index[0, 3] = N
    model = g.SAGEConv(D, D).train()
    with pytest.raises(IndexError) as plain:
        model(torch.randn(N, D), edge_index)
    with pytest.raises(IndexError) as own:
        dibit.compress(model)(torch.randn(N, D), edge_index)
    assert str(own.value) == str(plain.value)


def test_scatter_of_pyg_on_what_is_summed() -> None:
    """All reductions of a gather, with and without a factor."""

    class Sums(nn.Module):
        def __init__(self, reduce: str) -> None:
            super().__init__()
            self.lin, self.reduce = nn.Linear(D, D), reduce

        def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
            x_j = self.lin(x).index_select(0, edge_index[0])
            return scatter(weight * x_j, edge_index[1], 0, N, self.reduce) + scatter(x_j, edge_index[1], 0, N + 3)[:N]

    x, edge_index = torch.randn(N, D), graph()
    for reduce in ("sum", "mean", "max", "min", "mul"):
        model, weight = Sums(reduce), torch.rand(E, 1)
        plain = model(x, edge_index, weight)
        assert torch.equal(dibit.compress(model)(x, edge_index, weight), plain)


class AddedTo(nn.Module):
    """A linear layer reads what neighbours were added to."""

    def __init__(self, features: bool, start: float) -> None:
        super().__init__()
        self.lin, self.last, self.features, self.start = nn.Linear(D, D), nn.Linear(D, 5), features, start

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = x if self.features else self.lin(x)
        out = torch.full((N, D), self.start) if self.start else torch.zeros(N, D)
        return self.last(h) + self.last(out.index_add_(0, edge_index[1], h.index_select(0, edge_index[0])))


@pytest.mark.statistics
@pytest.mark.parametrize("start", [0.0, 3.0])
@pytest.mark.parametrize("features", [False, True])
def test_neighbours_that_are_added_to_something_else(features: bool, start: float) -> None:
    """The layer behind may keep what was summed up in the place of the sum only if there was nothing but zeros."""
    model, x, edge_index = AddedTo(features, start), torch.randn(N, D), graph()
    readout = torch.randn(N, 5)
    model.train()

    def run() -> Tensor:
        model.zero_grad()
        (model(x, edge_index) * readout).sum().backward()
        assert model.last.weight.grad is not None
        return model.last.weight.grad.clone()

    truth = run()
    dibit.compress(model)
    for _ in range(3):
        run()  # from now on the pass relies on features and graph

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run()

    bias = bias_of(draw, truth, 100)
    assert bias.unbiased, bias


@pytest.mark.statistics
@pytest.mark.parametrize("shape", [(-1, 1), (1, -1)])
@pytest.mark.parametrize("form", ["edge_index", "csr"])
def test_a_square_sum_divided_by_columns_is_no_mean(form: str, shape: tuple[int, int]) -> None:
    """As many features as nodes: the number of neighbours can be divided by along either dimension."""
    nodes = 64
    edge_index = torch.randint(0, nodes, (2, 600))
    count = torch.bincount(edge_index[1], minlength=nodes)
    order = edge_index[1].argsort(stable=True)
    crow = torch.cat((count.new_zeros(1), count.cumsum(0)))
    matrix = torch.sparse_csr_tensor(crow, edge_index[0][order], torch.ones(600), (nodes, nodes))

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.last = nn.Linear(nodes, nodes), nn.Linear(nodes, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lin(x)
            if form == "csr":
                total = torch.sparse.mm(matrix, h)
                each = (matrix.crow_indices()[1:] - matrix.crow_indices()[:-1]).view(shape).clamp(min=1)
                return self.last(total / each)
            each = h.new_zeros(nodes).scatter_add_(0, edge_index[1], h.new_ones(600)).clamp(min=1)
            total = torch.zeros(nodes, nodes).index_add_(0, edge_index[1], h.index_select(0, edge_index[0]))
            return self.last(total / each.view(shape).expand_as(total))

    model, x, readout = Square().train(), torch.randn(nodes, nodes), torch.randn(nodes, 5)
    truth = gradient(model, x, readout)
    dibit.compress(model)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return gradient(model, x, readout)

    bias = bias_of(draw, truth, 100)
    assert bias.unbiased, bias
