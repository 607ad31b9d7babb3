"""The sizes of the papers' data sets, a random graph of such a size, and the papers' GraphSAGE on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a data set, edges in both directions, and of the papers' GraphSAGE (mean, BatchNorm, ReLU, dropout).

    Saved bytes depend on nothing else, so a random graph of this shape stands for the real one.
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


ARXIV = Shape("arxiv", 169_343, 2_315_598, 128, 128, 40, 3, 0.5, 90_941)
FLICKR = Shape("flickr", 89_250, 899_756, 500, 256, 7, 2, 0.3, 44_625)
SHAPES = (ARXIV, FLICKR)


@lru_cache(maxsize=2)
def random_graph(shape: Shape) -> tuple[Any, Any]:
    """Features (N, F) and a sparse CSR adjacency (N, N) of this shape."""
    import torch
    from torch_geometric.utils import to_torch_csr_tensor

    torch.manual_seed(0)
    n = shape.nodes
    adjacency = to_torch_csr_tensor(torch.randint(n, (2, shape.edges)), size=(n, n))
    return torch.randn(n, shape.features), adjacency


def sage(shape: Shape) -> Any:
    """PyTorch Geometric's GraphSAGE of this shape in training mode, the same weights at each call."""
    import torch
    from torch_geometric.nn import GraphSAGE

    torch.manual_seed(0)
    return GraphSAGE(
        shape.features, shape.hidden, shape.layers, shape.classes, dropout=shape.dropout, norm="batch_norm"
    ).train()
