"""Reductions of messages by target that are computed without a tensor of one row an edge.

`Reductions` takes a call that completes a pattern (`dibit.edges.patterns`) or a program, finds the plan of its graph,
and runs the rule that computes the result. It returns `NotImplemented` where the gather must be executed instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.private.tensors import is_view
from dibit._torch.storage_identity import storage_key
from dibit.edges import programs
from dibit.edges.chunks import Computation, Reduction, Whole, wanted
from dibit.edges.deferred import Deferred, materialized
from dibit.edges.extremes import has_torchs_bits
from dibit.edges.patterns import gather_and_scale, kind, one_column, sources
from dibit.edges.plan import Plans, known_plans
from dibit.edges.recomputed import Writer
from dibit.edges.rules import chunked_rule, extreme_rule, recomputed_rule, row_extreme_rule, score_rule, sum_rule
from dibit.edges.scores import summed
from dibit.edges.sums import row_sum
from dibit.engine.forward_pass import ForwardPass
from dibit.recompute.repeatable import IN_PLACE
from dibit.rules.common import is_plain_float


class Reductions:
    """Computes what deferred messages are reduced to.

    Args:
        forward: the running forward pass.
        rule: runs a rule for a function of torch.
        free: returns True if no saved-tensor hooks but Dibit's are active.

    Attributes:
        zeros: keys of tensors that are known to be zero.
    """

    def __init__(self, forward: ForwardPass, rule: Any, free: Callable[[], bool]) -> None:
        self.forward, self.rule, self.free = forward, rule, free
        self.wanted = wanted(forward.state)
        self.plans = Plans(known_plans(forward.state))
        self.zeros: set[Any] = set()

    def clear(self) -> None:
        """The pass has ended, one way or the other."""
        self.plans.end()
        self.zeros.clear()
        self.rule = self.free = None  # type: ignore[assignment]

    def sum(self, func: Any, out: Any, dim: Any, target: Any, messages: Deferred) -> Any:
        """Add messages to the rows of their targets."""
        if kind(messages) == "program":
            return self._chunked(func, out, dim, target, messages, "sum")
        if kind(messages) not in ("gather", "scaled"):
            return NotImplemented
        return self._reduced(func, out, dim, target, messages, sum_rule)

    def extreme(
        self,
        func: Any,
        input: Any,
        dim: Any = None,
        index: Any = None,
        src: Any = None,
        reduce: Any = None,
        *,
        include_self: bool = True,
        **more: Any,
    ) -> Any:
        """Maxima or minima of messages of the same target: deferred ones, or a tensor (E, ...)."""
        if reduce not in ("amax", "amin") or include_self or more or not (type(src) is Deferred or is_plain_float(src)):
            return NotImplemented
        if not is_plain_float(input) or input.requires_grad:
            return NotImplemented
        if src.dtype != torch.float32 or not has_torchs_bits(input.device, src.shape[1:].numel()):
            return NotImplemented
        target = one_column(index, src)
        if type(src) is not Deferred:
            return self._extreme_of_rows(func, input, dim, target, src, reduce == "amin")
        if kind(src) == "program":
            return self._chunked(func, input, dim, target, src, reduce)
        if kind(src) != "gather":
            return NotImplemented
        return self._reduced(func, input, dim, target, src, functools.partial(extreme_rule, reduce == "amin"))

    def _extreme_of_rows(self, func: Any, out: Any, dim: Any, target: Any, rows: Tensor, least: bool) -> Any:
        """Maxima or minima of messages that exist as a tensor."""
        if not (rows.requires_grad and rows.is_contiguous()) or not _fits(out, dim, target, rows):
            return NotImplemented
        edges = self.plans.by_target(self.forward, target, out.shape[0])
        if edges is None:
            return NotImplemented
        zeros = self._is_zero(out)
        return self.rule(func, row_extreme_rule, (rows, self._to_write(func, out), edges, target, least, zeros))

    def _reduced(self, func: Any, out: Any, dim: Any, target: Any, messages: Deferred, rule: Any) -> Any:
        """Reduce messages by target into `out`, by a rule."""
        gathered, scale = gather_and_scale(messages)
        if not _fits(out, dim, target, messages) or gathered.value is not None:
            return NotImplemented
        messages.pending.check()
        x, _, source = gathered.args
        plan = self.plans.find(self.forward, source, target, x.shape[0], out.shape[0])
        if plan is None:
            return NotImplemented
        zeros = self._is_zero(out)
        out = self._to_write(func, out)
        y = self.rule(func, rule, (gathered, x, out, scale, plan, source, target, zeros))
        if y is not NotImplemented:
            messages.pending.used = gathered.used = True
        return y

    def _chunked(self, func: Any, out: Any, dim: Any, target: Any, messages: Deferred, how: str) -> Any:
        """Reduce the messages of a program into `out`, some thousand edges at a time."""
        forward, message = self.forward, messages.pending
        calls = list(programs.calls(message))
        if not _fits(out, dim, target, messages) or not any(call.function is F.linear for call in calls):
            return NotImplemented
        if not (torch.is_grad_enabled() and self.free()) or forward.config is None:
            return NotImplemented
        message.check()
        gathers = [call for call in calls if call.function is Tensor.index_select]
        key = forward.holdings.key
        ends = {key(target): "target"}
        x, _, source = next((call.args for call in gathers if key(call.args[2]) not in ends), (out, 0, target))
        ends.setdefault(key(source), "source")
        plan = self.plans.find(forward, source, target, x.shape[0], out.shape[0])
        if plan is None:
            return NotImplemented
        for call in programs.used(message):
            if call.again is not None:
                call.again()
        name, needed = self.wanted.next_program(calls, forward.module)
        zeros = self._is_zero(out)
        reduction = Reduction(self._to_write(func, out), how, zeros)
        wholes = [(call, Whole(out.new_empty(call.shape))) for call in needed]
        sinks, end = [(message, reduction), *wholes], lambda index: ends.get(key(index), "")
        indices = [call.args[2] for call in gathers]
        if all(call.lossless for call in calls if call.program):
            writer = Writer(messages.shape[0], end)
            program, own = writer.program([call for call, _ in sinks]), [sink for _, sink in wholes]
            given = program, writer.tensors, plan, reduction, own, indices, target
            y, *values = self.rule(func, recomputed_rule, given)
        else:
            y, *values = self._in_chunks(func, Computation(message, plan, end), sinks, name)
            self.rule(func, chunked_rule, (y, reduction, indices, target))
        for call in calls:
            call.used = True
        for call, value in zip(needed, values, strict=True):
            call.value = value
        return y

    def _in_chunks(self, func: Any, computation: Computation, sinks: Any, name: str) -> list[Tensor]:
        """Run a program chunk by chunk, each operation by its own rule."""
        forward = self.forward
        forward.stack.function = func
        begin = functools.partial(forward.accounting.begin_chunk, name)
        try:
            return computation.run(sinks, begin)
        finally:
            forward.accounting.begin_chunk(None)

    def sum_of_rows(self, func: Any, out: Any, dim: Any, target: Any, messages: Deferred) -> Any:
        """Sum messages that have been computed. Torch would keep a reference to them, only for their shape."""
        if not _fits(out, dim, target, messages):
            return NotImplemented
        rows = materialized(messages)
        return (
            self.rule(func, row_sum, (rows, self._to_write(func, out), target))
            if rows.requires_grad
            else NotImplemented
        )

    def _to_write(self, func: Any, out: Tensor) -> Tensor:
        """The tensor that a reduction writes to: `out`, or a copy if the function does not work in place."""
        if func not in IN_PLACE:
            return out.clone()
        self.forward.writes.before(out)
        return out

    def scores(self, func: Any, product: Deferred) -> Any:
        """Attention scores (E, ...): both ends' product, or w * leaky_relu of their sum, summed over the channels."""
        what = kind(product)
        if what not in ("product", "weighted"):
            return NotImplemented
        calls, slope, weight = [product.pending], 0.0, None
        if what == "weighted":
            leaky, weight = product.pending.args
            if type(leaky) is not Deferred:
                leaky, weight = weight, leaky
            slope = float(leaky.pending.args[1]) if len(leaky.pending.args) > 1 else 0.01
            if slope < 0:
                return NotImplemented
            calls += [leaky.pending, leaky.pending.args[0].pending]
        product.pending.check()
        ends = [x.pending for x in calls[-1].args]
        if any(call.value is not None for call in (*calls, *ends)):
            return NotImplemented
        (a, _, target), (b, _, source) = (end.args for end in ends)
        if a.dim() < 3 or not any(x.requires_grad for x in (a, b)):
            return NotImplemented
        plan = self.plans.find(self.forward, source, target, b.shape[0], a.shape[0])
        if plan is None:
            return NotImplemented
        scores = summed(product.pending, product.shape[0], tuple(product.shape[1:-1]))
        shaped = a.reshape(a.shape[0], -1, a.shape[-1]), b.reshape(b.shape[0], -1, b.shape[-1])
        rows = scores.reshape(scores.shape[0], -1)
        y = self.rule(func, score_rule, (ends, *shaped, weight, slope, rows, plan, source, target))
        if y is not NotImplemented:
            for call in (*calls, *ends):
                call.used = True
            y = y.view(scores.shape)
        return y

    def _is_zero(self, out: Tensor) -> bool:
        """Whether `out` is known to be zero, so that the sum is that of the messages alone."""
        if self.forward.holdings.key(out) in self.zeros:
            return True
        call = self.forward.lossless.tape.node(out).call
        return call is not None and call[0] is torch.zeros


def _fits(out: Any, dim: Any, target: Any, messages: Tensor) -> bool:
    """Whether a kernel can reduce messages (E, ...) into the rows of `out`."""
    if type(target) is not Tensor or target.dtype != torch.int64 or target.dim() != 1:
        return False
    if not messages.device == target.device == getattr(out, "device", None):
        return False
    if dim not in (0, -messages.dim()) or not is_plain_float(out) or out.dtype != messages.dtype:
        return False
    if out.shape[1:] != messages.shape[1:] or target.shape[0] != messages.shape[0] or not out.is_contiguous():
        return False
    if is_view(out) or (out.is_leaf and out.requires_grad) or not out.numel():
        return False
    read = sources(messages.pending) if type(messages) is Deferred else [messages]
    return all(storage_key(out) != storage_key(x) for x in read)
