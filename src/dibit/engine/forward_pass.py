"""One forward pass of a compressed model, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

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
from dibit.engine.holdings import Holdings, only_matrix, tensors_in
from dibit.engine.keeper import Keeper
from dibit.engine.known_sources import KnownSources
from dibit.engine.ledger import Ledger, Row
from dibit.engine.lossless import LosslessForms
from dibit.engine.measuring import Measuring
from dibit.engine.model_state import ModelState, Rule
from dibit.engine.module_stack import ModuleStack
from dibit.engine.noise.meter import Meter
from dibit.engine.owners import Owners
from dibit.recompute.recorder import Tape
from dibit.residuals.base import Residual
from dibit.residuals.constant_csr import ConstantCSR
from dibit.residuals.exact import Exact, LosslessForm, Narrowed, exact
from dibit.residuals.masks import Mask, SeededMask
from dibit.residuals.norm_results import Normed, Passed


class ForwardPass:
    """What lives as long as one forward pass: put together here, and offered to the rules.

    A rule asks for the running module's `config`, books by `plain` what torch would keep, and keeps what its backward
    pass needs by one of `keep` (a linear layer's input), `keep_affine` (a normalised input), `keep_factor` (a
    derivative), `gathered`, `exact` and `note` (a residual of its own making).

    Args:
        state: of the compressed model.
        inputs: arguments of the outermost module; data among them (no gradient history) is held by the caller.
        name: of the outermost module; empty for the model itself, rows of whose output are those of the loss.

    Attributes:
        seen: operations that a rule took over.
        inside: a rule is saving tensors of its own.
        low: autocast's dtype, while a rule runs for a function that takes it; `low_cached`: it copies a parameter once.
        factor: the name of what the running rule keeps to multiply the gradient by.
        seeded: the running rule has asked for a seed.
        deferred: residuals whose form depends on what the model returns.
        before_writes: called with a storage before something writes to it.
    """

    def __init__(self, state: ModelState, inputs: Any, name: str = "") -> None:
        self.state = state
        batch = current(state.root)
        batch = replace(batch, loss_rows=None) if name else batch
        owners = Owners(state.history)
        self.unpack = owners.guard.unpack  # for the hooks of autograd, which must not hold this object
        self.stack = ModuleStack()
        self.holdings = Holdings(owners)
        self.accounting = Accounting(state.ledger, self.holdings, self.stack)
        self.lossless = LosslessForms(self.holdings, self.accounting.ledger)
        self.sources = KnownSources(self.holdings, self.lossless.tape)
        self.draws = Draws(self.stack, state.seeds)
        self.measuring = Measuring(self.stack, state.scores.plan)
        self.keeper = Keeper(
            state,
            batch,
            only_matrix(inputs) if batch.loss_rows is not None else None,
            self.stack,
            self.holdings,
            self.lossless,
            self.sources,
            self.accounting,
            self.draws,
            self.measuring,
        )
        self.seen = 0
        self.inside = self.seeded = False
        self.low: torch.dtype | None = None
        self.low_cached = True
        self.factor = ""
        self.deferred: list[Any] = []
        self.before_writes: list[Callable[[int], None]] = []
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
                return NotImplemented  # of nothing there is nothing to win, and no rows of a width can be told
        self.accounting.open(func)
        self.inside, self.factor, self.seeded = True, "", False
        result = NotImplemented
        try:
            result = rule(self, *args, **kwargs)
        finally:
            self.inside = False
            self.accounting.close(declined=result is NotImplemented)
        if self.factor:
            _name_node(result, self.factor)
        if self.seeded and self.draws.key is not None:
            _tell(result, self.draws.key)
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
        if self.keeper.batch.loss_rows is not None:
            self.state.reach.observe(outputs, self.keeper.matrix, self.keeper.reached)
        returned = {storage_key(part) for x in outputs for part in storages(x)}
        for cell in self.deferred:
            cell.settle(self, returned)
        self.draws.end()
        if self.ledger is not None:
            self.ledger.close(outputs)
        self.deferred.clear()
        self.before_writes.clear()
        # autograd may keep the hooks, and with them this object, as long as the graph
        for part in (self.keeper, self.sources, self.lossless, self.accounting, self.holdings):
            part.clear()

    # -- what a rule asks -------------------------------------------------------------------------------------------

    @property
    def config(self) -> Config | None:
        """Of the innermost module that is running; `None` leaves everything exact."""
        return self.stack.config

    @property
    def module(self) -> str:
        """Name of the innermost module that is running; empty for the outermost."""
        return self.stack.module

    @property
    def function(self) -> Any:
        """The function of torch that is running."""
        return self.stack.function

    @property
    def tape(self) -> Tape:
        """The operations so far, as far as their results can be computed again."""
        return self.lossless.tape

    def held(self, x: Tensor) -> bool:
        """Whether someone else keeps the memory of x through the backward pass: inputs, parameters, buffers."""
        return self.holdings.held(x)

    def steady(self, x: Tensor) -> bool:
        """Whether what is kept may rest on the content that x has now, a tensor that somebody else holds."""
        return self.lossless.steady(x)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy of x that autocast makes for the rule that runs."""
        return self.holdings.cast(x, dtype)

    def forget_copies(self) -> None:
        """The rule has ended: what it was given are no copies of autocast's any more."""
        self.holdings.copies.clear()

    def origin(self, x: Tensor) -> Tensor:
        """What x is autocast's copy of, or x."""
        return self.holdings.origin(x)

    def seed(self, purpose: str, device: torch.device, *more: int) -> Tensor:
        """A fresh seed of the codec, int64 (), on the device."""
        self.seeded = True
        return self.draws.seed(purpose, device, *more)

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
        return self.keeper.keep(x, leaf=leaf, config=config, copied=copied)

    def keep_factor(self, x: Tensor, config: Config, fixed: bool = False) -> Residual:
        """A path residual (..., D) that multiplies the gradient element by element.

        Args:
            x: the factor.
            config: its codec; more bits are kept where the noise of the whole gradient asks for it.
            fixed: but not of this one.
        """
        if config.noise is None or not x.numel():
            return self.keeper.keep(x, leaf=False, config=config)
        self.factor = self.measuring.operation("factor")
        return self.keeper.keep_factor(x, config, self.factor, fixed)

    def keep_affine(self, x: Tensor, affine: Affine, config: Config, *, watched: bool) -> Residual:
        """A path residual of (x - shift) * scale, a tensor that nobody else has.

        Args:
            x: (N, D).
            affine: shift and scale, (D,) each.
            config: its codec.
            watched: its user tells the `Compressed.watch` what it is multiplied with.
        """
        return self.keeper.keep_affine(x, affine, config, watched)

    def exact(self, x: Tensor, copied: bool = False) -> Residual:
        """A residual that loses nothing; `copied` as in `keep`."""
        return self.keeper.exact(x, copied)

    def gathered(self, x: Tensor, config: Config, copied: bool = False) -> Residual:
        """A path residual: of the smaller tensor that x was gathered, viewed or expanded from, if there is one.

        Args:
            copied: as in `keep`.
        """
        return self.keeper.gathered(x, config, copied=copied)

    def cheaper_exact(self, x: Tensor, config: Config, gathered: Config | None = None, uses: int = 1) -> bool:
        """Whether x can be kept exactly for less than its codes would take, or those of what it was gathered from.

        Args:
            x: floating point (..., D).
            config: of its codes.
            gathered: of the codes of what it was gathered from; `None`: that does not count.
            uses: how often codes would be kept.
        """
        return self.keeper.cheaper_exact(x, config, gathered, uses)

    def share(self, x: Tensor) -> Tensor:
        """A constant of the graph structure, kept once for equal content; int64 as int32 where it fits."""
        if self.held(x):
            return x
        packed = self.lossless.once(x)
        return packed.x if isinstance(packed, Exact | Narrowed) else x

    def pack_index(self, index: Tensor) -> Exact | Narrowed:
        """An index for a rule that saves it itself: by reference, or once and in int32."""
        if self.held(index):
            return exact(index)
        kept = self.lossless.once(index)
        self.accounting.kept(kept.x)
        return kept

    def references(self, *tensors: Tensor) -> None:
        """The plain gradient rests on these themselves."""
        self.holdings.refer(*tensors)

    # -- what a rule tells ------------------------------------------------------------------------------------------

    def derived(self, y: Tensor, residual: Residual) -> None:
        """y follows from what others hold: features, their dropout, their aggregate."""
        self.sources.derived(y, residual)

    def aggregated(self, y: Tensor, graph: ConstantCSR, x: Tensor) -> None:
        """y = A x, which holds as long as somebody else keeps x alive."""
        self.sources.aggregated(y, graph, x)

    def source(self, y: Tensor) -> tuple[ConstantCSR, Tensor] | None:
        """A and x of a y = A x whose gradient nobody has asked for, where the recipe does not insist on keeping y."""
        if self.config is None or self.config.inputs != "reference":
            return None
        return self.sources.source(y)

    def normed(
        self, y: Tensor, kept: Any, weight: Tensor | None, bias: Tensor | None, masks: Sequence[Mask | SeededMask] = ()
    ) -> None:
        """A norm's result y, after masks, can be estimated from what the norm keeps, if that has every row."""
        self.sources.normed(y, kept, weight, bias, masks)

    def passed(self, source: Normed | Passed | None, y: Tensor, mask: Mask | SeededMask, scale: float = 1.0) -> None:
        """y is what a mask passes of what `estimate` gave, times scale."""
        self.sources.passed(source, y, mask, scale)

    def estimate(self, x: Tensor) -> Normed | Passed | None:
        """What is known of a norm's result, also after ReLU and dropout."""
        return self.sources.estimate(x)

    def estimate_before_change(self, x: Tensor) -> Normed | Passed | None:
        """The same of a tensor that the function that runs writes to."""
        return self.sources.changing(x)

    # -- what is measured -------------------------------------------------------------------------------------------

    def place(self, kind: str) -> str:
        """The name of the operation that is running among those of its kind, the same in every measured pass."""
        return self.measuring.operation(kind)

    @property
    def measured(self) -> bool:
        """Whether the error of what is running is measured in this pass."""
        return self.measuring.active

    def meter(self, key: str) -> Meter | None:
        """Of a residual or norm of this name, where it is to be measured."""
        return self.measuring.meter(key)

    # -- the ledger -------------------------------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger | None:
        """Of the pass, where somebody tracks it."""
        return self.accounting.ledger

    @property
    def row(self) -> Row | None:
        """The ledger's row of the running operation."""
        return self.accounting.row

    @row.setter
    def row(self, row: Row | None) -> None:
        self.accounting.row = row

    def note(self, residual: Residual | Any) -> Any:
        """Enter a residual in the ledger under the operation that is running."""
        return self.accounting.note(residual)

    def kept(self, *tensors: Tensor, how: str = "") -> None:
        """The running operation keeps these tensors as they are; `how`: in what form, where `note` has not said it."""
        self.accounting.kept(*tensors, how=how)

    def plain(self, *saved: Tensor | int | None) -> None:
        """What the running operation would keep without Dibit: tensors, or bytes that only it would allocate."""
        self.accounting.plain(*saved, low=self.low, cached=self.low_cached)

    # -- what the hooks tell ----------------------------------------------------------------------------------------

    def pack(self, x: Tensor) -> LosslessForm:
        """What is kept of a tensor that an operation saves: autograd calls it."""
        if self.inside:  # a rule's own tensors
            kept = exact(x)
            self.accounting.saved_by_rule(kept)
            self.lossless.follow(kept, x)
            return kept
        free = self.held(x)
        if strided(x):
            self.tape.saved(x)
        form = exact(x) if free or self.config is None or not strided(x) else self.lossless.exactly(x)
        if not free:
            self.accounting.saved(x, form)
        return form

    def made(self, x: Tensor) -> None:
        """This pass has made the memory of x; nobody else can write to it out of sight."""
        self.holdings.made(x)

    def before_change(self, x: Any) -> None:
        """An operation is about to change x in place. Plain torch would not mind where it keeps the result alone."""
        if isinstance(x, list | tuple):
            for item in x:
                self.before_change(item)
        elif is_a(x, Tensor) and strided(x):
            storage = self.holdings.storage(x)
            for tell in self.before_writes:
                tell(storage)
            if storage not in self.holdings.roles and not self.holdings.is_made(x):
                self.lossless.copy_aliases(x, storage)
            self.lossless.copy_leaves(storage)
            estimated = self.sources.estimate(x)
            self.holdings.count_change(storage)
            self.sources.changed(x, estimated)
            self.holdings.owners.changed(storage)

    def exposed(self, x: Any) -> None:
        """The memory of x is handed to somebody whose writes cannot be seen: NumPy, DLPack, a kernel by its address."""
        if is_a(x, Tensor) and strided(x):
            self.before_change(x)
            self.holdings.expose(self.holdings.storage(x))


def _tell(result: Any, key: Key) -> None:
    """Let the pass's key know when the backward pass comes to what a rule has drawn."""
    node = getattr(result, "grad_fn", None)
    if node is not None:
        node.register_prehook(lambda _: key.used())


def _name_node(result: Any, name: str) -> None:
    """Let the walk through autograd's graph know what multiplies the gradient here."""
    node = getattr(result, "grad_fn", None)
    if isinstance(node, torch.autograd.function.FunctionCtx) and not getattr(node, "measured", ""):
        node.measured = name  # type: ignore[attr-defined]
