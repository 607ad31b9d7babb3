"""Sums of two activations: `a + b`, which keep nothing, in plain torch either. What counts is the buffer of the result.

The peak of a forward pass is often a sum. In `out + self.lin(x)` nobody needs the second operand any more, so the sum
is written over it. Reference counts show that an operand is such a temporary; it must also be Dibit's own result, of
which autograd keeps nothing. The gradient is that of plain torch, exactly.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dibit._torch.huge_pages import empty_like, worth_huge_pages
from dibit._torch.private.tensors import COUNTS_USES, gradient_asked, held_once
from dibit.engine.forward_pass import ForwardPass
from dibit.engine.model_state import ModelState
from dibit.rules.common import first_order, is_plain_float
from dibit.rules.registry import rule


class Add(torch.autograd.Function):
    """y = a + b of one shape, in a new buffer or over b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, over: bool) -> Tensor:
        ctx.hops, ctx.fresh_result = 0, True
        if over:
            ctx.mark_dirty(b)
            return b.add_(a)  # the bits of a + b
        return torch.add(a, b, out=empty_like(a))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return dy, dy, None


@rule(runs_again=True, exact=True, in_its_row=True)
def add(forward: ForwardPass, input: Any, other: Any, *, alpha: Any = 1, out: Any = None) -> Any:
    if out is not None or alpha != 1 or not (is_plain_float(input, other) and worth_huge_pages(input, other)):
        return NotImplemented
    if input.shape != other.shape or input.dtype != other.dtype:
        return NotImplemented
    if not (input.is_contiguous() and other.is_contiguous()):
        return NotImplemented
    forward.keeps_nothing()
    if forward.function is Tensor.add and input is not other:  # `a + b`: for torch.add the counts are others
        counts = sys.getrefcount(input), sys.getrefcount(other)
        for x, count, most in zip((other, input), counts[::-1], _counts_of_temporaries()[::-1], strict=True):
            if count <= most and _nobody_keeps(x):
                return Add.apply(input if x is other else other, x, True)
    return Add.apply(input, other, False)


def _nobody_keeps(x: Tensor) -> bool:
    """Whether x is Dibit's own result, and neither autograd nor a hook nor another tensor holds its memory."""
    return getattr(x.grad_fn, "fresh_result", False) and not gradient_asked(x) and held_once(x)


@functools.cache
def _counts_of_temporaries() -> tuple[int, int]:
    """Reference counts that temporary operands of `a + b` have when a rule sees them.

    0 means that this Python cannot tell: from 3.14 on, local variables may lend operands without a reference.
    """
    if sys.version_info >= (3, 14) or not COUNTS_USES:
        return 0, 0
    probe, x = _Probe(), torch.zeros(1)
    with probe:
        torch.zeros(1) + torch.zeros(1)
        temporary = probe.counts
        x + x
    kept = probe.counts
    return temporary if temporary[0] < kept[0] and temporary[1] < kept[1] else (0, 0)


class _Probe(TorchFunctionMode):
    """Counts references to both operands of an addition, on the path by which `Intercept` sends them to a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = 0, 0
        self._forward = ForwardPass(ModelState(None), ())

        def count(forward: ForwardPass, input: Tensor, other: Tensor, *, alpha: Any = 1, out: Any = None) -> Tensor:
            self.counts = sys.getrefcount(input), sys.getrefcount(other)
            return input

        self._count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not Tensor.add:
            return func(*args, **kwargs)
        return self._forward.run_rule(func, self._count, args, kwargs)
