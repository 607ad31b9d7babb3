"""The mode that sees every operation of a compressed model's forward pass, looked up in a table.

A `TorchFunctionMode` looks each function up in a table (`dibit.functions.RULES`). A rule computes the plain forward and
keeps a residual; everything else runs as it is under `saved_tensors_hooks`, which keep floats exactly and pack bools
and integers losslessly: a hook sees a tensor, not the operation, so it cannot know what rounding would do.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dibit.state import Rule
from dibit.step import Step
from dibit.tape import PURE

_GRADIENTS = {torch.autograd.grad, Tensor.backward}
_INNER_GRADIENT = (
    "{} asks for a gradient inside its forward pass, where compressed activations would change the result; leave that "
    "module exact: dibit.compress(model, {{{!r}: None, '*': 'default'}})."
)


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
        self.hooks = (step.pack, step.unpack)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)  # a compiled function within the model: exact
        step = self.step
        if func in _GRADIENTS and step.config is not None:
            raise RuntimeError(_INNER_GRADIENT.format(step.module or type(step.state.root).__name__, step.module))
        if step._leaves and args and _changes(func):
            step.before_change(args[0])
        rule = self.rules.get(func)
        if rule is not None and step.config is not None and torch.is_grad_enabled() and self._outermost():
            step.function = func
            call = step.tape.before(func, args, kwargs) if func in PURE else None
            result = run_rule(step, func, rule, args, kwargs)
            if result is not NotImplemented:
                step.seen += 1
                step.tape.after(call, result)
                return result
        if func.__name__ != "__get__":  # a property is no operation
            step.function = func
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

    def _outermost(self) -> bool:
        """False inside someone else's saved-tensor hooks (activation checkpointing): there everything stays exact."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] == self.hooks[0]


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
