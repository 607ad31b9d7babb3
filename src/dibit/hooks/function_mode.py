"""The mode that sees every operation of a compressed model's forward pass, looked up in a table.

A `TorchFunctionMode` looks each function up in a table (`dibit.rules.RULES`). A rule computes the plain forward and
keeps a residual; everything else runs as it is under `saved_tensors_hooks`, which keep floats exactly and pack bools
and integers losslessly: a hook sees a tensor, not the operation, so it cannot know what rounding would do.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dibit._torch.private.autograd import hooks_refused, pop_hooks, push_hooks, top_hooks, transformed
from dibit._torch.private.operations import is_operator, writes_to
from dibit._torch.private.tensors import is_wrapped
from dibit._torch.spellings import torch_functions
from dibit._torch.storage_identity import storage_key, storages, strided
from dibit.edges.deferred import first_deferred, materialized
from dibit.edges.functions import EXTREMES, Edges
from dibit.engine.forward_pass import ForwardPass
from dibit.engine.holdings import tensors_in
from dibit.engine.model_state import Rule
from dibit.hooks import inner_gradients
from dibit.hooks.dropout_masks import DROPOUTS, Calls, hooks_free, run_away
from dibit.recompute.repeatable import PURE
from dibit.rules import EXACT

_EXPOSES = torch_functions("numpy data_ptr __array__ __dlpack__ untyped_storage storage share_memory_")
_FROM_OUTSIDE = torch_functions("as_tensor asarray from_numpy frombuffer from_dlpack")  # may share memory


def _name(function: Any) -> str:
    return getattr(function, "__name__", "")  # a callable object of the user's may have none


@functools.cache
def _changes(function: Any) -> bool:
    """Whether a function changes its first argument: `relu_`, `__setitem__`, `__iadd__`."""
    name = _name(function)
    dunder = name.startswith("__") and name.endswith("__")
    return name in ("__setitem__", "__set__") or (name.startswith("__i") if dunder else name.endswith("_"))


@functools.cache
def _option(function: Any, name: str) -> int | None:
    """The place of an argument of one of torch's Python functions; `None` where it has none of this name."""
    if not isinstance(function, FunctionType):
        return None
    names = list(inspect.signature(function, follow_wrapped=False).parameters)
    return names.index(name) if name in names else None


def _given(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    place = _option(function, name)
    return kwargs.get(name, args[place] if place is not None and place < len(args) else None)


@functools.cache
def _has_statistics(function: Any) -> bool:
    """Whether a function may write to running statistics: no version counter and no schema tells of it."""
    return any(part in _name(function) for part in ("batch_norm", "instance_norm"))


def announce_writes(forward_pass: ForwardPass, func: Any, args: Any, kwargs: Any) -> None:
    """Call `ForwardPass.writes` for the tensors that this call writes to, or lets somebody else write to."""
    if _changes(func):
        forward_pass.writes.before(args[0] if args else kwargs.get("input", kwargs.get("self")))
    elif func in _EXPOSES and args:
        forward_pass.writes.exposed(args[0])
    elif _has_statistics(func):
        for x in (*args[1:], *kwargs.values()):
            if isinstance(x, Tensor) and not x.requires_grad:
                forward_pass.writes.before(x)
    elif is_operator(func):
        for x in writes_to(func, args):
            forward_pass.writes.before(x)
    elif _option(func, "inplace") is not None and _given(func, "inplace", args, kwargs):
        forward_pass.writes.before(args[0] if args else kwargs.get("input"))
    elif _option(func, "max_norm") is not None and _given(func, "max_norm", args, kwargs) is not None:
        forward_pass.writes.before(_given(func, "weight", args, kwargs))  # rows of an embedding that are too long
    if kwargs and kwargs.get("out") is not None:
        forward_pass.writes.before(kwargs["out"])


def record_results(forward_pass: ForwardPass, func: Any, args: Any, result: Any) -> None:
    """Note which memory this call has made. Results with a gradient need no note: autograd's graph shows it."""
    for x in result if type(result) in (tuple, list) else (result,):
        if type(x) is Tensor and not x.requires_grad and strided(x):
            storage = storage_key(x)
            if not any(storage == storage_key(part) for a in tensors_in(args) for part in storages(a)):
                if func in _FROM_OUTSIDE:
                    forward_pass.holdings.expose(storage)
                else:
                    forward_pass.holdings.made(x)


class Intercept(TorchFunctionMode):
    """Looks up each function of the forward pass in the table."""

    def __init__(self, forward_pass: ForwardPass, rules: Mapping[Any, Rule]) -> None:
        super().__init__()
        self.forward_pass = forward_pass
        self.rules = rules
        self.hooks = (forward_pass.pack, forward_pass.unpack)
        self.calls = Calls(forward_pass.state, self.hooks[0])
        self.away = False
        self.edges = Edges(forward_pass, self._run_deferred, self._summed, hooks_free)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _name(func) == "__get__" or torch.compiler.is_dynamo_compiling() or transformed():
            return func(*args, **kwargs)  # a property; within the model a compiled function, or a transform: exact
        if first_deferred(args, kwargs) is not None:
            result = self.edges.take(func, args, kwargs)
            if result is not NotImplemented:
                return result
            args, kwargs = materialized(args), materialized(kwargs)
        if func in EXTREMES:
            result = self.edges.reduce(func, args, kwargs)
            if result is not NotImplemented:
                return result
        forward_pass = self.forward_pass
        if func in inner_gradients.ASKING:
            return self._inner_gradient(func, args, kwargs)
        if forward_pass.state.asks is not False and inner_gradients.makes_leaf(func, args, kwargs):
            forward_pass.stack.stay_exact()
        # Hooks are there for the one operation: transforms of `torch.func` refuse to begin where there are any.
        return self._hooked(func, args, kwargs, defers=True)

    def _run_deferred(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call that was deferred until now."""
        if self.forward_pass.over:
            return func(*args, **kwargs)
        others = []  # it belongs to where it was given, not to the activation checkpoint that needs it first
        while hooks_refused() is None and (top := top_hooks()) is not None:
            pop_hooks()
            others.append(top)
        try:
            return self._hooked(func, args, kwargs, defers=False)
        finally:
            for other in reversed(others):
                push_hooks(*other)

    def _summed(self, func: Any, rule: Rule, args: Any) -> Any:
        """A rule for a sum over edges; `NotImplemented` where nothing is compressed."""
        if not (torch.is_grad_enabled() and hooks_free()) or self.forward_pass.config is None:
            return NotImplemented
        push_hooks(*self.hooks)
        try:
            self.forward_pass.stack.function = func
            return self.forward_pass.run_rule(func, rule, args, {})
        finally:
            pop_hooks()

    def _hooked(self, func: Any, args: Any, kwargs: Any, *, defers: bool) -> Any:
        """Run an operation under Dibit's saved-tensor hooks, unless someone else's are there."""
        keeps = torch.is_grad_enabled() and hooks_free()
        if not keeps:
            return self._run(func, args, kwargs, keeps=keeps, defers=defers)
        push_hooks(*self.hooks)
        try:
            return self._run(func, args, kwargs, keeps=keeps, defers=defers)
        finally:
            pop_hooks()

    def _run(self, func: Any, args: Any, kwargs: Any, *, keeps: bool, defers: bool) -> Any:
        """Run an operation, by its rule if it has one.

        Args:
            keeps: gradients are on, and no hooks but Dibit's are there. Within an activation checkpoint all is exact.
            defers: a gather may be deferred.
        """
        forward_pass = self.forward_pass
        forward_pass.stack.function = func
        if forward_pass.config is None:
            announce_writes(forward_pass, func, args, kwargs)
            if func in DROPOUTS and forward_pass.stack.configs:
                result = self.calls.masked(forward_pass.stack.configs[-1], func, args, kwargs)
                if result is not NotImplemented:
                    return result
            return func(*args, **kwargs)
        tape, rule = forward_pass.lossless.tape, self.rules.get(func)
        if forward_pass.config.lossless and func not in EXACT and func not in forward_pass.state.rules:
            rule = None
        # Under no_grad others may write to what is made, out of sight: a Function's own forward pass runs there.
        call = tape.before(func, args, kwargs) if func in PURE and torch.is_grad_enabled() else None
        announce_writes(forward_pass, func, args, kwargs)
        result = NotImplemented
        if keeps and defers and rule is None:
            result = self.edges.gather(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if (
            result is NotImplemented
            and rule is not None
            and keeps
            and not (func in DROPOUTS and self.calls.torchs(forward_pass.config, func))
        ):
            result = forward_pass.run_rule(func, rule, args, kwargs)
        if result is NotImplemented and func in DROPOUTS:
            result = self.calls.masked(forward_pass.stack.configs[-1], func, args, kwargs)
        if result is NotImplemented:
            tape.running = call
            try:
                result = func(*args, **kwargs)
            finally:
                tape.running = None
        tape.after(call, result)
        if call is None:
            record_results(forward_pass, func, args, result)
        return result

    def _inner_gradient(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute a gradient that the model asks for inside its forward pass: exactly, or raise."""
        forward_pass = self.forward_pass
        outputs, inputs = inner_gradients.asked(func, args, kwargs)
        if inputs and all(map(is_wrapped, inputs)):
            return run_away(self, func, args, kwargs)  # what `torch.func.vjp` gave back: its inside was exact
        forward_pass.state.asks = True
        nodes = inner_gradients.compressed_between(outputs, inputs)
        if nodes:
            raise RuntimeError(
                inner_gradients.refusal(forward_pass.module, type(forward_pass.state.root).__name__, nodes)
            )
        forward_pass.stack.asked = True
        if (
            forward_pass.stack.exact_within is not None
            and forward_pass.stack.exact_within <= 1
            and not forward_pass.state.said_exact
        ):
            forward_pass.state.said_exact = True
            warnings.warn(
                f"dibit: {type(forward_pass.state.root).__name__} asks for a gradient inside its forward pass, which "
                "has to be exact, so what it computes from the tensor that it differentiates by is not compressed.",
                stacklevel=3,
            )
        forward_pass.taken += 1
        before, forward_pass.stack.exact_within = (
            forward_pass.stack.exact_within,
            0,
        )  # what an activation checkpoint runs again meanwhile
        try:
            return run_away(self, func, args, kwargs)
        finally:
            forward_pass.stack.exact_within = before
