"""Models of message passing that PyTorch Geometric has no class for: layers put together as in its own models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import TransformerConv

POSITIONS = 4  # of the features, the first are where a node of a mesh lies


class TransformerNetwork(nn.Module):
    """`TransformerConv` layers with BatchNorm, ReLU and dropout between them.

    Args:
        features: F, width of the input.
        hidden: width of the layers, all heads together.
        layers: how many.
        classes: C, width of the result.
        dropout: of the layers' results.
        heads: of each layer; the last has one.
    """

    def __init__(self, features: int, hidden: int, layers: int, classes: int, dropout: float, heads: int = 4) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden = {hidden} was given; expected a multiple of heads = {heads}.")
        widths = [features] + [hidden] * (layers - 1)
        self.convs = nn.ModuleList([TransformerConv(width, hidden // heads, heads) for width in widths[:-1]])
        self.convs.append(TransformerConv(widths[-1], classes))
        self.norms = nn.ModuleList([nn.BatchNorm1d(hidden) for _ in widths[:-1]])
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """x (N, F) and edge_index (2, E) give (N, C)."""
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = F.dropout(F.relu(norm(conv(x, edge_index))), self.dropout, self.training)
        return self.convs[-1](x, edge_index)  # type: ignore[no-any-return]


class MeshNetwork(nn.Module):
    """An encoder, blocks that pass messages along the edges of a mesh, and a decoder, as in models of weather and flow.

    Nodes and edges have a state each. A block adds to an edge's state what an MLP makes of it and of both ends, and to
    a node's state what an MLP makes of it and of the sum over its edges.

    Args:
        features: F, width of the input.
        hidden: width of both states.
        layers: number of blocks.
        classes: C, width of the result.
    """

    def __init__(self, features: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.nodes, self.edges = _mlp(features, hidden), _mlp(POSITIONS, hidden)
        self.edge_blocks = nn.ModuleList([_mlp(3 * hidden, hidden) for _ in range(layers)])
        self.node_blocks = nn.ModuleList([_mlp(2 * hidden, hidden) for _ in range(layers)])
        self.decoder = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """x (N, F) and edge_index (2, E) give (N, C)."""
        source, target = edge_index
        place = x[:, :POSITIONS].detach()
        x, edges = self.nodes(x), self.edges(place[target] - place[source])
        for of_edges, of_nodes in zip(self.edge_blocks, self.node_blocks, strict=True):
            edges = edges + of_edges(torch.cat([x[target], x[source], edges], -1))
            received = x.new_zeros(x.shape).index_add_(0, target, edges)
            x = x + of_nodes(torch.cat([x, received], -1))
        return self.decoder(x)  # type: ignore[no-any-return]


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
