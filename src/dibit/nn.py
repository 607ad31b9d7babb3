"""Layers of which a compressed model does in one pass what torch does in three."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function


def norm_relu_dropout(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`dropout(relu(batch_norm(input)))`: torch's three functions, and one pass where a compressed model trains.

    One pass gives the same numbers to rounding, with the dropout mask of Dibit's own stream. Beside the normalised
    input it keeps 1 bit an element, and its backward pass begins with one pass in the place of two.

    Args:
        input: floating point (N, D).
        running_mean, running_var, weight, bias, training, momentum, eps: as in `torch.nn.functional.batch_norm`.
        p: probability of an element to be zeroed.

    Raises:
        ValueError: p is not a probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p = {p!r} was given; expected a probability, from 0 to 1.")
    if has_torch_function((input,)):
        return handle_torch_function(
            norm_relu_dropout, (input,), input, running_mean, running_var, weight, bias, p, training, momentum, eps
        )
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training or running_mean is None, momentum, eps)
    return F.dropout(F.relu(y), p, training)


class NormReLUDropout(nn.BatchNorm1d):
    """BatchNorm, ReLU and dropout of a hidden layer, `norm_relu_dropout` as a module.

    Its `state_dict` is a BatchNorm's.

    Args:
        num_features: D, width of the input (N, D).
        p: probability of an element to be zeroed in training.
        eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm1d`.
    """

    def __init__(
        self,
        num_features: int,
        p: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, (N, D) as its input."""
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        keeps = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if keeps else (None, None)
        return norm_relu_dropout(input, mean, var, self.weight, self.bias, self.p, self.training, factor, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"  # type: ignore[no-untyped-call]


__all__ = ["NormReLUDropout", "norm_relu_dropout"]
