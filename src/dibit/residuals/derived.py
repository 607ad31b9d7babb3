"""Residuals of a tensor that is linear in another one: they are computed from what is kept of that, unbiased."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dibit.recompute.program import Program, Shared
from dibit.residuals.base import Residual
from dibit.residuals.constant_csr import ConstantCSR
from dibit.residuals.exact import Exact, Narrowed, with_tensors


@dataclass(frozen=True)
class Gathered(Residual):
    """`x[index]`, a view or an expansion of a smaller tensor, from the residual of that: linear, so unbiased."""

    source: Residual
    leaves: tuple[Exact | Narrowed, ...]
    program: Program
    shared: Shared

    @property
    def how(self) -> str:
        return f"gathered from {self.source.how}"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.source.tensors, *(leaf.x for leaf in self.leaves))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Gathered:
        count = max(0, len(tensors) - len(self.leaves))  # without tensors, the source cannot tell how many it has
        return replace(
            self, source=self.source.with_tensors(tensors[:count]), leaves=with_tensors(self.leaves, tensors[count:])
        )

    def value(self) -> Tensor:
        return self.program.run([self.source.value(), *(leaf.restore() for leaf in self.leaves)], self.shared)


@dataclass(frozen=True)
class Aggregated(Residual):
    """A x for a constant graph A, from the residual of x: (A x)^T dY = x^T (A^T dY) needs no aggregate."""

    graph: ConstantCSR
    source: Residual
    how = "aggregate of the source"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.graph.parts, *self.source.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Aggregated:
        return Aggregated(
            self.graph.with_tensors(tensors[: self.graph.count]), self.source.with_tensors(tensors[self.graph.count :])
        )

    @property
    def aggregated(self) -> tuple[ConstantCSR, Residual]:
        return self.graph, self.source

    def value(self) -> Tensor:
        return self.graph.product(self.source.value())

    def outer(self, dy: Tensor) -> Tensor:
        return self.source.outer(self.graph.transposed_product(dy))
