"""What the runs of one command share: the graph on the device, the model's blueprint, one training step."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import dibit
from dibit.bench.memory import peak_bytes
from dibit.train import metrics
from dibit.train.data import Graph, Split
from dibit.train.errors import UserError
from dibit.train.models import build_adjacency, build_model
from dibit.train.settings import CompressionSettings, OptimisationSettings, Settings


@dataclass(frozen=True)
class Task:
    """A graph and the settings, on one device.

    Attributes:
        settings: All of them.
        graph: On the CPU, for its splits.
        device: Of the tensors below.
        x: float32 (N, F).
        y: int64 (N,) or float32 (N, C).
        adjacency: As the model takes it.
    """

    settings: Settings
    graph: Graph
    device: torch.device
    x: Tensor
    y: Tensor
    adjacency: Tensor

    @classmethod
    def build(cls, settings: Settings, graph: Graph) -> Task:
        """Move the graph to the device that the settings name."""
        device = pick_device(settings.run.device)
        adjacency = build_adjacency(settings.model, graph.edge_index, graph.num_nodes, device)
        return cls(settings, graph, device, graph.x.to(device), graph.y.to(device), adjacency)

    def model(self, seed: int) -> nn.Module:
        """Seed torch and build the model: the same weights, and the same draws after it, for a seed."""
        torch.manual_seed(seed)
        model = build_model(self.settings.model, self.x.shape[1], self.graph.num_classes)
        return model.to(self.device)

    def split(self, seed: int) -> Split:
        """The split for this seed, on the device."""
        split = self.graph.split(seed)
        return Split(*(part.to(self.device) for part in (split.train, split.val, split.test)))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, train: Tensor, y_train: Tensor) -> Tensor:
        """Train one epoch; returns the loss, detached."""
        optimizer.zero_grad(set_to_none=True)
        with dibit.batch(model, loss_rows=train):
            logits = model(self.x, self.adjacency)
        loss = metrics.loss(logits[train], y_train)
        del logits
        loss.backward()
        if self.settings.optimisation.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.settings.optimisation.clip)
        optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> tuple[float, float]:
        """Return the metric on the validation and on the test nodes, 0 to 1."""
        model.eval()
        logits = model(self.x, self.adjacency)
        model.train()
        val, test = (metrics.score(self.graph.metric, logits[p], self.y[p]) for p in (split.val, split.test))
        return val, test


@dataclass(frozen=True)
class Measured:
    """Memory of a training step, in bytes.

    Attributes:
        saved: Kept between the forward and the backward pass, the training targets included.
        plain: The same without compression.
        peak: The largest number of live tensor bytes during a step, above what lives between steps.
    """

    saved: int
    plain: int
    peak: int


def measure(task: Task, model: nn.Module, config: dibit.Config | None, split: Split) -> Measured:
    """Measure on a copy of a plain model; the model and torch's random state are left as they were.

    Args:
        task: Graph and settings.
        model: Not compressed.
        config: How to compress the copy; None leaves it plain.
        split: Its training nodes enter the loss.
    """
    cuda = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        trial = compressed(copy.deepcopy(model), config)
        trial.train()
        y_train = task.y[split.train]
        targets = y_train.numel() * y_train.element_size()
        optimizer = adam(trial, task.settings.optimisation)
        task.step(trial, optimizer, split.train, y_train)  # Adam's moments and scores are there from the second step on
        with dibit.track(trial) as saved, dibit.batch(trial, loss_rows=split.train):
            logits = trial(task.x, task.adjacency)
        del logits
        optimizer.zero_grad(set_to_none=True)  # frees what the profiler has not seen come
        peak = peak_bytes(lambda: task.step(trial, optimizer, split.train, y_train), task.device)
    return Measured(saved.total + targets, saved.plain + targets, peak)


def compressed(model: nn.Module, config: dibit.Config | None) -> nn.Module:
    """Compress the model, in place; without a config return it untouched."""
    return model if config is None else dibit.compress(model, config)


def compression_config(settings: CompressionSettings) -> dibit.Config | None:
    """Return the recipe's config with the settings' bits, block and levels, also for norm layers; None for "none".

    Raises:
        UserError: The combination is not possible.
    """
    if settings.recipe == "none":
        return None
    given = {name: getattr(settings, name) for name in ("bits", "block", "levels")}
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        config = dibit.recipe(settings.recipe)
        norm = None if config.norm is None else _changed(config.norm, changes)
        return replace(_changed(config, changes), norm=norm)
    except (TypeError, ValueError) as error:
        raise UserError(f"--recipe {settings.recipe} cannot be changed so: {error}") from error


def _changed(config: dibit.Config, changes: dict[str, Any]) -> dibit.Config:
    if config.rounding == "dither" and changes.get("levels", "uniform") != "uniform":
        changes = {**changes, "rounding": "stochastic"}  # a dither needs uniform levels
    return replace(config, **changes)


def adam(model: nn.Module, settings: OptimisationSettings) -> torch.optim.Adam:
    """Build the optimiser."""
    return torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


def pick_device(name: str) -> torch.device:
    """Return the device of the setting `device`, or say why it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs here; use --device cpu, "
            "or a build of torch with CUDA."
        )
    return device
