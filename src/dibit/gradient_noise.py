"""How much noise a compressed model's gradient has, from draws of the codec alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dibit._torch.storage_identity import strided
from dibit.engine.model_state import ModelState, states_in
from dibit.engine.row_scores import Scores


@dataclass(frozen=True)
class Part:
    """The gradients of one module's own parameters.

    Attributes:
        error: their squared error over their own square.
        share: their squared error over the square of the whole gradient; the shares add up to `Noise.total`.
    """

    error: float
    share: float


@dataclass(frozen=True)
class Noise:
    r"""The squared error of a gradient over its square, :math:`E |\hat g - g|^2 / |g|^2`.

    Attributes:
        total: of the whole gradient; infinite where the draws show nothing but noise.
        modules: by name of the module, the parts it is made of.
    """

    total: float
    modules: dict[str, Part]

    def __str__(self) -> str:
        rows = sorted(self.modules.items(), key=lambda item: -item[1].share)
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"squared error of the gradient over its square: {self.total:.3g}"]
        lines += [f"  {name:<{width}}  {p.share:8.3g} of the whole's, {p.error:8.3g} of its own" for name, p in rows]
        return "\n".join(lines)


def noise(model: nn.Module, step: Callable[[], Any], draws: int = 2) -> Noise:
    r"""Measure the noise that compression adds to the gradient of a step, without a plain gradient to compare with.

    The step is repeated with other draws of the codec, and with the same dropout masks. Of n gradients
    :math:`\hat g_i` with mean :math:`\bar g`, :math:`V = \sum_i |\hat g_i - \bar g|^2 / (n - 1)` estimates the squared
    error and :math:`|\bar g|^2 - V / n` the square of the gradient, both without bias. What the model has learnt from
    earlier steps (scores of rows, how many are kept) is used and left as it is, and so are weights, buffers, gradients
    and torch's random state. Compiled models are measured uncompiled.

    Args:
        model: compressed, or with compressed parts, in training mode.
        step: runs one forward and one backward pass; no optimiser.
        draws: at least 2; each costs a step.

    Returns:
        The noise of the whole gradient, and of each module's own parameters.

    Raises:
        ValueError: nothing of the model is compressed, `draws` is less than 2, or the step leaves no gradient.
    """
    states = [found.state for found in states_in(model)]
    if not states:
        raise ValueError("noise got a model of which nothing is compressed; call dibit.compress(model) first.")
    if draws < 2:
        raise ValueError(f"draws = {draws!r} was given; expected at least 2, which are compared.")
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    found = []
    with as_before(model), _learnt_as_before(states):
        for draw in range(1, draws + 1):
            for state in states:
                state.salt = draw
            for p in model.parameters():
                p.grad = None
            # compiled code knows no other draws with the same masks
            with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
                step()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    if not any(found):
        raise ValueError("noise got a step that leaves no gradient; expected one that runs the backward pass.")
    return estimate(found)


def estimate(gradients: list[dict[str, Tensor]]) -> Noise:
    """The noise that several draws of the gradients by parameter show; a missing one is zero."""
    sums: dict[str, tuple[float, float]] = {}
    count = len(gradients)
    for name in dict.fromkeys(name for found in gradients for name in found):
        drawn = [_dense(found[name]) for found in gradients if name in found]
        mean = torch.stack(drawn).sum(0) / count
        zeros = (count - len(drawn)) * float(mean.square().sum())
        variance = (sum(float((x - mean).square().sum()) for x in drawn) + zeros) / (count - 1)
        signal = float(mean.square().sum()) - variance / count
        module = name.rpartition(".")[0]
        before = sums.get(module, (0.0, 0.0))
        sums[module] = before[0] + variance, before[1] + signal
    whole = sum(signal for _, signal in sums.values())
    modules = {name: Part(_ratio(v, signal), _ratio(v, whole)) for name, (v, signal) in sums.items()}
    return Noise(_ratio(sum(v for v, _ in sums.values()), whole), modules)


def _dense(grad: Tensor) -> Tensor:
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    return (torch.view_as_real(grad) if grad.is_complex() else grad).double()


def _ratio(variance: float, signal: float) -> float:
    return variance / signal if signal > 0 else math.inf if variance > 0 else 0.0


def _copied(scores: Scores) -> Scores:
    """All that is known, with what was measured since the last step."""
    twin = Scores()
    twin.load_state_dict({key: value for key, value in scores.state_dict().items() if not key.startswith("draws/")})
    twin.plan.bound = scores.plan.bound
    return twin


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Put back a model's buffers and gradients, which repeated steps change."""
    buffers = [(b, b.clone()) for b in model.buffers() if strided(b)]
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # an expanded one cannot be written to
                    buffer.copy_(value)
        for p, grad in grads:
            p.grad = grad


@contextmanager
def _learnt_as_before(states: list[ModelState]) -> Iterator[None]:
    """Put back what the states have learnt, and which draws they make."""
    learnt = [(state, state.scores, state.salt) for state in states]
    try:
        for state in states:
            state.scores = _copied(state.scores)
        yield
    finally:
        for state, scores, salt in learnt:
            state.scores, state.salt = scores, salt
