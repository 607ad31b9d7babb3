"""What the rules share: checks of arguments, codecs for factors, layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dibit._torch.autocast import exact_dtypes
from dibit._torch.private.tensors import is_view
from dibit._torch.storage_identity import strided
from dibit.config import Config

if TYPE_CHECKING:
    from dibit.engine.forward_pass import ForwardPass


MIN_ELEMENTS = 64  # below this compressing does not pay: seed and range cost more than the codes save


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that has no derivative of its own, and says so as soon as one is prepared.

    `once_differentiable` alone would drop second derivatives silently where dY needs no gradient (a gradient penalty).
    """
    inner = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        refuse_second_derivatives()
        devices = [grad.device for grad in grads if grad is not None]  # of several results, some may be unused
        # the caller's autocast block may include its call of backward()
        with exact_dtypes(devices[0]) if devices else nullcontext():
            return inner(ctx, *grads)

    return checked


def refuse_second_derivatives() -> None:
    """Within a backward pass: raise an error where one of it is prepared."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a compressed model has no second derivatives, but create_graph=True asks for them; leave the modules "
            "in question exact: dibit.compress(model, {'their.name': None, '*': 'default'})."
        )


def is_plain_float(*tensors: Any) -> bool:
    """Whether all are plain strided floating-point tensors: subclasses and other layouts stay with torch."""
    return all(type(x) in (Tensor, torch.nn.Parameter) and strided(x) and x.is_floating_point() for x in tensors)


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) as rows (N, D)."""
    return x.reshape(-1, x.shape[-1])


def running_config(forward: ForwardPass) -> Config:
    """The config of the module that is running: a rule is called only where there is one."""
    assert forward.config is not None
    return forward.config


def without_reduction(config: Config) -> Config:
    """For a factor that differs from element to element: every element is kept."""
    return replace(config, reduce=None) if config.reduce else config


def eight_bit(config: Config) -> Config:
    """For factors with long tails that enter everything before them: 8 bits, every element."""
    return replace(config, bits=8, reduce=None, levels="uniform", block=1024, norm=None)


def copy_or_return(x: Tensor, value: Tensor, inplace: bool) -> Tensor:
    """Copy a contiguous value over x if `inplace`; else return it in the strides of torch's element-wise results."""
    if inplace:
        return x.copy_(value)
    if x.is_contiguous():
        return value
    own = torch.empty_like(x) if x.device.type != "cpu" else torch.neg(x)  # torch's CPU has a rule of its own
    return own.copy_(value)


def own(y: Tensor) -> Tensor:
    """y, never a view: autograd forbids to change a view in place that came out of a `torch.autograd.Function`."""
    return y.detach() if is_view(y) else y
