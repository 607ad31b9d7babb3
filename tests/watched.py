"""Calls of functions, seen from outside: nothing is replaced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def watched(
    *functions: Callable[..., Any], note: Callable[[dict[str, Any]], Any] = dict, after: bool = False
) -> Iterator[list[Any]]:
    """The calls of functions of Python in this thread, until the block ends.

    Args:
        functions: written in Python.
        note: makes what is noted of a function's local variables, its arguments among them.
        after: it is noted when the function returns, else when it begins.
    """
    codes, found = {function.__code__ for function in functions}, []
    when, before = "return" if after else "call", sys.getprofile()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == when and frame.f_code in codes:
            found.append(note(frame.f_locals))

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(before)
