"""Which kernels run an operator of the codec: those of the backend for the device that its tensors lie on.

A backend is a module (or any object) with a function for each operator that it has a kernel for, of the operator's
name and with its arguments, in their order. There is one for a type of device, as torch names it ("cpu", "cuda",
"xpu"), and it is loaded when the first tensor of that type arrives. Operators that it lacks, and devices without a
backend, run the definition in plain torch, `dibit.codec.backends.reference`.

A package brings a backend of its own by an entry point in the group "dibit.backends", named after the type of device:

    [project.entry-points."dibit.backends"]
    xpu = "my_package.kernels"

It serves in the place of Dibit's own backend, where there is one for that type. Its kernels must give the definition's
codes bit for bit; `dibit.codec.backends` says how they are written and tested.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any, ParamSpec, TypeVar

import torch
from torch.library import CustomOpDef, custom_op

from dibit._torch.signatures import with_typing
from dibit.codec.backends import reference

GROUP = "dibit.backends"
# By type of device: the module, the package that compiles its kernels, and what a sentence calls the device.
_OWN = {
    "cpu": ("dibit.codec.backends.cpu", "numba", "the CPU"),
    "cuda": ("dibit.codec.backends.triton", "triton", "the GPU"),
}

_instead: dict[str, Any] = {}  # backends that `using_backend` has put in the place of others

P = ParamSpec("P")
R = TypeVar("R")


def served(definition: Callable[..., R]) -> Callable[..., R]:
    """The function that runs a definition's kernel on the device of its first argument, without being torch's operator.

    Args:
        definition: see `dibit.codec.backends.reference`.
    """
    name = definition.__name__

    @functools.wraps(definition)
    def run(*args: Any) -> R:
        device = args[0].device.type
        return getattr(_instead.get(device) or backend(device), name, definition)(*args)  # type: ignore[no-any-return]

    return run


def operator(definition: Callable[..., Any], writes: str = "") -> CustomOpDef:
    """The operator `dibit::NAME`, with the name and the schema of its definition, and a kernel for each device.

    Args:
        definition: see `dibit.codec.backends.reference`.
        writes: the argument that it writes to, if there is one.
    """
    function = with_typing(served(definition), definition)
    return custom_op(f"dibit::{definition.__name__}", function, mutates_args=(writes,) if writes else ())


@functools.cache
def backend(device: str) -> Any:
    """What has the kernels for a type of device.

    Raises:
        RuntimeError: more than one package offers a backend for it.
    """
    offered = list(entry_points(group=GROUP, name=device))
    if len(offered) > 1:
        names = " and ".join(f"{one.dist.name if one.dist else 'unknown'} ({one.value})" for one in offered)
        raise RuntimeError(
            f"{len(offered)} packages offer a backend for {device!r} tensors in the entry-point group {GROUP!r}: "
            f"{names}; uninstall all but one."
        )
    if offered:
        return offered[0].load()
    if device not in _OWN:
        return reference
    module, compiler, called = _OWN[device]
    if importlib.util.find_spec(compiler) is None:
        warnings.warn(
            f"dibit: {compiler} is not installed, so {called} runs the plain-torch codec, which is slower; "
            f"'pip install {compiler}'.",
            stacklevel=3,
        )
        return reference
    return importlib.import_module(module)


@contextmanager
def using_backend(device: str, kernels: Any) -> Iterator[None]:
    """Within it, another backend serves a type of device, in all threads: to compare backends with one another."""
    before = _instead.get(device)
    _instead[device] = kernels
    try:
        yield
    finally:
        if before is None:
            del _instead[device]
        else:
            _instead[device] = before


def serving(device: str) -> Any:
    """The backend that serves a type of device now; see `backend` for errors."""
    return _instead.get(device) or backend(device)


def has_kernel(device: str, name: str) -> bool:
    """Whether the backend that serves a type of device has a kernel of its own for the operator of this name."""
    found = serving(device)
    return found is not reference and hasattr(found, name)


def kernel(**served: torch.dtype | tuple[torch.dtype, ...]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a backend's function of an operator: the definition runs in its place for what it does not serve.

        @kernel(x=torch.float32)
        def dropout(x, seed, p): ...

    Args:
        served: by the name of an argument, the dtypes for which the function serves. The argument is a tensor, a dtype,
            or `None`, which is always served.

    The decorated function takes its arguments by position. For what depends on more than dtypes it may return
    `NotImplemented`.

    Raises:
        TypeError: there is no such operator, or it has no such argument.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        called = function.__name__
        definition: Callable[P, R] | None = getattr(reference, called, None)
        if definition is None:
            raise TypeError(f"{called} is no operator of the codec; dibit.codec.ops has them.")
        places = list(inspect.signature(definition).parameters)
        for name in served:
            if name not in places:
                raise TypeError(f"the operator {called} has no argument {name!r}; it has {', '.join(places)}.")
        wanted = [(places.index(name), own if isinstance(own, tuple) else (own,)) for name, own in served.items()]

        @functools.wraps(function)
        def serve(*args: P.args, **kwargs: P.kwargs) -> R:
            for place, dtypes in wanted:
                given: Any = args[place]
                if given is not None and getattr(given, "dtype", given) not in dtypes:
                    return definition(*args, **kwargs)
            found = function(*args, **kwargs)
            return definition(*args, **kwargs) if found is NotImplemented else found

        return serve

    return decorate
