"""Gradients that a forward pass asks for itself: forces, energies that a layer minimises, gradient penalties.

They are part of what the model returns, so they must be exact. A tensor that is made to require a gradient within the
pass announces a request: all that follows stays exact, until the module ends in which it was made, if a gradient was
asked for there, else until the pass ends (later passes know if no request came). Every request is checked besides: it
is answered only if nothing compressed lies between what is differentiated and what it is differentiated by.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dibit._torch.private.autograd import function_of
from dibit._torch.user_objects import is_a, static

_FUNCTIONS = (torch.autograd.grad, torch.autograd.backward)
_DEEPEST = 4  # calls from a module's forward to the function that asks

ASKING = {*_FUNCTIONS, Tensor.backward}
_SETS = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_MAKING = {Tensor.requires_grad_, _SETS}


def makes_leaf(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call makes a tensor require a gradient: it will be differentiated by."""
    if func not in _MAKING:
        return bool(kwargs.get("requires_grad")) if kwargs else False
    if isinstance(args[0], nn.Parameter):
        return False
    return bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))


def asked(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor] | None]:
    """What a call of `ASKING` differentiates, and by what (`None`: every leaf)."""
    names = {
        torch.autograd.grad: ("outputs", "inputs"),
        torch.autograd.backward: ("tensors", "grad_tensors", "retain_graph", "create_graph", "_", "inputs"),
        Tensor.backward: ("tensors", "gradient", "retain_graph", "create_graph", "inputs"),
    }[func]
    given = dict(zip(names, args, strict=False)) | kwargs
    outputs = _tensors(given.get("outputs", given.get("tensors", given.get("self"))))
    inputs = given.get("inputs")
    return outputs, None if inputs is None else _tensors(inputs)


def compressed_between(outputs: Iterable[Tensor], inputs: Iterable[Tensor] | None) -> list[Any]:
    """Autograd's nodes of compressed operations that a gradient of the outputs by the inputs comes past."""
    ends = None if inputs is None else {torch.autograd.graph.get_gradient_edge(x).node for x in inputs}
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(x.grad_fn, False) for x in outputs if x.grad_fn is not None]
    while stack:  # children before parents
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    leads: set[Any] = set()  # nodes before which an input lies
    for node in order:
        if ends is None or any(child in ends or child in leads for child, _ in node.next_functions):
            leads.add(node)
    return [node for node in order if node in leads and _compressed(node)]


def modules(nodes: Iterable[Any]) -> list[str]:
    """The names of modules that keep something of these nodes compressed, as far as they tell."""
    found = {
        getattr(part, "module", "") for node in nodes for part, _ in getattr(node, "layout", ()) if part is not None
    }
    return sorted(found - {""})


def refusal(module: str, model: str, nodes: list[Any]) -> str:
    """The sentence for a request that cannot be answered exactly."""
    named = modules(nodes)
    those = (
        f"dibit.compress(model, {{{', '.join(f'{n!r}: None' for n in named)}, '*': 'default'}}), or " if named else ""
    )
    through = f"through {', '.join(map(repr, named))}" if named else "through operations"
    return (
        f"{module or model} asks in its forward pass for a gradient {through} whose activations are compressed, which "
        f"would make it wrong; leave what is differentiated exact: {those}the whole model: dibit.compress(model, None)."
    )


def asks(model: nn.Module) -> bool:
    """Whether the forward pass of some module may ask for a gradient, as far as its code tells."""
    kinds: dict[int, Any] = {id(type(module)): type(module) for module in model.modules()}
    return any(_class_asks(kind) for kind in kinds.values())


_known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _class_asks(kind: Any) -> bool:
    try:
        if kind not in _known:
            ours = not str(static(kind, "__module__")).startswith("torch.nn.")
            _known[kind] = ours and any(_asks(f, kind, 0, set()) for f in _functions(static(kind, "forward")))
        return _known[kind]
    except Exception:  # a metaclass of the user's own may raise anything; requests are checked besides
        return False


def _asks(function: FunctionType, kind: type, depth: int, seen: set[CodeType]) -> bool:
    code = function.__code__
    if code in seen:
        return False
    seen.add(code)
    names = set(_names(code))
    if "backward" in names or ("autograd" in names and names & {"grad", "functional"}):
        return True
    called = [function.__globals__.get(name) for name in names]
    if any(f is value for value in called for f in _FUNCTIONS):
        return True
    if depth == _DEEPEST:
        return False
    owners = [value for value in called if is_a(value, ModuleType) and not _torchs(static(value, "__name__"))]
    called += [static(owner, name) for owner in (kind, *owners) for name in names]
    own = [f for value in called for f in _functions(value) if not _torchs(f.__module__)]
    return any(_asks(f, kind, depth + 1, seen) for f in own)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions that run when this member of a class or module is called or read, none of them run now."""
    for _ in range(_DEEPEST):
        if is_a(value, (staticmethod, classmethod)):
            value = value.__func__
        elif is_a(value, (functools.partial, functools.partialmethod, functools.cached_property)):
            value = value.func
        elif is_a(value, property):
            value = value.fget
        elif is_a(value, FunctionType) and "__wrapped__" in vars(value):
            value = vars(value)["__wrapped__"]
        else:
            break
    if is_a(value, FunctionType):
        yield value


def _torchs(name: Any) -> bool:
    return is_a(name, str) and (name == "torch" or name.startswith("torch."))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _compressed(node: Any) -> bool:
    made_by = function_of(node)
    return made_by.__module__.startswith("dibit.") and made_by.__name__ != "ExactDropout"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for x in value or () if isinstance(x, Tensor)]
