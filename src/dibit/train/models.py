"""PyTorch Geometric's own models, and the adjacency each of them is given."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GAT, GCN, GIN, GCN2Conv, GraphSAGE
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.nn.resolver import normalization_resolver
from torch_geometric.utils import to_torch_csr_tensor

from dibit.train.settings import ModelSettings, Settings

# Class of each --norm and its arguments; LayerNorm by default would take one mean over the whole graph.
_NORMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "none": (None, {}),
    "batch": ("BatchNorm", {}),
    "layer": ("LayerNorm", {"mode": "node"}),
    "graph": ("GraphNorm", {}),
    "pair": ("PairNorm", {}),
}


class GCN2(nn.Module):
    r"""GCNII: deep graph convolution with an initial residual and identity mapping (arXiv:2007.02133).

    A linear layer to the hidden width, `num_layers` of `GCN2Conv` with normalisation, ReLU and dropout, and a
    linear layer to the classes. With `residual`, a layer is relu(norm(conv(dropout(x), x0)) + x), after
    EXACT's GCNII (whose code adds dropout(x) there).

    Args:
        in_channels: Features a node.
        hidden_channels: Width of the layers.
        num_layers: Number of `GCN2Conv` layers.
        out_channels: Classes.
        dropout: Probability of dropping an element.
        norm: Name of a normalisation layer for `normalization_resolver`, or None.
        norm_kwargs: Its arguments.
        alpha: Share of the first layer's output in every layer.
        theta: beta = log(theta / layer + 1).
        residual: Add each layer's input x to its output, before the ReLU.

    Shapes:
        x: (N, in_channels); adj: sparse CSR (N, N), normalised, or edges int64 (2, E) with their weights (E,);
        output: (N, out_channels).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int,
        out_channels: int,
        dropout: float = 0.0,
        norm: str | None = None,
        norm_kwargs: dict[str, Any] | None = None,
        alpha: float = 0.5,
        theta: float = 1.0,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.lin_in = nn.Linear(in_channels, hidden_channels)
        self.convs = nn.ModuleList(
            GCN2Conv(hidden_channels, alpha, theta, layer=i + 1, normalize=False) for i in range(num_layers)
        )
        self.norms = nn.ModuleList(
            nn.Identity() if norm is None else normalization_resolver(norm, hidden_channels, **(norm_kwargs or {}))
            for _ in range(num_layers)
        )
        self.lin_out = nn.Linear(hidden_channels, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.residual = residual

    @property
    def num_layers(self) -> int:
        """Steps of layer-wise inference: the two linear layers count."""
        return len(self.convs) + 2

    def forward(self, x: Tensor, adj: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Return the logits."""
        x = initial = F.relu(self.lin_in(self.dropout(x)))
        for i in range(len(self.convs)):
            x = self._layer(i, x, initial, adj, edge_weight)
        return self.lin_out(self.dropout(x))

    def inference_per_layer(self, layer: int, x: Tensor, adj: Tensor, batch_size: int) -> Tensor:
        """One step of layer-wise inference for the first rows; between the layers the first one's output goes along."""
        if layer == 0:
            initial = F.relu(self.lin_in(x[:batch_size]))
            return torch.cat((initial, initial), dim=1)
        h, initial = x.chunk(2, dim=1)
        if layer == self.num_layers - 1:
            return self.lin_out(h[:batch_size])
        h = self._layer(layer - 1, h, initial, adj, None)
        return torch.cat((h[:batch_size], initial[:batch_size]), dim=1)

    def _layer(self, i: int, x: Tensor, initial: Tensor, adj: Tensor, edge_weight: Tensor | None) -> Tensor:
        h = self.norms[i](self.convs[i](self.dropout(x), initial, adj, edge_weight))
        return F.relu(h + x if self.residual else h)


class LinearSkip(nn.Module):
    """A graph layer with a linear layer beside it: conv(x, ...) + W x + b.

    Args:
        conv: A layer of torch_geometric.nn.
        in_channels: Features a node.
        out_channels: Of the layer.
    """

    def __init__(self, conv: nn.Module, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, *edges: Any, **more: Any) -> Tensor:
        """Return the sum, (N, out_channels)."""
        return self.conv(x, *edges, **more) + self.lin(x)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.conv.reset_parameters()  # type: ignore[operator]
        self.lin.reset_parameters()


class _LinearSkips:
    """Mixed into one of PyTorch Geometric's models: a linear layer beside each of its graph layers."""

    def init_conv(self, in_channels: int, out_channels: int, **kwargs: Any) -> nn.Module:
        conv = super().init_conv(in_channels, out_channels, **kwargs)  # type: ignore[misc]
        return LinearSkip(conv, in_channels, out_channels)


class GCNLinearSkip(_LinearSkips, GCN):
    """GCN with linear skips."""


class GraphSAGELinearSkip(_LinearSkips, GraphSAGE):
    """GraphSAGE with linear skips."""


class GINLinearSkip(_LinearSkips, GIN):
    """GIN with linear skips."""


class GATLinearSkip(_LinearSkips, GAT):
    """GAT with linear skips."""


_MODELS: dict[str, tuple[type[BasicGNN], type[BasicGNN]]] = {  # without linear skips, and with them
    "gcn": (GCN, GCNLinearSkip),
    "sage": (GraphSAGE, GraphSAGELinearSkip),
    "gin": (GIN, GINLinearSkip),
    "gat": (GAT, GATLinearSkip),
}


def build_model(settings: ModelSettings, in_channels: int, out_channels: int) -> nn.Module:
    """Build the model, its weights drawn from torch's default generator; call it as ``model(x, adjacency)``.

    Args:
        settings: Which model.
        in_channels: Features a node.
        out_channels: Classes.
    """
    norm, norm_kwargs = _NORMS[settings.norm]
    common: dict[str, Any] = {
        "in_channels": in_channels,
        "hidden_channels": settings.hidden,
        "num_layers": settings.layers,
        "out_channels": out_channels,
        "dropout": settings.dropout,
        "norm": norm,
        "norm_kwargs": norm_kwargs,
    }
    if settings.model == "gcn2":
        return GCN2(**common, alpha=settings.alpha, theta=settings.theta, residual=settings.residual)
    own: dict[str, Any] = {}
    if settings.model == "gcn":
        own["normalize"] = False  # the adjacency is normalised already
    if settings.model == "gat":
        own["heads"] = settings.heads
    if settings.aggr is not None:
        own["aggr"] = settings.aggr
    if not settings.bias:
        own["bias"] = False
    return _MODELS[settings.model][settings.linear_skip](**common, jk=settings.jk, **own)


def build_adjacency(settings: ModelSettings, edge_index: Tensor, num_nodes: int, device: torch.device) -> Tensor:
    """Return the graph in the form that the model takes, on `device`.

    Sparse CSR with a row for each target; for gcn and gcn2 with self-loops and normalised once, here. For
    gat, and for what CUDA's sparse product cannot do (max), the edge list.

    Args:
        settings: Which model.
        edge_index: int64 (2, E), from row 0 to row 1.
        num_nodes: N.
        device: Where to.
    """
    if settings.model == "gat" or (settings.aggr == "max" and device.type == "cuda"):
        return edge_index.to(device)
    weight = None
    if settings.model in ("gcn", "gcn2"):
        edge_index, weight = gcn_norm(edge_index, None, num_nodes)
    adjacency = to_torch_csr_tensor(edge_index.flip(0), weight, size=(num_nodes, num_nodes))
    return adjacency.to(device)


def adjacency_arguments(
    settings: Settings, edge_index: Tensor, num_nodes: int, device: torch.device
) -> tuple[Tensor, ...]:
    """What the model takes after x in training: the adjacency, or below FP32 the edges and, for gcn, their weights.

    torch's sparse products with a mean take FP32 alone.
    """
    if settings.optimisation.precision == "fp32":
        return (build_adjacency(settings.model, edge_index, num_nodes, device),)
    if settings.model.model not in ("gcn", "gcn2"):
        return (edge_index.to(device),)
    edge_index, weight = gcn_norm(edge_index, None, num_nodes)
    return edge_index.to(device), weight.to(device)
