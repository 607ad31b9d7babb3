"""How far a compressed model's gradient is from the plain one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dibit.api import Setting, compress, decompress, state_of
from dibit.config import Config
from dibit.gradient_noise import as_before
from dibit.recipes import recipe
from dibit.study.variance import Estimate


def gradient_error(
    model: nn.Module,
    step: Callable[[], Any],
    config: Setting | Mapping[str, Setting],
    draws: int = 8,
    before: Callable[[], Any] | None = None,
) -> Estimate:
    r"""Relative squared error of the whole gradient, :math:`|g - g_{plain}|^2 / |g_{plain}|^2`, over the codec's draws.

    Weights, buffers, torch's random state and gradients are as before afterwards. All draws see the dropout masks of
    the plain step: `dropout="mask"` is used, whatever the config says.

    Args:
        model: plain, in training mode.
        step: runs one forward and one backward pass of `model`.
        config: as `dibit.compress` takes it.
        draws: number of draws of the codec over which the error is averaged.
        before: runs once on the compressed model: the training step before, of which `Sample(by="gradient")` has its
            scores. It leaves the weights as it found them, having written them (`load_state_dict` does).

    Returns:
        The mean over the draws and its standard error.

    Raises:
        ValueError: the model is compressed already, or the step leaves no gradient.
    """
    if state_of(model) is not None:
        raise ValueError("gradient_error got a compressed model; call dibit.decompress(model) first.")
    with torch.random.fork_rng(), as_before(model):
        start = torch.get_rng_state()
        plain = _gradient(model, step)
        scale = plain.square().sum()
        if not scale > 0:
            raise ValueError("gradient_error got a gradient of zero; expected a step that runs the backward pass.")
        compress(model, _with_masks(config))
        state = state_of(model)
        assert state is not None
        errors = []
        try:
            if before is not None:
                before()
            for draw in range(1, draws + 1):
                torch.set_rng_state(start)
                state.salt = draw
                errors.append(float((_gradient(model, step) - plain).square().sum() / scale))
        finally:
            decompress(model)
    error = statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else float("nan")
    return Estimate(statistics.fmean(errors), error)


def _gradient(model: nn.Module, step: Callable[[], Any]) -> Tensor:
    for p in model.parameters():
        p.grad = None
    step()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads) if grads else torch.zeros(1)


def _with_masks(config: Setting | Mapping[str, Setting]) -> Any:
    if isinstance(config, Mapping):
        return {name: _with_masks(setting) for name, setting in config.items()}
    if isinstance(config, str) and config != "none":
        config = recipe(config)
    return replace(config, dropout="mask") if isinstance(config, Config) else config
