"""Mixed precision: the copies that `torch.autocast` makes unseen are made here, where a rule can tell what they are of.

A rule for a function that autocast runs in another dtype is marked `low_precision` or `full_precision`. It
then gets copies of its tensors in that dtype, made on autograd's record as plain torch makes them, and runs with
autocast off, so that nothing which Dibit computes beside (codes, derivatives) changes its dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dibit._torch.private import modes
from dibit._torch.storage_identity import strided

HALF = (torch.bfloat16, torch.float16)


def at_least_single(x: Tensor) -> Tensor:
    """x, in float32 if it is of half precision: for what is computed of it but not part of the forward pass."""
    return x.float() if x.dtype in HALF else x


def autocast_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and modes.autocasts(device.type)


def exact_dtypes(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which every operation computes in the dtype of its tensors."""
    return torch.autocast(device.type, enabled=False) if autocast_on(device) else nullcontext()


def copies(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype; as they are where that is `None`."""
    return tensors if dtype is None else tuple(None if x is None else x.to(dtype) for x in tensors)


def low_precision(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a rule for a function that autocast runs in its own dtype, such as linear layers and matrix products.

    Leaves of autograd's graph, parameters first of all, are handed on as they are, with `forward.low` for the dtype of
    their copies: so the gradient of a weight is made in the weight's dtype, and nothing but the weight is kept.
    """

    @functools.wraps(rule)
    def cast(forward: Any, *args: Any, **kwargs: Any) -> Any:
        device = _device(args, kwargs)
        if device is None or not autocast_on(device):
            return rule(forward, *args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not all(type(x) in (Tensor, torch.nn.Parameter) and strided(x) for x in tensors):
            return NotImplemented
        if any(x.dtype == torch.float64 for x in tensors):
            return NotImplemented  # autocast leaves these alone
        low = modes.autocast_dtype(device.type)

        def copy(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point() or (x.is_leaf and x.requires_grad):
                return x
            return forward.holdings.cast(x, low)

        return _without_autocast(rule, forward, args, kwargs, copy, device, low)

    return cast


def full_precision(sample: Callable[[Tensor], Tensor]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a rule for a function that autocast may run in float32; whether it does depends on device and version.

    Args:
        sample: calls the function with a (2, 2) tensor of half precision, so that the dtype of its result tells.
    """

    def mark(rule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def in_single(device: str) -> bool:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                return sample(torch.zeros(2, 2, dtype=torch.bfloat16, device=device)).dtype == torch.float32

        @functools.wraps(rule)
        def cast(forward: Any, *args: Any, **kwargs: Any) -> Any:
            device = _device(args, kwargs)
            if device is None or not autocast_on(device) or not in_single(device.type):
                return rule(forward, *args, **kwargs)

            def copy(x: Any) -> Any:
                return forward.holdings.cast(x, torch.float32) if isinstance(x, Tensor) and x.dtype in HALF else x

            return _without_autocast(rule, forward, args, kwargs, copy, device, None)

        return cast

    return mark


def _device(args: Any, kwargs: Any) -> torch.device | None:
    return next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def _without_autocast(
    rule: Callable[..., Any],
    forward: Any,
    args: Any,
    kwargs: Any,
    copy: Callable[[Any], Any],
    device: torch.device,
    low: torch.dtype | None,
) -> Any:
    cached = modes.autocast_caches()
    with exact_dtypes(device), forward.autocast(low, cached):
        args, kwargs = tuple(map(copy, args)), {name: copy(x) for name, x in kwargs.items()}
        return rule(forward, *args, **kwargs)
