"""Programs on edges: operations that work on each edge alone. They are recorded until a reduction needs their result.

The message of an EdgeConv, Linear(ReLU(Linear(cat(x_i, x_j - x_i)))), and the edge update of a mesh network are such
programs. `dibit.edges.chunks` computes a program some thousand edges at a time. `extend` decides whether a call of
torch can be recorded: the rows of a chunk must have the same bits as in a computation of all edges at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.spellings import torch_functions
from dibit.codec.dispatch import has_kernel
from dibit.edges.deferred import Deferred, PendingCall
from dibit.rules.common import is_plain_float
from dibit.rules.elementwise import POINTWISE, Pointwise
from dibit.rules.registry import spellings

CHUNKS = 16  # aim for this many chunks, of a number of edges within these bounds
CHUNK, LARGEST = 1 << 13, 1 << 15  # on a CPU, where their tensors stay in the caches
CHUNK_ON_GPU, LARGEST_ON_GPU = 1 << 16, 1 << 17  # smaller ones would leave a GPU idle
MOST_CALLS = 200  # calls in one program; one that is used twice counts twice
_VECTOR = 32  # elements that torch's vectorised loops take at once; those left at the end may have other bits
_GRAIN = 1 << 15  # elements for which torch starts another thread (at::internal::GRAIN_SIZE)
_BINARY = torch_functions("add sub mul div")
_CAT = torch_functions("cat")
# Every element-wise function whose rule keeps a derivative, and what its rule says of it.
_SMOOTH: dict[Any, Pointwise] = {
    function: f for name, f in POINTWISE.items() for function, adapter in spellings(name).items() if adapter is None
}
# Others, and their arguments after the first.
_LINEAR_IN_PARTS: dict[Any, tuple[str, ...]] = dict.fromkeys(torch_functions("relu"), ("inplace",))
_LINEAR_IN_PARTS |= dict.fromkeys(torch_functions("leaky_relu"), ("negative_slope", "inplace"))
_LINEAR_IN_PARTS |= dict.fromkeys(torch_functions("neg"), ())
_PRELU = torch_functions("prelu")
_NORM = "normalized_shape", "weight", "bias", "eps"


def concatenate(*parts: Tensor) -> Tensor:
    """Rows of several tensors, side by side."""
    return torch.cat(parts, -1)


def extend(function: Any, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...], tuple[int, ...]] | None:
    """A call of torch as part of a program: its function, its arguments by position, the shape (E, D) of its result.

    `None` if it cannot be part of one: it does not work on each edge alone, or a chunk's rows might have other bits.
    """
    if function in _CAT:
        return _cat(*args, **kwargs)
    edges = _edges(args)
    if edges is None:
        return None
    if function in _BINARY and len(args) == 2 and not kwargs:
        shape = tuple(torch.broadcast_shapes(*(x.shape if isinstance(x, Tensor) else () for x in args)))
        return (function, args, shape) if len(shape) == 2 and shape[0] == edges else None
    x = args[0]
    if type(x) is not Deferred:
        return None
    if function in _LINEAR_IN_PARTS:
        given = _given(_LINEAR_IN_PARTS[function], args, kwargs)
        return (
            None if given is None or given.pop("inplace", False) else (function, (x, *given.values()), tuple(x.shape))
        )
    if function in _SMOOTH:
        options = _options(_SMOOTH[function], function, args[1:], kwargs)
        if options is None or (_depends_on_vectors(function, x) and not in_whole_vectors(x.numel())):
            return None
        return function, (x, *options), tuple(x.shape)
    if function in _PRELU:
        given = _given(("weight",), args, kwargs)
        if not given or not _are_parameters(weight := given["weight"]) or weight.numel() not in (1, x.shape[1]):
            return None
        return function, (x, weight), tuple(x.shape)
    if function is F.linear:
        given = _given(("weight", "bias"), args, kwargs)
        if given is None or not _are_parameters(weight := given.get("weight"), bias := given.get("bias")):
            return None
        if weight is None or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
            return None
        if not _rows_alike(weight.shape[0], weight.shape[1], bias is not None, x.device):
            return None
        return function, (x, weight, bias), (edges, weight.shape[0])
    if function is F.layer_norm:
        given = _given(_NORM, args, kwargs)
        if given is None or not _are_parameters(given.get("weight"), given.get("bias")):
            return None
        if list(given["normalized_shape"]) != [x.shape[1]]:
            return None
        more = [x.shape[1]], given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
        return function, (x, *more), tuple(x.shape)
    return None


def _given(names: tuple[str, ...], args: Any, kwargs: Any) -> dict[str, Any] | None:
    """The arguments after the first by their names, in the order of these; `None` where there are others."""
    found = dict(zip(names, args[1:], strict=False)) | kwargs
    if len(args) > 1 + len(names) or set(found) - set(names):
        return None
    return {name: found[name] for name in names if name in found}


def _options(f: Pointwise, function: Any, args: Any, kwargs: Any) -> list[Any] | None:
    """The arguments after the first, by position, without defaults at the end; `None` where that cannot be."""
    found = f.arguments(args, kwargs)
    if found is None or found[1]:
        return None
    options, defaults = found[0], list(f.options.values())
    while options and options[-1] == defaults[len(options) - 1]:
        options.pop()
    by_position = isinstance(function, FunctionType) or len(options) <= len(args)
    return options if by_position else None  # torch's own functions may take some by name alone


def _are_parameters(*tensors: Any) -> bool:
    return all(x is None or is_plain_float(x) for x in tensors)


def _cat(tensors: Any = None, dim: Any = 0, **more: Any) -> Any:
    edges = _edges(tensors) if type(tensors) in (tuple, list) else None
    if edges is None or more or dim not in (-1, 1):
        return None
    if not all(isinstance(x, Tensor) and x.dim() == 2 and x.shape[0] == edges for x in tensors):
        return None
    return concatenate, tuple(tensors), (edges, sum(x.shape[1] for x in tensors))


def _edges(args: Iterable[Any]) -> int | None:
    """The number of edges, where all tensors are float32 of two dimensions at the most, and one is deferred."""
    found = None
    for x in args:
        if isinstance(x, Tensor):
            if x.dim() > 2 or x.dtype != torch.float32 or not (type(x) is Deferred or is_plain_float(x)):
                return None
            if type(x) is Deferred:
                found = x.shape[0] if x.dim() == 2 else None
                if found is None:
                    return None
    return found


def is_of_edges(call: PendingCall, x: Any, edges: int) -> bool:
    """Whether an argument has a row for each edge, not the same for all of them."""
    rows = call.function is concatenate or call.function in _BINARY
    return rows and isinstance(x, Tensor) and x.dim() == 2 and x.shape[0] == edges


def calls(call: PendingCall) -> Iterator[PendingCall]:
    """All calls of a program that have not been made, each once."""
    return _walk(call, lambda one: False)


def used(call: PendingCall) -> list[PendingCall]:
    """The calls of a program whose result was computed before and not kept, without those that lead to these."""
    return [one for one in _walk(call, lambda one: one.used) if one.used]


def _walk(call: PendingCall, ends: Callable[[PendingCall], bool]) -> Iterator[PendingCall]:
    seen: set[int] = set()
    waiting = [call]
    while waiting:
        if id(one := waiting.pop()) not in seen and one.value is None:
            seen.add(id(one))
            yield one
            waiting += [] if ends(one) else [x.pending for x in one.args if type(x) is Deferred]


def in_whole_vectors(elements: int) -> bool:
    """Whether each of torch's threads works on whole vectors of a contiguous tensor with so many elements."""
    threads = max(1, min(torch.get_num_threads(), -(-elements // _GRAIN)))
    return elements % _VECTOR == 0 and -(-elements // threads) % _VECTOR == 0


def padding(rows: int, widths: Iterable[int]) -> int:
    """How many rows to add to so many, so that rows of each of these widths fill whole vectors."""
    widths = [*widths]
    return next(more for more in itertools.count() if all(in_whole_vectors((rows + more) * width) for width in widths))


def in_vectors(call: PendingCall) -> bool:
    """Whether the bits of this operation depend on where vectors begin."""
    return call.function in _SMOOTH and _depends_on_vectors(call.function, call.args[0])


def _depends_on_vectors(function: Any, x: Tensor) -> bool:
    # on a GPU each thread computes its elements by the same code, wherever they lie
    return x.device.type == "cpu" and _SMOOTH[function].in_vectors


def run_on(device: torch.device) -> bool:
    """Whether programs are computed in chunks on this device: on CPUs, and on GPUs that Triton's kernels serve."""
    return device.type == "cpu" or (device.type == "cuda" and has_kernel("cuda", "edge_winners"))


def chunk_bounds(device: torch.device) -> tuple[int, int]:
    """About how many edges a chunk has on this device, at least and at most."""
    return (CHUNK, LARGEST) if device.type == "cpu" else (CHUNK_ON_GPU, LARGEST_ON_GPU)


def _rows_alike(outputs: int, inputs: int, bias: bool, device: torch.device) -> bool:
    try:
        return linear_by_rows(outputs, inputs, bias, device, product_settings(device))
    except torch.OutOfMemoryError:  # the model itself may still have room
        return False


def product_settings(device: torch.device) -> tuple[Any, ...]:
    """What decides, beside their sizes, how torch multiplies matrices on this device."""
    if device.type == "cpu":
        return (torch.get_num_threads(),)
    matmul = torch.backends.cuda.matmul
    own = getattr(matmul, "fp32_precision", None)  # torch 2.9; the older flag then refuses some settings
    general = getattr(torch.backends, "fp32_precision", None)
    library, fixed = torch.backends.cuda.preferred_blas_library(), torch.are_deterministic_algorithms_enabled()
    return own or matmul.allow_tf32, general, library, fixed


@functools.cache
def linear_by_rows(outputs: int, inputs: int, bias: bool, device: torch.device, settings: tuple[Any, ...]) -> bool:
    """Whether torch's linear layer, on this device, gives a row the same bits among few rows as among many.

    Args:
        settings: what else decides how torch multiplies there; it is tried once for each.
    """
    generator = torch.Generator(device).manual_seed(0)
    least, most = chunk_bounds(device)
    sizes = most, least, 8 * (least // 9) + 1, least // 2 + 77
    x = torch.randn(sum(sizes) + 397, inputs, generator=generator, device=device)
    weight = torch.randn(outputs, inputs, generator=generator, device=device)
    b = torch.randn(outputs, generator=generator, device=device) if bias else None
    y, order = F.linear(x, weight, b), torch.randperm(len(x), generator=generator, device=device)
    at = 0
    for rows in sizes:
        part = order[at : at + rows]
        if not torch.equal(F.linear(x.index_select(0, part), weight, b), y.index_select(0, part)):
            return False
        at += rows
    return True
