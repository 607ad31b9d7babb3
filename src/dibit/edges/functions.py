"""Operations on a deferred gather, x[source], whose shape is known but whose elements are not yet computed.

A model that sums over neighbours gathers x[source], perhaps multiplies it by a weight for each edge, and adds the rows
to those of their targets. `Edges` sees the three calls and computes the sum from x alone. Operations on each edge, such
as the network of an EdgeConv, are recorded until their result is reduced, chunk by chunk. Any other operation on
x[source] executes the gather and goes on as in plain torch.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dibit._torch.autocast import autocast_on
from dibit._torch.huge_pages import MIN_BYTES, empty
from dibit._torch.private.tensors import DEFERS, TensorWeakRef, natively
from dibit._torch.spellings import torch_functions
from dibit._torch.storage_identity import storage_key
from dibit.codec.dispatch import serving
from dibit.codec.seed_stream import capturing
from dibit.edges import programs
from dibit.edges.deferred import (
    ASKS_GRADIENT,
    METADATA,
    Deferred,
    GradientPath,
    PendingCall,
    Run,
    defer,
    first_deferred,
    materialized,
    watch,
)
from dibit.edges.patterns import PRODUCTS, is_ends, is_weight, kind, one_column, sources
from dibit.edges.programs import MOST_CALLS, concatenate, extend
from dibit.edges.reductions import Reductions
from dibit.engine.forward_pass import ForwardPass
from dibit.recompute.repeatable import LIKE, SIZES_ONLY
from dibit.rules.common import is_plain_float

MIN_DEFERRED_ELEMENTS = 1 << 16  # elements of a gather: a smaller one is made at once
WIDE = 8  # elements a row below which the index weighs as much as the row
_GATHERS = torch_functions("index_select")
_GATHERS_EACH = torch_functions("gather")
_SUMS = torch_functions("add")
_TOTALS = torch_functions("sum")
_PLAIN = (Tensor, torch.nn.Parameter)
_LEAKY = torch_functions("leaky_relu")
_SCATTERS = torch_functions("scatter_add", in_place=True)
_ADDS = torch_functions("index_add", in_place=True)
EXTREMES = torch_functions("scatter_reduce", in_place=True)


class Edges:
    """Handles operations on a deferred gather: records them, replaces sums by a kernel, or executes the gather.

    Args:
        forward: the running forward pass.
        run: runs a call of torch as the pass does, without deferring it.
        rule: runs a rule for a function of torch.
        free: returns True if no saved-tensor hooks but Dibit's are active.
    """

    def __init__(self, forward: ForwardPass, run: Any, rule: Any, free: Callable[[], bool]) -> None:
        self.forward, self.run, self.free = forward, run, free
        self.reductions = Reductions(forward, rule, free)
        self._alive: list[Any] = []
        self._paths: list[weakref.ref[GradientPath]] = []
        self._ranges: dict[Any, tuple[int, int]] = {}  # of indices, by their identity
        forward.writes.listen(self._written)

    def gather(self, func: Any, args: Any, kwargs: Any) -> Any:
        """x.index_select(0, index), x[index] or torch.gather as a deferred tensor; else `NotImplemented`."""
        given = _gather(func, args) if DEFERS and not kwargs else None
        if given is None:
            return NotImplemented
        x, dim, index = given
        if type(index) is not Tensor or index.dtype != torch.int64 or index.dim() != 1 or not is_plain_float(x):
            return NotImplemented
        if index.device != x.device:
            return NotImplemented  # x[index] takes an index on the CPU, too
        if x.dim() < 2 or dim not in (0, -x.dim()) or x.dtype != torch.float32 or not _has_kernels(x.device):
            return NotImplemented
        width = x.shape[1:].numel()
        if width < WIDE or index.numel() * width < MIN_DEFERRED_ELEMENTS or index.numel() < x.shape[0]:
            return NotImplemented
        if self.forward.holdings.is_exposed(x) or self.forward.holdings.is_exposed(index):
            return NotImplemented
        low, high = self._range(index)
        if low < 0 or high >= x.shape[0]:
            return NotImplemented  # torch says what is wrong
        call = PendingCall(Tensor.index_select, (x, 0, index), (x,), self.run)
        return self._defer(call, torch.Size((index.numel(), *x.shape[1:])), x)

    def reduce(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A maximum or minimum by target of messages that are no deferred tensor; else `NotImplemented`."""
        if func in self.forward.state.rules or self.forward.config is None or not torch.is_grad_enabled():
            return NotImplemented  # the user's own rule, or nothing is compressed
        if not self.free():
            return NotImplemented
        if not any(type(x) is Tensor and x.numel() >= MIN_DEFERRED_ELEMENTS for x in (*args[3:4], kwargs.get("src"))):
            return NotImplemented
        return self.reductions.extreme(func, *args, **kwargs)

    def take(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Handle a call with a deferred tensor among its arguments; `NotImplemented` if the gather must be executed."""
        if func in METADATA:
            return natively(func, args, kwargs)
        found = first_deferred(args, kwargs)
        assert found is not None
        if func in self.forward.state.rules:
            return NotImplemented  # the user's own
        if func is Tensor.detach_ and args and args[0] is found:
            found.pending.value = found.pending.make().detach()
            return natively(func, args, kwargs)
        if func in ASKS_GRADIENT and args and args[0] is found:
            watch(found)
            return natively(func, args, kwargs)
        if func in SIZES_ONLY and args and args[0] is found:
            return self._sized(func, args, kwargs)
        if func in _TOTALS and (kwargs or {"dim": args[1:]}) in ({"dim": -1}, {"dim": (-1,)}):
            return self.reductions.scores(func, found)
        if found.pending.value is None:
            result = self._pattern(func, args, kwargs, found)
            if result is not NotImplemented:
                return result
        elif func in _ADDS and not kwargs and len(args) == 4 and args[3] is found:
            return self.reductions.sum_of_rows(func, *args)
        return self._extended(func, args, kwargs)

    def _pattern(self, func: Any, args: Any, kwargs: Any, found: Deferred) -> Any:
        """Handle a call that is part of a pattern computed from node tensors alone, or that completes one."""
        if func in _LEAKY and len(args) == 1 and not kwargs.get("inplace", False):
            args, kwargs = (*args, kwargs.get("negative_slope", 0.01)), {}
        if func in EXTREMES:
            return self.reductions.extreme(func, *args, **kwargs)
        if kwargs:
            return NotImplemented
        if func in LIKE and len(args) == 2 and type(args[0]) is Tensor:
            return self.run(LIKE[func], (args[0], *found.shape), {})
        if func in PRODUCTS and len(args) == 2:
            return self._scaled(func, *args)
        if func in _SUMS and len(args) == 2 and is_ends(*args):
            return self._rowwise(func, args)
        if func in _LEAKY and len(args) in (1, 2, 3) and args[2:] in ((), (False,)) and kind(found) == "sum":
            return self._rowwise(func, args[:2])
        if func in _SCATTERS and len(args) == 4 and args[3] is found:
            out, dim, index, _ = args
            return self.reductions.sum(func, out, dim, one_column(index, found), found)
        if func in _ADDS and len(args) == 4 and args[3] is found:
            return self.reductions.sum(func, *args)
        return NotImplemented

    def end(self, output: Any) -> Any:
        """The pass ends: execute the gathers that still exist, because their sources are out of sight from now on."""
        while self._alive:
            self._make(self._alive.pop())
        return _returned(output)

    def clear(self) -> None:
        """The pass has ended, one way or the other."""
        self.reductions.clear()
        self._paths.clear()
        self._ranges.clear()
        self.run = self.free = None  # type: ignore[assignment]

    # -- one call ---------------------------------------------------------------------------------------------------

    def _defer(self, call: PendingCall, shape: torch.Size, like: Tensor) -> Deferred:
        made = defer(call, shape, like)
        self._alive.append(TensorWeakRef(made))
        self._paths.append(weakref.ref(call.path))
        return made

    def _range(self, index: Tensor) -> tuple[int, int]:
        """The smallest and the largest number of an index: read once, as a GPU is waited for."""
        key = self.forward.holdings.key(index)
        if key not in self._ranges:
            low, high = index.aminmax()
            self._ranges[key] = int(low), int(high)
        return self._ranges[key]

    def _sized(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call such as `new_zeros`, which needs only the dtype, the device or the shape of a deferred tensor."""
        sized = func is Tensor.new_zeros and len(args) == 2 and not kwargs and type(args[1]) in (tuple, torch.Size)
        if sized and args[0].element_size() * math.prod(args[1]) >= MIN_BYTES:
            zeros = empty(args[1], args[0].dtype, args[0].device).zero_()
            self.forward.holdings.made(zeros)
            self.reductions.zeros.add(self.forward.holdings.key(zeros))
            return zeros
        like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
        if not func.__name__.startswith("new_"):
            like = like.new_empty(1).expand(args[0].shape)
        return self.run(func, (like, *args[1:]), kwargs)

    def _rowwise(self, func: Any, args: Any) -> Any:
        """Record an operation that works on each edge alone."""
        own = [x for x in args if type(x) is Deferred]
        if any(x.pending.value is not None for x in own):
            return NotImplemented
        roots = (*(root for x in own for root in x.pending.roots), *(x for x in args if type(x) in _PLAIN))
        return self._defer(PendingCall(func, args, roots, self.run), own[0].shape, roots[0])

    def _extended(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Append an operation to a program on edges."""
        forward, config = self.forward, self.forward.config
        if config is None or not (torch.is_grad_enabled() and self.free()):
            return NotImplemented
        args = _made(args)
        first = first_deferred(args)
        if first is None or not programs.run_on(first.device) or autocast_on(first.device):
            return NotImplemented
        if first.shape[0] < 2 * programs.chunk_bounds(first.device)[0]:
            return NotImplemented
        found = extend(func, args, kwargs)
        if found is None:
            return NotImplemented
        func, args, shape = found
        deferred = [x for x in args if type(x) is Deferred]
        plain = [x for x in args if isinstance(x, Tensor) and type(x) is not Deferred]
        if any(forward.holdings.is_exposed(x) or torch.is_inference(x) for x in plain):
            return NotImplemented
        roots = *(root for x in deferred for root in x.pending.roots), *plain
        call = PendingCall(func, args, roots, self._run_here())
        call.program, call.shape, call.lossless = True, shape, config.lossless
        return self._defer(call, torch.Size(shape), roots[0]) if call.size <= MOST_CALLS else NotImplemented

    def _run_here(self) -> Run:
        """A function that runs calls later, under the names and configs of the modules that are running now."""
        stack, run = self.forward.stack, self.run
        names, configs = list(stack.names), list(stack.configs)

        def run_here(func: Any, args: Any, kwargs: Any) -> Any:
            if func is concatenate:
                func, args = torch.cat, (list(args), -1)
            before, stack.names, stack.configs = (stack.names, stack.configs), names, configs
            try:
                return run(func, args, kwargs)
            finally:
                stack.names, stack.configs = before

        return run_here

    def _scaled(self, func: Any, a: Any, b: Any) -> Any:
        if type(a) is type(b):
            return self._rowwise(func, (a, b)) if is_ends(a, b) else NotImplemented
        x, scale = (a, b) if type(a) is Deferred else (b, a)
        if isinstance(scale, Tensor) and self.forward.holdings.is_exposed(scale):
            return NotImplemented
        if kind(x) == "leaky" and is_plain_float(scale) and scale.dtype == x.dtype and is_weight(scale, x):
            return self._rowwise(func, (a, b))
        if not is_plain_float(scale) or scale.dtype != x.dtype or torch.is_inference(scale):
            return NotImplemented
        if kind(x) != "gather" or scale.shape != (*x.shape[:-1], 1):
            return NotImplemented
        call = PendingCall(func, (a, b), (*x.pending.roots, scale), self.run)
        return self._defer(call, x.shape, scale)

    # -- what is still there ----------------------------------------------------------------------------------------

    def _written(self, storage: int) -> None:
        """Something is about to write to a storage: execute the gathers from it now."""
        for path in self._paths:
            if (alive := path()) is not None:
                alive.secure(storage)
        kept = []
        for reference in self._alive:
            found = reference()
            if found is None or found.pending.value is not None:
                continue
            if any(storage_key(x) == storage for x in sources(found.pending)):
                self._make(reference)
            else:
                kept.append(reference)
        self._alive = kept

    @staticmethod
    def _make(reference: Any) -> None:
        found = reference()
        if found is not None and not found.pending.lost():  # whoever uses it then gets the error
            materialized(found)


def _has_kernels(device: torch.device) -> bool:
    """Whether kernels sum over edges on this device. A CUDA graph captures none: the CPU reads the plan."""
    return device.type == "cpu" or (hasattr(serving(device.type), "add_scaled") and not capturing(device))


def _made(value: Any) -> Any:
    """Arguments with those deferred tensors as they are that have been made, or that a sum was computed without."""
    if type(value) is Deferred:
        made = value.pending.value is not None or (value.pending.program and value.pending.used)
        return materialized(value) if made else value
    return type(value)(_made(x) for x in value) if type(value) in (tuple, list) else value


def _gather(func: Any, args: Any) -> tuple[Any, Any, Any] | None:
    """The arguments of an equal `index_select`; `None` if this is no gather of whole rows."""
    if func in _GATHERS and len(args) == 3:
        return args  # type: ignore[no-any-return]
    if func is Tensor.__getitem__ and type(args[0]) in _PLAIN and type(args[1]) is Tensor:
        return args[0], 0, args[1]
    if func in _GATHERS_EACH and len(args) == 3 and type(args[0]) in _PLAIN and type(args[2]) is Tensor:
        x, dim, index = args
        if x.dim() == index.dim() > 1 and x.shape[1:] == index.shape[1:]:
            return x, dim, one_column(index, index)
    return None


def _returned(value: Any) -> Any:
    """What a model returns, with deferred tensors replaced by plain ones."""
    if type(value) is Deferred:
        return materialized(value)
    if type(value) in (tuple, list):
        return type(value)(_returned(item) for item in value)
    if type(value) is dict:
        return {name: _returned(item) for name, item in value.items()}
    return value
