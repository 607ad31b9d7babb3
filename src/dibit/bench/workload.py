"""One training step on a random graph, under Dibit's recipes and under what people would pick instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.utils.checkpoint import checkpoint

import dibit
from dibit.experiments.shapes import BY_EDGES, MODELS, NAMED, Shape, mesh, random_graph
from dibit.recipes import RECIPES

FORMS = ("csr", "edge_index")
ORDERS = ("target", "source", "shuffled")
LOADERS = ("full", "neighbor")
NEIGHBORS = 15, 10, 5  # of the mini-batches: sampled for a node in each hop
BATCH = 1024
_BATCHES = 8  # different ones
SETTINGS = ("plain", "compile", "bf16", "checkpoint", *reversed(RECIPES))


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        shape: name of the sizes.
        model: name of the model.
        layers: number of layers; `None`: the shape's.
        hidden: width; `None`: the shape's.
        form: how the model gets its graph: "csr" (`torch.sparse`) or "edge_index".
        scale: nodes and edges are this many times those of the shape.
        order: how the edges of an `edge_index` are sorted: by "target", by "source", or "shuffled".
        loader: "full": a step is on the whole graph; "neighbor": on `BATCH` nodes and their sampled neighbours, which
            are an `edge_index` in the sampler's own order. Batches are sampled before anything is measured.
    """

    shape: str = "arxiv"
    model: str = "sage"
    layers: int | None = None
    hidden: int | None = None
    form: str = "csr"
    scale: float = 1.0
    order: str = "target"
    loader: str = "full"

    def sizes(self) -> Shape:
        shape = NAMED[self.shape]
        shape = replace(shape, layers=self.layers or shape.layers, hidden=self.hidden or shape.hidden)
        return shape if self.scale == 1 else shape.scaled(self.scale)

    def build(self) -> tuple[nn.Module, BenchmarkBatch]:
        """The model and its (first) batch; the same numbers at each call."""
        return self.network(), self.batches()[0]

    def network(self) -> nn.Module:
        """The model, in training mode."""
        model: nn.Module = MODELS[self.model](self.sizes())
        if self.loader != "full":
            for module in model.modules():
                if "cached" in (own := vars(module)):  # GCN would use the first batch's edges for all
                    own["cached"] = False
        return model

    def batches(self) -> list[BenchmarkBatch]:
        """What the steps are on, in turn."""
        shape = self.sizes()
        x, graph = (mesh if shape.name == "mesh" else random_graph)(shape)
        if self.model == "gcn2":
            graph = _normalised(graph)
        torch.manual_seed(0)
        y = torch.randint(shape.classes, (x.shape[0],))
        if self.loader == "neighbor":
            return _sampled(x, _edges(graph), y)
        if self.form == "edge_index" or self.model in BY_EDGES:
            graph = _edges(graph)
            if self.order != "target":
                keys = graph[0] if self.order == "source" else torch.rand(graph.shape[1])
                graph = graph[:, keys.argsort(stable=True)]
        train = torch.randperm(x.shape[0])[: shape.train]
        return [BenchmarkBatch(x, graph, train, y[train])]

    def __str__(self) -> str:
        shape = self.sizes()
        return (
            f"{self.model}, {shape.layers} x {shape.hidden}, on the {shape.name} shape ({shape.nodes:,} nodes, "
            f"{shape.edges:,} edges, {', '.join(self._how())})"
        )

    def _how(self) -> list[str]:
        """How a model gets the graph."""
        if self.loader == "neighbor":
            return [f"batches of {BATCH:,} nodes and {', '.join(map(str, NEIGHBORS))} neighbours"]
        if self.form == "csr" and self.model not in BY_EDGES:
            return ["csr"]
        return ["edge_index", {"shuffled": "shuffled"}.get(self.order, f"sorted by {self.order}")]


@dataclass(frozen=True)
class BenchmarkBatch:
    """Features (N, F), graph, rows of the loss (T,), their classes (T,)."""

    x: Tensor
    graph: Tensor
    train: Tensor
    y: Tensor

    def to(self, device: torch.device | str) -> BenchmarkBatch:
        return BenchmarkBatch(*(t.to(device) for t in (self.x, self.graph, self.train, self.y)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        if self.graph.layout == torch.sparse_csr:
            parts = (self.graph.crow_indices(), self.graph.col_indices(), self.graph.values())
        else:
            parts = (self.graph,)  # type: ignore[assignment]
        return (self.x, *parts, self.train, self.y)


class TrainingStep:
    """A training step of a model under a setting, in two halves.

    Args:
        model: from `Workload.build`.
        batch: its data.
        setting: one of `SETTINGS`.
    """

    def __init__(self, model: nn.Module, batch: BenchmarkBatch, setting: str) -> None:
        self.batch = batch
        self.model = model
        self.forward_model = prepare(model, setting)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        self.autocast = setting == "bf16"

    def logits(self) -> Tensor:
        """The model's forward pass: (N, C)."""
        with torch.autocast(self.batch.x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.forward_model(self.batch.x, self.batch.graph)

    def forward(self) -> Tensor:
        """Zero the gradients and compute the loss, in float32."""
        self.optimizer.zero_grad()
        return cross_entropy(self.logits()[self.batch.train].float(), self.batch.y)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients and update the weights."""
        loss.backward()
        self.optimizer.step()

    def __call__(self) -> None:
        self.backward(self.forward())

    def input_bytes(self) -> int:
        """What lives between two steps: data, parameters, buffers, gradients and the optimiser's state."""
        parameters = [*self.model.parameters()]
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        held = [*self.batch.tensors, *parameters, *self.model.buffers(), *state]
        return sum(t.nbytes for t in held) + sum(p.grad.nbytes for p in parameters if p.grad is not None)


def prepare(model: nn.Module, setting: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The forward pass of the model under a setting."""
    if setting in RECIPES:
        return dibit.compress(model, setting)
    if setting == "compile":
        return torch.compile(model)
    if setting == "checkpoint":
        return Checkpointed(model)
    return model


class Checkpointed:
    """The model with `torch.utils.checkpoint` around each layer: convolution, norm, activation and dropout."""

    def __init__(self, model: Any) -> None:
        self.model = model
        if not (hasattr(model, "lin_in") or hasattr(model, "act")):
            raise ValueError(f"nobody has divided {type(model).__name__} into layers to checkpoint.")
        self.layer = _gcn2_layer if hasattr(model, "lin_in") else _basic_layer

    def __call__(self, x: Tensor, graph: Tensor) -> Tensor:
        model = self.model
        deep = hasattr(model, "lin_in")
        initial = x = relu(model.lin_in(model.dropout(x))) if deep else x
        for i in range(len(model.convs)):
            x = checkpoint(self.layer, model, i, x, initial, graph, use_reentrant=False)
        return model.lin_out(model.dropout(x)) if deep else x


def _basic_layer(model: Any, i: int, x: Tensor, _: Tensor, graph: Tensor) -> Tensor:
    """A layer of PyTorch Geometric's `BasicGNN`."""
    x = model.convs[i](x, graph)
    if i == model.num_layers - 1:
        return x
    return model.dropout(model.act(model.norms[i](x)))


def _gcn2_layer(model: Any, i: int, x: Tensor, initial: Tensor, graph: Tensor) -> Tensor:
    return relu(model.norms[i](model.convs[i](model.dropout(x), initial, graph)))


def _sampled(x: Tensor, edge_index: Tensor, y: Tensor) -> list[BenchmarkBatch]:
    """Batches of nodes and their sampled neighbours, as PyTorch Geometric's `NeighborLoader` gives them."""
    from torch_geometric.data import Data
    from torch_geometric.loader import NeighborLoader

    from dibit.train.neighbor_sampler import NumbaSampler

    data = Data(x=x, edge_index=edge_index, y=y)
    nodes = torch.randperm(x.shape[0])[: _BATCHES * BATCH]
    sampler = NumbaSampler(data, NEIGHBORS)
    found = []
    for batch in NeighborLoader(data, NEIGHBORS, input_nodes=nodes, batch_size=BATCH, neighbor_sampler=sampler):
        own = torch.arange(batch.batch_size)
        found.append(BenchmarkBatch(batch.x, batch.edge_index, own, batch.y[own]))
    return found


def _edges(graph: Tensor) -> Tensor:
    """The edges of a matrix as an `edge_index` (2, E), sorted by target."""
    rows = torch.arange(graph.shape[0]).repeat_interleave(graph.crow_indices().diff())
    return torch.stack((graph.col_indices(), rows))


def _normalised(graph: Tensor) -> Tensor:
    from torch_geometric.nn.conv.gcn_conv import gcn_norm
    from torch_geometric.utils import to_torch_csr_tensor

    edges, weight = gcn_norm(_edges(graph), None, graph.shape[0])
    return to_torch_csr_tensor(edges.flip(0), weight, size=tuple(graph.shape))  # type: ignore[arg-type]
