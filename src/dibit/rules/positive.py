"""The codec for factors that are positive and have a wide range: softmaxes, exponentials, gates.

A product of two such factors usually meets a logarithm or a reciprocal (a mixture, a product of experts). There the
smallest elements of each factor count as much as the largest, so their levels are in geometric progression. A ReLU's
result does not qualify: its elements lie about evenly between 0 and the largest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from dibit._torch.private.autograd import operation_of
from dibit._torch.spellings import torch_functions
from dibit.config import Config
from dibit.engine.forward_pass import ForwardPass
from dibit.recompute.nodes import Node
from dibit.recompute.recorder import Tape
from dibit.rules.common import running_config
from dibit.rules.registry import OPERATIONS, spellings
from dibit.rules.relative import full_range_levels, geometric, octaves_of, relative

_SELECTED = torch_functions(
    "view reshape unsqueeze squeeze expand transpose permute t flatten contiguous narrow select __getitem__ "
    "index_select"
)
_PRODUCTS = torch_functions("mul div", in_place=True)
_LOOKS: ContextVar[bool] = ContextVar("_LOOKS", default=True)
_DEEPEST = 8
_NARROW = 2.0**3  # of such a range the linear levels of 4 bits are good enough
_WIDE = 2.0**8
_RARE = 32  # one in so many elements below the `_WIDE`th part of the largest: a ReLU has fewer


def codec(forward: ForwardPass, x: Tensor, by: Tensor, both: bool) -> Config | None:
    """Relative levels for a factor x that is multiplied by another, if both are positive and x has a wide range.

    On the CPU the numbers themselves decide. That would wait for a GPU: there the tape shows how they came about.

    Args:
        both: `by` must have a wide range, too.
    """
    config = running_config(forward)
    if not x.numel() or not by.numel():
        return None
    if x.device.type != "cpu" or not _LOOKS.get():
        certain = all(_positive(forward.lossless.tape, forward.holdings.origin(part)) for part in (x, by))
        return relative(config, full_range_levels()) if certain else None
    octaves = _octaves(x.detach())
    if octaves is None or (_octaves(by.detach()) is None if both else not bool(by.detach().amin() >= 0)):
        return None
    return relative(config, geometric(octaves_of(octaves)))


@contextmanager
def without_looking() -> Iterator[None]:
    """Forward passes within it ask the tape on a CPU, too, as they do on a GPU."""
    token = _LOOKS.set(False)
    try:
        yield
    finally:
        _LOOKS.reset(token)


def _octaves(x: Tensor) -> float | None:
    """The range of x, if it is wide and positive."""
    low, high = (float(end) for end in x.aminmax())
    if not (0 <= low < math.inf and low * _NARROW < high < math.inf):
        return None
    least = low
    if not low or int((x == low).sum()) * _RARE > x.numel():  # zeros, or what a clamp has made of them
        above = x > low
        if int((above & (x < high / _WIDE)).sum()) * _RARE < x.numel():
            return None
        least = low or float(x[above].amin())
    return math.log2(high) - math.log2(least)


def _positive(tape: Tape, x: Tensor) -> bool:
    """Whether x is known to be positive, and of a wide range, by how it came about."""
    node = tape.nodes.get(tape.key(x))
    return _by_softmax(x) if node is None else _made(node, 0)


def _made(node: Any, depth: int) -> bool:
    if not isinstance(node, Node):
        return isinstance(node, int | float) and node > 0
    if node.call is None:
        return (x := node.ref()) is not None and _by_softmax(x)
    function, args = node.call[0], (*node.call[1], *node.call[2].values())
    if function in _makers():
        return True
    if depth == _DEEPEST or not args or not (function in _PRODUCTS or function in _SELECTED):
        return False
    return all(_made(part, depth + 1) for part in (args if function in _PRODUCTS else args[:1]))


@functools.cache
def _makers() -> frozenset[Any]:
    """The functions whose rules say so."""
    return frozenset(f for name, operation in OPERATIONS.items() if operation.positive for f in spellings(name))


def _by_softmax(x: Tensor) -> bool:
    """Autograd knows what the tape does not."""
    return operation_of(x.grad_fn) == "Softmax"
