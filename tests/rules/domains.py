"""Where element-wise functions are defined, and how they are called."""

from __future__ import annotations

import math

from torch import Tensor

# The open interval that a function is defined on, where that is not all numbers.
DOMAIN = dict.fromkeys(("sqrt", "rsqrt", "reciprocal", "log"), (0.0, math.inf))
# Arguments after the first that a function needs.
MORE = {"pow": (3,)}


def into_domain(name: str, x: Tensor) -> Tensor:
    """Numbers of both signs as numbers that a function is defined for, none of them close to an end of its interval.

    Args:
        name: of the function.
        x: any shape.
    """
    low, high = DOMAIN.get(name, (-math.inf, math.inf))
    if math.isinf(low):
        return x if math.isinf(high) else high - 0.1 - x.abs()
    return (
        x.abs() + (low + 0.1) if math.isinf(high) else x.sigmoid() * (0.9 * (high - low)) + (0.95 * low + 0.05 * high)
    )
