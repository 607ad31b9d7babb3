"""The calls that are running: which of torch's, and of Dibit's, a hook or a function was called in."""

from __future__ import annotations

from types import FrameType

from dibit._torch.private.registry import find

_get_frame = find("sys._getframe", "see in which call of a module its hook runs", needed=True)


def caller(depth: int = 1) -> FrameType | None:
    """The frame of the function that calls this (depth 0), or of one further out; `None` where Python has no frames."""
    return None if _get_frame is None else _get_frame(depth + 1)


def calling_module() -> str | None:
    """The name of the module whose code calls the function that calls this."""
    frame = caller(2)
    return None if frame is None else frame.f_globals["__name__"]
