"""Programs on edges, computed chunk by chunk. A chunk is some thousand edges, so tensors of one row an edge stay small.

The edges are sorted by target, and a chunk has all edges of its target nodes. For each chunk, the rows of node and edge
tensors are gathered. The rules of the pass run the operations of the program in the module that called them, and keep
what they always keep. Then the messages are reduced into the rows of their targets. Autograd's graph therefore contains
the operations once for each chunk. Gradients enter and leave these parts of the graph by tensors that all chunks share:

- `Take` adds the gradient of its rows to a shared `Gradient`. After all chunks have, `ChunkedTensor` passes it on.
- `Join`, the result, puts the gradient of all messages into a `Sink`. Each `Leave` takes its chunk's part from there.

In the graph, these functions are connected by empty tensors. Torch runs the nodes of a graph in the reverse order of
their creation, so the backward pass goes chunk by chunk, too.
"""

from __future__ import annotations

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.huge_pages import empty
from dibit._torch.private.autograd import backward_pass
from dibit.codec import ops
from dibit.edges import programs
from dibit.edges.deferred import Deferred, PendingCall
from dibit.edges.extremes import extremes
from dibit.edges.plan import Plan
from dibit.engine.model_state import ModelState
from dibit.residuals.base import released
from dibit.rules.common import first_order, refuse_second_derivatives


@dataclass(frozen=True)
class Chunk:
    """Consecutive edges of a plan: all that have one of some consecutive nodes as their target.

    Attributes:
        plan: of the graph.
        nodes: these target nodes, the rows of the result.
        edges: the places of the edges in the plan.
        padding: how often the last edge is repeated at the end.
    """

    plan: Plan
    nodes: slice
    edges: slice
    padding: int

    @property
    def size(self) -> int:
        """Edges, without those that are repeated."""
        return self.edges.stop - self.edges.start

    @property
    def crow(self) -> Tensor:
        """Pointers of these nodes into the chunk."""
        return self.plan.by_target.crow[self.nodes.start : self.nodes.stop + 1] - self.edges.start

    @property
    def places(self) -> Tensor:
        """The edges of the chunk as columns of compressed rows."""
        crow = self.plan.by_target.crow
        return torch.arange(self.size, dtype=crow.dtype, device=crow.device)

    @property
    def targets(self) -> Tensor:
        """For each edge, which of the nodes is its target."""
        return torch.repeat_interleave(self.crow.diff(), output_size=self.size)

    def select(self, x: Tensor | None) -> Tensor:
        """Select x (E, ...) for the edges of this chunk; without x, the caller's edge numbers."""
        order = self.plan.by_target.order
        if order is not None:
            return order[self.edges] if x is None else x.index_select(0, order[self.edges])
        return self.places + self.edges.start if x is None else x[self.edges]


class RowSelection:
    """Which row of a tensor each edge takes.

    Args:
        index: int64 (E,), to the caller; `None`: each edge has a row of its own.
        end: "source" or "target" where that is the graph's, which the plan has; else empty.
    """

    def __init__(self, index: Tensor | None, end: str) -> None:
        self.index, self.end = None if end else index, end

    @property
    def planned(self) -> bool:
        """Whether the plan has it."""
        return self.index is None

    def index_for(self, chunk: Chunk) -> Tensor:
        """The rows that the edges of a chunk take: integers (edges,)."""
        if self.end == "source":
            return chunk.plan.by_target.col[chunk.edges]
        return chunk.targets + chunk.nodes.start if self.end == "target" else chunk.select(self.index)


def size_of(edges: int, device: torch.device) -> int:
    """About how many edges a chunk has, in a graph of `edges` edges on a device."""
    least, most = programs.chunk_bounds(device)
    return max(least, min(edges // programs.CHUNKS, most))


def cut(plan: Plan, widths: set[int]) -> Iterator[Chunk]:
    """Cut a graph into chunks.

    Args:
        plan: of the graph.
        widths: of the rows whose bits depend on where vectors begin.
    """
    crow = plan.by_target.crow.cpu()  # a GPU is waited for once, not for each chunk
    edges, first, start = int(crow[-1]), 0, 0
    size = size_of(edges, plan.by_target.crow.device)
    while start < edges:
        last = int(torch.searchsorted(crow, start + size, right=True)) - 1
        # no small chunk before a node of many edges: products of few rows may have other bits
        while int(crow[last]) - start < size // 2:
            last += 1
        if edges - int(crow[last]) < size // 2:
            last = crow.numel() - 1
        stop = int(crow[last])
        yield Chunk(plan, slice(first, last), slice(start, stop), programs.padding(stop - start, widths))
        first, start = last, stop


class Gradient:
    """Where the chunks add up the gradient of one tensor, in one backward pass."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.sum: Tensor | None = None
        self._pass = -1

    def add(self, selection: RowSelection, chunk: Chunk, index: Tensor | None, rows: Tensor) -> None:
        """Add rows of the gradient.

        Args:
            selection: how the chunk took the rows.
            index: where they come from; `None` where the plan has it.
            rows: contiguous (edges of the chunk, D).
        """
        if self._pass != backward_pass():  # an earlier one may have ended with an exception, halfway
            self._pass, self.sum = backward_pass(), None
        if self.sum is None:
            self.sum = empty(self.shape, self.dtype, self.device).zero_()
        if selection.end == "target":  # they are sorted: on a GPU too they are added in their order
            own = self.sum[chunk.nodes]  # without the last nodes of the graph, if x does not have them
            ops.add_neighbours(own, chunk.crow[: own.shape[0] + 1], chunk.places, None, rows)
        else:
            ops.add_rows(self.sum, selection.index_for(chunk) if index is None else index, rows)

    def taken(self) -> Tensor | None:
        found, self.sum = self.sum, None
        return found


class ChunkedTensor(torch.autograd.Function):
    """A tensor of which chunks take rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Gradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return x.detach()

    @staticmethod
    def backward(ctx: Any, nothing: None) -> tuple[Any, ...]:
        return ctx.gradient.taken(), None


class Take(torch.autograd.Function):
    """The rows of a tensor that a chunk needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: RowSelection, chunk: Chunk, gradient: Gradient) -> Tensor:
        index = rows.index_for(chunk)
        ctx.rows, ctx.chunk, ctx.gradient = rows, chunk, gradient
        # the caller may change an index of its own before the backward pass
        ctx.index = None if rows.planned else index.to(chunk.plan.by_target.crow.dtype, copy=True)
        return select_rows(x, index, chunk)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        ctx.gradient.add(ctx.rows, ctx.chunk, ctx.index, dy[: ctx.chunk.size].contiguous())
        return None, None, None, None


def select_rows(x: Tensor, index: Tensor, chunk: Chunk) -> Tensor:
    """Rows of x for the edges of a chunk, with those that fill up its last vector."""
    if chunk.padding:
        index = torch.cat((index, index[-1:].expand(chunk.padding)))
    return x.index_select(0, index)


class Sink(ABC):
    """Where the chunks' results go, and where the gradient of these comes from.

    Args:
        out: the joint result of all chunks; it is written to.
    """

    def __init__(self, out: Tensor) -> None:
        self._out: Tensor | None = out
        self._grad: Tensor | None = None
        self._left = 0  # chunks that have not had their gradient

    @property
    def out(self) -> Tensor:
        """The joint result, before it is taken."""
        assert self._out is not None
        return self._out

    def taken(self) -> Tensor:
        """The whole result. It is not held any longer here: the graph that leads to a tensor must not hold it."""
        out, self._out = self.out, None
        return out

    def arrived(self, grad: Tensor | None, chunks: int) -> None:
        """Store the gradient of `out`; `chunks` chunks take their parts from it."""
        self._grad, self._left = grad, chunks

    def gradient(self, chunk: Chunk, kept: tuple[Tensor, ...]) -> Tensor | None:
        """The gradient of the rows that a chunk has put into the sink."""
        grad = self._grad
        self._left -= 1
        if not self._left:
            self._grad = None
        if grad is None:
            return None
        rows = self._gradient(grad, chunk, kept)
        return F.pad(rows, (0, 0, 0, chunk.padding)) if chunk.padding else rows

    @abstractmethod
    def put(self, rows: Tensor, chunk: Chunk) -> tuple[Tensor, ...]:
        """Store a chunk's rows (edges, D); returns what their gradient needs."""

    @abstractmethod
    def _gradient(self, grad: Tensor, chunk: Chunk, kept: tuple[Tensor, ...]) -> Tensor: ...


class Reduction(Sink):
    """The reduction of messages by target, into contiguous (N, D).

    Args:
        out: see `Sink`.
        how: "sum", "amax" or "amin".
        zeros: `out` is zero.
    """

    def __init__(self, out: Tensor, how: str, zeros: bool) -> None:
        super().__init__(out)
        self.how, self.zeros = how, zeros
        self.kept: tuple[Tensor, ...] = ()

    def put(self, rows: Tensor, chunk: Chunk) -> tuple[Tensor, ...]:
        own, out = rows[: chunk.size].contiguous(), self.out.detach()[chunk.nodes]
        if self.how == "sum":
            ops.add_neighbours(out, chunk.crow, chunk.places, None, own)
            return ()
        kept = extremes(out, chunk.crow, chunk.places, own, self.how == "amin", self.zeros)
        self.kept += kept
        return kept

    def _gradient(self, grad: Tensor, chunk: Chunk, kept: tuple[Tensor, ...]) -> Tensor:
        grad = grad[chunk.nodes]
        if self.how == "sum":
            return grad.index_select(0, chunk.targets)
        planes, many, *initial = kept
        rows = grad.new_zeros(chunk.size, grad.shape[1])
        before = initial[0] if initial else None
        ops.add_winners(rows, chunk.crow, None, planes, many, grad.contiguous(), before)
        return rows


class Whole(Sink):
    """The messages themselves, a row for each edge: (E, D)."""

    def put(self, rows: Tensor, chunk: Chunk) -> tuple[Tensor, ...]:
        self.out.index_copy_(0, chunk.select(None).long(), rows[: chunk.size])
        return ()

    def _gradient(self, grad: Tensor, chunk: Chunk, kept: tuple[Tensor, ...]) -> Tensor:
        return grad.index_select(0, chunk.select(None))


class Leave(torch.autograd.Function):
    """Puts the messages of a chunk into a sink."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sink: Sink, chunk: Chunk) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sink, ctx.chunk, ctx.kept = sink, chunk, sink.put(rows, chunk)
        return rows.new_empty(())

    @staticmethod
    def backward(ctx: Any, nothing: None) -> tuple[Any, ...]:
        return ctx.sink.gradient(ctx.chunk, released(ctx, "kept")), None, None


class Join(torch.autograd.Function):
    """The result that the chunks have put into a sink."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, sink: Sink, *chunks: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(out)
        ctx.sink, ctx.count = sink, len(chunks)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        ctx.sink.arrived(dy, ctx.count)
        return dy if ctx.needs_input_grad[0] else None, None, *(None,) * ctx.count


class Computation:
    """A program on the edges of a graph.

    Args:
        program: its last call.
        plan: of the graph, of E edges.
        end: whether an index (E,) has the graph's sources or targets: "source", "target" or empty.
    """

    def __init__(self, program: PendingCall, plan: Plan, end: Callable[[Tensor], str]) -> None:
        self.plan, self.edges = plan, plan.by_target.col.numel()
        self._end = end
        self._sources: dict[int, tuple[Tensor, Gradient]] = {}
        self._widths = {call.args[0].shape[1] for call in programs.calls(program) if programs.in_vectors(call)}

    def run(self, sinks: Sequence[tuple[PendingCall, Sink]], begin: Callable[[], None]) -> list[Tensor]:
        """Compute calls of the program, chunk by chunk.

        Args:
            sinks: the calls, each with the sink that its result is written to.
            begin: called before each chunk.

        Returns:
            The result of each call.
        """
        chunks: list[list[Tensor]] = [[] for _ in sinks]
        for chunk in cut(self.plan, self._widths):
            begin()
            known: dict[int, Tensor] = {}
            for (call, sink), own in zip(sinks, chunks, strict=True):
                own.append(Leave.apply(self._value(call, chunk, known), sink, chunk))
        return [Join.apply(sink.taken(), sink, *own) for (_, sink), own in zip(sinks, chunks, strict=True)]

    def _value(self, call: PendingCall, chunk: Chunk, known: dict[int, Tensor]) -> Tensor:
        """What a call gives for the edges of a chunk."""
        if id(call) not in known:
            if call.value is not None:
                found = self._take(call.value, None, chunk)
            elif call.function is Tensor.index_select:
                found = self._take(call.args[0], call.args[2], chunk)
            else:
                found = call.run(call.function, [self._argument(call, x, chunk, known) for x in call.args], {})
            known[id(call)] = found
        return known[id(call)]

    def _argument(self, call: PendingCall, x: Any, chunk: Chunk, known: dict[int, Tensor]) -> Any:
        if type(x) is Deferred:
            return self._value(x.pending, chunk, known)
        return self._take(x, None, chunk) if programs.is_of_edges(call, x, self.edges) else x

    def _take(self, x: Tensor, index: Tensor | None, chunk: Chunk) -> Tensor:
        rows = RowSelection(index, "" if index is None else self._end(index))
        if not x.requires_grad:
            return select_rows(x, rows.index_for(chunk), chunk)
        if id(x) not in self._sources:
            gradient = Gradient(x)
            self._sources[id(x)] = ChunkedTensor.apply(x, gradient), gradient
        source, gradient = self._sources[id(x)]
        return Take.apply(source, rows, chunk, gradient)


class Wanted:
    """Which calls of programs are needed after a reduction: what earlier passes of a model have shown.

    Args:
        names: of these calls; they are added to.
    """

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._counts: dict[str, int] = {}

    def next_program(self, calls: Sequence[PendingCall], module: str) -> tuple[str, list[PendingCall]]:
        """The name of the next program that a module reduces (the same in every pass), and those of its calls whose
        results are used later."""
        self._counts[module] = number = self._counts.get(module, 0) + 1
        name, found = f"{module}:{number}", []
        for place, call in enumerate(calls):
            if call.program:
                call.again = functools.partial(self._names.add, f"{name}/{place}")
                if f"{name}/{place}" in self._names:
                    found.append(call)
        return name, found


_wanted: weakref.WeakKeyDictionary[ModelState, set[str]] = weakref.WeakKeyDictionary()


def wanted(state: ModelState) -> Wanted:
    """For a pass of a compressed model."""
    return Wanted(_wanted.setdefault(state, set()))
