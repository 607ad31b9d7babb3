"""Memory handed out by a function of C++ that no function mode sees: `torch.utils.dlpack.to_dlpack`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils.dlpack

from dibit.engine.forward_pass import ForwardPass
from dibit.hooks.passes import running


def watch() -> None:
    """Put a function in its place, once, that tells the pass of this thread and then calls it."""
    given = torch.utils.dlpack.to_dlpack
    if hasattr(given, "__wrapped__"):
        return

    @functools.wraps(given)
    def to_dlpack(x: Any, *args: Any, **kwargs: Any) -> Any:
        active = running()
        if active is not None and isinstance(active.forward_pass, ForwardPass):
            active.forward_pass.writes.exposed(x)
        return given(x, *args, **kwargs)

    torch.utils.dlpack.to_dlpack = to_dlpack  # type: ignore[assignment]
    if torch.to_dlpack is given:
        torch.to_dlpack = to_dlpack  # type: ignore[assignment]
