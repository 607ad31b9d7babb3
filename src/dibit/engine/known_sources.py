"""Tensors that follow from others which are kept anyway: aggregates, their means, and results of norms."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dibit._torch.private.tensors import gradient_asked
from dibit.engine.holdings import Holdings
from dibit.recompute.mean_pattern import is_count_of, is_degree_of, quotient_of
from dibit.recompute.nodes import Node
from dibit.recompute.recorder import Tape
from dibit.residuals.base import Residual
from dibit.residuals.constant_csr import ConstantCSR
from dibit.residuals.derived import Aggregated
from dibit.residuals.masks import Mask, SeededMask
from dibit.residuals.norm_results import Normed, Passed


class KnownSources:
    """What a pass knows of how its tensors came about.

    Args:
        holdings: of the pass.
        tape: its operations.
    """

    def __init__(self, holdings: Holdings, tape: Tape) -> None:
        self.holdings, self.tape = holdings, tape
        self._derived: dict[Any, Residual] = {}  # tensors that can be recomputed from what others hold
        self._aggregates: dict[Any, tuple[ConstantCSR, weakref.ref[Tensor], Any]] = {}
        self._estimated: dict[Any, Normed | Passed] = {}  # tensors of which a norm has kept every row
        self._changing: tuple[Any, Normed | Passed] | None = None  # what is known of one that is about to be written to

    def derived(self, y: Tensor, residual: Residual) -> None:
        """Remember that y can be recomputed from tensors of the caller (features, their dropout, their aggregate)."""
        self._derived[self.holdings.key(y)] = residual

    def aggregated(self, y: Tensor, graph: ConstantCSR, x: Tensor) -> None:
        """Remember that y = A x, as long as somebody else keeps x alive."""
        if self.holdings.held(x):
            self.tape.node(x)  # remembers the content
        self._aggregates[self.holdings.key(y)] = graph, weakref.ref(x), self.holdings.key(x)

    def source(self, y: Tensor) -> tuple[ConstantCSR, Tensor] | None:
        """If y was computed as A @ x (a sum or a mean) and no hook or retain_grad needs its gradient: (A, x)."""
        if not self._aggregates:
            return None
        found = self._aggregates.get(self.holdings.key(y)) or self._average(y)
        if found is None:
            return None
        graph, ref, key = found
        x = ref()
        if x is None or self.holdings.key(x) != key or gradient_asked(y):
            return None
        return graph, x

    def residual(self, x: Tensor) -> Residual | None:
        """A residual that rebuilds x from tensors that others hold. Recognises the mean made from a known sum, too."""
        if not self._derived:
            return None
        found = self._derived.get(self.holdings.key(x))
        parts = quotient_of(self.tape, x) if found is None else None
        if parts is None:
            return found
        for key, source in self._derived.items():
            if (of := source.aggregated) is not None and self._is_mean(parts, key, of[0]):
                return Aggregated(replace(of[0], mean=True), of[1])
        return None

    def _average(self, y: Tensor) -> tuple[ConstantCSR, weakref.ref[Tensor], Any] | None:
        """The aggregate of a y that is a sum over neighbours divided by their number."""
        parts = quotient_of(self.tape, y)
        if parts is not None:
            for key, (graph, ref, source) in self._aggregates.items():
                if self._is_mean(parts, key, graph):
                    return replace(graph, mean=True), ref, source
        return None

    def _is_mean(self, parts: tuple[Node, Node], key: Any, graph: ConstantCSR) -> bool:
        """Whether a quotient divides this key's sum over neighbours by the number of neighbours."""
        if graph.mean or parts[0] is not self.tape.nodes.get(key):
            return False
        if (divisor := parts[1].tensor()) is not None and graph.divides_by(divisor):
            return True
        if not graph.parts:
            return False
        if graph.counted is not None:
            return is_count_of(parts[1], self.tape.nodes.get(graph.counted))
        return is_degree_of(parts[1], self.tape.nodes.get(self.holdings.key(graph.parts[0])))

    # -- results of norms -------------------------------------------------------------------------------------------

    def normed(
        self, y: Tensor, kept: Any, weight: Tensor | None, bias: Tensor | None, masks: Sequence[Mask | SeededMask] = ()
    ) -> None:
        """A norm's result y, after masks, can be estimated from what the norm keeps, if that has every row."""
        if (packed := kept.encoded) is not None and packed.config.reduce is None and packed.shape == y.shape:
            weight, bias = (None if x is None else x.detach().clone() for x in (weight, bias))
            found: Normed | Passed = Normed(kept, weight, bias)
            for mask in masks:
                found = Passed(found, mask)
            self._estimated[self.holdings.key(y)] = found

    def passed(self, source: Normed | Passed | None, y: Tensor, mask: Mask | SeededMask, scale: float = 1.0) -> None:
        """Remember that y is `mask` applied to `source` (what `estimate` gave), times scale."""
        if source is not None:
            self._estimated[self.holdings.key(y)] = Passed(source, mask, scale)

    def estimate(self, x: Tensor) -> Normed | Passed | None:
        """What is known of a norm's result, also after ReLU and dropout."""
        return self._estimated.get(self.holdings.key(x)) if self._estimated else None

    def changed(self, x: Tensor, estimated: Normed | Passed | None) -> None:
        """The running function writes to x, whose key is new already; `estimated`: what `estimate` gave before."""
        self._changing = None if estimated is None else (self.holdings.key(x), estimated)

    def changing(self, x: Tensor) -> Normed | Passed | None:
        """What `estimate` gave for x before the running function began to write to it."""
        key, found = self._changing or (None, None)
        return found if found is not None and key == self.holdings.key(x) else None

    def clear(self) -> None:
        """The pass has ended."""
        for table in (self._derived, self._aggregates, self._estimated):
            table.clear()
        self._changing = None
