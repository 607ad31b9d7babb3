"""How what hangs on a compressed model is copied and pickled: a saved model also loads where Dibit is not installed.

`torch.save(model)` pickles the hooks with the model. Their pickle names nothing but Python's standard library: it
asks for `dibit.portable`, and where there is none, `functools.partial` makes a callable that does nothing in the place
of each hook. Then the model is a plain one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pydoc
from collections.abc import Callable
from typing import Any, ClassVar


class _Call:
    """Pickled as the result of a call that the reader makes."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.called = function, args

    def __reduce__(self) -> Any:
        return self.called

    def __call__(self, *args: Any) -> Any:  # a pickler wants to be given something callable
        raise NotImplementedError


_revive = _Call(getattr, _Call(pydoc.locate, "dibit.portable"), "revive", functools.partial)
_nothing = contextlib.nullcontext().__exit__  # takes any arguments and returns None


class Portable:
    """Base of hooks and of what they share."""

    kinds: ClassVar[dict[str, type[Portable]]] = {}
    kind: ClassVar[str]  # the class's name in pickles, which stays when the class is renamed

    def __init_subclass__(cls, kind: str = "") -> None:
        cls.kind = kind or cls.__name__
        Portable.kinds[cls.kind] = cls

    def packed(self) -> dict[str, Any]:
        """What a pickle holds, of builtin types, torch's, and other `Portable`s."""
        return vars(self)

    def unpacked(self, packed: dict[str, Any]) -> None:
        vars(self).update(packed)

    def copied(self) -> dict[str, Any]:
        """What a copy has."""
        return vars(self)

    def __reduce__(self) -> Any:
        # the state is that of a partial: (function, arguments, keywords, attributes)
        return _revive, (_nothing, type(self).kind), (_nothing, (), {}, self.packed())

    def __setstate__(self, state: Any) -> None:
        self.unpacked(state[3])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(self.copied(), memo))
        return twin


def revive(nothing: Any, kind: str) -> Portable:
    """An empty object of this kind, for a pickle to fill."""
    return object.__new__(Portable.kinds[kind])
