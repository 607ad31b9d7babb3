"""What a compiler traces: the value that a tensor has at a point of a trace, and operators that are traced through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dibit._torch.private.registry import find

_Functional = find(
    "torch._subclasses.functional_tensor.FunctionalTensor",
    "see in a compiler's trace whether a tensor was written to",
    "time and memory: compiled models gather node features by edges",
)
_operators = torch.library.Library("dibit", "FRAGMENT")


def traced_value(x: Tensor) -> Tensor | None:
    """The value that x has at this point of a trace without writes: the same object until x is written to.

    Returns:
        `None` where nothing is traced, or by somebody who leaves writes in the trace.
    """
    if _Functional is None or not issubclass(type(x), _Functional):
        return None
    return x.from_functional()  # type: ignore[attr-defined,no-any-return]


def traced_through(schema: str, function: Callable[..., Any]) -> Any:
    """An operator `dibit::NAME` that a model's graph shows as a whole, and of which a compiler sees the inside.

    The function runs when the graph is traced again, below Dynamo and above autograd.

    Args:
        schema: name, arguments and results.
        function: what it does, in functions of torch.
    """
    name = schema.partition("(")[0]
    _operators.define(schema)
    _operators.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.dibit, name).default
