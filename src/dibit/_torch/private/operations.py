"""Operations of torch, what they save, and tools around them."""

from __future__ import annotations

import io
import json
import pickle
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import (
    BuiltinFunctionType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.private.registry import enter, find

_functions = find(
    "torch._C._VariableFunctions",
    "see the function that PyTorch Geometric's wrapper of torch.index_select calls",
    "memory: what index_select has gathered is kept where PyTorch Geometric wraps it",
)
VARIABLE_FUNCTIONS: Any = torch if _functions is None else _functions  # the functions of torch, before any wrapper

_COPIED = "memory: what torch.ops operators read is copied, as if they wrote to it"
_operator = find("torch._ops.OpOverloadPacket", "tell an operator of torch.ops from a function", _COPIED)
_overload = find("torch._ops.OpOverload", "tell one signature of an operator from a function", _COPIED)
_schema = find(
    "torch._ops.OpOverload._schema",
    "see which arguments an operator writes to",
    _COPIED,
    look=lambda: torch.ops.aten.add.Tensor._schema,
)
_OPERATORS = (_operator, _overload) if None not in (_operator, _overload) else ()
_FUNCTIONS = (
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)


def is_operator(function: Any) -> bool:
    """Whether this is an operator of `torch.ops`; of what torch does not tell apart, all that is no plain function."""
    return isinstance(function, _OPERATORS) if _OPERATORS else not isinstance(function, _FUNCTIONS)


def writes_to(operator: Any, args: Any) -> list[Any]:
    """The arguments that an operator says it writes to; all of them where torch does not tell."""
    if not _OPERATORS or _schema is None:
        return list(args)
    names = None if isinstance(operator, _overload) else operator.overloads()
    overloads = [operator] if names is None else [getattr(operator, name) for name in names]
    declared = (each for overload in overloads for each in zip(overload._schema.arguments, args, strict=False))
    return [value for argument, value in declared if argument.alias_info is not None and argument.alias_info.is_write]


_assert_async = find(
    "torch._assert_async", "check on a device that a tensor has not changed", "time: the device is waited for"
)


def assert_true(condition: Tensor, message: str) -> None:
    """Raise a RuntimeError where a bool 0-d tensor is false, without waiting for its device if torch can."""
    if _assert_async is not None:
        _assert_async(condition, message)
    elif not condition:
        raise RuntimeError(message)


_AGAIN = "time: they are computed again"
_batch_norm = find("torch._batch_norm_impl_index", "get the statistics of a BatchNorm", _AGAIN)
_compiled_batch_norm = find("torch.native_batch_norm", "get the statistics of a BatchNorm in compiled code", _AGAIN)
_layer_norm = find("torch.native_layer_norm", "get the statistics of a LayerNorm", _AGAIN)


def batch_norm(
    x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's BatchNorm of x (N, D, ...), and the mean and inverse standard deviation (D,) of its batch."""
    if _batch_norm is not None:
        settings = weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled
        y, mean, inverse, *_ = _batch_norm(x, *settings)
        return y, mean, inverse
    statistics = _statistics(x, [d for d in range(x.dim()) if d != 1], eps)
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps), *statistics


def compiled_batch_norm(
    x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in training, in a form that the compiler can trace."""
    if _compiled_batch_norm is not None:
        return _compiled_batch_norm(  # type: ignore[no-any-return]
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
    statistics = _statistics(x, [d for d in range(x.dim()) if d != 1], eps)
    return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps), *statistics


def layer_norm(x: Tensor, shape: list[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """torch's LayerNorm of x (..., *shape), and the mean and inverse standard deviation (..., 1, ...) of each row."""
    if _layer_norm is not None:
        return _layer_norm(x, shape, weight, bias, eps)  # type: ignore[no-any-return]
    statistics = _statistics(x, [-1 - i for i in range(len(shape))], eps, keepdim=True)
    return F.layer_norm(x, shape, weight, bias, eps), *statistics


def _statistics(x: Tensor, dims: list[int], eps: float, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation over these dimensions, in single precision at least."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    var, mean = torch.var_mean(wide, dims, correction=0, keepdim=keepdim)
    return mean, torch.rsqrt(var + eps)


_batch_norm_into = find(
    "torch.ops.aten.native_batch_norm.out",
    "write the result of a BatchNorm into a buffer of large pages",
    "time: page faults in large results of a BatchNorm",
)
WRITES_BATCH_NORM = _batch_norm_into is not None  # whether there is `batch_norm_into`


def batch_norm_into(y: Tensor, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm` of a contiguous x (N, D) in training, on the CPU, written into y."""
    mean, inverse = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    _batch_norm_into(x, *settings, out=y, save_mean=mean, save_invstd=inverse)
    return y, mean, inverse


_dropout = find(
    "torch.native_dropout",
    "see the mask of torch's dropout on a GPU and in compiled code",
    "memory: there, masks of torch's dropout are kept as torch keeps them",
)
SHOWS_MASK = _dropout is not None  # whether there is `dropout`


def dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """torch's dropout in training, and its mask, bool, set where an element stays."""
    return _dropout(x, p, True)  # type: ignore[no-any-return]


_winners = find(
    "torch._C._functions.SparseMmReduceImplBackward0._saved_result1",
    "keep which neighbour has won a max or min",
    "memory: max and min by torch.sparse.mm are kept as torch keeps them",
)
SAVES_WINNERS = _winners is not None  # whether `winners` can tell


def winners(y: Tensor) -> Tensor:
    """Which stored element each result of a max or min by `torch.sparse.mm` is, int64 of the shape of y."""
    return y.grad_fn._saved_result1  # type: ignore[union-attr,no-any-return]


# -- tools --------------------------------------------------------------------------------------------------------

_reader = enter(
    "torch._C.PyTorchFileReader",
    "look into a data set saved by torch before torch.load reads it",
    "data sets in torch's own format, which are not read unchecked",
    tool=True,
)
_kineto = enter(
    "torch._C._autograd._KinetoEvent.nbytes",
    "read allocations from torch's profiler",
    "time: they are read from a file",
    tool=True,
)
_unpickler = enter(
    "pickle._Unpickler",
    "read a pickle in Python, without running what lies in it",
    "data sets that hold pickles, which are not read unchecked",
    tool=True,
)
_cache = enter(
    "numba.core.dispatcher.Dispatcher.stats",
    "say that kernels are compiled, before the first time",
    "that sentence, and the folder of kernels in dibit doctor",
    tool=True,
)


class _NoUnpickler:
    """In the place of Python's, where there is none."""

    dispatch: Mapping[int, Any] = {}

    def __init__(self, *_: Any, **__: Any) -> None:
        raise pickle.UnpicklingError(f"Python {platform.python_version()} cannot read a pickle without running it")


def python_unpickler() -> Any:
    """Python's `pickle.Unpickler` as a class in Python, whose opcodes are methods that can be replaced."""
    return _unpickler.value or _NoUnpickler


def archived(content: bytes, record: str) -> bytes | None:
    """A record of a file that `torch.save` has written; `None` where this version of torch cannot look into it."""
    return _reader.value(io.BytesIO(content)).get_record(record) if _reader.found else None


def allocations(profile: Any) -> list[int]:
    """Bytes that were allocated (freed: negative) on the CPU, in order of time, under a `torch.profiler.profile`."""
    results = getattr(profile.profiler, "kineto_results", None) if _kineto.found else None
    if results is None:
        changes = _exported(profile)
    else:
        changes = [
            (event.start_ns(), event.nbytes())
            for event in results.events()
            if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
        ]
    changes.sort(key=lambda change: change[0])  # stable: events of the same nanosecond keep their order
    return [change for _, change in changes]


def _exported(profile: Any) -> list[tuple[float, int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [event for event in events if event.get("name") == "[memory]"]
    return [(event["ts"], event["args"]["Bytes"]) for event in found if event["args"]["Device Type"] == 0]


def kernel_cache(kernel: Any) -> Path | None:
    """The folder in which Numba keeps a compiled kernel; `None` where this version of Numba does not tell."""
    path = getattr(kernel.stats, "cache_path", None) if _cache.found else None
    return None if path is None else Path(path)
