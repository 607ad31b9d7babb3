"""`torch.jit.script` compiles a module's hooks too, and Dibit's are no TorchScript: it is handed the plain model."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from dibit.portable import Portable

_HOOKS = "_forward_pre_hooks", "_forward_hooks"


def prepare() -> None:
    """Give modules the method by which TorchScript asks for what it shall compile; of plain ones it is themselves."""
    nn.Module.__prepare_scriptable__ = _plain  # type: ignore[attr-defined]


def _plain(module: nn.Module) -> nn.Module:
    """The module, or where it is compressed or contains what is, a copy on the same parameters without the hooks."""
    if not any(isinstance(hook, Portable) for part in module.modules() for hook in part._forward_pre_hooks.values()):
        return module
    twin = object.__new__(type(module))
    attributes: dict[str, Any] = twin.__dict__
    attributes.update(vars(module))
    attributes["_modules"] = module._modules.copy()  # TorchScript replaces the children, one by one
    for name in _HOOKS:
        hooks = attributes[name]
        attributes[name] = OrderedDict((key, hook) for key, hook in hooks.items() if not isinstance(hook, Portable))
    return twin
