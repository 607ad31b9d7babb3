"""What is done with a gather that has not been made: shapes are told, factors noted, sums evaluated.

A model that sums up its neighbours makes x[source], perhaps times a weight an edge, and adds the rows to those of their
targets. `Edges` sees the three calls, and makes the sum from x alone. Whatever else is done with x[source] makes it,
and goes on as it would in plain torch.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from dibit._torch.private.tensors import DEFERS, is_view, natively
from dibit._torch.storage_identity import storage_key
from dibit.edges.deferred import ASKS, DESCRIBES, Cell, Deferred, defer, deferred_in, real, watch
from dibit.edges.plan import Plan, plans
from dibit.edges.sums import edge_sum, scaled_sum
from dibit.engine.forward_pass import ForwardPass
from dibit.recompute.repeatable import SIZES_ONLY, torch_functions
from dibit.rules.common import is_plain_float

LEAST = 1 << 16  # elements of a gather: a smaller one is made at once
_WIDE = 8  # elements a row below which the index weighs as much as the row
_GATHERS = torch_functions("index_select")
_PRODUCTS = torch_functions("mul __mul__ __rmul__ multiply")
_LIKE = {Tensor.expand_as: Tensor.expand, Tensor.view_as: Tensor.view}
_SCATTERS = torch_functions("scatter_add_ scatter_add")
_ADDS = torch_functions("index_add_ index_add")
_IN_PLACE = torch_functions("scatter_add_ index_add_")


class Edges:
    """The gathers of one forward pass that have not been made.

    Args:
        forward: the pass.
        run: runs a call of torch as the pass does, without deferring it.
        rule: runs a rule for a function of torch.
    """

    def __init__(self, forward: ForwardPass, run: Any, rule: Any) -> None:
        self.forward, self.run, self.rule = forward, run, rule
        self.plans = plans(forward.state)
        self._alive: list[weakref.ref[Deferred]] = []
        forward.before_writes.append(self._written)

    def gather(self, func: Any, args: Any, kwargs: Any) -> Any:
        """x.index_select(0, index) as a deferred tensor; `NotImplemented` for any other call."""
        if func not in _GATHERS or kwargs or len(args) != 3 or not DEFERS:
            return NotImplemented
        x, dim, index = args
        if type(index) is not Tensor or index.dtype != torch.int64 or index.dim() != 1 or not is_plain_float(x):
            return NotImplemented
        if x.dim() < 2 or dim not in (0, -x.dim()) or x.dtype != torch.float32 or x.device.type != "cpu":
            return NotImplemented
        width = x.shape[1:].numel()
        if width < _WIDE or index.numel() * width < LEAST or index.numel() < x.shape[0]:
            return NotImplemented
        low, high = index.aminmax()
        if low < 0 or high >= x.shape[0]:
            return NotImplemented  # torch says what is wrong
        cell = Cell(Tensor.index_select, (x, 0, index), (x,), self.run)
        return self._defer(cell, torch.Size((index.numel(), *x.shape[1:])), x)

    def take(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that has a deferred tensor among its arguments; `NotImplemented` if that has to be made."""
        if func in DESCRIBES:
            return natively(func, args, kwargs)
        found = deferred_in(args, kwargs)
        assert found is not None
        if func in ASKS and args and args[0] is found:
            watch(found)
            return natively(func, args, kwargs)
        if func in SIZES_ONLY and args and args[0] is found:
            return self._sized(func, args, kwargs)
        if kwargs or found.cell.value is not None:
            return NotImplemented
        if func in _LIKE and len(args) == 2 and type(args[0]) is Tensor:
            return self.run(_LIKE[func], (args[0], *found.shape), {})
        if func in _PRODUCTS and len(args) == 2:
            return self._scaled(func, *args)
        if func in _SCATTERS and len(args) == 4 and args[3] is found:
            out, dim, index, _ = args
            return self._sum(func, out, dim, _one_column(index, found), found)
        if func in _ADDS and len(args) == 4 and args[3] is found:
            return self._sum(func, *args)
        return NotImplemented

    def end(self, output: Any) -> Any:
        """The pass ends: what is still there is made, as what it is made of is out of sight from now on."""
        while self._alive:
            self._make(self._alive.pop())
        return _returned(output)

    def clear(self) -> None:
        """The pass has ended, one way or the other."""
        self.plans.end()
        self.forward.before_writes.clear()
        self.run = self.rule = None

    # -- one call ---------------------------------------------------------------------------------------------------

    def _defer(self, cell: Cell, shape: torch.Size, like: Tensor) -> Deferred:
        made = defer(cell, shape, like)
        self._alive.append(weakref.ref(made))
        return made

    def _sized(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of a dtype, a device and perhaps a shape."""
        like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
        if not func.__name__.startswith("new_"):
            like = like.new_empty(1).expand(args[0].shape)
        return self.run(func, (like, *args[1:]), kwargs)

    def _scaled(self, func: Any, a: Any, b: Any) -> Any:
        x, scale = (a, b) if type(a) is Deferred else (b, a)
        if not is_plain_float(scale) or scale.dtype != x.dtype or torch.is_inference(scale):
            return NotImplemented
        if x.cell.value is not None or x.cell.function is not Tensor.index_select or scale.shape != (*x.shape[:-1], 1):
            return NotImplemented
        cell = Cell(func, (a, b), (*x.cell.roots, scale), self.run)
        return self._defer(cell, x.shape, scale)

    def _sum(self, func: Any, out: Any, dim: Any, target: Any, messages: Deferred) -> Any:
        """Messages added to the rows of their targets."""
        if type(target) is not Tensor or target.dtype != torch.int64 or target.dim() != 1:
            return NotImplemented
        if dim not in (0, -messages.dim()) or not is_plain_float(out) or out.dtype != messages.dtype:
            return NotImplemented
        if out.shape[1:] != messages.shape[1:] or target.shape[0] != messages.shape[0] or not out.is_contiguous():
            return NotImplemented
        gathered, scale = _parts(messages)
        if gathered.value is not None:
            return NotImplemented
        x, _, source = gathered.args
        if storage_key(out) == storage_key(x) or is_view(out) or (out.is_leaf and out.requires_grad) or not out.numel():
            return NotImplemented
        plan = self.plans.find(self.forward, source, target, x.shape[0], out.shape[0])
        if plan is None:
            return NotImplemented
        if func in _IN_PLACE:
            self.forward.before_change(out)
        else:
            out = out.clone()
        y = self.rule(func, _rule, (x, out, scale, plan, source, target))
        if y is not NotImplemented:
            messages.cell.used = gathered.used = True
        return y

    # -- what is still there ----------------------------------------------------------------------------------------

    def _written(self, storage: int) -> None:
        """Something is about to write to a storage: what is made of it is made now."""
        kept = []
        for reference in self._alive:
            found = reference()
            if found is None or found.cell.value is not None:
                continue
            if any(storage_key(x) == storage for x in _sources(found.cell)):
                self._make(reference)
            else:
                kept.append(reference)
        self._alive = kept

    @staticmethod
    def _make(reference: weakref.ref[Deferred]) -> None:
        found = reference()
        if found is not None:
            real(found)


def _rule(
    forward: ForwardPass, x: Tensor, out: Tensor, scale: Tensor | None, plan: Plan, source: Tensor, target: Tensor
) -> Tensor:
    needs = x.requires_grad, scale is not None and scale.requires_grad
    forward.plain(source if needs[0] else None, target if any(needs) else None)
    if scale is None or not (scale.requires_grad or scale.shape[1:].numel() > 1):
        return edge_sum(forward, x, out, plan, scale, target)
    return scaled_sum(forward, x, scale, out, plan)


def _one_column(index: Any, messages: Deferred) -> Any:
    """The index (E,) that was expanded to the shape of the messages; `None` if it is another one."""
    if type(index) is not Tensor or index.shape != messages.shape:
        return None
    expanded = all(stride == 0 or size == 1 for stride, size in zip(index.stride()[1:], index.shape[1:], strict=True))
    return index.as_strided(index.shape[:1], index.stride()[:1]) if expanded else None


def _parts(messages: Deferred) -> tuple[Cell, Tensor | None]:
    """The gather, and what it is multiplied by."""
    cell = messages.cell
    if cell.function is Tensor.index_select:
        return cell, None
    a, b = cell.args
    return (a.cell, b) if type(a) is Deferred else (b.cell, a)


def _sources(cell: Cell) -> list[Tensor]:
    """The tensors that a call reads, also those that need no gradient."""
    found: list[Tensor] = []
    for x in cell.args:
        if type(x) is Deferred:
            found += _sources(x.cell)
        elif isinstance(x, Tensor):
            found.append(x)
    return found


def _returned(value: Any) -> Any:
    """What a model returns, with what was made in the place of deferred tensors."""
    if type(value) is Deferred:
        return real(value)
    if type(value) in (tuple, list):
        return type(value)(_returned(item) for item in value)
    if type(value) is dict:
        return {name: _returned(item) for name, item in value.items()}
    return value
