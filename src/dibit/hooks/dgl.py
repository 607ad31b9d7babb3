"""DGL's functions on edges, made visible to a pass.

Their work is done in C++, out of sight of torch's function modes. DGL calls each by the `apply` of an autograd
function. `watch` puts a function in its place, once, that shows the call to the pass of this thread, where one runs;
then it is a function of torch like any other: it may have a rule, what it saves goes through Dibit's hooks, and the
tape can repeat it. A version of DGL that does not look as expected is left as it is.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from dibit._torch.private.modes import is_innermost
from dibit._torch.user_objects import is_a
from dibit.engine.forward_pass import ForwardPass
from dibit.hooks.function_mode import Intercept
from dibit.hooks.passes import running
from dibit.recompute.repeatable import repeatable
from dibit.rules import dgl, serve

_MODULE = "dgl.backend.pytorch.sparse"
# DGL's autograd functions, by the names that they get in the ledger, and what their forward passes take.
_SEEN = {
    "GSpMM": ("gspmm", "ctx gidx op reduce_op X Y"),
    "GSDDMM": ("gsddmm", "ctx gidx op X Y lhs_target rhs_target"),
    "EdgeSoftmax": ("edge_softmax", "ctx gidx score eids norm_by"),
    "SegmentReduce": ("segment_reduce", "ctx op x offsets"),
}
_watched: set[int] = set()  # identities of modules; they stay loaded


def watch() -> None:
    """Make DGL's functions visible, if it is loaded and its backend is torch."""
    module = sys.modules.get(_MODULE)
    if module is None or id(module) in _watched:
        return
    _watched.add(id(module))
    if not _expected(module):
        warnings.warn(
            f"dibit: this version of DGL ({getattr(sys.modules.get('dgl'), '__version__', 'unknown')}) is not as Dibit "
            "expects, so its functions on edges keep what they keep without Dibit; the rest of the model is "
            "compressed. Dibit was tested with DGL 1.1.3.",
            stacklevel=2,
        )
        return
    calls = {name: _watch(getattr(module, name), *_SEEN[name]) for name in _SEEN}
    serve(calls["GSpMM"], dgl.gspmm(module.GSpMM, calls["GSpMM"]), exact=True)
    serve(calls["GSDDMM"], dgl.gsddmm(module.GSDDMM), exact=False)
    repeatable({calls["GSDDMM"]}, set(), autocast=False, saves_result=False)
    repeatable({calls["EdgeSoftmax"]}, set(), autocast=False, saves_result=True)


def _watch(owner: Any, name: str, _: str) -> Callable[..., Any]:
    """Show calls of an autograd function to the running pass; returns the function that the pass sees."""
    plain = owner.apply

    def call(*args: Any) -> Any:
        active = running()
        if active is None or not isinstance(active.forward_pass, ForwardPass):
            return plain(*args)
        with active.forward_pass.writes.reading():
            return plain(*args)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is not owner:
            return super(owner, cls).apply(*args, **kwargs)
        active = running()
        if kwargs or active is None or not is_a(active.mode, Intercept) or not is_innermost(active.mode):
            return plain(*args, **kwargs)
        return handle_torch_function(call, [x for x in args if isinstance(x, Tensor)], *args)

    call.__name__ = call.__qualname__ = name
    owner.apply = classmethod(apply)
    return call


def _expected(module: ModuleType) -> bool:
    """Whether DGL's functions take what they are expected to, and run on a context that stands for autograd's."""
    try:
        for name, (_, names) in _SEEN.items():
            owner = getattr(module, name)
            if not issubclass(owner, torch.autograd.Function) or "apply" in vars(owner):
                return False
            if [*inspect.signature(owner.forward).parameters] != names.split():
                return False
        make = sys.modules["dgl.heterograph_index"].create_unitgraph_from_coo
        index = make(1, 3, 3, torch.tensor([0, 1, 0]), torch.tensor([1, 2, 2]), ["coo", "csr", "csc"])
        x, y = torch.tensor([[1.0, 2.0], [3.0, -1.0], [2.0, 5.0]]), torch.tensor([[2.0], [-3.0], [4.0]])
        calls: list[Any] = [
            (module.GSpMM, (index, op, how, x, y)) for op in ("mul", "add", "copy_lhs") for how in ("sum", "max")
        ]
        calls += [(module.GSDDMM, (index, op, x, x + 1, "u", "v")) for op in ("mul", "dot")]
        if not all(_alike(owner, args) for owner, args in calls):
            return False
        return all(_extreme(module.GSpMM, index, *case) for case in (("copy_lhs", "max", x), ("copy_rhs", "min", y)))
    except Exception:
        return False


def _alike(owner: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call gives on a context of Dibit's what it gives by autograd."""
    with torch.enable_grad():
        args = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in args)
        result = owner.apply(*args)
        grad = torch.arange(1.0, 1 + result.numel()).view(result.shape)
        result.backward(grad)
    with torch.no_grad():
        context = dgl.Context(tuple(isinstance(x, Tensor) for x in args))
        own = owner.forward(context, *args)
        grads = owner.backward(context, grad)
    expected = [x.grad if isinstance(x, Tensor) else None for x in args]
    return torch.equal(own, result) and all(
        a is b is None or torch.equal(torch.zeros_like(x) if a is None else a, torch.zeros_like(x) if b is None else b)
        for a, b, x in zip(expected, grads, args, strict=True)
    )


def _extreme(owner: Any, index: Any, op: str, how: str, x: Tensor) -> bool:
    """Whether the winners that Dibit keeps give DGL's gradient."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        result = owner.apply(index, op, how, *((x, None) if op == "copy_lhs" else (None, x)))
        grad = torch.arange(1.0, 1 + result.numel()).view(result.shape)
        result.backward(grad)
    with torch.no_grad():
        own, edge = dgl.extreme(owner, index, op, how, x)
        places = dgl.places_of(index, edge)
        found = dgl.gradient_of_extreme(index, op, x.shape, places, grad)
    return torch.equal(own, result) and x.grad is not None and torch.equal(found, x.grad)
