"""One forward pass of a compressed model, as the rules see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dibit._torch.storage_identity import storage_key, storages, strided
from dibit._torch.user_objects import is_a
from dibit.codec import Affine
from dibit.codec.seed_stream import Key
from dibit.config import Config
from dibit.engine.accounting import Accounting
from dibit.engine.batch_info import current
from dibit.engine.draws import Draws
from dibit.engine.encoder import Encoder
from dibit.engine.holdings import Holdings, only_matrix, tensors_in
from dibit.engine.keeper import Keeper
from dibit.engine.known_sources import KnownSources
from dibit.engine.ledger import Row
from dibit.engine.lossless import LosslessForms
from dibit.engine.measuring import Measuring
from dibit.engine.model_state import ModelState, Rule
from dibit.engine.module_stack import ModuleStack
from dibit.engine.owners import Owners
from dibit.engine.rows_in_reach import RowsInReach
from dibit.engine.writes import Writes
from dibit.residuals.base import Residual
from dibit.residuals.exact import Exact, LosslessForm, Narrowed, exact


class SettledLater(Protocol):
    """A residual whose form depends on what the model returns."""

    def settle(self, forward: ForwardPass, returned: set[int]) -> None:
        """The pass ends; `returned`: identities of the storages that the model returns.

        Config and ledger row are those of the operation that keeps the residual.
        """


@dataclass(slots=True)
class _RunningRule:
    """What the rule that is running has said so far."""

    factor: str = ""  # the name of what it keeps to multiply the gradient by
    seeded: bool = False  # it has asked for a seed
    keeps: bool = True  # it keeps something


class ForwardPass:
    """The state of one forward pass, and the methods by which a rule asks, keeps and reports.

    A rule asks for the running module's `config` and books by `plain` what torch would keep. What its backward pass
    needs it keeps by `keep` (a linear layer's input), `keep_affine` (a normalised input), `keep_factor` (a derivative),
    `gathered`, `exact` or `note` (a residual of its own making). The parts below know more of the pass.

    Args:
        state: of the compressed model.
        inputs: arguments of the outermost module; data among them (no gradient history) is held by the caller.
        name: of the outermost module; empty for the model itself: `loss_rows` are rows of its output alone.

    Attributes:
        stack: the modules and the function that are running.
        holdings: whose memory tensors lie in, and whether their content can have changed.
        lossless: what is kept exactly, and the tape of what can be computed again.
        sources: how tensors came about: aggregates, results of norms.
        measuring: names of operations, and what is measured of the gradient's noise.
        accounting: the ledger's rows.
        writes: is called before any operation writes to a tensor.
        low: autocast's dtype of half precision while a rule runs for a function that autocast runs in it; else `None`.
        taken: how many operations rules have taken over, with something to keep.
        over: the pass has ended.
    """

    def __init__(self, state: ModelState, inputs: Any, name: str = "") -> None:
        self.state = state
        owners = Owners(state.history)
        self.unpack = owners.guard.unpack  # for the hooks of autograd, which must not hold this object
        self.stack = ModuleStack()
        self.holdings = Holdings(owners)
        self.accounting = Accounting(state.ledger, self.holdings, self.stack)
        self.lossless = LosslessForms(self.holdings, self.accounting.ledger)
        self.sources = KnownSources(self.holdings, self.lossless.tape)
        self.writes = Writes(self.lossless, self.sources)
        self.measuring = Measuring(self.stack, state)
        self._draws = Draws(self.stack, state.seeds)
        batch = current(state.root)
        loss_rows = None if name else batch.loss_rows
        self._reach = RowsInReach(state.reach, loss_rows, None if loss_rows is None else only_matrix(inputs))
        encoder = Encoder(state, self.stack, self._draws, self.measuring, self._reach, batch.node_ids)
        self._keeper = Keeper(self.stack, self.lossless, self.sources, self.accounting, encoder)
        self._rule: _RunningRule | None = None
        self._later: list[tuple[SettledLater, Config | None, Row | None]] = []
        self.low: torch.dtype | None = None
        self._low_cached = True  # autocast copies a parameter once
        self.taken = 0
        self.over = False
        state.scores.begin(state.root.parameters())
        for number, x in enumerate(tensors_in(inputs)):
            if not x.requires_grad or x.is_leaf:
                self.holdings.hold(x, f"tensor {number} among the arguments of {name or type(state.root).__name__!r}")
        for attribute, x in state.constants():
            self.holdings.hold(x, f"{attribute!r} of the model")

    def run_rule(self, func: Any, rule: Rule, args: Any, kwargs: Any) -> Any:
        """Call a rule; an entry in the ledger is opened for it and dropped where it declines."""
        for x in (*args, *kwargs.values()):
            if is_a(x, Tensor) and (not (parts := storages(x)) or (parts[0] is x and not x.numel())):
                return NotImplemented  # an empty tensor saves nothing, and its rows have no width
        self.accounting.open(func)
        outer, self._rule = self._rule, (running := _RunningRule())
        result = NotImplemented
        try:
            result = rule(self, *args, **kwargs)
        finally:
            self._rule = outer
            self.accounting.close(declined=result is NotImplemented)
        if running.factor:
            _label_node(result, running.factor)
        if running.seeded and self._draws.key is not None:
            _notify_key_on_backward(result, self._draws.key)
        self.taken += result is not NotImplemented and running.keeps
        return result

    def end(self, outputs: Any) -> None:
        """Settle what depends on the outputs, and forget what is shared within the pass."""
        self.over = True
        outputs = list(tensors_in(outputs))
        self.holdings.copies.clear()
        self.lossless.let_go()
        for storage in self.holdings.owners.referenced({key[0] for key in self.holdings.referenced}):
            self.lossless.copy_leaves(storage)
        if self.measuring.metered:
            self.state.scores.plan.walk(outputs, self.holdings.began)
        self._reach.observe(outputs)
        returned = {storage_key(part) for x in outputs for part in storages(x)}
        for residual, config, row in self._later:
            with self.stack.resumed(config), self.accounting.entering(row):
                residual.settle(self, returned)
        self._draws.end()
        self._later.clear()
        # autograd may keep the hooks, and with them this object, as long as the graph
        for part in (self._keeper, self.writes, self.sources, self.lossless):
            part.clear()
        self.accounting.end(outputs)
        self.holdings.clear()

    # -- what a rule asks -------------------------------------------------------------------------------------------

    @property
    def config(self) -> Config | None:
        """The config of the innermost module that is running; `None` leaves everything exact."""
        return self.stack.config

    @property
    def module(self) -> str:
        """Name of the innermost module that is running; empty for the outermost."""
        return self.stack.module

    @property
    def function(self) -> Any:
        """The function of torch that is running."""
        return self.stack.function

    def held(self, x: Tensor) -> bool:
        """Whether someone else keeps the memory of x through the backward pass: inputs, parameters, buffers."""
        return self.holdings.held(x)

    def seed(self, purpose: str, device: torch.device, *more: int) -> Tensor:
        """A fresh seed of the codec, int64 (), on the device."""
        if self._rule is not None:
            self._rule.seeded = True
        return self._draws.seed(purpose, device, *more)

    # -- what a rule keeps ------------------------------------------------------------------------------------------

    def keep(self, x: Tensor, *, leaf: bool, config: Config | None = None, copied: bool = False) -> Residual:
        """A residual of x.

        Args:
            x: floating point (..., D). Of a copy that autocast made, the residual may stand for what it is a copy of.
            leaf: it enters gradients of parameters only, so one draw may serve all leaves of the same tensor. A path
                residual enters gradients of what comes before and is always drawn anew.
            config: default: that of the running module.
            copied: plain torch keeps something that was computed from x, not x itself, so that x may be changed.
        """
        return self._keeper.keep(x, leaf=leaf, config=config, copied=copied)

    def keep_factor(self, x: Tensor, config: Config, fixed: bool = False) -> Residual:
        """A path residual (..., D) that multiplies the gradient element by element.

        Args:
            x: the factor.
            config: its codec. Dibit may raise its bits to bound the noise of the whole gradient.
            fixed: keep exactly this codec; never raise its bits.
        """
        if config.noise is None or not x.numel():
            return self._keeper.keep(x, leaf=False, config=config)
        name = self.measuring.operation("factor")
        if self._rule is not None:
            self._rule.factor = name
        return self._keeper.keep_factor(x, config, name, fixed)

    def keep_affine(self, x: Tensor, affine: Affine, config: Config, *, watched: bool) -> Residual:
        """A path residual of (x - shift) * scale, a tensor that exists nowhere else.

        Args:
            x: (N, D).
            affine: shift and scale, (D,) each.
            config: its codec.
            watched: its user calls the residual's `observe` with what it is multiplied by.
        """
        return self._keeper.keep_affine(x, affine, config, watched)

    def exact(self, x: Tensor, copied: bool = False) -> Residual:
        """A residual that loses nothing; `copied` as in `keep`."""
        return self._keeper.exact(x, copied)

    def gathered(self, x: Tensor, config: Config, copied: bool = False) -> Residual:
        """A path residual: of the smaller tensor that x was gathered, viewed or expanded from, if there is one.

        Args:
            copied: as in `keep`.
        """
        return self._keeper.gathered(x, config, copied=copied)

    def cheaper_exact(self, x: Tensor, config: Config, gathered: Config | None = None, uses: int = 1) -> bool:
        """Whether x can be kept exactly for less than its codes would take, or those of what it was gathered from.

        Args:
            x: floating point (..., D).
            config: of its codes.
            gathered: of the codes of what it was gathered from; `None`: that does not count.
            uses: how often codes would be kept.
        """
        return self._keeper.cheaper_exact(x, config, gathered, uses)

    def share(self, x: Tensor) -> Tensor:
        """A constant of the graph structure, kept once for equal content; int64 as int32 where it fits."""
        if self.held(x):
            return x
        return self.lossless.once(x).x

    def pack_index(self, index: Tensor) -> Exact | Narrowed:
        """An index for a rule that saves it itself: by reference, or once and in int32."""
        if self.held(index):
            return exact(index)
        kept = self.lossless.once(index)
        self.accounting.kept(kept.x)
        return kept

    def settle_later(self, residual: SettledLater) -> None:
        """Let a residual choose its form when the pass ends, by what the model returns."""
        self._later.append((residual, self.config, self.accounting.row))

    # -- what a rule says -------------------------------------------------------------------------------------------

    def keeps_nothing(self) -> None:
        """The running rule keeps nothing, as plain torch does: no sign that the model has anything to compress."""
        if self._rule is not None:
            self._rule.keeps = False

    def note(self, residual: Residual | Any) -> Any:
        """Enter a residual in the ledger under the operation that is running."""
        return self.accounting.note(residual)

    def kept(self, *tensors: Tensor, how: str = "") -> None:
        """The running operation keeps these tensors as they are; `how`: their form, if `note` has not given it."""
        self.accounting.kept(*tensors, how=how)

    def plain(self, *saved: Tensor | int | None) -> None:
        """What the running operation would keep without Dibit: tensors, or bytes that only it would allocate."""
        self.accounting.plain(*saved, low=self.low, cached=self._low_cached)

    # -- what torch says --------------------------------------------------------------------------------------------

    @contextmanager
    def autocast(self, low: torch.dtype | None, cached: bool) -> Iterator[None]:
        """A block that runs a rule for a function which autocast runs in another dtype.

        Args:
            low: its dtype of half precision, where it takes that.
            cached: it copies each parameter once.
        """
        try:
            self.low, self._low_cached = low, cached
            yield
        finally:
            self.low = None
            self.holdings.copies.clear()  # what the rule was given are no copies of autocast's any more

    def pack(self, x: Tensor) -> LosslessForm:
        """What is kept of a tensor that an operation saves: autograd calls it."""
        if self._rule is not None:  # a rule's own tensors
            kept = exact(x)
            self.accounting.saved_by_rule(kept)
            self.lossless.follow(kept, x)
            return kept
        free = self.held(x)
        if strided(x):
            self.lossless.tape.saved(x)
        form = exact(x) if free or self.config is None or not strided(x) else self.lossless.exactly(x)
        if not free:
            self.accounting.saved(x, form)
        return form


def _notify_key_on_backward(result: Any, key: Key) -> None:
    """Call `key.used()` when the backward pass reaches the operation that made `result`."""
    node = getattr(result, "grad_fn", None)
    if node is not None:
        node.register_prehook(lambda _: key.used())


def _label_node(result: Any, name: str) -> None:
    """Write the name of the kept factor on the autograd node, where the walk that predicts the noise reads it."""
    node = getattr(result, "grad_fn", None)
    if isinstance(node, torch.autograd.function.FunctionCtx) and not getattr(node, "measured", ""):
        node.measured = name  # type: ignore[attr-defined]
