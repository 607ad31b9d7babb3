"""The mode that sees every operation of a compressed model's forward pass, looked up in a table.

A `TorchFunctionMode` looks each function up in a table (`dibit.functions.RULES`). A rule computes the plain forward and
keeps a residual; everything else runs as it is under `saved_tensors_hooks`, which keep floats exactly and pack bools
and integers losslessly: a hook sees a tensor, not the operation, so it cannot know what rounding would do.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

from dibit.identity import storage_key, storages
from dibit.replay import functions
from dibit.state import Rule
from dibit.step import Step, tensors_in
from dibit.tape import PURE

_EXPOSES = functions("numpy data_ptr __array__ __dlpack__ untyped_storage storage share_memory_") | {
    Tensor.__cuda_array_interface__.__get__  # type: ignore[attr-defined]
}
_FROM_OUTSIDE = functions("as_tensor asarray from_numpy frombuffer from_dlpack")  # may share somebody else's memory
_STATISTICS = {  # where running statistics are among the arguments; the version counter does not tell of these writes
    F.batch_norm: slice(1, 3), F.instance_norm: slice(1, 3), torch.batch_norm: slice(3, 5),
    torch.instance_norm: slice(3, 5), torch.native_batch_norm: slice(3, 5),
}  # fmt: skip
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


def tell_of_writes(step: Step, func: Any, args: Any, kwargs: Any) -> None:
    """What is kept must not change with a tensor that this call writes to, or lets somebody write to."""
    if args and _changes(func):
        step.before_change(args[0])
    elif func in _EXPOSES and args:
        step.exposed(args[0])
    elif func in _STATISTICS:
        step.before_change(args[_STATISTICS[func]])
    elif isinstance(func, OpOverload | OpOverloadPacket):
        for x in written(func, args):
            step.before_change(x)
    if kwargs and kwargs.get("out") is not None:
        step.before_change(kwargs["out"])


def tell_of_results(step: Step, func: Any, args: Any, result: Any) -> None:
    """Note memory that this call has made. What has a gradient tells by itself."""
    for x in result if type(result) in (tuple, list) else (result,):
        if type(x) is Tensor and not x.requires_grad and x.layout == torch.strided and func not in _FROM_OUTSIDE:
            storage = storage_key(x)
            if not any(storage == storage_key(part) for a in tensors_in(args) for part in storages(a)):
                step.made(x)


def written(func: OpOverload | OpOverloadPacket, args: Any) -> Iterator[Any]:
    """The arguments that an operator's schema says it writes to."""
    overloads = [func] if isinstance(func, OpOverload) else [getattr(func, name) for name in func.overloads()]
    for overload in overloads:
        for declared, value in zip(overload._schema.arguments, args, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                yield value


class Intercept(TorchFunctionMode):
    """Looks up each function of the forward pass in the table."""

    def __init__(self, step: Step, rules: Mapping[Any, Rule]) -> None:
        super().__init__()
        self.step = step
        self.rules = rules
        self.hooks = (step.pack, step.unpack)
        self.frame: FrameType | None = None  # of the outermost module's call; set at entry

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)  # a compiled function within the model: exact
        step = self.step
        if func in _GRADIENTS and step.config is not None and self.running():
            raise RuntimeError(_INNER_GRADIENT.format(step.module or type(step.state.root).__name__, step.module))
        rule = self.rules.get(func)
        if (rule is not None or func in PURE) and not self.running():
            return func(*args, **kwargs)
        if func.__name__ != "__get__":  # a property is no operation
            step.function = func
        if step.config is None:
            tell_of_writes(step, func, args, kwargs)
            return func(*args, **kwargs)
        grad, tape = torch.is_grad_enabled(), step.tape
        # Under no_grad others may write to what is made, out of sight: a Function's own forward pass runs there.
        call = tape.before(func, args, kwargs) if grad and func in PURE else None
        tell_of_writes(step, func, args, kwargs)
        if rule is not None and grad and self._outermost():
            result = run_rule(step, func, rule, args, kwargs)
            if result is not NotImplemented:
                step.seen += 1
                tape.after(call, result)
                return result
        tape.running = call
        try:
            result = func(*args, **kwargs)
        finally:
            tape.running = None
        tape.after(call, result)
        if call is None:
            tell_of_results(step, func, args, result)
        return result

    def running(self) -> bool:
        """Whether the forward pass that set this mode is still on the stack: Ctrl-C ends one without any hook."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

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
