"""Signatures of operators as torch 2.6 reads them: it knows `typing.List` and `Optional`, not `list` and `| None`."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def with_typing(function: F, of: Callable[..., Any] | None = None) -> F:
    """The function, with its own signature or another function's, in the types of `typing`."""
    own = inspect.signature(of or function, eval_str=True)
    parameters = [one.replace(annotation=_plain(one.annotation)) for one in own.parameters.values()]
    signature = own.replace(parameters=parameters, return_annotation=_plain(own.return_annotation))
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _plain(kind: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is UnionType:
        return typing.Optional[_plain(next(part for part in inner if part is not NoneType))]  # noqa: UP045
    if origin is list:
        return typing.List[inner[0]]  # type: ignore[valid-type]  # noqa: UP006
    return kind
