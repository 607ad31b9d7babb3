"""The recipe "lossless": what it keeps in the place of a copy may change as in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GATv2Conv, SAGEConv, TransformerConv

import dibit
from dibit.edges import functions

N, E, D = 200, 900, 16
GENERATOR = torch.Generator().manual_seed(0)
EDGES = torch.randint(N, (2, E), generator=GENERATOR)
MATRIX = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(E), (N, N)).coalesce().to_sparse_csr()
CONVS: dict[str, Any] = {
    "SAGE": lambda: SAGEConv(D, D, root_weight=False, aggr="sum"),
    "GAT": lambda: GATConv(D, D // 4, heads=4),
    "GATv2": lambda: GATv2Conv(D, D // 4, heads=4),
    "Transformer": lambda: TransformerConv(D, D // 4, heads=4, root_weight=False),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "MIN_DEFERRED_ELEMENTS", 1)


class Summed(nn.Module):
    """A sum over neighbours, with a linear layer, of something that is changed afterwards."""

    def __init__(self, conv: nn.Module, change: str) -> None:
        super().__init__()
        self.lin, self.conv, self.change = nn.Linear(D, D), conv, change
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        h = x if self.change == "the caller's" else self.lin(x)
        y = self.conv(h, graph)
        if self.change == "in place":
            return y + h.relu_()
        if self.change == "without gradients":
            with torch.no_grad():
                h.mul_(2)
        if self.change == "by the caller":
            self.kept = h
        return y


def gradient(model: Summed, graph: Tensor) -> Any:
    """Of all parameters, or that torch refuses it."""
    x = torch.linspace(-1, 1, N * D).view(N, D).clone()
    model.zero_grad()
    y = model(x, graph)
    with torch.no_grad():
        if model.change == "the caller's":
            x.mul_(3)
        if model.kept is not None:
            model.kept.mul_(3)
    try:
        (y * torch.linspace(0, 1, D)).sum().backward()
    except RuntimeError:
        return "refused"
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("change", ["in place", "without gradients", "the caller's", "by the caller"])
@pytest.mark.parametrize(
    ("name", "graph"), [("SAGE", MATRIX), *((name, EDGES) for name in CONVS)], ids=["SAGE by a matrix", *CONVS]
)
def test_what_is_summed_may_change_afterwards(name: str, graph: Tensor, change: str) -> None:
    torch.manual_seed(0)
    model = Summed(CONVS[name](), change)
    own = dibit.compress(copy.deepcopy(model), "lossless")
    truth = gradient(model, graph)
    for _ in range(3):
        found = gradient(own, graph)
        if isinstance(truth, str):
            assert found == truth
        else:
            assert not isinstance(found, str)
            assert (found - truth).norm() <= 1e-5 * truth.norm()
