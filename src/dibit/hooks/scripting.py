"""TorchScript: compressed models that are compiled by it, and parts of models that have been before.

`torch.jit.script` compiles a module's hooks too, and Dibit's are no TorchScript: it is handed the plain model.

What has been scripted or traced runs in C++, where no function mode sees its operations: they stay exact. Saved-tensor
hooks are called for what it keeps, so that the ledger names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from dibit._torch.private.modules import pre_hooks, twin_without
from dibit._torch.user_objects import is_a
from dibit.portable import Portable


def prepare(model: nn.Module) -> None:
    """Give modules the method by which TorchScript asks for what it shall compile; of plain ones it is themselves."""
    nn.Module.__prepare_scriptable__ = _plain  # type: ignore[attr-defined]
    for kind in {id(kind): kind for module in model.modules() for kind in type(module).__mro__}.values():
        own = vars(kind).get("__prepare_scriptable__", _plain)
        if own is not _plain and is_a(own, FunctionType) and not hasattr(own, "__wrapped__"):
            kind.__prepare_scriptable__ = _then(own)  # type: ignore[attr-defined]


def _then(own: Callable[[Any], Any]) -> Callable[[nn.Module], Any]:
    """A class's own method, which gets the plain module."""

    @functools.wraps(own)
    def prepare_scriptable(module: nn.Module) -> Any:
        return own(_plain(module))

    return prepare_scriptable


def scripted(module: nn.Module) -> bool:
    """Whether TorchScript runs a module."""
    return isinstance(module, torch.jit.ScriptModule)


def _plain(module: nn.Module) -> nn.Module:
    """The module, or where it is compressed or contains what is, a copy on the same parameters without the hooks."""
    if scripted(module):
        return module  # it is not compiled again
    if not any(is_a(hook, Portable) for part in module.modules() for hook in pre_hooks(part).values()):
        return module
    return twin_without(module, lambda hook: is_a(hook, Portable))  # TorchScript replaces the children, one by one
