"""`compress`, `decompress`, `track`: hooks on an unmodified model that set and remove the mode around its forward."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from dibit.compiled import mode as traced
from dibit.compiled.spec import setting_of
from dibit.config import Config, nearest, recipe
from dibit.functions import RULES
from dibit.inner_gradient import asks
from dibit.intercept import Intercept
from dibit.ledger import Ledger
from dibit.masks import Exactly, Masks, top_hooks, transformed
from dibit.score_table import Scores
from dibit.state import Rule, State
from dibit.step import Step, tensors_in

Setting = Config | str | None
M = TypeVar("M", bound=nn.Module)


@dataclass
class Active:
    """The forward pass that is running in this thread."""

    step: Step | Exactly
    mode: Intercept | Masks
    callback: Any = None  # what compiles frames, to be put back when this pass ends
    suspended: bool = False

    def suspend(self) -> None:
        """Step aside for a part of the model that is compiled: the mode and hooks of compiled code take over."""
        self.mode.__exit__(None, None, None)
        self.suspended = True
        self.step.seen += 1

    def resume(self) -> None:
        self.mode.__enter__()
        self.suspended = False


class _Local(threading.local):
    active: Active | None = None


_local = _Local()


class Enter:
    """Forward pre-hook: the outermost module starts a step, every module tells its name and config."""

    def __init__(self, state: State, name: str, config: Config | None) -> None:
        self.state, self.name, self.config = state, name, config
        self.setting = setting_of(config)  # for compiled code

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            traced.enter(self, module, args, kwargs)
        elif not torch.compiler.is_compiling():  # `torch.export` and the like: exact
            callback = traced.set_callback(None)  # nothing of what follows is to be compiled
            if callback is None:
                self.eager(module, args, kwargs, None)
            else:
                try:
                    callback = self.compiled(module, args, kwargs, callback)
                finally:
                    traced.set_callback(callback)

    def eager(self, module: nn.Module, args: Any, kwargs: Any, callback: Any) -> None:
        active = _local.active
        if active is not None and not active.mode.running():
            _abandon()  # Ctrl-C ended a forward pass without running any hook
            active = None
        if active is None:
            active = _begin(self.state, module, not self.name, (args, kwargs))
            if active is None:
                return
            _local.active = active
            active.callback = callback
        active.mode.calls.enter(module)
        active.step.names.append(self.name)
        active.step.configs.append(self.config)
        active.step.compresses |= self.config is not None

    def compiled(self, module: nn.Module, args: Any, kwargs: Any, callback: Any) -> Any:
        """A call from compiled code that is not traced itself: the outermost, or one at which a graph was broken.

        Returns:
            What is to be compiled in this call: as before, or nothing.
        """
        mode = traced.local.mode
        outermost = not mode.settings or (not self.name and mode.state is self.state)
        if mode.settings and (outermost or (mode.frame is not None and not traced.running(mode.frame))):
            traced.end(mode)  # an interrupted pass
            outermost = True
        if not outermost:
            mode.settings.append(self.setting)
            return callback
        active = _local.active
        if active is not None and not active.mode.running():
            _abandon()
            active = None
        if self.state.passive or not (module.training and torch.is_grad_enabled()):
            return callback
        if active is not None:
            active.suspend()
        elif _taken():
            return callback
        tensors = list(tensors_in((args, kwargs)))
        traceable = tensors and all(type(x) in _TRACED and x.layout == torch.strided for x in tensors)
        if not traceable or traced.weighs_edges(module):
            if active is not None:
                active.resume()
            self.eager(module, args, kwargs, callback)  # sparse matrices break every graph, and edges would be kept
            return None
        held = [x for x in tensors if x.is_floating_point() and not x.requires_grad]
        traced.begin(mode, self.state, traced.ops.fresh(tensors[0], self.state.seeds), held)
        mode.frame = _caller()
        mode.settings.append(self.setting)
        return callback


class Exit:
    """Forward hook, also called when the forward pass raised."""

    def __init__(self, state: State, name: str) -> None:
        self.state, self.name = state, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            traced.leave()
        elif not torch.compiler.is_compiling():
            callback = traced.set_callback(None)
            if callback is None:
                self.eager(output)
            else:
                try:
                    traced.leave()
                    active = _local.active
                    if active is not None and active.suspended and not traced.local.mode.settings:
                        active.resume()
                finally:
                    traced.set_callback(callback)

    def eager(self, output: Any) -> None:
        active = _local.active
        if active is None or not active.step.names:
            return
        active.mode.calls.leave()
        active.step.names.pop()
        active.step.configs.pop()
        if active.step.exact_within is not None and len(active.step.names) < active.step.exact_within:
            active.step.exact_within = None if active.step.asked else 0
            if not active.step.names and active.mode.calls.state.asks is None:
                active.mode.calls.state.asks = False  # a tensor was made to require a gradient, and none was asked for
        if not active.step.names:
            _local.active = None
            active.mode.__exit__(None, None, None)
            try:
                active.step.end(output)
                active.step.seen += traced.local.mode.used
                _warn_if_unseen(active.step)
            finally:
                if active.callback is not None:
                    traced.set_callback(active.callback)


_TRACED = (torch.Tensor, nn.Parameter)
traced.alone(Enter.__call__, Exit.__call__)


def _caller() -> Any:
    """The frame of Module._call_impl that runs a hook of ours."""
    frame = sys._getframe(1)
    while frame.f_code is not Enter.__call__.__code__ and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_back


def _begin(state: State, module: nn.Module, whole: bool, inputs: Any) -> Active | None:
    """A pass that compresses; where it may not, one that draws dropout's masks; in eval mode none."""
    if not module.training or transformed():
        return None
    compresses = torch.is_grad_enabled() and not _taken()
    if not compresses and not state.seeds:
        return None
    traced.local.mode.used = False
    mode = _mode(state, whole, inputs) if compresses else Masks(state)
    mode.frame = _caller()
    mode.__enter__()
    return Active(mode.step, mode)


def _mode(state: State, whole: bool, inputs: Any) -> Intercept:
    step = Step(state, inputs, whole)
    if state.asks and any(x.requires_grad and x.is_leaf for x in tensors_in(inputs)):
        step.exact_within = 0
    return Intercept(step, {} if state.passive else {**RULES, **state.rules} if state.rules else RULES)


def _abandon() -> None:
    """Remove a mode and hooks that an interrupted forward pass left behind in this thread."""
    active, _local.active = _local.active, None
    assert active is not None
    above = []
    while active.mode in _get_current_function_mode_stack():
        mode = _pop_mode()
        if mode is active.mode:
            break
        above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)


def _taken() -> bool:
    """Inside someone else's hooks (an activation checkpoint runs its part again) or a transform of `torch.func`."""
    return top_hooks() is not None or transformed()


def _warn_if_unseen(step: Step | Exactly) -> None:
    if not step.compresses or step.seen or isinstance(step, Exactly):
        return
    state = step.state
    if not state.warned:
        state.warned = True
        warnings.warn(
            f"dibit: a training forward pass of the compressed {type(state.root).__name__} had no operation that Dibit "
            "knows, so nothing was compressed; dibit.track(model) lists what is kept.",
            stacklevel=4,
        )


def compress(
    model: M,
    config: Setting | Mapping[str, Setting] = "default",
    *,
    rules: Mapping[Any, Rule] | None = None,
) -> M:
    """Keep compressed activations for the backward pass of a model; the forward pass stays as it is.

    Nothing of the model changes but forward hooks: parameters, buffers, `state_dict`, class and `repr` stay. In eval
    mode and under `torch.no_grad` nothing is compressed; in training, dropout has the same masks there.
    Compressing again replaces the setting.

    Args:
        model: any `torch.nn.Module`; parts of it may be called on their own.
        config: a recipe's name ("default", "small", "exact", "iexact"), a `Config`, `None` (everything exact), or a
            mapping from module names to those. A name stands for the module and all within; `*` and `?` match as in
            file names; the first entry that matches counts, and modules without a match stay exact.
        rules: more entries for the table, or others for its functions: function -> `rule(step, *args, **kwargs)`, see
            `dibit.functions`.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module, or a setting is neither a name nor a `Config`.
        ValueError: a recipe or a module name is unknown; the message gives the nearest.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress got a {type(model).__name__}; expected a torch.nn.Module.")
    settings = _resolve(model, config)
    decompress(model)
    _attach(model, State(model, dict(rules or {})), settings)
    return model


def decompress(model: M) -> M:
    """Remove what `compress` attached, from the model and every module in it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Enter | Exit)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
    return model


@contextlib.contextmanager
def track(model: nn.Module) -> Iterator[Ledger]:
    """The ledger of the training forward passes in this block: one row a residual.

    Works on a plain model too: then `total` equals `plain`. Put one training step in the block; several add up.

    Example:
        >>> with dibit.track(model) as saved:
        ...     loss = step(model)
        >>> print(saved); saved.total, saved.plain
    """
    ledger = Ledger()
    state = state_of(model)
    if state is None:
        _attach(
            model,
            State(model, passive=True, ledger=ledger),
            {name: None for name, _ in model.named_modules()},
        )
        try:
            yield ledger
        finally:
            decompress(model)
    else:
        before, state.ledger = state.ledger, ledger
        try:
            yield ledger
        finally:
            state.ledger = before


def scores(model: nn.Module) -> Scores:
    """What `Sample(by="gradient")` knows of a compressed model's rows: `state_dict` and `load_state_dict`.

    Raises:
        ValueError: the model is not compressed.
    """
    state = state_of(model)
    if state is None:
        raise ValueError("scores got a model that is not compressed; call dibit.compress(model) first.")
    return state.scores


def state_of(model: nn.Module) -> State | None:
    """What `compress` attached to this module, if anything."""
    return next((hook.state for hook in model._forward_pre_hooks.values() if isinstance(hook, Enter)), None)


def _attach(model: nn.Module, state: State, settings: Mapping[str, Config | None]) -> None:
    shared = _defaults(model)
    state.seeds = any(config is not None and config.dropout == "seed" for config in settings.values())
    state.asks = False if state.passive else asks(model) or None
    for name, module in model.named_modules():
        if id(module) in shared:
            continue
        module.register_forward_pre_hook(Enter(state, name, settings[name]), prepend=True, with_kwargs=True)
        module.register_forward_hook(Exit(state, name), always_call=True)


def _defaults(model: nn.Module) -> set[int]:
    """Modules that are a default argument (`act=ReLU()`): shared by all instances of that layer, everywhere."""
    found: set[int] = set()
    for kind in {type(module) for module in model.modules()}:
        given = (*(getattr(kind.__init__, "__defaults__", None) or ()),)
        named = getattr(kind.__init__, "__kwdefaults__", None) or {}
        found |= {id(value) for value in (*given, *named.values()) if isinstance(value, nn.Module)}
    return found


def _config(setting: Setting) -> Config | None:
    if setting is None or setting == "none":
        return None
    if isinstance(setting, str):
        return recipe(setting)
    if isinstance(setting, Config):
        return setting
    raise TypeError(
        f"a setting of type {type(setting).__name__} was given; expected a recipe's name or a dibit.Config."
    )


def _resolve(model: nn.Module, config: Setting | Mapping[str, Setting]) -> dict[str, Config | None]:
    names = [name for name, _ in model.named_modules()]
    if not isinstance(config, Mapping):
        one = _config(config)
        return dict.fromkeys(names, one)
    patterns = {pattern: _config(setting) for pattern, setting in config.items()}
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"no module is named {pattern!r}; {nearest(pattern, [n for n in names if n])}.")
    return {
        name: next((setting for pattern, setting in patterns.items() if _matches(name, pattern)), None)
        for name in names
    }


def _matches(name: str, pattern: str) -> bool:
    """Whether a module's name, or that of a module around it, matches."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
