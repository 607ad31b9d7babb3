"""Models of packages from the index, unmodified; one small adapter a package, skipped where it is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.peers import adapters
from tests.peers.compare import Program, compare

Builds = Iterator[tuple[str, Callable[[], Program]]]


def dgl() -> Builds:
    """Layers of DGL: kernels in C++ fill tensors that torch made."""
    import dgl
    import dgl.nn as layers

    def graph() -> Any:
        generator = torch.Generator().manual_seed(3)  # DGL's own generator follows no seed of torch
        return dgl.add_self_loop(dgl.graph(tuple(torch.randint(120, (2, 500), generator=generator)), num_nodes=120))

    def case(make: Callable[[], nn.Module], *more: Any, width: int = 32) -> Callable[[], Program]:
        class Model(nn.Module):
            """Two layers and a head."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.layer, self.head = nn.Linear(16, width), make(), nn.LazyLinear(4)

            def forward(self, g: Any, x: Tensor) -> Tensor:
                y = self.layer(g, self.first(x).relu(), *more)
                y = y[0] if isinstance(y, tuple) else y
                return self.head(y.flatten(1)).log_softmax(-1)

        def build() -> Program:
            g, x, model = graph(), torch.randn(120, 16), Model()
            model(g, x)  # the head's size becomes known
            return Program(model, lambda model: model(g, x))

        return build

    edges = int(graph().num_edges())
    weights = torch.rand(edges, generator=torch.Generator().manual_seed(1))
    types = torch.arange(edges) % 3
    pseudo = torch.rand(edges, 2, generator=torch.Generator().manual_seed(1))
    features = torch.rand(edges, 5, generator=torch.Generator().manual_seed(2))
    yield "GraphConv", case(lambda: layers.GraphConv(32, 24))
    yield "GraphConv, edge weights", case(lambda: _Weighted(layers.GraphConv(32, 24), weights))
    yield "GATConv", case(lambda: layers.GATConv(32, 12, 3))
    yield "GATConv, dropout", case(lambda: layers.GATConv(32, 12, 3, feat_drop=0.3, attn_drop=0.3, residual=True))
    yield "GATv2Conv", case(lambda: layers.GATv2Conv(32, 12, 3))
    yield "EGATConv", case(lambda: _Args(layers.EGATConv(32, 5, 12, 6, 3), features))
    yield "DotGatConv", case(lambda: layers.DotGatConv(32, 12, 3))
    for kind in ("mean", "gcn", "pool", "lstm"):
        yield f"SAGEConv, {kind}", case(lambda kind=kind: layers.SAGEConv(32, 24, kind))
    for kind in ("sum", "mean", "max"):
        yield f"GINConv, {kind}", case(lambda kind=kind: layers.GINConv(nn.Linear(32, 24), kind, learn_eps=True))
    yield "GINEConv", case(lambda: _Args(layers.GINEConv(nn.Linear(32, 24)), torch.cat([features] * 7, 1)[:, :32]))
    yield "TAGConv", case(lambda: layers.TAGConv(32, 24, 2))
    yield "SGConv", case(lambda: layers.SGConv(32, 24, 2))
    yield "APPNPConv", case(lambda: layers.APPNPConv(3, 0.5))
    yield "GCN2Conv", case(lambda: _Twice(layers.GCN2Conv(32, 1)))
    yield "AGNNConv", case(lambda: layers.AGNNConv())
    yield "EdgeConv", case(lambda: layers.EdgeConv(32, 24))
    yield "EdgeConv, batch norm", case(lambda: layers.EdgeConv(32, 24, batch_norm=True))
    yield "RelGraphConv", case(lambda: _Args(layers.RelGraphConv(32, 24, 3, "basis", 2), types))
    yield "RelGraphConv, bdd", case(lambda: _Args(layers.RelGraphConv(32, 24, 3, "bdd", 4), types))
    yield "GatedGraphConv", case(lambda: _Args(layers.GatedGraphConv(32, 32, 2, 3), types))
    yield "GMMConv", case(lambda: _Args(layers.GMMConv(32, 24, 2, 3, "mean"), pseudo))
    yield "NNConv", case(lambda: _Args(layers.NNConv(32, 8, nn.Linear(5, 256), "mean"), features))
    yield "CFConv", case(lambda: _Args(layers.CFConv(32, 5, 16, 24), features))
    yield "ChebConv", case(lambda: layers.ChebConv(32, 24, 2))
    yield "PNAConv, mean, max, std", case(lambda: layers.PNAConv(32, 24, ["mean", "max", "std"], ["identity"], 2.5))
    yield (
        "PNAConv, sum, moment3",
        case(lambda: layers.PNAConv(32, 24, ["sum", "moment3"], ["identity", "amplification"], 2.5)),
    )
    yield "TWIRLSConv", case(lambda: layers.TWIRLSConv(32, 24, 16, prop_step=2))
    yield "GroupRevRes", case(lambda: _GroupRev(layers))
    yield "readouts", case(lambda: _Readout(layers))


class _Args(nn.Module):
    """A layer that takes more about each edge."""

    def __init__(self, layer: nn.Module, *more: Any) -> None:
        super().__init__()
        self.layer, self.more = layer, more

    def forward(self, g: Any, x: Tensor) -> Any:
        return self.layer(g, x, *self.more)


class _Weighted(_Args):
    def forward(self, g: Any, x: Tensor) -> Any:
        return self.layer(g, x, edge_weight=self.more[0])


class _Twice(_Args):
    def forward(self, g: Any, x: Tensor) -> Any:
        return self.layer(g, x.relu(), x)


class _GroupRev(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layer = layers.GroupRevRes(layers.SAGEConv(16, 16, "mean"), groups=2)

    def forward(self, g: Any, x: Tensor) -> Tensor:
        return self.layer(g, x.clone())


class _Readout(nn.Module):
    """One graph's sum, mean, attention and Set2Set, given back to each node."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        pools = [layers.SumPooling(), layers.AvgPooling(), layers.MaxPooling(), layers.SortPooling(2)]
        pools += [layers.GlobalAttentionPooling(nn.Linear(32, 1)), layers.Set2Set(32, 2, 1)]
        self.pools = nn.ModuleList([*pools, layers.SetTransformerEncoder(32, 2, 16, 32)])

    def forward(self, g: Any, x: Tensor) -> Tensor:
        *pools, encoder = self.pools
        return torch.cat([x, encoder(g, x), *[pool(g, x).expand(x.shape[0], -1) for pool in pools]], 1)


PACKAGES: dict[str, Callable[[], Builds]] = {
    "dgl": dgl,
    "schnetpack": adapters.schnetpack,
    "chemprop": adapters.chemprop,
    "pykeen": adapters.pykeen,
    "recbole": adapters.recbole,
}


def main(names: list[str], only: str = "") -> int:
    failed = 0
    for name in names or list(PACKAGES):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed here: skipped.")
            continue
        for title, build in PACKAGES[name]():
            if only in title:
                try:
                    verdict = compare(f"{name} {title}", build)
                except Exception as error:  # the plain program does not run here
                    print(f"skip {name} {title}: {type(error).__name__}: {str(error)[:150]}", flush=True)
                    continue
                failed += bool(verdict.faults)
                print(verdict, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:2], *sys.argv[2:3])))
