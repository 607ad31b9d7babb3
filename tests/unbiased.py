"""The statistic behind every test of an unbiased estimate."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Bias:
    """n |mean - g|^2 / tr(Cov), 1 on average for an unbiased estimate, and its distance from 1 in standard errors.

    For a Gaussian mean the statistic's variance is 2 tr(Cov^2) / tr(Cov)^2: few directions, wide spread. `relative` is
    tr(Cov) / |g|^2, the squared error of one draw.
    """

    statistic: float
    z: float
    relative: float
    exact: bool

    @property
    def unbiased(self) -> bool:
        return self.exact or (self.relative > 0 and self.z < 5)


def bias_of(draw: Callable[[int], Tensor], truth: Tensor, draws: int) -> Bias:
    """Draw estimates of `truth` for seeds 0 .. draws - 1."""
    truth = truth.double().flatten()
    samples = torch.stack([draw(i).double().flatten() for i in range(draws)])
    mean = samples.mean(0)
    spread = samples - mean
    trace = (spread.square().sum() / (draws - 1)).item()
    scale = truth.square().sum().item()
    miss = (mean - truth).square().sum().item()
    if trace <= 1e-10 * scale:
        return Bias(0.0, 0.0, 0.0, exact=miss <= 1e-10 * scale)
    gram = spread @ spread.T / (draws - 1)
    # tr(Cov^2) from n samples, less what the samples' own noise adds
    squares = max(gram.square().sum().item() - trace**2 / (draws - 1), trace**2 / truth.numel())
    statistic = draws * miss / trace
    relative = trace / scale if scale else float("inf")
    return Bias(statistic, (statistic - 1) / (2 * squares / trace**2) ** 0.5, relative, exact=False)


def gradient(model: nn.Module, x: Tensor, readout: Tensor, *args: object) -> Tensor:
    """Gradients of <readout, model(x)> by every parameter and by x, as one vector."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    (model(x, *args) * readout).sum().backward()
    return torch.cat([p.grad.flatten() for p in [x, *model.parameters()] if p.grad is not None])
