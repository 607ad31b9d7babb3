"""Study of what is quantised: real activations, their distribution, the variance of rounding, better levels.

Example:
    >>> model = dibit.compress(model, "iexact")
    >>> for a in dibit.study.capture(model, lambda: loss(model(x, adj)).backward()):
    ...     h = a.normalised()
    ...     print(a.module, measured_variance(h, a.levels), measured_variance(h, optimal_levels(h, a.bits)))
"""

from dibit.codec.normal_levels import expected_variance, normal_levels
from dibit.study.capture import Activation, capture
from dibit.study.distribution import ClippedNormal, divergence, fit, histogram, uniform
from dibit.study.gradient import gradient_error
from dibit.study.levels import optimal_levels, uniform_levels
from dibit.study.variance import Estimate, measured_variance, monte_carlo

__all__ = [
    "Activation",
    "ClippedNormal",
    "Estimate",
    "capture",
    "divergence",
    "expected_variance",
    "fit",
    "gradient_error",
    "histogram",
    "measured_variance",
    "monte_carlo",
    "normal_levels",
    "optimal_levels",
    "uniform",
    "uniform_levels",
]
