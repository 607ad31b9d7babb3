"""Forward passes of a compressed model: what is set when one begins, and taken away however it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dibit._torch.private.autograd import pop_hooks, push_hooks, top_hooks, transformed
from dibit._torch.private.modes import may_have_mode, mode_count, pop_mode, push_mode, set_callback, uncompiled
from dibit._torch.storage_identity import strided
from dibit.compile import compiled_mode, ops
from dibit.engine.batch_info import innermost
from dibit.engine.forward_pass import ForwardPass
from dibit.engine.holdings import tensors_in
from dibit.hooks import nothing_compressed
from dibit.hooks.dropout_masks import Exactly, Masks, hooks_free
from dibit.hooks.function_mode import Intercept
from dibit.hooks.scripting import scripted
from dibit.rules import RULES

_TRACED = (torch.Tensor, nn.Parameter)
_MIN_NUMBERS = 1 << 14  # numbers in the largest argument: of a smaller graph there is little to save


class Pass:
    """The forward pass that is running in this thread: one that compresses, or one that draws dropout's masks alone."""

    def __init__(self, hook: Any, inputs: Any, compressed: bool) -> None:
        state = hook.state
        self.suspended = False
        self.mode: Intercept | Masks
        if compressed:
            forward_pass = ForwardPass(state, inputs, hook.name)
            if state.asks and any(x.requires_grad and x.is_leaf for x in tensors_in(inputs)):
                forward_pass.stack.exact_within = 0
            rules = {} if state.passive else {**RULES, **state.rules} if state.rules else RULES
            self.mode = Intercept(forward_pass, rules)
        else:
            self.mode = Masks(state)
        self.forward_pass: ForwardPass | Exactly = self.mode.forward_pass

    def begin(self) -> None:
        compiled_mode.local.mode.used = False
        _local.active = self
        self.resume()

    def end(self) -> None:
        """Take away what `begin` and operations have set, if it is there; whatever the model itself has set stays."""
        _local.active = None
        _remove_mode(self.mode)
        if isinstance(self.mode, Intercept):
            _remove_hooks(self.mode.hooks[0])
            self.mode.edges.clear()

    def suspend(self) -> None:
        """Step aside for a part of the model that is compiled: the mode and hooks of compiled code take over."""
        _remove_mode(self.mode)
        self.suspended = True
        self.forward_pass.taken += 1

    def resume(self) -> None:
        self.suspended = False
        push_mode(self.mode)


class _Local(threading.local):
    active: Pass | None = None


_local = _Local()


def running() -> Pass | None:
    """The pass that is running in this thread."""
    return _local.active


def run(hook: Any, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """A module's forward, called in its place: the outermost module is a pass, every other one a part of it.

    Args:
        hook: the `Enter` of this module.
        module: called with these arguments.
        forward: what the module would have called.
    """
    callback = set_callback(None)  # nothing of what follows is to be compiled, but for the forward
    if callback is None:
        return _eager(hook, module, forward, args, kwargs)
    try:
        return _compiled(hook, module, callback, forward, args, kwargs)
    finally:
        set_callback(callback)


def _eager(hook: Any, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    active = _local.active
    if active is not None:
        return _part(active, hook, module, forward, args, kwargs)
    compressed = compresses()
    hook.called(module)
    batch = innermost(hook.state.root) if compressed and not (hook.name or hook.state.passive) else None
    if batch is not None:
        batch.check_inputs(hook.state, list(tensors_in((args, kwargs))))
    active = Pass(hook, (args, kwargs), compressed)
    forward_pass = active.forward_pass
    try:
        try:
            active.begin()
            output = _part(active, hook, module, forward, args, kwargs)
            if isinstance(active.mode, Intercept):
                output = active.mode.edges.end(output)
        finally:
            try:
                active.end()
            finally:
                active.end()  # where Ctrl-C came in the middle of the line above
    except BaseException:
        forward_pass.end(None)
        raise
    forward_pass.end(output)
    forward_pass.taken += compiled_mode.local.mode.used
    if compressed and forward_pass.stack.compresses:
        nothing_compressed.passed(hook.state, forward_pass.taken, whole=not hook.name)
    if batch is not None:
        batch.check_output(hook.state, list(tensors_in(output)))
    return output


def _part(active: Pass, hook: Any, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a forward with the name and config of its module on the step."""
    forward_pass, mode, calls = active.forward_pass, active.mode, active.mode.calls
    depth, away = len(forward_pass.stack.names), mode.away
    try:
        if away:  # run again by a gradient that is asked for in the pass
            push_mode(mode)
            mode.away = False
        calls.enter()
        forward_pass.stack.enter(hook.name, hook.config)
        if scripted(module) and isinstance(mode, Intercept):
            return _unseen(mode, forward, args, kwargs)
        return forward(*args, **kwargs)
    finally:
        if away:
            _remove_mode(mode)
            mode.away = True
        calls.leave(depth)
        if forward_pass.stack.leave(depth) and not depth and calls.state.asks is None:
            calls.state.asks = False  # a tensor was made to require a gradient, and none was asked for


def _unseen(mode: Intercept, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A forward that TorchScript runs: exact, and in the ledger under its name, as saved-tensor hooks see it."""
    forward_pass, keeps = mode.forward_pass, torch.is_grad_enabled() and hooks_free()
    _remove_mode(mode)  # the hooks are called while it would be active
    mode.away = True
    try:
        for x in tensors_in((args, kwargs)):
            if not forward_pass.held(x):
                forward_pass.writes.before(x)  # the forward may write to it
        forward_pass.stack.function = "TorchScript"
        with torch.autograd.graph.saved_tensors_hooks(*mode.hooks) if keeps else nullcontext():
            return forward(*args, **kwargs)
    finally:
        mode.away = False
        push_mode(mode)


def _compiled(hook: Any, module: nn.Module, callback: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A call from compiled code that is not traced itself: the outermost, or one at which a graph was broken."""
    mode, active = compiled_mode.local.mode, _local.active
    if mode.settings and not hook.name and mode.state is hook.state:
        compiled_mode.end(mode)  # the model cannot run within itself: left behind by a graph that was interrupted
    outermost = not mode.settings
    if outermost:
        if hook.state.passive or not (module.training and torch.is_grad_enabled()):
            return _compile(callback, forward, args, kwargs)
        if active is None and not compresses():
            return _compile(callback, forward, args, kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if not tensors or not all(type(x) in _TRACED and strided(x) for x in tensors):
            return _eager(hook, module, forward, args, kwargs)  # sparse matrices break every graph
        if compiled_mode.weighs_edges(module) and max(x.numel() for x in tensors) >= _MIN_NUMBERS:
            return _eager(hook, module, forward, args, kwargs)  # a graph would keep what is made for each edge
    depth = len(mode.settings)
    try:
        if outermost:
            if active is not None:
                active.suspend()
            held = [x for x in tensors if x.is_floating_point() and not x.requires_grad]
            compiled_mode.begin(mode, hook.state, ops.fresh(tensors[0], hook.state.seeds), held)
        mode.settings.append(hook.setting)
        return _compile(callback, forward, args, kwargs)
    finally:
        if outermost:
            try:
                compiled_mode.end(mode)
            finally:
                compiled_mode.end(mode)
            nothing_compressed.passed(hook.state, 1, whole=not hook.name)
            if active is not None and active.suspended:
                active.resume()
        while len(mode.settings) > depth:
            compiled_mode.leave()


def _compile(callback: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a forward that Dynamo may compile."""
    try:
        set_callback(callback)
        return forward(*args, **kwargs)
    finally:
        set_callback(None)


run = uncompiled(run)
compiled_mode.alone(run, _compiled, _compile, _eager, _part, _unseen)


def compresses() -> bool:
    """Whether a pass that begins here, in training mode, compresses: it has gradients, and nobody else's hooks.

    In those of an activation checkpoint a part is run again; transforms of `torch.func` go their own way.
    """
    return torch.is_grad_enabled() and hooks_free() and not transformed()


def _remove_mode(mode: TorchFunctionMode) -> None:
    """Take a mode from this thread's stack, also from under others; nothing happens where it is not there."""
    if may_have_mode(mode):
        above = []
        while mode_count() and (top := pop_mode()) is not mode:
            above.append(top)
        for other in reversed(above):
            push_mode(other)


def _remove_hooks(pack: Any) -> None:
    """The same of saved-tensor hooks, known by their first function."""
    above = []
    while (top := top_hooks()) is not None:
        pop_hooks()
        if top[0] == pack:
            break
        above.append(top)
    for other in reversed(above):
        push_hooks(*other)
