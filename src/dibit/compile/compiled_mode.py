"""The mode of a compiled pass: small enough that Dynamo traces it, with a table of its own (`dibit.compile.rules`).

There is one object a thread, always the same one: where Dynamo has to break a graph in the middle of a model, it can
put back a mode only if it knows where to find it. Between the parts of a broken graph the mode is on the stack and
leaves everything to torch.
"""

from __future__ import annotations

import functools
import inspect
import threading
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dibit._torch.private.modes import mode_count, not_alone, pop_mode, push_mode
from dibit._torch.user_objects import is_a, static
from dibit.compile import ops
from dibit.compile.config_text import Setting
from dibit.compile.rules import RULES


class CompiledMode(TorchFunctionMode):
    """One compiled forward pass of a compressed model.

    Attributes:
        settings: configs of the modules that are running, innermost last; empty between passes.
        key: of this pass, int64 0-d.
        draws: residuals so far.
        inputs: of linear layers, with the numbers of their residuals; while a part of the model runs.
        dropped: dropouts of tensors that the caller holds, with those, numbers and probabilities; up to the next part.
        older: how many of them the part that runs has found.
        held: floating-point inputs that the caller keeps.
        passes: int64 0-d, see `ops.draw_key`.
        state: of the compressed model whose pass this is.
        own: functions for which the user gave rules of another kind: left to torch.
        used: some pass was compiled since this was last set to `False`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settings: list[Setting | None] = []
        self.key: Any = None
        self.draws = 0
        self.inputs: list[tuple[Tensor, int]] = []
        self.dropped: list[tuple[Tensor, Tensor, int, float]] = []
        self.older = 0
        self.held: tuple[Tensor, ...] = ()
        self.passes = torch.zeros((), dtype=torch.int64)
        self.state: Any = None
        self.own: tuple[Any, ...] = ()
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling() and self.settings and torch.is_grad_enabled():
            rule = RULES.get(func)
            if rule is not None and self.settings[-1] is not None and func not in self.own:
                result = rule(self, *args, **kwargs)
                if result is not NotImplemented:
                    return result
        return func(*args, **kwargs)


class _Local(threading.local):
    def __init__(self) -> None:
        self.mode = CompiledMode()


local = _Local()


def enter(hook: Any, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
    """A module of a compressed model begins, in a call that Dynamo traces."""
    mode = local.mode
    if mode.settings and not hook.name and mode.state is hook.state:
        end(mode)  # the model cannot run within itself: an interrupted pass has left this behind
    if not mode.settings:
        if hook.state.passive or not (module.training and torch.is_grad_enabled()):
            return
        held = []
        like = None
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                if like is None:
                    like = x
                if x.is_floating_point() and not x.requires_grad:
                    held.append(x)
        if like is None:
            return  # no tensor among the arguments tells the device
        begin(mode, hook.state, ops.draw_key(mode.passes, like, hook.state.seeds), held)
    mode.settings.append(hook.setting)


def leave() -> None:
    """A module of a compressed model ends."""
    mode = local.mode
    if mode.settings:
        mode.settings.pop()
        if len(mode.settings) <= 1:
            # a compiled graph would return what is left here; a dropout may serve the module after it
            mode.inputs, mode.dropped = [], mode.dropped[mode.older :]
            mode.older = len(mode.dropped)
        if not mode.settings:
            end(mode)


def begin(mode: CompiledMode, state: Any, key: Tensor, held: list[Tensor]) -> None:
    """Start a pass."""
    mode.key, mode.draws, mode.held, mode.used = key, 0, tuple(held), True
    mode.inputs, mode.dropped, mode.older = [], [], 0
    mode.state, mode.own = state, tuple(state.rules)
    push_mode(mode)


def end(mode: CompiledMode) -> None:
    """End a pass, also one that was interrupted."""
    above = []
    while mode_count():
        top = pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        push_mode(other)
    mode.inputs, mode.dropped, mode.older = [], [], 0
    mode.settings, mode.key, mode.held, mode.state, mode.own = [], None, (), None, ()


def weighs_edges(module: torch.nn.Module) -> bool:
    """Whether a layer of PyTorch Geometric makes numbers for each edge (attention, weights of self-loops).

    A graph would keep them all; an uncompiled pass computes them again from the nodes' (`dibit.recompute.recorder`).
    """
    return any(map(_makes_numbers, module.modules()))


def _makes_numbers(layer: torch.nn.Module) -> bool:
    """Weights of edges that are the caller's are none, but their products with degrees are, and those of self-loops."""
    kind: Any = type(layer)
    more = _more_than_features(kind)
    if more != {"edge_weight"}:
        return bool(more)
    forward = static(kind, "forward")
    normalizes = is_a(forward, FunctionType) and "gcn_norm" in forward.__code__.co_names
    return bool(getattr(layer, "normalize", normalizes) or getattr(layer, "add_self_loops", False))


@functools.cache
def _more_than_features(kind: Any) -> frozenset[str]:
    """What a class's messages are made of beside the neighbour's features."""
    message = static(kind, "message")
    if not is_a(message, FunctionType) or static(kind, "propagate") is None:
        return frozenset()
    return frozenset(inspect.signature(message).parameters) - {"self", "x_j"}


def alone(*functions: Any) -> None:
    """Dynamo does not compile these functions on their own; where it compiles their caller, it traces them."""
    for function in functions:
        not_alone(function.__code__)
