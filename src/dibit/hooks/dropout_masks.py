"""Dropout's masks where nothing is compressed: in training, Dibit draws them in every call of its modules.

A forward pass may be run twice with torch's generator put back in between, and only one of the two be compressed: the
first without gradients (reentrant activation checkpoints, reversible layers, gradient caches), or one inside of someone
else's saved-tensor hooks. Both must draw the same masks, so the masks do not depend on any of this: what is called
within a module of a compressed model has Dibit's masks, exactly kept here.

There is one exception. A function that an activation checkpoint calls directly, not by way of a module, is run again
where no module of ours is on the stack: there torch draws the mask, both times. The stack tells of such a function: the
checkpoint's hooks do not, as there are none without gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from dibit._torch.private.autograd import hooks_refused, top_hooks, transformed
from dibit._torch.private.frames import caller
from dibit.config import Config
from dibit.engine.model_state import ModelState
from dibit.engine.module_stack import ModuleStack
from dibit.hooks.inner_gradients import ASKING
from dibit.nn import norm_relu_dropout
from dibit.rules.dropout import seeded
from dibit.rules.registry import table

# Frames below which a function is run that may be run again elsewhere: checkpoints, reversible layers.
_CALLERS = inspect.unwrap(checkpoint), inspect.unwrap(torch.autograd.Function.apply)
_RUN_AGAIN: set[CodeType] = {each.__code__ for each in _CALLERS if hasattr(each, "__code__")}
_SEEN = len(_RUN_AGAIN) == len(_CALLERS)  # since torch 2.14 `apply` is not Python, and has no frame


def hooks_free() -> bool:
    """Whether ours can be set: there are no other hooks in this thread, and none are forbidden."""
    return top_hooks() is None and hooks_refused() is None


def _dropout(calls: Calls, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return seeded(input, p, inplace) if training else NotImplemented


def _norm_relu_dropout(
    calls: Calls,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    p: float,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    if not training or not 0 < p < 1:
        return NotImplemented
    y = norm_relu_dropout(input, running_mean, running_var, weight, bias, 0.0, training, momentum, eps)
    masked = seeded(y, p)
    return F.dropout(y, p) if masked is NotImplemented else masked


DROPOUTS: Mapping[Any, Callable[..., Any]] = table({"dropout": _dropout, "norm_relu_dropout": _norm_relu_dropout})


class Calls:
    """The modules of a compressed model that are running in one pass: who draws the masks in them.

    Args:
        own: the pack hook that the pass itself sets, where there are no others.
    """

    def __init__(self, state: ModelState, own: Any = None) -> None:
        self.state = state
        self._own = own
        self._calls: list[tuple[CodeType | None, Any]] = []  # innermost last: what runs it, and in which hooks

    def enter(self) -> None:
        """A module begins, which the caller runs."""
        frame = caller()
        self._calls.append((None if frame is None else frame.f_code, self._foreign()))

    def leave(self, depth: int) -> None:
        """A module ends that was called within so many others."""
        del self._calls[depth:]

    def masked(self, config: Config | None, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a dropout, exactly kept, with Dibit's mask; `NotImplemented` where torch draws it."""
        if config is None or config.dropout != "seed" or func in self.state.rules or transformed():
            return NotImplemented
        return NotImplemented if self._run_again_unseen() else DROPOUTS[func](self, *args, **kwargs)

    def torchs(self, config: Config, func: Any) -> bool:
        """Whether torch draws the mask of a dropout although Dibit could keep a seed of its own."""
        return config.dropout == "seed" and func not in self.state.rules and self._run_again_unseen()

    def _run_again_unseen(self) -> bool:
        """Whether a function is called directly in what an activation checkpoint, or its like, runs again."""
        part, hooks = self._calls[-1]
        if self._foreign() is not hooks:
            return True
        frame = caller()
        while frame is not None and frame.f_code is not part:
            if frame.f_code in _RUN_AGAIN or not (_SEEN or _context(frame) is None):
                return True
            frame = frame.f_back
        return False

    def _foreign(self) -> Any:
        """The innermost pack hook that somebody else has set."""
        top = top_hooks()
        return None if top is None or top[0] is self._own else top[0]


def _context(frame: FrameType) -> FunctionCtx | None:
    """The context of the `torch.autograd.Function` whose forward or backward pass a frame is."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if isinstance(first, FunctionCtx) else None


class Exactly:
    """A forward pass in which nothing is compressed and masks alone are drawn; in the place of a `ForwardPass`."""

    taken = 1  # it has no part in the warning that nothing was compressed

    def __init__(self) -> None:
        self.stack = ModuleStack()

    def end(self, outputs: Any) -> None:
        """Nothing is left of it."""


class Masks(TorchFunctionMode):
    """Draws dropout's masks in an `Exactly`; everything else is torch's own."""

    def __init__(self, state: ModelState) -> None:
        super().__init__()
        self.forward_pass = Exactly()
        self.calls = Calls(state)
        self.away = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS and not torch.compiler.is_dynamo_compiling():
            result = self.calls.masked(self.forward_pass.stack.configs[-1], func, args, kwargs)
            if result is not NotImplemented:
                return result
        return run_away(self, func, args, kwargs) if func in ASKING else func(*args, **kwargs)


def run_away(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """A gradient that is asked for in the pass: torch has the mode off its stack, but a checkpoint may run modules."""
    before, mode.away = mode.away, True
    try:
        return func(*args, **kwargs)
    finally:
        mode.away = before
