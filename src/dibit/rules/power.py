"""Roots, powers, exponentials, logarithms; softplus, absolute values, sine and cosine: 8 bits of the derivative.

The derivative is computed exactly in the forward pass, and dX has one estimate of it (`dibit.rules.elementwise`). Most
derivatives have long tails (1/x, x^3), and what follows multiplies the small ones by large numbers (a root after a
square). So they have 8 bits whatever the recipe, with an error that is a part of each element. If the model returns the
result of exp or a root, the derivative is computed from that. Where the input can be computed again for fewer bytes,
torch's own operation runs and stays exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import full_precision
from dibit.rules.elementwise import EIGHT_BIT, MEASURED, elementwise


def _softplus_slope(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    return torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta)).to(x.dtype)


# `exp` is mostly part of a softmax, whose quotient keeps the result twice more: in both of its factors.
exp = elementwise(
    "exp",
    torch.exp,
    of_result=lambda y: y,
    codec=MEASURED,
    uses=3,
    in_vectors=False,
    autocast=full_precision(torch.exp),
    runs_again=True,
    positive=True,
)
sqrt = elementwise("sqrt", torch.sqrt, of_result=lambda y: 0.5 / y, codec=MEASURED, in_vectors=False, runs_again=True)
rsqrt = elementwise(
    "rsqrt",
    torch.rsqrt,
    of_result=lambda y: -0.5 * y**3,
    codec=MEASURED,
    in_vectors=False,
    autocast=full_precision(torch.rsqrt),
    runs_again=True,
)
reciprocal = elementwise(
    "reciprocal",
    torch.reciprocal,
    of_result=lambda y: -(y**2),
    codec=MEASURED,
    in_vectors=False,
    autocast=full_precision(torch.reciprocal),
    runs_again=True,
)
log = elementwise(
    "log", torch.log, lambda x: 1 / x, codec=MEASURED, autocast=full_precision(torch.log), runs_again=True
)
pow_ = elementwise(
    "pow",
    torch.pow,
    lambda x, exponent: exponent * torch.pow(x, exponent - 1),
    codec=MEASURED,
    autocast=full_precision(lambda x: torch.pow(x, 1.5)),
    runs_again=True,
)
square = elementwise("square", torch.square, lambda x: 2 * x, codec=MEASURED, in_vectors=False, runs_again=True)
abs_ = elementwise("abs", torch.abs, torch.sign, codec=MEASURED, in_vectors=False, runs_again=True)
softplus = elementwise("softplus", F.softplus, _softplus_slope, codec=MEASURED, autocast=full_precision(F.softplus))
sin = elementwise("sin", torch.sin, torch.cos, codec=EIGHT_BIT)
cos = elementwise("cos", torch.cos, lambda x: -torch.sin(x), codec=EIGHT_BIT)
