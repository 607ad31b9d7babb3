"""What every residual promises, on the residuals of real passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, SAGEConv

import dibit
from dibit.residuals.base import GradientMap, Residual, Saved, outer
from dibit.residuals.compressed import Compressed
from dibit.residuals.derived import Aggregated, Gathered
from dibit.residuals.exact import Lossless, Recomputed, Reference
from dibit.residuals.masks import Mask, SeededMask
from dibit.residuals.norm_results import Normed, Passed
from dibit.rules.relative import Signed
from tests.autograd_graph import nodes

N, D = 1_200, 32


class Net(nn.Module):
    """Something of each family of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(D, D), nn.Linear(D, D)
        self.column = nn.Linear(D, 1)
        self.sage, self.gcn = SAGEConv(D, D), GCNConv(D, D, normalize=False)
        self.gat = GATConv(D, D // 4, heads=4)
        self.norm, self.layer = nn.BatchNorm1d(D), nn.LayerNorm(D)
        self.last = nn.Linear(D, 5)

    def forward(self, x: Tensor, graph: Tensor, edges: Tensor) -> Tensor:
        h = F.leaky_relu(self.sage(x, graph) + self.first(x))
        h = F.dropout(F.relu(self.norm(self.gcn(h, graph))), 0.5, self.training)
        h = F.silu(self.layer(self.gat(h, edges))) * torch.sigmoid(self.gate(h))
        messages = h.index_select(0, edges[0]) * h.index_select(0, edges[1])
        h = h * self.column(h).sigmoid()
        h = h + torch.zeros_like(h).index_add(0, edges[1], messages)
        return F.log_softmax(self.last(F.dropout(h * h, 0.2, self.training)), -1)


def kept(y: Tensor) -> Iterator[tuple[Saved, list[Tensor]]]:
    """The residuals in a graph of autograd: each as `save` leaves it, and the tensors that autograd holds for it."""
    for node in nodes(y):
        tensors, at = getattr(node, "saved_tensors", ()), 0
        for residual, count in getattr(node, "layout", None) or ():
            if residual is not None:
                yield residual, list(tensors[at : at + count])
            at += count


def passes(config: Any) -> list[tuple[Saved, list[Tensor]]]:
    """The residuals of a second step: by then rows have scores."""
    torch.manual_seed(0)
    edges = torch.randint(N, (2, 4 * N))
    graph = torch.sparse_coo_tensor(edges, torch.ones(4 * N), (N, N)).to_sparse_csr()
    model, x = dibit.compress(Net().train(), config), torch.randn(N, D)
    model(x, graph, edges)[:, 0].sum().backward()
    return list(kept(model(x, graph, edges)))


CONFIGS = {name: dibit.recipe(name) for name in dibit.recipes.RECIPES} | {
    "2 bit": dibit.Config(),
    "projected": dibit.Config(reduce=dibit.Project(4)),
    "sampled": dibit.Config(reduce=dibit.Sample(4), bits=4),
}


@pytest.fixture(scope="module", params=CONFIGS)
def residuals(request: pytest.FixtureRequest) -> list[tuple[Saved, list[Tensor]]]:
    return passes(CONFIGS[request.param])


def test_all_kinds_are_among_them() -> None:
    found = {type(part) for config in CONFIGS.values() for residual, _ in passes(config) for part in within(residual)}
    assert found >= {
        Aggregated,
        Compressed,
        Gathered,
        Lossless,
        Mask,
        Normed,
        Passed,
        Recomputed,
        Reference,
        SeededMask,
        Signed,
    }


def within(residual: Any) -> Iterator[Any]:
    yield residual
    for name in ("source", "magnitude", "mask"):
        if isinstance(part := getattr(residual, name, None), Saved):
            yield from within(part)


def test_a_description_holds_no_tensors(residuals: Any) -> None:
    """Autograd frees what a step keeps only if nothing else holds it."""
    assert residuals
    for residual, _ in residuals:
        assert not any(x.numel() for x in residual.tensors), residual


def test_tensors_go_and_come_back_in_order(residuals: Any) -> None:
    for residual, tensors in residuals:
        again = residual.with_tensors(tensors)
        assert type(again) is type(residual)
        assert [x.data_ptr() for x in again.tensors] == [x.data_ptr() for x in tensors]
        assert not any(x.numel() for x in again.with_tensors(()).tensors)
        assert isinstance(again.how, str)


def test_a_weights_gradient_is_that_of_the_value(residuals: Any) -> None:
    """`outer` may take any shortcut, of the same draw."""
    count = 0
    for residual, tensors in residuals:
        if isinstance(residual, Residual) and not (isinstance(residual, SeededMask) and len(tensors) < 2):
            again = residual.with_tensors(tensors)
            value = again.value()
            if value.dim() == 2 and value.is_floating_point():
                dy = torch.randn(value.shape[0], 3)
                truth = outer(value, dy)
                assert torch.allclose(again.outer(dy), truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max())), residual
                count += 1
    assert count


def test_a_gradient_is_mapped_element_by_element(residuals: Any) -> None:
    """A map is linear, and an element of its result depends on that element alone."""
    for residual, tensors in residuals:
        if isinstance(residual, GradientMap) and isinstance(residual, Mask | SeededMask):
            again = residual.with_tensors(tensors)
            count = 8 * (tensors[0].numel() - 1) if isinstance(residual, Mask) else N
            ones, grad = again.apply(torch.ones(count)), torch.randn(count)
            assert torch.allclose(again.apply(grad), ones * grad)
