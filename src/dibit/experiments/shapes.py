"""Sizes of data sets that people train on, random graphs of these sizes, and the models that run on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a data set, edges in both directions, and of the model that its users train.

    Saved bytes depend on nothing else, so a random graph of this shape stands for the real one. Time does not: random
    neighbours find less in the caches than real ones.
    """

    name: str
    nodes: int
    edges: int
    features: int
    hidden: int
    classes: int
    layers: int
    dropout: float
    train: int

    @property
    def widths(self) -> list[int]:
        """Input width of each layer."""
        return [self.features] + [self.hidden] * (self.layers - 1)

    def scaled(self, scale: float) -> Shape:
        """The same with `scale` times as many nodes and edges."""
        sizes = {name: max(64, round(scale * getattr(self, name))) for name in ("nodes", "edges", "train")}
        return replace(self, **sizes)


ARXIV = Shape("arxiv", 169_343, 2_315_598, 128, 128, 40, 3, 0.5, 90_941)
FLICKR = Shape("flickr", 89_250, 899_756, 500, 256, 7, 2, 0.3, 44_625)
SHAPES = (ARXIV, FLICKR)  # of the papers
PRODUCTS_SMALL = Shape("products-small", 244_903, 12_371_828, 100, 256, 47, 3, 0.5, 19_662)  # a tenth of ogbn-products
CORA = Shape("cora", 2_708, 10_556, 1_433, 64, 7, 2, 0.5, 140)
MESH = Shape("mesh", 40_000, 238_402, 8, 128, 3, 6, 0.0, 40_000)  # a grid of 200 x 200 with one diagonal
NAMED = {shape.name: shape for shape in (ARXIV, FLICKR, PRODUCTS_SMALL, CORA, MESH)}


@lru_cache(maxsize=2)
def random_graph(shape: Shape) -> tuple[Any, Any]:
    """Features (N, F) and a sparse CSR adjacency (N, N) of this shape."""
    import torch
    from torch_geometric.utils import to_torch_csr_tensor

    torch.manual_seed(0)
    n = shape.nodes
    adjacency = to_torch_csr_tensor(torch.randint(n, (2, shape.edges)), size=(n, n))
    return torch.randn(n, shape.features), adjacency


@lru_cache(maxsize=1)
def mesh(shape: Shape) -> tuple[Any, Any]:
    """Features (N, F) and a sparse CSR adjacency (N, N) of a square grid with one diagonal, of about so many nodes."""
    import torch
    from torch_geometric.utils import to_torch_csr_tensor

    torch.manual_seed(0)
    side = round(shape.nodes**0.5)
    node = torch.arange(side * side).view(side, side)
    pairs = [(node[:, :-1], node[:, 1:]), (node[:-1], node[1:]), (node[:-1, :-1], node[1:, 1:])]
    one, other = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    edges = torch.stack([torch.cat([one, other]), torch.cat([other, one])])
    return torch.randn(side * side, shape.features), to_torch_csr_tensor(edges, size=(side * side, side * side))


def sage(shape: Shape) -> Any:
    """PyTorch Geometric's GraphSAGE of this shape in training mode, the same weights at each call."""
    return MODELS["sage"](shape)


def _seeded(build: Callable[[Shape], Any]) -> Callable[[Shape], Any]:
    def model(shape: Shape) -> Any:
        import torch

        torch.manual_seed(0)
        return build(shape).train()

    return model


def _basic(kind: str, **settings: Any) -> Callable[[Shape], Any]:
    def build(shape: Shape) -> Any:
        import torch_geometric.nn as g

        sizes = shape.features, shape.hidden, shape.layers, shape.classes
        return getattr(g, kind)(*sizes, dropout=shape.dropout, norm="batch_norm", **settings)

    return _seeded(build)


def _gcn2(shape: Shape) -> Any:
    from dibit.train.models import GCN2

    return GCN2(shape.features, shape.hidden, shape.layers, shape.classes, dropout=shape.dropout, norm="batch_norm")


def _transformer(shape: Shape) -> Any:
    from dibit.experiments.models import TransformerNetwork

    return TransformerNetwork(shape.features, shape.hidden, shape.layers, shape.classes, shape.dropout)


def _mesh(shape: Shape) -> Any:
    from dibit.experiments.models import MeshNetwork

    return MeshNetwork(shape.features, shape.hidden, shape.layers, shape.classes)


MODELS: dict[str, Callable[[Shape], Any]] = {
    "sage": _basic("GraphSAGE"),
    "gcn": _basic("GCN", cached=True),
    "gin": _basic("GIN"),
    "gat": _basic("GAT", heads=4),
    "gatv2": _basic("GAT", heads=4, v2=True),
    "transformer": _seeded(_transformer),
    "edgecnn": _basic("EdgeCNN"),
    "mesh": _seeded(_mesh),
    "gcn2": _seeded(_gcn2),
}
BY_EDGES = ("gat", "gatv2", "transformer", "edgecnn", "mesh")  # their graph is an `edge_index`
