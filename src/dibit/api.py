"""`compress`, `decompress`, `track`: hooks on an unmodified model that begin compressed passes."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import _symbolic_trace

from dibit._torch.module_call import around, check
from dibit._torch.user_objects import is_a, static
from dibit.compile import mode as traced
from dibit.compile.spec import setting_of
from dibit.config import Config, Sample, nearest, recipe
from dibit.engine.ledger import Ledger, Row
from dibit.engine.model_state import Found, Hook, Rule, State, state_of, states_in
from dibit.engine.row_scores import Scores
from dibit.hooks import dlpack as outside
from dibit.hooks import nothing_compressed as unseen
from dibit.hooks import passes
from dibit.hooks.dropout_masks import transformed
from dibit.hooks.inner_gradients import asks
from dibit.hooks.scripting import prepare as prepare_scripting
from dibit.hooks.scripting import scripted
from dibit.portable import Portable

__all__ = ["compress", "decompress", "scores", "state_of", "track"]

Setting = Config | str | None
M = TypeVar("M", bound=nn.Module)


class Enter(Hook):
    """Forward pre-hook: lets `passes.run` call the module's forward, where there is, or begins, a compressed pass."""

    def __init__(self, state: State, name: str, config: Config | None) -> None:
        super().__init__(state, name)
        self.config = config
        state.scores.plan.expect(config)
        self.traced = state.scores.plan.unmeasured(config, state.root)
        self.setting = setting_of(self.traced)  # for compiled code

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if torch.compiler.is_dynamo_compiling():
            traced.enter(self, module, args, kwargs or {})
        elif not torch.compiler.is_compiling() and not _written_down():  # `torch.export` and the like: exact
            callback = traced.set_callback(None)  # nothing of what follows is to be compiled
            try:
                inside = passes.running() is not None or (callback is not None and traced.local.mode.settings)
                if inside or self.begins(module):
                    around(module, passes.run, self, module)
            finally:
                traced.set_callback(callback)

    def called(self, module: nn.Module) -> None:
        super().called(module)
        if self.state.scripted:  # copies of what TorchScript runs come without hooks
            for name, part in self.state.root.named_modules():
                if scripted(part) and state_of(part) is None:
                    _hang(part, Enter(self.state, name, None))

    def begins(self, module: nn.Module) -> bool:
        """Whether a call of this module, outside of any pass, is one: it compresses, or draws dropout's masks alone."""
        return module.training and not transformed() and (self.state.seeds or passes.compresses())

    def packed(self) -> dict[str, Any]:
        root = None if self.name else self.state.root  # a part is saved without the model that it is of
        return {
            "state": self.state,
            "name": self.name,
            "config": pickle.dumps((self.config, self.traced)),
            "root": root,
        }

    def unpacked(self, packed: dict[str, Any]) -> None:
        Hook.__init__(self, packed["state"], packed["name"])
        config = pickle.loads(packed["config"])
        self.config, self.traced = (
            config if isinstance(config, tuple) else (config, config)
        )  # as older versions have it
        self.setting = setting_of(self.traced)
        if packed["root"] is not None:
            self.state.belongs_to(packed["root"])


class Exit(Portable):
    """Forward hook, for compiled code: there a module's end is traced as its beginning is."""

    def __init__(self, state: State) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            traced.leave()


traced.alone(Enter.__call__, Exit.__call__)


def _written_down() -> bool:
    """Whether operations are written down to be run elsewhere: by `torch.jit.trace`, ONNX or `torch.fx`."""
    return torch._C._get_tracing_state() is not None or _symbolic_trace._is_fx_tracing_flag


def compress(
    model: M,
    config: Setting | Mapping[str, Setting] = "default",
    *,
    noise: float | None = None,
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
        noise: a bound on the squared error of the gradient over its square, in the place of the recipe's
            (`Config.noise`); for configs that leave out rows.
        rules: more entries for the table, or others for its functions: function -> `rule(step, *args, **kwargs)`, see
            `dibit.rules`.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module, or a setting is neither a name nor a `Config`.
        ValueError: a recipe or a module name is unknown; the message gives the nearest. Or `noise` is not above 0, or
            no config leaves out rows.
        RuntimeError: this version of torch is not known.
    """
    _check_module("compress", model)
    check()
    settings = _bounded(_resolve(model, config), noise)
    decompress(model)
    state = State(model, dict(rules or {}))
    _attach(model, state, settings)
    prepare_scripting(model)
    if any(setting is not None for setting in settings.values()):
        unseen.expect(state)
        outside.watch()
    return model


def decompress(model: M) -> M:
    """Remove what `compress` attached, from the model and every module in it.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module("decompress", model)
    _detach(model, lambda _: True)
    return model


@contextlib.contextmanager
def track(model: nn.Module) -> Iterator[Ledger]:
    """The ledger of the training forward passes in this block: one row a residual.

    Works on a plain model too: then `total` equals `plain`. Put one training step in the block; several add up. Blocks
    may lie within each other: each gets all rows of its own model.

    Args:
        model: a compressed model; a part of one, whose rows alone are shown; or what contains compressed models
            (DDP, `torch.compile`, `AveragedModel`, a LightningModule): theirs are shown, and nothing of what else it
            keeps. Rows carry the names by which `compress` knows the modules; where there are several compressed
            models, each one's own name goes before them.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> with dibit.track(model) as saved:
        ...     loss = step(model)
        >>> print(saved); saved.total, saved.plain
    """
    _check_module("track", model)
    ledger = Ledger()
    found = states_in(model) or [each for each in states_in(model, passive=True) if each.state is state_of(model)]
    observed = None
    if not found:
        observed = State(model, passive=True)
        _attach(model, observed, {name: None for name, _ in model.named_modules()})
        found = [Found(observed, "", {""})]
    trackers = []
    for each in found:
        tell = functools.partial(_take, ledger, None if each.whole else each.names, each.path if found[1:] else "")
        each.state.trackers.append(tell)
        trackers.append((each.state, tell))
    try:
        yield ledger
    finally:
        for state, tell in trackers:
            state.trackers[:] = [other for other in state.trackers if other is not tell]
        if observed is not None:
            _detach(model, lambda state: state is observed)


def _take(ledger: Ledger, names: set[str] | None, path: str, rows: list[Row]) -> None:
    """Enter the rows of a pass, all or those of modules with these names, with a path before their own."""
    for row in rows:
        if names is None or row.module in names:
            ledger.add(replace(row, module=".".join(filter(None, (path, row.module)))) if path else row)


def scores(model: nn.Module) -> Scores:
    """What `Sample(by="gradient")` knows of a compressed model's rows: `state_dict` and `load_state_dict`.

    Args:
        model: the compressed model, a part of it, or what contains it and no other.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing of the model is compressed, or it contains several compressed models.
    """
    _check_module("scores", model)
    found = states_in(model)
    if not found:
        raise ValueError("scores got a model that is not compressed; call dibit.compress(model) first.")
    if len(found) > 1:
        names = ", ".join(repr(each.path) for each in found)
        raise ValueError(f"scores got a model that contains {len(found)} compressed ones, {names}; give one of them.")
    return found[0].state.scores


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} got a {type(model).__name__}; expected a torch.nn.Module.")


def _detach(model: nn.Module, which: Callable[[State], bool]) -> None:
    """Remove the hooks of these states."""
    for module in model.modules():
        found: tuple[Any, Any] = module._forward_pre_hooks, module._forward_hooks
        for hooks in found:
            for key in [key for key, hook in hooks.items() if is_a(hook, (Enter, Exit)) and which(hook.state)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _attach(model: nn.Module, state: State, settings: Mapping[str, Config | None]) -> None:
    shared = _defaults(model)
    state.seeds = any(config is not None and config.dropout == "seed" for config in settings.values())
    state.asks = False if state.passive else asks(model) or None
    for name, module in model.named_modules():
        if id(module) in shared:
            continue
        state.scripted |= scripted(module)
        _hang(module, Enter(state, name, None if scripted(module) else settings[name]))


def _hang(module: nn.Module, hook: Enter) -> None:
    # by the base class: what TorchScript runs refuses hooks by its own method, yet Python's call of it heeds them
    nn.Module.register_forward_pre_hook(module, hook, prepend=True, with_kwargs=True)
    nn.Module.register_forward_hook(module, Exit(hook.state))


def _defaults(model: nn.Module) -> set[int]:
    """Modules that are a default argument (`act=ReLU()`): shared by all instances of that layer, everywhere."""
    found: set[int] = set()
    for kind in {id(type(module)): type(module) for module in model.modules()}.values():
        init = static(kind, "__init__")
        if is_a(init, FunctionType):
            given = *(init.__defaults__ or ()), *(init.__kwdefaults__ or {}).values()
            found |= {id(value) for value in given if is_a(value, nn.Module)}
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


def _bounded(settings: dict[str, Config | None], noise: float | None) -> dict[str, Config | None]:
    if noise is None:
        return settings
    if not any(config is not None and isinstance(config.reduce, Sample) for config in settings.values()):
        raise ValueError(
            f"noise = {noise!r} was given, but no config leaves out rows, of which more could be kept; use one with "
            "reduce=Sample(ratio), or the recipe 'default' or 'small'."
        )
    return {name: config and replace(config, noise=noise) for name, config in settings.items()}


def _matches(name: str, pattern: str) -> bool:
    """Whether a module's name, or that of a module around it, matches."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
