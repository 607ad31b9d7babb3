"""Autograd: hooks for what it saves, its nodes, the backward pass that runs, and transforms that go their own way."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks

from dibit._torch.private.registry import find

# -- hooks for saved tensors --------------------------------------------------------------------------------------


def _push_hooks(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
    saved_tensors_hooks(pack, unpack).__enter__()


def _pop_hooks() -> None:
    saved_tensors_hooks(_same, _same).__exit__()


def _same(x: Any) -> Any:
    return x


def _none(_: Any) -> None:
    return None


def _noted(push: Any, pop: Any) -> tuple[Any, Any, Any]:
    """`push_hooks`, `pop_hooks` and `top_hooks`: what Python sets is noted on its way, as torch cannot be asked."""
    local = threading.local()

    def noted_push(pack: Any, unpack: Any) -> None:
        push(pack, unpack)
        local.hooks = [*getattr(local, "hooks", ()), (pack, unpack)]

    def noted_pop() -> None:
        pop()
        local.hooks = getattr(local, "hooks", [])[:-1]

    owner: Any = torch._C._autograd
    owner._push_saved_tensors_default_hooks, owner._pop_saved_tensors_default_hooks = noted_push, noted_pop
    return noted_push, noted_pop, lambda: (getattr(local, "hooks", None) or [None])[-1]


def _refusal() -> str | None:
    try:
        push_hooks(_same, _same)
    except RuntimeError as error:
        return str(error)
    pop_hooks()
    return None


_autograd = "torch._C._autograd."
_push = find(_autograd + "_push_saved_tensors_default_hooks", "set hooks for saved tensors")
_pop = find(_autograd + "_pop_saved_tensors_default_hooks", "take hooks for saved tensors away")
_top = find(
    _autograd + "_top_saved_tensors_default_hooks",
    "see somebody else's hooks for saved tensors",
    "hooks for saved tensors that are not set in Python are not seen",
    needed=None in (_push, _pop),
    since="2.8",
)
# Set saved-tensor hooks (pack, unpack); take the innermost away; those of this thread, or `None`.
push_hooks, pop_hooks, top_hooks = _push or _push_hooks, _pop or _pop_hooks, functools.partial(_top or _none, True)
if _top is None and None not in (_push, _pop):
    push_hooks, pop_hooks, top_hooks = _noted(_push, _pop)
# Why no hooks can be set now, `None` where they can be.
hooks_refused: Any = (
    find(_autograd + "_saved_tensors_hooks_get_disabled_error_message", "see that hooks are forbidden", "time")
    or _refusal
)

# -- the backward pass that runs ----------------------------------------------------------------------------------

_task = find("torch._C._current_graph_task_id", "tell backward passes apart", needed=True)
# The number of the backward pass that runs in this thread, -1 outside of one.
backward_pass: Any = _task if _task is not None else lambda: -1
_keep_graph = find(
    _autograd + "_get_current_graph_task_keep_graph",
    "see whether a backward pass leaves the graph for another one",
    "memory: what is kept lives as long as the graph, not until the backward pass has used it",
)
# Whether the backward pass that runs leaves what was saved for another one.
keeps_graph: Any = _keep_graph if _keep_graph is not None else lambda: True

# -- nodes --------------------------------------------------------------------------------------------------------


def _node() -> Any:
    """Of a softmax."""
    with torch.inference_mode(False), torch.enable_grad():
        return torch.ones(1, requires_grad=True).softmax(0).grad_fn


find(
    "torch.autograd.graph.Node._sequence_nr",
    "order the nodes of the graph by time",
    needed=True,
    look=lambda: _node()._sequence_nr,
)


def sequence_number(node: Any) -> int:
    """Of a node of autograd's graph: nodes that this thread makes later have higher ones."""
    return node._sequence_nr()  # type: ignore[no-any-return]


def _next_sequence_number() -> int:
    return 1 + sequence_number(_node())


_next = find(_autograd + "_get_sequence_nr", "know which nodes of the graph a pass has made", "time")
next_sequence_number: Any = _next_sequence_number if _next is None else _next  # of the node that is made next

_named = find(
    "torch.autograd.graph.Node.name",
    "see which operation of torch a node of the graph is",
    "memory: rows that the loss cannot reach are kept; and, on a GPU, accuracy where softmaxes are multiplied",
    look=lambda: _node().name() == "SoftmaxBackward0" or None,
)


def operation_of(node: Any) -> str:
    """The operation of torch that made a node, such as "Softmax" or "Add"; another word where it was something else.

    Empty where this version of torch has other names.
    """
    return type(node).__name__.removesuffix("Backward0") if _named else ""


_forward_cls = find(
    "torch.autograd.Function._backward_cls._forward_cls",
    "find compressed operations in the graph",
    "a model that asks for gradients in its forward pass, past an operation of its own that is named like one of "
    "Dibit's, is refused",
)


def function_of(node: Any) -> Any:
    """The `torch.autograd.Function` that made a node; `object` where torch itself did."""
    if _forward_cls is not None:
        return getattr(type(node), "_forward_cls", object)
    name = type(node).__name__ if isinstance(node, FunctionCtx) else ""
    named = [kind for kind in torch.autograd.Function.__subclasses__() if f"{kind.__name__}Backward" == name]
    return max(named, key=lambda kind: kind.__module__.startswith("dibit."), default=object)


_saved_dim = find(
    "torch.autograd.graph.Node._saved_dim",
    "see that a softmax works row by row",
    "memory: rows that the loss cannot reach are kept before a softmax",
    look=lambda: _node()._saved_dim,
)


def saved_dim(node: Any) -> int | None:
    """The dimension of a softmax, as its node has it; `None` where torch does not tell."""
    return None if _saved_dim is None else getattr(node, "_saved_dim", None)


# -- transforms ---------------------------------------------------------------------------------------------------

_interpreters = find("torch._C._functorch.peek_interpreter_stack", "leave transforms of torch.func alone", needed=True)
_level = find("torch.autograd.forward_ad._current_level", "leave forward-mode differentiation alone", needed=True)

if _interpreters is not None and _level is not None:

    def transformed() -> bool:
        """Inside a transform of `torch.func`, or of forward-mode differentiation."""
        return _interpreters() is not None or forward_ad._current_level >= 0

else:

    def transformed() -> bool:
        return False
