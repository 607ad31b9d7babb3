"""A GraphSAGE in training, stopped at several epochs to look at what is quantised, or how good its gradient is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dibit
from dibit.config import Config
from dibit.experiments.cases import Case
from dibit.study import Activation, Estimate, capture, gradient_error
from dibit.train.batches import MiniBatch
from dibit.train.task import Task, adam

_MEMORY = 4  # steps that scores are made of; older ones have faded


class Stage:
    """A training at one epoch.

    Attributes:
        epoch: steps taken so far.
    """

    def __init__(self, batch: MiniBatch, model: nn.Module, epoch: int, before: list[dict[str, Any]]) -> None:
        self.epoch = epoch
        self._batch, self._model, self._before = batch, model, before

    def activations(self, config: Config) -> list[Activation]:
        """What would be quantised with this config; the training is not disturbed.

        Those without a distribution are left out: no spread in any block, or fewer than 3 elements a block.
        """
        trial = self._trial()
        with torch.random.fork_rng():
            found = capture(trial, lambda: self._forward(trial), config=config)
        return [a for a in found if a.count >= 3 and a.varied().any()]

    def gradient_error(self, config: Config, draws: int) -> Estimate:
        """The error of the whole gradient; scores of rows come from the steps before this epoch."""
        trial = self._trial()
        before = partial(self._steps_before, trial) if self._before else None
        return gradient_error(trial, partial(self._step, trial), config, draws, before)

    def saved_bytes(self, config: Config) -> int:
        """All that a forward pass keeps with this config, once scores of rows are known."""
        trial = dibit.compress(self._trial(), config)
        with torch.random.fork_rng():
            self._steps_before(trial)
            with dibit.track(trial) as saved:
                self._forward(trial)
        return saved.total

    def _step(self, trial: nn.Module) -> None:
        from dibit.train import metrics

        metrics.loss(self._forward(trial)[self._batch.rows], self._batch.y).backward()

    def _forward(self, trial: nn.Module) -> Tensor:
        return trial(self._batch.x, *self._batch.adjacency)

    def _steps_before(self, trial: nn.Module) -> None:
        """The gradients of the steps that led here (of this one, before the first), at their weights."""
        now = copy.deepcopy(trial.state_dict())
        for weights in self._before or [now]:
            trial.load_state_dict(weights)
            self._step(trial)
        trial.load_state_dict(now)

    def _trial(self) -> nn.Module:
        return dibit.decompress(copy.deepcopy(self._model)).train()


def stages(case: Case, epochs: tuple[int, ...], config: Config | None, note: Callable[[str], None]) -> Iterator[Stage]:
    """Train with `config` (`None`: plainly) and stop at each of the epochs, 0 being before the first step."""
    task = Task.build(case.settings, case.graph)
    model = task.model(0).train()
    dibit.compress(model, config)
    optimizer = adam(model, case.settings.optimisation)
    (batch,) = task.batches(0)
    before: list[dict[str, Any]] = []
    for epoch in range(max(epochs) + 1):
        if epoch in epochs:
            note(f"epoch {epoch}")
            yield Stage(batch, model, epoch, before)
        if epoch < max(epochs):
            before = [*before[1 - _MEMORY :], copy.deepcopy(model.state_dict())]
            task.step(model, optimizer, batch)
