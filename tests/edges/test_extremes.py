"""Maxima and minima over edges: torch's own bits, and its rule for those that tie, from a few bits an element."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch_geometric.nn as g
from torch import Tensor, nn

import dibit
from dibit.codec import dispatch, ops
from dibit.codec.backends import reference
from dibit.edges.extremes import has_torchs_bits
from tests.edges.test_sums import ORDERS, E, N, graph

ODD = torch.tensor([float("nan"), -torch.inf, torch.inf])
# Values that tie never, in part (some of few numbers), all together (zeros behind a ReLU), and whose sign is all.
FEATURES = {
    "all different": lambda n, d: torch.randn(n, d),
    "few numbers": lambda n, d: torch.randint(-2, 3, (n, d)).float(),
    "after a ReLU": lambda n, d: (torch.randn(n, d) - 1).relu(),
    "zeros of both signs": lambda n, d: torch.where(torch.rand(n, d) < 0.5, 0.0, -0.0),
    "not finite": lambda n, d: torch.where(torch.rand(n, d) < 0.9, torch.randn(n, d), ODD[torch.randint(0, 3, (n, d))]),
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also the signs of zeros; any NaN is NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(7.0).view(torch.int32), b.nan_to_num(7.0).view(torch.int32)
    )


@pytest.mark.parametrize("edges", [0, 1, 200, E])
@pytest.mark.parametrize("width", [16, 33, 70])
@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("features", FEATURES)
def test_operators(features: str, least: bool, width: int, edges: int) -> None:
    """Results, winners and gradients: torch's, the kernels', and those of the definition."""
    source, target = graph(edges=edges)
    x, out = FEATURES[features](N, width).requires_grad_(), torch.zeros(N, width)
    messages = x.index_select(0, source)
    index, name = target[:, None].expand_as(messages), "amin" if least else "amax"
    plain = out.clone().scatter_reduce_(0, index, messages, name, include_self=False)
    dy = torch.randn(N, width)
    (truth,) = torch.autograd.grad(plain, x, dy)
    crow, rank = ops.sort_edges(target, N)
    col, x = source[rank.long()].int(), x.detach()
    for backend in (ops, reference):
        y = out.clone()
        backend.edge_extremes(y, crow, col, x, least)
        assert same_bits(y, plain.detach())
    found, known = (backend.edge_winners(crow, col, x, y) for backend in (ops, reference))
    assert all(torch.equal(own, other) for own, other in zip(found, known, strict=True))
    initial = ((y == 0).int() @ torch.eye(width, dtype=torch.int32)).bool()  # what was there was zero
    packed = torch.nn.functional.pad(initial, (0, -width % 8)).view(N, -1, 8)
    packed = (packed * (1 << torch.arange(8))).sum(-1).to(torch.uint8)
    for backend in (ops, reference):
        dx = torch.zeros(N, width)
        backend.add_winners(dx, crow, col, *found, dy, packed)
        assert torch.allclose(dx, truth, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_an_infinite_gradient_is_not_a_number_elsewhere() -> None:
    """Of the others torch multiplies it by zero."""
    x, (source, target), dy = torch.randn(N, 16), graph(), torch.ones(N, 16)
    dy[:9, :3] = torch.inf
    leaf = x.clone().requires_grad_()
    index = target[:, None].expand(E, 16)
    y = torch.zeros(N, 16).scatter_reduce_(0, index, leaf[source], "amax", include_self=False)
    y.backward(dy)
    crow, rank = ops.sort_edges(target, N)
    col = source[rank.long()].int()
    ops.add_winners(dx := torch.zeros(N, 16), crow, col, *ops.edge_winners(crow, col, x, y.detach()), dy, None)
    assert torch.allclose(dx, leaf.grad, equal_nan=True)  # type: ignore[arg-type]


class Net(nn.Module):
    """Maxima of node features among -1, 0 and 1, whose gradient is that of what was rounded."""

    def __init__(self, aggr: Any) -> None:
        super().__init__()
        self.lin, self.conv = nn.Linear(32, 32), g.SAGEConv(32, 32, aggr=aggr)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.lin(x)
        return self.conv(h - h.detach() + h.detach().round(), edge_index)


class Into(Net):
    """The same, into a tensor of a number."""

    def __init__(self, start: float, reduce: str) -> None:
        super().__init__("max")
        self.start, self.reduce = start, reduce

    def conv_(self, h: Tensor, edge_index: Tensor) -> Tensor:
        out = torch.full((N, 32), self.start)
        index = edge_index[1][:, None].expand(E, 32)
        return out.scatter_reduce_(0, index, h[edge_index[0]], self.reduce, include_self=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.lin(x)
        return self.conv_(h - h.detach() + h.detach().round(), edge_index)


class OfRows(Into):
    """Of messages that exist as a tensor: a BatchNorm over all edges needs them."""

    def __init__(self, start: float, reduce: str) -> None:
        super().__init__(start, reduce)
        self.norm = nn.BatchNorm1d(32)

    def conv_(self, h: Tensor, edge_index: Tensor) -> Tensor:
        rows = self.norm(h[edge_index[0]])
        rows = rows - rows.detach() + rows.detach().round()
        out, index = torch.full((N, 32), self.start), edge_index[1][:, None].expand(E, 32)
        return out.scatter_reduce_(0, index, rows, self.reduce, include_self=False)


class Wrong(Net):
    """The same with targets in columns, and of a part of the rows' features: no rows of memory."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = torch.cat([self.lin(x)[edge_index[0]].sin()] * 2, -1)[:, 16:48]
        index = (edge_index[1][:, None] + torch.arange(32)) % N
        return torch.zeros(N, 32).scatter_reduce_(0, index, h, "amax", include_self=False)


NETS = {
    "of rows, max": lambda: OfRows(0.0, "amax"),
    "of rows, min": lambda: OfRows(1.0, "amin"),
    "each column by its own index": lambda: Wrong("max"),
    "max": lambda: Net("max"),
    "min": lambda: Net("min"),
    "three": lambda: Net(["min", "sum", "max"]),
    "into zeros": lambda: Into(0.0, "amax"),
    "into ones": lambda: Into(1.0, "amin"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NETS)
def test_the_gradient_of_ties_is_torchs(name: str, order: str) -> None:
    """What was there before takes a share, too, if it is equal."""
    model, x, edge_index = NETS[name](), torch.randn(N, 32), graph(order)
    own = dibit.compress(copy.deepcopy(model), "lossless")
    readout, grads = torch.randn(N, 32), []
    for each in (model, own):
        each(x, edge_index).backward(readout)
        grads.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    assert torch.equal(own(x, edge_index), model(x, edge_index))
    assert torch.allclose(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_torchs_bits_by_device() -> None:
    """Of rows of few elements torch takes the first of equal zeros, on a CPU."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert has_torchs_bits(cpu, 16)
    assert not has_torchs_bits(cpu, 15)
    with dispatch.using_backend("cuda", reference):
        assert not has_torchs_bits(cuda, 16)
    with dispatch.using_backend("cuda", SimpleNamespace(edge_winners=None)):
        assert has_torchs_bits(cuda, 8)


@pytest.mark.parametrize("width", [16, 33])
def test_the_gradient_of_rows_of_edges(width: int) -> None:
    """Without columns, edge e has row e."""
    crow = ops.sort_edges(graph()[1], N)[0]
    x, y = torch.randint(-2, 3, (E, width)).float(), torch.zeros(N, width)
    col = torch.arange(E, dtype=crow.dtype)
    ops.edge_extremes(y, crow, col, x, False)
    kept, dy = ops.edge_winners(crow, col, x, y), torch.randn(N, width)
    for backend in (ops, reference):
        found, expected = torch.zeros(2, E, width)
        backend.add_winners(found, crow, None, *kept, dy, None)
        backend.add_winners(expected, crow, col, *kept, dy, None)
        assert found.any()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("nodes", [60, 300, 3000])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("features", ["all different", "few numbers", "after a ReLU"])
def test_no_more_bytes_than_one_bit_a_message(features: str, parallel: bool, nodes: int) -> None:
    """Whatever ties, such as parallel edges, at 1 to 67 neighbours a node."""
    source, target = graph(nodes=nodes) if parallel else graph(nodes=nodes).unique(dim=1)
    x, y = FEATURES[features](nodes, 64), torch.zeros(nodes, 64)
    crow, rank = ops.sort_edges(target, nodes)
    col = source[rank.long()].int()
    ops.edge_extremes(y, crow, col, x, False)
    planes, _ = ops.edge_winners(crow, col, x, y)
    assert planes.nbytes <= len(source) * 64 // 8
    if features != "few numbers" and not parallel and nodes <= 300:
        assert planes.nbytes < len(source) * 64 // 8 / 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("least", [False, True])
def test_messages_that_exist_have_torchs_bits(features: str, least: bool, order: str) -> None:
    """The kernel that takes messages as rows; some nodes have none."""
    edge_index, name = graph(order), "amin" if least else "amax"
    messages = FEATURES[features](E, 32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(E, 1))

        def forward(self, x: Tensor) -> Tensor:
            index = edge_index[1][:, None].expand(E, 32)
            return torch.zeros(N + 9, 32).scatter_reduce_(0, index, x * self.weight, name, include_self=False)

    model = Model().train()
    plain, dy = model(messages), torch.randn(N + 9, 32)
    plain.backward(dy)
    (truth, model.weight.grad), own = (model.weight.grad, None), dibit.compress(model, "lossless")
    with dibit.track(own) as saved:
        y = own(messages)
    assert same_bits(y.detach(), plain.detach())
    assert [row.how for row in saved.rows if row.operation == "scatter_reduce_"] == ["winners of each target"]
    y.backward(dy)
    assert truth is not None
    assert torch.allclose(own.weight.grad, truth, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_nothing_of_one_row_an_edge_is_kept() -> None:
    edge_index, x = graph().unique(dim=1), torch.randn(N, 32)
    model = dibit.compress(g.SAGEConv(32, 32, aggr="max").train())
    x.requires_grad_()
    for _ in range(3):
        with dibit.track(model) as saved:
            model(x, edge_index).sum().backward()
    (row,) = (row for row in saved.rows if row.operation == "scatter_reduce_")
    assert row.how == "winners of each target"
    assert row.kept < edge_index.shape[1] * 32 / 8 / 2
    assert row.plain > E * 32 * 4
    assert not any(row.kept for row in saved.rows if row.operation in ("index_select", "new_zeros"))
