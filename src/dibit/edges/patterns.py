"""The patterns of deferred tensors that Dibit computes with, without executing the gather."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dibit._torch.spellings import torch_functions
from dibit.edges.deferred import Deferred, PendingCall

PRODUCTS = torch_functions("mul")


def kind(x: Deferred) -> str:
    """What a deferred tensor is.

    Returns:
        "gather"; "scaled", that times a factor an edge; "product" or "sum" of two gathers; "leaky", the leaky ReLU of
        such a sum; "weighted", that times weights; "program", some other operations on each edge; empty if it has been
        made.
    """
    call = x.pending
    if call.value is not None:
        return ""
    if call.function is Tensor.index_select:
        return "gather"
    if call.program:
        return "program"
    found = [kind(part) for part in call.args if type(part) is Deferred]
    if found == ["gather", "gather"]:
        return "product" if call.function in PRODUCTS else "sum"
    return {"gather": "scaled", "sum": "leaky", "leaky": "weighted"}.get(found[0], "")


def is_ends(a: Any, b: Any) -> bool:
    """Whether both are gathers of heads by edges, and of one shape."""
    both = type(a) is Deferred and type(b) is Deferred and kind(a) == kind(b) == "gather"
    return both and a is not b and a.dim() > 2 and a.shape == b.shape


def is_weight(weight: Tensor, x: Deferred) -> bool:
    """Whether a factor is the same for all edges, and has all heads and features."""
    return weight.shape[-x.dim() + 1 :] == x.shape[1:] and weight.numel() == x.shape[1:].numel()


def one_column(index: Any, messages: Tensor) -> Any:
    """The index (E,) that was expanded to the shape of the messages; `None` if it is another one."""
    if type(index) is not Tensor or index.shape != messages.shape:
        return None
    expanded = all(stride == 0 or size == 1 for stride, size in zip(index.stride()[1:], index.shape[1:], strict=True))
    return index.as_strided(index.shape[:1], index.stride()[:1]) if expanded else None


def gather_and_scale(messages: Deferred) -> tuple[PendingCall, Tensor | None]:
    """The gather in a message that is a "gather" or "scaled", and its scale (E, ..., 1) or `None`."""
    call = messages.pending
    if call.function is Tensor.index_select:
        return call, None
    a, b = call.args
    return (a.pending, b) if type(a) is Deferred else (b.pending, a)


def sources(call: PendingCall) -> list[Tensor]:
    """The tensors that a call reads, also those that need no gradient."""
    found: list[Tensor] = []
    for x in call.args:
        if type(x) is Deferred:
            found += sources(x.pending)
        elif isinstance(x, Tensor):
            found.append(x)
    return found
