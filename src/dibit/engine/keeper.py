"""Which residual a tensor gets: a reference, what it can be computed from, or its codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dibit._torch.storage_identity import strided
from dibit.codec import Affine, encode, encoded_bytes, norm_scores
from dibit.codec.row_sampling import LEFT_OUT, by_length, unevenness
from dibit.config import Config, Project, Sample
from dibit.engine.accounting import Accounting
from dibit.engine.batch_info import BatchInfo
from dibit.engine.draws import Draws
from dibit.engine.holdings import Holdings
from dibit.engine.known_sources import KnownSources
from dibit.engine.lossless import LosslessForms
from dibit.engine.measuring import Measuring
from dibit.engine.model_state import ModelState
from dibit.engine.module_stack import ModuleStack, function_name
from dibit.engine.noise.meter import rounding_of
from dibit.engine.noise.noise_flow import Leaf
from dibit.engine.noise.row_plan import UNEVEN
from dibit.recompute.nodes import nbytes
from dibit.residuals.base import Residual
from dibit.residuals.compressed import Compressed
from dibit.residuals.derived import Gathered
from dibit.residuals.exact import Reference, exact
from dibit.residuals.gradient_norms import GradientNormObserver


class Keeper:
    """Makes the residuals of one pass, from all that is known of its tensors.

    Attributes:
        reached: by residual, how far from the output it lies, of those that left out rows beyond the loss's reach.
    """

    def __init__(
        self,
        state: ModelState,
        batch: BatchInfo,
        matrix: Tensor | None,
        stack: ModuleStack,
        holdings: Holdings,
        lossless: LosslessForms,
        sources: KnownSources,
        accounting: Accounting,
        draws: Draws,
        measuring: Measuring,
    ) -> None:
        self.state, self.batch, self.matrix, self.stack = state, batch, matrix, stack
        self.holdings, self.lossless, self.sources = holdings, lossless, sources
        self.accounting, self.draws, self.measuring = accounting, draws, measuring
        self.reached: dict[str, int] = {}
        self._leaves: dict[Any, Residual] = {}  # by content, dtype and config

    def keep(self, x: Tensor, *, leaf: bool, config: Config | None = None, copied: bool = False) -> Residual:
        """See `ForwardPass.keep`."""
        own = self.stack.config
        assert own is not None
        config = config or own
        if own.lossless:
            return self._lossless(x, copied)
        origin = self.holdings.origin(x)
        if own.inputs == "reference":
            if self.holdings.held(origin) and self._by_reference(x, origin, copied):
                return self._reference(origin, x.shape)
            known = self.sources.residual(origin)
            if known is None:
                known = self.lossless.recomputed(origin, encoded_bytes(x.shape, config))
            if known is not None:
                return self._noted(known)
        if not leaf:
            return self._noted(self._encode(x, config, "path"))
        key = (self.holdings.key(origin), x.dtype, config)
        found = self._leaves.get(key)
        if found is None:
            found = self._leaves[key] = self._leaf_residual(x, origin, config)
        return self._noted(found)

    def keep_factor(self, x: Tensor, config: Config, name: str, fixed: bool) -> Residual:
        """See `ForwardPass.keep_factor`; `name`: of the factor, for the measurement of noise."""
        plan = self.measuring.plan
        if self.measuring.active:
            self.measuring.metered = True
            plan.measured(name, rounding_of(x.detach(), config))
        return self.keep(x, leaf=False, config=plan.factor_config(name, config, x.numel(), fixed))

    def keep_affine(self, x: Tensor, affine: Affine, config: Config, watched: bool) -> Residual:
        """See `ForwardPass.keep_affine`."""
        return self._noted(self._encode(x, config, "path", affine, watched))

    def cheaper_exact(self, x: Tensor, config: Config, gathered: Config | None, uses: int) -> bool:
        """See `ForwardPass.cheaper_exact`."""
        x = self.holdings.origin(x)
        if self.lossless.free(x):
            return True
        limit = uses * encoded_bytes(x.shape, config)
        found = self.lossless.tape.gathered(x) if gathered is not None else None
        if gathered is not None and found is not None and (source := found[0].tensor()) is not None:
            limit = min(limit, encoded_bytes(source.shape, gathered))
        return self.lossless.tape.cut(x, limit) is not None

    def exact(self, x: Tensor, copied: bool = False) -> Residual:
        """See `ForwardPass.exact`."""
        origin = self.holdings.origin(x)
        if self.holdings.held(origin):
            if self._by_reference(x, origin, copied):
                return self._reference(origin, x.shape)
            if copied:
                return self._noted(exact(x.detach().clone()).residual())  # whoever holds it may change it
        elif copied:
            return self._noted(self.lossless.leaf(x).residual())
        known = self.lossless.recomputed(origin, nbytes(x)) if origin is not x else None
        kept = known or self.lossless.exactly(x)
        return self._noted(kept.residual())

    def gathered(self, x: Tensor, config: Config, copied: bool = False) -> Residual:
        """See `ForwardPass.gathered`."""
        if self.stack.config is not None and self.stack.config.lossless:
            return self._lossless(x, copied)
        origin, tape = self.holdings.origin(x), self.lossless.tape
        found = tape.gathered(origin)
        beside = None if found is None else self.lossless.secured(found[1])
        if found is None or beside is None:
            return self.keep(x, leaf=False, config=config, copied=copied)
        source = found[0]
        tensor = source.tensor()
        assert tensor is not None
        if source.root is not None and not self.holdings.settled(tensor) and self.lossless.secure(source) is None:
            return self.keep(x, leaf=False, config=config, copied=copied)
        row, self.accounting.row = self.accounting.row, None  # the ledger gets one entry, of the whole
        kept = self.keep(tensor, leaf=False, config=config, copied=True)
        self.accounting.row = row
        program = tape.program(origin, [source, *found[1]])
        return self._noted(Gathered(kept, beside, program, tape.shared))

    def clear(self) -> None:
        """The pass has ended."""
        self._leaves.clear()

    def _lossless(self, x: Tensor, copied: bool) -> Residual:
        """Exact; by what it was summed up from where that is known."""
        origin = self.holdings.origin(x)
        known = None if self.holdings.held(origin) else self.sources.residual(origin)
        return self.exact(x, copied) if known is None else self._noted(known)

    # -- references -------------------------------------------------------------------------------------------------

    def _noted(self, residual: Residual) -> Residual:
        self.accounting.note(residual)
        return residual

    def _reference(self, x: Tensor, shape: torch.Size) -> Residual:
        return self._noted(Reference(x, shape, self.holdings.on_use(x)))

    def _by_reference(self, x: Tensor, origin: Tensor, copied: bool = False) -> bool:
        """Whether a reference to what somebody else holds will do: plain torch keeps one, or nobody changes it."""
        if origin is x and not copied:
            if strided(x):
                self.holdings.referenced.add(self.holdings.key(x))
            return True
        return self.lossless.steady(origin)

    # -- codes ------------------------------------------------------------------------------------------------------

    def _leaf_residual(self, x: Tensor, origin: Tensor, config: Config) -> Residual:
        if config.noise is None:
            return self._encode(x, config, "leaf", watched=True)
        name = self.measuring.residual()
        estimate = self.sources.estimate(origin)
        plan = self.measuring.plan
        config = plan.leaf_config(name, config, x.shape, estimate is not None, self.state.root)
        if estimate is not None and config.inputs == "reference":
            return replace(estimate, key=name)
        return self._encode(x, config, "leaf", watched=True, name=name)

    def _encode(
        self,
        x: Tensor,
        config: Config,
        purpose: str,
        affine: Affine | None = None,
        watched: bool = False,
        name: str = "",
    ) -> Compressed:
        salt = (self.state.salt,) if self.state.salt else ()
        scores = watch = candidates = None
        key = name
        if watched and (self.batch.loss_rows is not None or _by_gradient(config)):
            key = name or self.measuring.residual()
            rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
            if _by_gradient(config):
                scores, watch = self._scores(key, rows, x.shape, affine is None)
            config, scores, candidates = self._within_reach(key, config, rows, scores)
        packed = encode(x, config, self.draws.seed(purpose, x.device, *salt), affine, scores, candidates)
        if self.state.observer is not None:
            x = x if affine is None else affine(x)
            self.state.observer(self.stack.module, function_name(self.stack.function), x, packed)
        return Compressed(packed, watch, key, self.stack.module, self.draws.key)

    def _scores(
        self, key: str, rows: Tensor, shape: torch.Size, norms: bool
    ) -> tuple[Tensor | None, GradientNormObserver | None]:
        """Scores of rows by the gradients of earlier steps; by their norms as long as there are none."""
        table, ids = self.state.scores, self.batch.node_ids
        if ids is not None:
            ids = ids.to(rows.device)
            if (each := shape[1:-1].numel()) > 1:  # the heads of a node are rows of their own
                ids = (ids[: shape[0], None] * each + torch.arange(each, device=ids.device)).reshape(-1)
            if ids.numel() < rows.shape[0]:  # they are no nodes: edges, which have no names
                return norm_scores(rows) if norms else None, None
        scores = table.of(key, rows, ids)
        if scores is None and norms:
            scores = norm_scores(rows)
        elif scores is not None and norms and (leaf := table.plan.leaves.get(key)) is not None:
            scores = self._by_length(scores, rows, leaf)
        return scores, table.watch(key, ids)

    def _by_length(self, scores: Tensor, rows: Tensor, leaf: Leaf) -> Tensor:
        """Scores of |dY_n| |x_n| where the rows of a leaf are of uneven lengths, of |dY_n| elsewhere."""
        lengths = norm_scores(rows) if self.measuring.active or leaf.uneven else None
        if lengths is not None and self.measuring.active:
            leaf.uneven = unevenness(lengths) > UNEVEN
        return by_length(scores, lengths) if leaf.uneven and lengths is not None else scores

    def _within_reach(
        self, key: str, config: Config, rows: Tensor, scores: Tensor | None
    ) -> tuple[Config, Tensor | None, int | None]:
        """Leave out the rows that the loss does not reach: config, scores and how many rows may be kept."""
        loss_rows, reduce = self.batch.loss_rows, config.reduce
        if loss_rows is None or self.matrix is None or isinstance(reduce, Project):
            return config, scores, None
        found = self.state.reach.rows_within(key, self.matrix, loss_rows, rows.shape[0])
        if found is None or not 0 < found[1] < rows.shape[0]:
            return config, scores, None
        self.reached[key] = self.state.reach.steps[key]
        if scores is None:
            by_norm = reduce is not None and reduce.by == "norm"
            scores = norm_scores(rows) if by_norm else rows.new_zeros(rows.shape[0], dtype=torch.uint8)
        scores = torch.where(found[0], scores, LEFT_OUT)
        return config if reduce is not None else replace(config, reduce=Sample(1)), scores, found[1]


def _by_gradient(config: Config) -> bool:
    return isinstance(config.reduce, Sample) and config.reduce.by == "gradient"
