"""The mode that sees every operation of a compressed model's forward pass, looked up in a table.

A `TorchFunctionMode` looks each function up in a table (`dibit.functions.RULES`). A rule computes the plain forward and
keeps a residual; everything else runs as it is under `saved_tensors_hooks`, which keep floats exactly and pack bools
and integers losslessly: a hook sees a tensor, not the operation, so it cannot know what rounding would do.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dibit import inner_gradient
from dibit.masks import DROPOUTS, Calls, top_hooks, transformed
from dibit.state import Rule
from dibit.step import Step
from dibit.tape import PURE

_push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
_pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks


@functools.cache
def _changes(function: Any) -> bool:
    """Whether a function changes its first argument: `relu_`, `__setitem__`, `__iadd__`."""
    name = function.__name__
    dunder = name.startswith("__") and name.endswith("__")
    return name in ("__setitem__", "__set__") or (name.startswith("__i") if dunder else name.endswith("_"))


class Intercept(TorchFunctionMode):
    """Looks up each function of the forward pass in the table."""

    def __init__(self, step: Step, rules: Mapping[Any, Rule]) -> None:
        super().__init__()
        self.step = step
        self.rules = rules
        self.calls = Calls(step.state)
        self.hooks = (step.pack, step.unpack)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__get__" or torch.compiler.is_dynamo_compiling() or transformed():
            return func(*args, **kwargs)  # a property; within the model a compiled function, or a transform: exact
        step = self.step
        if func in inner_gradient.ASKING:
            return self._asked(func, args, kwargs)
        if step.state.asks is not False and inner_gradient.makes_leaf(func, args, kwargs):
            step.exact_within = len(step.names) if step.exact_within is None else step.exact_within
            step.asked = False
        # Hooks are there for the one operation: transforms of `torch.func` refuse to begin where there are any.
        keeps = torch.is_grad_enabled() and top_hooks() is None
        if not keeps:
            return self._run(func, args, kwargs, keeps)
        _push_hooks(*self.hooks)
        try:
            return self._run(func, args, kwargs, keeps)
        finally:
            _pop_hooks()

    def _run(self, func: Any, args: Any, kwargs: Any, keeps: bool) -> Any:
        """An operation; `keeps`: not within someone else's hooks (activation checkpoints), where all stays exact."""
        step = self.step
        if step._leaves and args and _changes(func):
            step.before_change(args[0])
        rule = self.rules.get(func)
        step.function = func
        if rule is not None and step.config is not None and keeps:
            call = step.tape.before(func, args, kwargs) if func in PURE else None
            result = run_rule(step, func, rule, args, kwargs)
            if result is not NotImplemented:
                step.seen += 1
                step.tape.after(call, result)
                return result
        if func in DROPOUTS and step.configs:
            result = self.calls.masked(step.configs[-1], func, args, kwargs)
            if result is not NotImplemented:
                return result
        if func not in PURE or step.config is None:
            return func(*args, **kwargs)
        tape = step.tape
        call = tape.running = tape.before(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        finally:
            tape.running = None
        tape.after(call, result)
        return result

    def _asked(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A gradient is asked for inside the forward pass: exactly, or not at all."""
        step = self.step
        step.state.asks = True
        outputs, inputs = inner_gradient.asked(func, args, kwargs)
        nodes = inner_gradient.compressed_between(outputs, inputs)
        if nodes:
            raise RuntimeError(inner_gradient.refusal(step.module, type(step.state.root).__name__, nodes))
        step.asked = True
        if step.exact_within is not None and step.exact_within <= 1 and not step.state.told:
            step.state.told = True
            warnings.warn(
                f"dibit: {type(step.state.root).__name__} asks for a gradient inside its forward pass, which has to be "
                "exact, so what it computes from the tensor that it differentiates by is not compressed.",
                stacklevel=3,
            )
        step.seen += 1
        before, step.exact_within = step.exact_within, 0  # what an activation checkpoint runs again meanwhile
        try:
            return func(*args, **kwargs)
        finally:
            step.exact_within = before


def run_rule(step: Step, func: Any, rule: Rule, args: Any, kwargs: Any) -> Any:
    """Call a rule; an entry in the ledger is opened for it and dropped where it declines."""
    step.open(func)
    step.inside = True
    try:
        result = rule(step, *args, **kwargs)
    finally:
        step.inside = False
        row, step.row = step.row, None
    if result is NotImplemented and step.ledger is not None and row is not None:
        step.ledger.rows.remove(row)
    return result
