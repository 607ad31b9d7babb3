"""Which residual a tensor gets: a reference, what it can be computed from, or its codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dibit._torch.storage_identity import strided
from dibit.codec import Affine, encoded_bytes
from dibit.config import Config
from dibit.engine.accounting import Accounting
from dibit.engine.encoder import Encoder
from dibit.engine.known_sources import KnownSources
from dibit.engine.lossless import LosslessForms
from dibit.engine.module_stack import ModuleStack
from dibit.recompute.nodes import nbytes
from dibit.residuals.base import Residual
from dibit.residuals.derived import Gathered
from dibit.residuals.exact import Reference, exact

_ENCODES: ContextVar[bool] = ContextVar("encodes", default=True)


@contextmanager
def inputs_kept_exactly() -> Iterator[None]:
    """To test what surrounds the codec: forward passes within it keep the inputs of linear layers exactly.

    Rules that need codes of their own, such as those of norms and smooth activations, cannot run within it.
    """
    token = _ENCODES.set(False)
    try:
        yield
    finally:
        _ENCODES.reset(token)


class Keeper:
    """Makes the residuals of one pass, from all that is known of its tensors.

    Args:
        stack: the running modules of the pass.
        lossless: what it keeps exactly.
        sources: how its tensors came about.
        accounting: its ledger's rows.
        encoder: of everything else.
    """

    def __init__(
        self,
        stack: ModuleStack,
        lossless: LosslessForms,
        sources: KnownSources,
        accounting: Accounting,
        encoder: Encoder,
    ) -> None:
        self.stack, self.lossless, self.sources = stack, lossless, sources
        self.accounting, self.encoder = accounting, encoder
        self.holdings, self.measuring = lossless.holdings, encoder.measuring
        self._leaves: dict[Any, Residual] = {}  # by content, dtype and config

    def keep(self, x: Tensor, *, leaf: bool, config: Config | None = None, copied: bool = False) -> Residual:
        """See `ForwardPass.keep`."""
        own = self.stack.config
        assert own is not None
        config = config or own
        if own.lossless:
            return self._lossless(x, copied)
        if not _ENCODES.get():
            return self.exact(x, copied)
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
            return self._noted(self.encoder.encode(x, config, "path"))
        key = (self.holdings.key(origin), x.dtype, config)
        found = self._leaves.get(key)
        if found is None:
            found = self._leaves[key] = self._leaf_residual(x, origin, config)
        return self._noted(found)

    def keep_factor(self, x: Tensor, config: Config, name: str, fixed: bool) -> Residual:
        """See `ForwardPass.keep_factor`; `name`: of the factor, for the measurement of noise."""
        self.measuring.factor(name, x, config)
        return self.keep(x, leaf=False, config=self.measuring.plan.factor_config(name, config, x.numel(), fixed))

    def keep_affine(self, x: Tensor, affine: Affine, config: Config, watched: bool) -> Residual:
        """See `ForwardPass.keep_affine`."""
        return self._noted(self.encoder.encode(x, config, "path", affine, watched))

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
        if not _ENCODES.get():
            return self.exact(x, copied)
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
        """An exact residual of x, or one that computes x again from tensors that others hold, if that is known."""
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
            return self.encoder.encode(x, config, "leaf", watched=True)
        name = self.measuring.residual()
        estimate = self.sources.estimate(origin)
        config = self.measuring.leaf_config(name, config, x.shape, estimate is not None)
        if estimate is not None and config.inputs == "reference":
            return replace(estimate, key=name)
        return self.encoder.encode(x, config, "leaf", watched=True, name=name)
