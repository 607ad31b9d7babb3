"""What the runs of one command share: the graph on the device, the model's blueprint, one training step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import dibit
from dibit.tools.errors import UserError, shown
from dibit.tools.memory import peak_bytes
from dibit.train import metrics
from dibit.train.batches import Batches, FullBatch, MiniBatch, sampled
from dibit.train.data import NodeDataset, Split
from dibit.train.distributed import World
from dibit.train.layerwise import layerwise
from dibit.train.models import adjacency_arguments, build_adjacency, build_model
from dibit.train.settings import CompressionSettings, OptimisationSettings, Settings

MOST_NOISE = 1000.0  # stands for draws that show nothing but noise


@dataclass(frozen=True)
class Task:
    """A graph and the settings, on one device.

    Attributes:
        settings: The settings of the training.
        graph: The data set; stays on the CPU.
        device: The device of the model.
        x: Node features, float32 (N, F), on the same device as `adjacency`.
        adjacency: The whole graph, as the model takes it; on the device, or with mini-batches on the CPU.
        world: The processes that share the training.
    """

    settings: Settings
    graph: NodeDataset
    device: torch.device
    x: Tensor
    adjacency: Tensor
    world: World = field(default_factory=World)

    @classmethod
    def build(cls, settings: Settings, graph: NodeDataset, world: World | None = None) -> Task:
        """Move the graph to the device that the settings name; with mini-batches it stays on the CPU."""
        world = world or World()
        device = pick_device(settings.run.device, world.local_rank if world.size > 1 else None)
        held = device if settings.loader.loader == "full" else torch.device("cpu")
        adjacency = build_adjacency(settings.model, graph.edge_index, graph.num_nodes, held)
        return cls(settings, graph, device, graph.x.to(held), adjacency, world)

    def model(self, seed: int) -> nn.Module:
        """Seed torch and build the model: the same weights, and the same draws after it, for a seed."""
        torch.manual_seed(seed)
        model = build_model(self.settings.model, self.x.shape[1], self.graph.num_classes)
        return model.to(self.device)

    @property
    def whole(self) -> bool:
        """Whether a step is on the whole graph."""
        return self.settings.loader.loader == "full"

    def split(self, seed: int) -> Split:
        """The split for this seed."""
        return self.graph.split(seed)

    def batches(self, seed: int) -> Batches:
        """What an epoch of this seed's training is made of."""
        split, graph = self.split(seed), self.graph
        if not self.whole:
            return sampled(self.settings, graph, split, seed, self.device, self.world)
        edges: tuple[Tensor, ...] = (self.adjacency,)
        if self.settings.optimisation.precision != "fp32":
            edges = adjacency_arguments(self.settings, graph.edge_index, graph.num_nodes, self.device)
        train = split.train.to(self.device)
        return FullBatch(MiniBatch(self.x, edges, train, graph.y[split.train].to(self.device)))

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: MiniBatch,
        scaler: torch.amp.GradScaler | None = None,
    ) -> tuple[Tensor, int]:
        """Train on one batch.

        Args:
            model: Compressed or not; with several processes in torch's `DistributedDataParallel`.
            optimizer: Of its parameters.
            batch: Without a row for the loss in any process nothing happens.
            scaler: Of the loss, in fp16.

        Returns:
            The mean loss over the batch's rows, detached, and their number; of this process.
        """
        optimizer.zero_grad(set_to_none=True)
        loss, own = self.gradient(model, batch, scaler)
        if loss is None:
            return torch.zeros(()), 0
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self.settings.optimisation.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.settings.optimisation.clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
            torch.autograd.graph.increment_version(optimizer.param_groups[0]["params"][:1])  # a step, even if skipped
        return loss, own

    def gradient(
        self, model: nn.Module, batch: MiniBatch, scaler: torch.amp.GradScaler | None = None
    ) -> tuple[Tensor | None, int]:
        """The forward and backward pass of a step; gradients are scaled with the loss.

        Returns:
            The mean loss over the batch's rows, detached, and their number; `None` without a row in any process.
        """
        own = batch.rows.numel()
        count = self.world.sums(own)[0]
        if not count:
            return None, 0
        with self.autocast(), dibit.batch(unwrapped(model), node_ids=batch.nodes, loss_rows=batch.rows):
            logits = model(batch.x, *batch.adjacency)
        loss = metrics.loss(logits[batch.rows].float(), batch.y) if own else logits.sum() * 0.0
        del logits
        # processes average their gradients: each counts as much as it has rows
        scaled = loss if self.world.size == 1 else loss * (own * self.world.size / count)
        (scaled if scaler is None else scaler.scale(scaled)).backward()
        return loss.detach(), own

    def noise(self, model: nn.Module, batch: MiniBatch, scaler: torch.amp.GradScaler | None = None) -> float | None:
        """The squared error of a compressed model's gradient over its square, of two draws; `None` without a row.

        It ends at `MOST_NOISE`: then the draws show nothing but noise.
        """
        alone = replace(self, world=World())
        if not batch.rows.numel():
            return None
        return min(dibit.noise(model, lambda: alone.gradient(model, batch, scaler)).total, MOST_NOISE)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the forward pass."""
        precision = self.settings.optimisation.precision
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if precision == "bf16" else torch.float16)

    def scaler(self) -> torch.amp.GradScaler | None:
        """Scales the loss, in fp16."""
        return torch.amp.GradScaler(self.device.type) if self.settings.optimisation.precision == "fp16" else None

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: Split, note: Callable[[int, int], None] | None = None
    ) -> tuple[float, float]:
        """Return the metric on the validation and on the test nodes, 0 to 1, in FP32 and on every edge.

        With mini-batches layer by layer (`layerwise`); `note` gets the parts done and their number.
        """
        model.eval()
        if self.whole:
            logits = model(self.x, self.adjacency).cpu()
        else:
            logits = layerwise(model, self.x, self.adjacency, self.device, note, self.world)
        model.train()
        val, test = (metrics.score(self.graph.metric, logits[p], self.graph.y[p]) for p in (split.val, split.test))
        return val, test


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's `DistributedDataParallel`."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


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

    def largest(self, other: Measured) -> Measured:
        """The larger of each."""
        return Measured(*(max(pair) for pair in zip(astuple(self), astuple(other), strict=True)))


def measure(task: Task, model: nn.Module, config: dibit.Config | None, batches: Batches) -> Measured:
    """Measure on a copy of a model; the model and torch's random state are left as they were.

    Args:
        task: NodeDataset and settings.
        model: Plain, or compressed and in training.
        config: How to compress a plain one's copy; None leaves it as it is.
        batches: The first of them is measured.
    """
    cuda = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        trial = compressed(copy.deepcopy(model), config)
        trial.train()
        alone = replace(task, world=World())  # one process measures
        batch = next(iter(batches))
        targets = batch.y.numel() * batch.y.element_size()
        optimizer, scaler = adam(trial, task.settings.optimisation), task.scaler()
        for _ in range(3):  # by then Adam's moments and scores are there, and how many rows the error asks for
            alone.step(trial, optimizer, batch, scaler)
        rows = dibit.batch(trial, node_ids=batch.nodes, loss_rows=batch.rows)
        with dibit.track(trial) as saved, task.autocast(), rows:
            logits = trial(batch.x, *batch.adjacency)
        del logits
        optimizer.zero_grad(set_to_none=True)  # frees what the profiler has not seen come
        peak = peak_bytes(lambda: alone.step(trial, optimizer, batch, scaler), task.device)
    return Measured(saved.total + targets, saved.plain + targets, peak)


def compressed(model: nn.Module, config: dibit.Config | None) -> nn.Module:
    """Compress the model, in place; without a config return it untouched."""
    return model if config is None else dibit.compress(model, config)


def compression_config(settings: CompressionSettings) -> dibit.Config | None:
    """Return the recipe's config with the settings' changes (all but the noise also for norm layers); None for "none".

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
        noise = config.noise if settings.noise is None else settings.noise
        return replace(_changed(config, changes), norm=norm, noise=noise)
    except (TypeError, ValueError) as error:
        raise UserError(f"--recipe {settings.recipe} cannot be changed so: {error}") from error


def _changed(config: dibit.Config, changes: dict[str, Any]) -> dibit.Config:
    if config.rounding == "dither" and changes.get("levels", "uniform") != "uniform":
        changes = {**changes, "rounding": "stochastic"}  # a dither needs uniform levels
    return replace(config, **changes)


def adam(model: nn.Module, settings: OptimisationSettings) -> torch.optim.Adam:
    """Build the optimiser."""
    return torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device of the setting `device`, or say why it cannot be used.

    Args:
        name: The setting.
        local_rank: Of this process, where several share a machine: which GPU "cuda" means.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device is {shown(name)!r}, expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {shown(name)!r}, expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device is {shown(name)!r}, but torch sees {torch.cuda.device_count()} GPUs here; use --device cpu, "
            "or a build of torch with CUDA."
        )
    return device
