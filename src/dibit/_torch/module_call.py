"""A call in the place of a module's `forward`, for one call of the module, set by a forward pre-hook.

Hooks do not see every end of a call: those with `always_call` run on `Exception` alone, and Ctrl-C, `SystemExit` or
`GeneratorExit` go past them. What must end with the call needs a `finally` around it. `Module._call_impl` holds the
`forward` that it will call in a cell, from before its pre-hooks run; a pre-hook can put another function there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

_NAME = "forward_call"


def _find() -> tuple[CodeType | None, int]:
    """The code within `Module._call_impl` that runs hooks and forward, and the place of its cell."""
    for code in nn.Module._call_impl.__code__.co_consts:
        if isinstance(code, CodeType) and _NAME in code.co_freevars:
            return code, code.co_freevars.index(_NAME)
    return None, 0


_CODE, _CELL = _find()


def check() -> None:
    """Raise a RuntimeError where this version of torch calls modules in another way."""
    if _CODE is None:
        raise RuntimeError(
            f"torch {torch.__version__} calls a module's forward in a way that this version of Dibit does not know; "
            "install a newer Dibit, or an older torch."
        )


def around(module: nn.Module, function: Callable[..., Any], *given: Any) -> bool:
    """Let the call of a module whose pre-hooks run now call `function(*given, forward, *args, **kwargs)`.

    Returns:
        `False` where the hook was not called by a call of this module; then nothing has changed.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CODE:
        frame = frame.f_back
    if frame is None or frame.f_back is None:
        return False
    caller = frame.f_back.f_locals
    if caller.get("self") is not module:
        return False
    cell = caller["inner"].__closure__[_CELL]
    cell.cell_contents = functools.partial(function, *given, cell.cell_contents)
    return True
