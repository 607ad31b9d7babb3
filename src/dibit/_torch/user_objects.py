"""Objects of the user's, looked at without running code of theirs.

`getattr` and `hasattr` run properties, descriptors and `__getattr__`, which may import, read files or raise anything;
`isinstance` asks for `__class__`, which the proxies of some libraries answer by a call; iterating over a container of a
class of its own may load what it stands for. What Dibit looks for is found without any of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import GetSetDescriptorType
from typing import Any

_mro: Any = vars(type)["__mro__"].__get__  # a metaclass may answer otherwise
_body: Any = vars(type)["__dict__"].__get__


def is_a(value: Any, kinds: Any) -> bool:
    """`isinstance` by the object's true class."""
    return issubclass(type(value), kinds)


def static(owner: Any, name: str) -> Any:
    """An attribute of a class, a module or an object as it is stored, not as it is read; `None` where there is none."""
    try:
        return inspect.getattr_static(owner, name, None)
    except Exception:  # a metaclass may raise anything
        return None


def defines(value: Any, name: str) -> bool:
    """Whether the object's class, or one above it, has something of this name in its body."""
    return any(name in _body(kind) for kind in _mro(type(value)))


def attributes(value: Any) -> dict[str, Any]:
    """An object's own attributes, empty where it has none, or puts something else in their place."""
    for kind in _mro(type(value)):
        found = _body(kind).get("__dict__")
        if found is not None:
            return found.__get__(value) if type(found) is GetSetDescriptorType else {}  # type: ignore[no-any-return]
    return {}


def items(value: Any) -> Iterator[Any] | None:
    """What a list, tuple, set or dict holds; `None` of anything else."""
    kind = next((kind for kind in (list, tuple, dict, set, frozenset) if is_a(value, kind)), None)
    if kind is None:
        return None
    return iter(dict.values(value)) if kind is dict else kind.__iter__(value)  # type: ignore[attr-defined]


def mapped(value: Any) -> list[Any]:
    """The values of a mapping that is no dict and has no attributes, if it gives them."""
    if not is_a(value, Mapping):
        return []
    try:
        return list(value.values())
    except Exception:
        return []
