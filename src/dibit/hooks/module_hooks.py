"""The hooks that `compress` puts on every module of a model."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from dibit._torch.private import COMPILES, USABLE
from dibit._torch.private.autograd import transformed
from dibit._torch.private.modes import set_callback, written_down
from dibit._torch.private.modules import around, forward_hooks, pre_hooks, remove_hook
from dibit._torch.user_objects import is_a, static
from dibit.compile import compiled_mode
from dibit.compile.config_text import setting_of
from dibit.config import Config
from dibit.engine.model_state import Hook, ModelState, state_of
from dibit.hooks import dgl, passes
from dibit.hooks.inner_gradients import asks
from dibit.hooks.scripting import scripted
from dibit.portable import Portable


class Enter(Hook):
    """Forward pre-hook: lets `passes.run` call the module's forward, where there is, or begins, a compressed pass."""

    def __init__(self, state: ModelState, name: str, config: Config | None) -> None:
        super().__init__(state, name)
        self.config = config
        state.scores.plan.expect(config)
        self.traced = state.scores.plan.unmeasured(config, state.root)
        self.setting = setting_of(self.traced)  # for compiled code

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if torch.compiler.is_dynamo_compiling():
            if COMPILES:
                compiled_mode.enter(self, module, args, kwargs or {})
        elif not torch.compiler.is_compiling() and not written_down(args, kwargs):  # `torch.export` and the like: exact
            callback = set_callback(None)  # nothing of what follows is to be compiled
            try:
                inside = passes.running() is not None or (callback is not None and compiled_mode.local.mode.settings)
                if inside or self.begins(module):
                    around(module, passes.run, self, module)
            finally:
                set_callback(callback)

    def called(self, module: nn.Module) -> None:
        super().called(module)
        dgl.watch()
        if self.state.scripted:  # copies of what TorchScript runs come without hooks
            for name, part in self.state.root.named_modules():
                if scripted(part) and state_of(part) is None:
                    _hang(part, Enter(self.state, name, None))

    def begins(self, module: nn.Module) -> bool:
        """Whether a call of this module, outside of any pass, is one: it compresses, or draws dropout's masks alone."""
        return USABLE and module.training and not transformed() and (self.state.seeds or passes.compresses())

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

    def __init__(self, state: ModelState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if COMPILES and torch.compiler.is_dynamo_compiling():
            compiled_mode.leave()


compiled_mode.alone(Enter.__call__, Exit.__call__)


def detach(model: nn.Module, which: Callable[[ModelState], bool]) -> None:
    """Remove the hooks of these states."""
    for module in model.modules():
        for key, hook in [*pre_hooks(module).items(), *forward_hooks(module).items()]:
            if is_a(hook, (Enter, Exit)) and which(hook.state):
                remove_hook(module, key)


def attach(model: nn.Module, state: ModelState, settings: Mapping[str, Config | None]) -> None:
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
