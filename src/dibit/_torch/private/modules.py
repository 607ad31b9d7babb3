"""Modules: a call in the place of one's `forward`, the tables of its hooks, and the base classes of norms.

Hooks do not see every end of a call: those with `always_call` run on `Exception` alone, and Ctrl-C, `SystemExit` or
`GeneratorExit` go past them. What must end with the call needs a `finally` around it. `Module._call_impl` holds the
`forward` that it will call in a cell, from before its pre-hooks run; a pre-hook can put another function there.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from types import CodeType
from typing import Any

from torch import nn

from dibit._torch.private.frames import caller as frame_of_caller
from dibit._torch.private.registry import find

_NAME = "forward_call"


def _inner() -> CodeType:
    """The code within `Module._call_impl` that runs hooks and forward, and has the cell."""
    constants = nn.Module._call_impl.__code__.co_consts
    return next(code for code in constants if isinstance(code, CodeType) and _NAME in code.co_freevars)


_code: CodeType | None = find(
    "torch.nn.Module._call_impl", "begin and end passes however a call ends", needed=True, look=_inner
)
_cell = _code.co_freevars.index(_NAME) if _code is not None else 0


def around(module: nn.Module, function: Callable[..., Any], *given: Any) -> bool:
    """Let the call of a module whose pre-hooks run now call `function(*given, forward, *args, **kwargs)`.

    Returns:
        `False` where the hook was not called by a call of this module; then nothing has changed.
    """
    frame = frame_of_caller()
    while frame is not None and frame.f_code is not _code:
        frame = frame.f_back
    if frame is None or frame.f_back is None:
        return False
    caller = frame.f_back.f_locals
    if caller.get("self") is not module:
        return False
    cell = caller["inner"].__closure__[_cell]
    cell.cell_contents = functools.partial(function, *given, cell.cell_contents)
    return True


# -- tables of a module -------------------------------------------------------------------------------------------

_HOOKS = "_forward_pre_hooks", "_forward_hooks"
_MORE = "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"


def _table(name: str, purpose: str, lost: str = "", needed: bool = False) -> bool:
    look = functools.partial(getattr, nn.Module(), name)
    return find(f"torch.nn.Module.{name}", purpose, lost, needed=needed, look=look) is not None


_has_hooks = _table("_forward_pre_hooks", "find what compress has put on a model", needed=True)
_has_hooks &= _table("_forward_hooks", "find what compress has put on a model", needed=True)
for _name in _MORE:
    _table(_name, "leave nothing behind in decompress")
_has_children = _table(
    "_modules", "hand TorchScript the plain model", "torch.jit.script of compressed models, to be decompressed before"
)


def pre_hooks(module: nn.Module) -> MutableMapping[int, Any]:
    """The forward pre-hooks of a module by their keys."""
    return module._forward_pre_hooks if _has_hooks else {}


def forward_hooks(module: nn.Module) -> MutableMapping[int, Any]:
    """The forward hooks of a module by their keys."""
    return module._forward_hooks if _has_hooks else {}


def remove_hook(module: nn.Module, key: int) -> None:
    """Remove the hook of this key, forward or before."""
    for name in (*_HOOKS, *_MORE):
        getattr(module, name, {}).pop(key, None)


def twin_without(module: nn.Module, hook: Callable[[Any], bool]) -> nn.Module:
    """A copy on the same parameters that may get other children, without the hooks for which this is true."""
    if not (_has_hooks and _has_children):
        return module
    twin = object.__new__(type(module))
    attributes: dict[str, Any] = twin.__dict__
    attributes.update(vars(module))
    attributes["_modules"] = module._modules.copy()
    for name in _HOOKS:
        attributes[name] = OrderedDict((key, own) for key, own in attributes[name].items() if not hook(own))
    return twin


# -- norms --------------------------------------------------------------------------------------------------------

_CUSTOM = "accuracy of the first steps: norms of a class of your own are not counted among those of a deep model"
_batch = find("torch.nn.modules.batchnorm._BatchNorm", "count the norms of a model", _CUSTOM)
_instance = find("torch.nn.modules.instancenorm._InstanceNorm", "count the norms of a model", _CUSTOM)
_BATCH = (_batch,) if _batch else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE = (_instance,) if _instance else (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS: tuple[type[nn.Module], ...] = (*_BATCH, *_INSTANCE, nn.LayerNorm)
