"""What every residual promises, on the residuals of real passes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, SAGEConv

import dibit
from dibit.codec.backends import reference
from dibit.residuals.base import GradientMap, Residual, Saved, outer
from dibit.residuals.masks import Mask, SeededMask
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


def kinds() -> set[type[Saved]]:
    """All classes of residuals and maps of gradients that Dibit has."""
    for module in pkgutil.walk_packages(dibit.__path__, "dibit."):
        if module.name.startswith(("dibit.residuals", "dibit.rules", "dibit.edges", "dibit.engine", "dibit.compile")):
            importlib.import_module(module.name)
    found, new = set(), {Saved}
    while new:
        new = {below for kind in new for below in kind.__subclasses__()}
        found |= new
    return {kind for kind in found if kind.__module__.startswith("dibit.") and not inspect.isabstract(kind)}


def test_all_kinds_are_among_them() -> None:
    found = {type(part) for config in CONFIGS.values() for residual, _ in passes(config) for part in within(residual)}
    lacking = sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds() - found)
    assert not lacking, (
        f"no pass of `Net` keeps {', '.join(lacking)}; give `Net` above an operation that does, or `CONFIGS` a config, "
        "so that the tests of this file hold for it"
    )


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
    """A map is linear, an element of its result depends on that element alone, and it is what the factor says."""
    count = 0
    for residual, tensors in residuals:
        for again in within(residual.with_tensors(tensors)):
            if isinstance(again, GradientMap):
                factor = of_ones(again)
                grad = torch.randn(factor.shape)
                mapped = again.apply(grad)
                assert mapped.shape == grad.shape, again
                assert torch.allclose(mapped, factor * grad, rtol=1e-5), again
                count += 1
    assert count


def of_ones(kept: GradientMap) -> Tensor:
    """What a map makes of ones, by other means than `apply`: its value, or what its bits or its seed stand for."""
    if isinstance(kept, Mask):
        count = 8 * kept.bits.numel()  # the tensors of `Net` fill all bytes
        return torch.where(reference.unpack(kept.bits.view(1, -1), count, 1).view(-1).bool(), 1.0, kept.slope)
    if isinstance(kept, SeededMask):
        ones = torch.ones(N, D)
        return SeededMask(kept.seed, kept.p, ones).value()
    assert isinstance(kept, Residual), (
        f"{type(kept).__name__} maps gradients and has no value; say here what it makes of a gradient of ones"
    )
    return kept.value()
