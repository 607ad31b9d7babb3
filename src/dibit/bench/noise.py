"""Squared error of the gradient on a grid of models, norms, depths and stages of training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from dibit import Config, Sample
from dibit.engine.model_state import state_of
from dibit.recipes import RECIPES
from dibit.study import gradient_error
from dibit.train.data import NodeDataset

MODELS = ("sage", "gcn", "gin", "gat")
NORMS = ("none", "batch", "layer", "layer-graph", "graph", "instance", "pair", "l2")
LAYERS = (2, 3, 4, 8, 16, 32)
EPOCHS = (0, 30)
GRAPHS = ("planted:6000", "amazon_computers")
CONFIGS: dict[str, Config] = {
    **RECIPES,
    "unbounded": replace(dibit.recipe("default"), noise=None),  # rows by the recipe's ratios, whatever the error is
    "all-rows": replace(dibit.recipe("default"), noise=1e-9),  # as many rows as a bound can ask for
}
SETTINGS = ("default", "iexact")
IDENTITY = ("graph", "model", "norm", "residual", "layers", "epoch", "setting")  # of a row
WIDTH, HEADS, DROPOUT, RATE = 64, 4, 0.2, 1e-3
_MEMORY = 4  # steps that scores are made of; older ones have faded


@dataclass(frozen=True)
class NetworkSettings:
    """One network of the grid.

    Args:
        model: of `MODELS`.
        norm: of `NORMS`.
        residual: h + f(h) around each layer.
        layers: convolutions, between two linear layers.
    """

    model: str
    norm: str
    residual: bool
    layers: int

    def __str__(self) -> str:
        return f"{self.model}, {self.norm}{', residual' if self.residual else ''}, {self.layers} layers"


class Network(nn.Module):
    """A linear layer, `layers` times convolution, norm, ReLU and dropout, and a linear layer to the classes."""

    def __init__(self, network: NetworkSettings, features: int, classes: int, width: int = WIDTH) -> None:
        super().__init__()
        self.residual = network.residual
        self.first, self.last = nn.Linear(features, width), nn.Linear(width, classes)
        self.convs = nn.ModuleList(_conv(network.model, width) for _ in range(network.layers))
        self.norms = nn.ModuleList(_norm(network.norm, width) for _ in range(network.layers))

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        """Logits (N, C) of features (N, F) on a sparse matrix, or on edges for GAT."""
        h = self.first(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            new = F.dropout(F.relu(norm(conv(h, graph))), DROPOUT, self.training)
            h = h + new if self.residual else new
        return self.last(h)


class _L2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Rows of length 1."""
        return F.normalize(x)


def _conv(model: str, width: int) -> nn.Module:
    import torch_geometric.nn as g

    match model:
        case "sage":
            return g.SAGEConv(width, width)
        case "gcn":
            return g.GCNConv(width, width, normalize=False)
        case "gin":
            return g.GINConv(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
        case _:
            return g.GATConv(width, width // HEADS, heads=HEADS)


def _norm(norm: str, width: int) -> nn.Module:
    import torch_geometric.nn as g

    match norm:
        case "none":
            return nn.Identity()
        case "batch":
            return nn.BatchNorm1d(width)
        case "layer":
            return nn.LayerNorm(width)
        case "layer-graph":
            return g.LayerNorm(width)  # type: ignore[no-any-return]
        case "graph":
            return g.GraphNorm(width)  # type: ignore[no-any-return]
        case "instance":
            return g.InstanceNorm(width, affine=True)  # type: ignore[no-any-return]
        case "pair":
            return g.PairNorm()  # type: ignore[no-any-return]
        case _:
            return _L2()


def networks(
    models: Sequence[str] = MODELS,
    norms: Sequence[str] = NORMS,
    layers: Sequence[int] = LAYERS,
    residual: Sequence[bool] = (False, True),
) -> Iterator[NetworkSettings]:
    """The part of the grid with these."""
    return (NetworkSettings(m, n, r, k) for m in models for n in norms for r in residual for k in layers)


class Training:
    """A plain training of one network, stopped at several epochs."""

    def __init__(self, network: NetworkSettings, graph: NodeDataset) -> None:
        torch.manual_seed(0)
        self.x, self.y = graph.x, graph.y
        self.rows = torch.as_tensor(graph.split(0).train)
        self.graph = _adjacency(network.model, graph)
        self.model = Network(network, graph.x.shape[1], graph.num_classes).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.epoch = 0
        self._before: list[dict[str, Any]] = []

    def until(self, epoch: int) -> None:
        """Train up to this epoch."""
        while self.epoch < epoch:
            self._before = [*self._before[1 - _MEMORY :], copy.deepcopy(self.model.state_dict())]
            self.optimizer.zero_grad()
            self.step(self.model)
            self.optimizer.step()
            self.epoch += 1

    def step(self, model: nn.Module) -> None:
        """One forward and one backward pass."""
        self.loss(model).backward()

    def loss(self, model: nn.Module) -> Tensor:
        """The cross-entropy of the training nodes."""
        return F.cross_entropy(model(self.x, self.graph)[self.rows], self.y[self.rows])

    def error(self, setting: str, draws: int) -> dict[str, float]:
        """Squared error of the gradient at this epoch, its standard error, what was predicted, and bytes a node kept.

        Scores, and all else that is learnt from earlier steps, come from those that led here.
        """
        config = CONFIGS[setting]
        trial = copy.deepcopy(self.model)
        learns = config.noise is not None or isinstance(config.reduce, Sample)
        before = partial(self._steps_before, trial) if learns else None
        error = gradient_error(trial, partial(self.step, trial), config, draws, before)
        dibit.compress(trial, config)
        with torch.random.fork_rng():
            if before is not None:
                before()
            with dibit.track(trial) as saved:
                self.loss(trial)
        found = {"error": error.mean, "standard_error": error.error, "bytes": saved.total / self.x.shape[0]}
        state = state_of(trial)
        if config.noise is not None and state is not None:
            found["predicted"] = state.scores.plan.predicted()
        return found

    def _steps_before(self, trial: nn.Module) -> None:
        now = copy.deepcopy(trial.state_dict())
        for weights in (self._before or [now] * _MEMORY)[-_MEMORY:]:
            trial.load_state_dict(weights)
            self.step(trial)
        trial.load_state_dict(now)


def _adjacency(model: str, graph: NodeDataset) -> Tensor:
    from torch_geometric.nn.conv.gcn_conv import gcn_norm
    from torch_geometric.utils import to_torch_csr_tensor

    edges, weight = graph.edge_index, None
    if model == "gat":
        return edges
    if model == "gcn":
        edges, weight = gcn_norm(edges, None, graph.num_nodes)
    return to_torch_csr_tensor(edges.flip(0), weight, size=(graph.num_nodes,) * 2)  # type: ignore[no-any-return]


def measure(
    graphs: Sequence[str],
    root: str,
    grid: Sequence[NetworkSettings],
    epochs: Sequence[int],
    draws: int,
    settings: Sequence[str],
    note: Callable[[str], None],
    done: Callable[[dict[str, Any]], None] = lambda row: None,
    skip: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Train each network of the grid plainly; at each epoch repeat the same step under every setting.

    Args:
        graphs: names or files, as `dibit train --dataset` takes them.
        root: folder of data sets.
        grid: networks.
        epochs: steps taken before each measurement.
        draws: number of draws of the codec over which the error is averaged.
        settings: recipes.
        note: called with a line that says how far the measurement is.
        done: is given each row once it is measured.
        skip: rows of an earlier run, which are taken as they are.

    Returns:
        {"epochs", "draws", "rows"}: a row a graph, network, epoch and setting, with the draws that it was measured with
        and `Training.error`'s numbers.
    """
    from dibit.experiments.data import load_prepared

    rows = list(skip)
    known = {tuple(row[name] for name in IDENTITY) for row in rows}
    for name in graphs:
        note(f"loading {name}")
        graph = load_prepared(name, root)
        for network in grid:
            wanted = [(e, s) for e in sorted(epochs) for s in settings]
            wanted = [w for w in wanted if (graph.name, *asdict(network).values(), *w) not in known]
            training = Training(network, graph) if wanted else None
            for epoch, setting in wanted:
                assert training is not None
                training.until(epoch)
                note(f"{graph.name}: {network}, epoch {epoch}, {setting}")
                found = training.error(setting, draws)
                where = {"graph": graph.name, **asdict(network), "epoch": epoch, "setting": setting}
                row = {**where, "draws": draws, **found}
                rows.append(row)
                done(row)
    return {"epochs": sorted(epochs), "draws": draws, "rows": rows}
