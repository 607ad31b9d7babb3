"""Programs on edges that are computed again in the backward pass, chunk by chunk.

The recipe "lossless" keeps no rounded residual. So nothing of a chunk is kept: only the tensors that the program starts
from, exactly, and the parameters. The backward pass runs the operations of a chunk again, with the same bits, and takes
the gradient by torch's own derivatives. The gradient is that of plain torch up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dibit._torch.storage_identity import storage_key
from dibit.edges import programs
from dibit.edges.chunks import Chunk, Gradient, RowSelection, Sink, cut, select_rows
from dibit.edges.deferred import Deferred, PendingCall
from dibit.edges.plan import Plan
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import load, released, save
from dibit.rules.common import first_order


@dataclass(frozen=True)
class Rows:
    """An operand: the rows of a tensor for the edges of a chunk.

    Attributes:
        tensor: its number among the tensors of the program.
        index: the number of the index that selects them; `None` if the plan has it.
        end: see `RowSelection`.
    """

    tensor: int
    index: int | None
    end: str


@dataclass(frozen=True)
class Parameter:
    """An operand: a whole tensor, the same for all edges; `tensor` is its number."""

    tensor: int


@dataclass(frozen=True)
class Result:
    """An operand: what an earlier step gives; `step` is its number."""

    step: int


@dataclass(frozen=True)
class EdgeProgram:
    """A program on edges, apart from the tensors that it reads: their numbers stand for them.

    Attributes:
        steps: functions and their arguments, each after those that it reads.
        results: the steps that give what is needed.
        widths: of the rows whose bits depend on where vectors begin.
    """

    steps: Sequence[tuple[Any, Sequence[Any]]]
    results: Sequence[int]
    widths: set[int]

    @property
    def parameters(self) -> list[int]:
        """The numbers of the tensors that are the same for all edges."""
        return sorted({x.tensor for _, args in self.steps for x in args if type(x) is Parameter})

    def run(
        self, tensors: Sequence[Tensor], chunk: Chunk, needs: Sequence[bool]
    ) -> tuple[list[Tensor], dict[Any, Tensor]]:
        """Compute the results for a chunk.

        Args:
            tensors: what the program reads.
            chunk: of edges.
            needs: which of the tensors need a gradient.

        Returns:
            The results, and the rows that were selected, which require a gradient where their tensor needs one.
        """
        rows: dict[Any, Tensor] = {}
        values: list[Tensor] = []

        def operand(x: Any) -> Any:
            if type(x) is Result:
                return values[x.step]
            if type(x) is Parameter:
                return tensors[x.tensor]
            if type(x) is not Rows:
                return x
            if x not in rows:
                index = selection(x, tensors).index_for(chunk)
                rows[x] = select_rows(tensors[x.tensor].detach(), index, chunk).requires_grad_(needs[x.tensor])
            return rows[x]

        for function, args in self.steps:
            values.append(function(*(operand(x) for x in args)))
        return [values[step] for step in self.results], rows


class Writer:
    """Writes an `EdgeProgram` for calls that were recorded.

    Args:
        edges: the number of edges.
        end: whether an index (E,) has the graph's sources or targets: "source", "target" or empty.

    Attributes:
        tensors: what the program reads, by their numbers.
    """

    def __init__(self, edges: int, end: Callable[[Tensor], str]) -> None:
        self.tensors: list[Tensor] = []
        self._edges, self._end = edges, end
        self._steps: list[tuple[Any, list[Any]]] = []
        self._widths: set[int] = set()
        self._numbers: dict[int, int] = {}
        self._known: dict[int, Any] = {}

    def program(self, calls: Sequence[PendingCall]) -> EdgeProgram:
        """The program that computes these calls."""
        results = [self._operand(call).step for call in calls]
        return EdgeProgram(self._steps, results, self._widths)

    def _operand(self, call: PendingCall) -> Any:
        if id(call) not in self._known:
            self._known[id(call)] = self._written(call)
        return self._known[id(call)]

    def _written(self, call: PendingCall) -> Any:
        if call.value is not None:
            return Rows(self._number(call.value), None, "")
        if call.function is Tensor.index_select:
            x, _, index = call.args
            end = self._end(index)
            return Rows(self._number(x), None if end else self._number(index), end)
        args = [self._argument(call, x) for x in call.args]
        if programs.in_vectors(call):
            self._widths.add(call.args[0].shape[1])
        self._steps.append((call.function, args))
        return Result(len(self._steps) - 1)

    def _argument(self, call: PendingCall, x: Any) -> Any:
        if type(x) is Deferred:
            return self._operand(x.pending)
        if not isinstance(x, Tensor):
            return x
        number = self._number(x)
        return Rows(number, None, "") if programs.is_of_edges(call, x, self._edges) else Parameter(number)

    def _number(self, x: Tensor) -> int:
        if id(x) not in self._numbers:
            self._numbers[id(x)] = len(self.tensors)
            self.tensors.append(x)
        return self._numbers[id(x)]


def selection(rows: Rows, tensors: Sequence[Tensor]) -> RowSelection:
    """Which rows each edge takes."""
    return RowSelection(None if rows.index is None else tensors[rows.index], rows.end)


class RecomputedProgram(torch.autograd.Function):
    """The results of a program, reduced into `out` or stored for each edge; kept: what the program reads."""

    @staticmethod
    def forward(
        ctx: Any, program: EdgeProgram, plan: Plan, sinks: list[Sink], run: Any, kept: list[Any], *tensors: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        out = sinks[0].out
        ctx.mark_dirty(out)
        chunks, held = list(cut(plan, program.widths)), []
        detached = [x.detach() for x in tensors[:-1]]
        for chunk in chunks:
            values = run(program, detached, chunk)
            held.append([sink.put(value, chunk) for sink, value in zip(sinks, values, strict=True)])
        counts = [[len(own) for own in one] for one in held]
        save(ctx, *kept, *(x for one in held for own in one for x in own))
        ctx.program, ctx.chunks, ctx.sinks, ctx.counts = program, chunks, sinks, counts
        ctx.inputs = [(x.shape, x.dtype, x.device) for x in tensors[:-1]]
        return tuple(sink.taken() for sink in sinks)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = load(ctx)
        program, sinks, count = ctx.program, ctx.sinks, len(ctx.inputs)
        chunks = released(ctx, "chunks")
        needs, planes = ctx.needs_input_grad[5:], iter(saved[count:])
        tensors = [kept.value().detach() for kept in saved[:count]]
        for sink, grad in zip(sinks, grads, strict=True):
            sink.arrived(grad, len(chunks))
        by_rows: dict[int, Gradient] = {}  # by the number of the tensor
        whole: dict[int, Tensor] = {}
        leaves = [x.requires_grad_(need) if need else x for x, need in zip(tensors, needs, strict=False)]
        for chunk, counts in zip(chunks, ctx.counts, strict=True):
            held = [tuple(next(planes) for _ in range(number)) for number in counts]
            own = [sink.gradient(chunk, kept) for sink, kept in zip(sinks, held, strict=True)]
            _add_gradients(program, leaves, needs, chunk, own, by_rows, whole)
        found = {number: gradient.taken() for number, gradient in by_rows.items()}
        for number, grad in whole.items():
            rows = found.get(number)
            found[number] = grad if rows is None else grad.add_(rows)
        return *(None,) * 5, *(found.get(number) for number in range(count)), grads[0] if needs[count] else None


def _add_gradients(
    program: EdgeProgram,
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    chunk: Chunk,
    grads: Sequence[Tensor | None],
    by_rows: dict[int, Gradient],
    whole: dict[int, Tensor],
) -> None:
    """Add a chunk's gradients: of tensors whose rows it takes to `by_rows`, of parameters to `whole`."""
    with torch.enable_grad():
        values, rows = program.run(tensors, chunk, needs)
    pairs = [(y, dy) for y, dy in zip(values, grads, strict=True) if dy is not None and y.requires_grad]
    if not pairs:
        return
    taken = [key for key, x in rows.items() if x.requires_grad]
    parameters = [number for number in program.parameters if needs[number]]
    wanted = [*(rows[key] for key in taken), *(tensors[number] for number in parameters)]
    found = torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True)
    for key, dx in zip(taken, found, strict=False):
        if dx is not None:
            gradient = by_rows.setdefault(key.tensor, Gradient(tensors[key.tensor]))
            gradient.add(selection(key, tensors), chunk, None, dx[: chunk.size].contiguous())
    for number, dw in zip(parameters, found[len(taken) :], strict=True):
        if dw is not None:
            whole[number] = dw if number not in whole else whole[number].add_(dw)


def compute_again(
    forward: ForwardPass, program: EdgeProgram, tensors: Sequence[Tensor], plan: Plan, sinks: Sequence[Sink]
) -> tuple[Tensor, ...]:
    """Compute a program chunk by chunk, for a rule. Returns what each sink has got; the first one is the reduction."""
    # torch keeps a reference to a parameter, and reports a change; a gather and `cat` copy what they read
    parameters = program.parameters
    kept = [forward.exact(x, copied=number not in parameters) for number, x in enumerate(tensors)]
    needs = [x.requires_grad for x in tensors]

    def run(program: EdgeProgram, detached: list[Tensor], chunk: Chunk) -> list[Tensor]:
        if forward.accounting.ledger is None:
            return program.run(detached, chunk, [False] * len(needs))[0]
        return _measured(forward, program, detached, chunk, needs)

    return RecomputedProgram.apply(program, plan, sinks, run, kept, *tensors, sinks[0].out)  # type: ignore[no-any-return,no-untyped-call]


def _measured(
    forward: ForwardPass, program: EdgeProgram, tensors: Sequence[Tensor], chunk: Chunk, needs: Sequence[bool]
) -> list[Tensor]:
    """Run a chunk, and enter in the ledger what plain torch would keep of it."""
    leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    known, rows = {storage_key(x) for x in leaves}, chunk.size + chunk.padding

    def count(x: Tensor) -> Tensor:
        if storage_key(x) not in known:
            known.add(storage_key(x))
            alive.append(x)
            forward.plain(x.untyped_storage().nbytes() * chunk.size // rows)
        return x

    alive: list[Tensor] = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        values, _ = program.run(leaves, chunk, needs)
    return [value.detach() for value in values]
