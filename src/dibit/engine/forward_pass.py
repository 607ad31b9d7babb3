"""What lives as long as one forward pass of a compressed model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from dibit._torch.storage_identity import Alive, holders, storage_key, storages, strided, version
from dibit._torch.user_objects import attributes as own_attributes
from dibit._torch.user_objects import defines, is_a, items, mapped, static
from dibit.codec import Affine, encode, encoded_bytes, mix, norm_scores, seed_tensor
from dibit.codec.fingerprint import fingerprint
from dibit.codec.row_sampling import LEFT_OUT, by_length, unevenness
from dibit.codec.seed_stream import Key, capturing, replayed_key
from dibit.config import Config, Project, Sample
from dibit.engine.batch_info import current
from dibit.engine.ledger import Ledger, Row
from dibit.engine.model_state import Rule, State
from dibit.engine.noise.meter import Meter, rounding_of
from dibit.engine.noise.noise_flow import Leaf
from dibit.engine.noise.row_plan import UNEVEN
from dibit.engine.owners import Owners, is_whole
from dibit.recompute.mean_pattern import counts, division
from dibit.recompute.recorder import SMALL, Node, Tape, nbytes
from dibit.residuals.base import (
    Aggregated,
    Compressed,
    Gathered,
    Lossless,
    Mask,
    Normed,
    Passed,
    Reference,
    Reseeded,
    Residual,
)
from dibit.residuals.constant_csr import Graph
from dibit.residuals.exact import Exact, Kept, Narrowed, Recomputed, exact, narrow, own
from dibit.residuals.gradient_norms import GradientNormObserver

_DEEPEST = 6  # nested containers that are searched for the caller's tensors


class Step:
    """One forward pass of a compressed model: its seeds, what is shared within it, its entries in the ledger.

    Args:
        state: of the compressed model.
        inputs: arguments of the outermost module; data among them (no gradient history) is held by the caller.
        name: of the outermost module; empty for the model itself, rows of whose output are those of the loss.
    """

    def __init__(self, state: State, inputs: Any, name: str = "") -> None:
        self.state = state
        self.names: list[str] = []
        self.configs: list[Config | None] = []
        self.ledger: Ledger | None = state.ledger
        self.exact_within: int | None = None  # everything is, until fewer modules than this are running
        self.asked = False  # for a gradient, since that began
        self.compresses = False  # some module of this pass has a config
        self.seen = 0  # operations that a rule took over
        self.function: Any = None  # the function now running, for the ledger
        self.row: Row | None = None
        self.inside = False  # a rule is saving tensors of its own
        self.factor = ""  # the name of what it keeps to multiply the gradient by
        self.low: torch.dtype | None = None  # autocast's, while a rule runs for a function that takes it
        self.low_cached = True  # it copies each parameter once
        self.origins: dict[Any, Tensor] = {}  # by the key of a copy that autocast makes: what it is a copy of
        self._copied: set[Any] = set()
        told = current(state.root)
        self.batch = replace(told, loss_rows=None) if name else told
        self._keys: dict[str, int] = {}  # residuals with a key so far, by module and function
        self._places: dict[str, int] = {}  # the same of operations that are measured
        self._metered = False
        self._assumed: dict[str, int] = {}  # how far from the output residuals lie that left out rows
        self.matrix = _only_matrix(inputs) if self.batch.loss_rows is not None else None
        self._key: Key | None = None
        self._replayed: Tensor | None = None
        self._draws = 0
        self.deferred: list[Any] = []  # residuals whose form depends on what the model returns
        self.owners = Owners(state.history)
        self.unpack = self.owners.guard.unpack  # for the hooks of autograd, which must not hold this object
        self._began = torch._C._autograd._get_sequence_nr()  # nodes of autograd with a higher number are of this pass
        self._alive = Alive()  # keeps identities in the tables below from being used again
        self._made: set[int] = set()  # storages of what this pass has made without a gradient
        self._exposed: set[int] = set()  # storages that somebody may write to out of sight
        self._changes: dict[int, int] = {}  # by storage: how often this pass wrote to it, past version counters too
        self._kept: set[Any] = set()  # keys of what the plain gradient rests on by itself, through a reference
        self._shared: dict[Any, Any] = {}
        self._derived: dict[Any, Residual] = {}  # tensors that can be had again from what others hold
        self._estimated: dict[Any, Normed | Passed] = {}  # tensors of which a norm has kept every row
        self._changing: tuple[Any, Normed | Passed] | None = None  # what is known of one that is about to be written to
        self._aggregates: dict[Any, tuple[Graph, weakref.ref[Tensor], Any]] = {}
        self._content: dict[Any, list[Exact | Narrowed]] = {}
        self._leaves: dict[int, list[Exact]] = {}  # by storage: kept in the place of tensors computed from them
        self.tape = Tape(self.key, self.free, self._owned)
        state.scores.begin(state.root.parameters())
        for number, x in enumerate(tensors_in(inputs)):
            if not x.requires_grad or x.is_leaf:
                self._hold(x, f"tensor {number} among the arguments of {name or type(state.root).__name__!r}")
        for attribute, x in state.constants():
            self._hold(x, f"{attribute!r} of the model")

    # -- rules ------------------------------------------------------------------------------------------------------

    def run_rule(self, func: Any, rule: Rule, args: Any, kwargs: Any) -> Any:
        """Call a rule; an entry in the ledger is opened for it and dropped where it declines."""
        for x in (*args, *kwargs.values()):
            if is_a(x, Tensor) and (not (parts := storages(x)) or (parts[0] is x and not x.numel())):
                return NotImplemented  # of nothing there is nothing to win, and no rows of a width can be told
        self.open(func)
        self.inside, self.factor = True, ""
        try:
            result = rule(self, *args, **kwargs)
        finally:
            self.inside = False
            row, self.row = self.row, None
        if self.factor:
            _name_node(result, self.factor)
        if result is NotImplemented and self.ledger is not None and row is not None:
            self.ledger.rows.remove(row)
        return result

    # -- randomness -------------------------------------------------------------------------------------------------

    def seed(self, purpose: str, device: torch.device, *more: int) -> Tensor:
        """A fresh seed of the codec. The stream is a function of torch's default generator and draws nothing from it.

        While a CUDA graph is captured a number would be written into it once and for all: there the key is drawn on the
        device, anew at each replay.
        """
        if capturing(device):
            self._draws += 1
            if self._replayed is None:
                self._replayed = replayed_key(device)
            return self._replayed ^ mix(self._draws, purpose, *more)
        if self._key is None:
            self._key = Key(self.names[0] if self.names else "", self.state.seeds)
        self._draws += 1
        return seed_tensor(mix(self._key.value, purpose, self._draws, *more), device)

    def end(self, outputs: Any) -> None:
        """Settle what depends on the outputs, and forget what is shared within the pass."""
        outputs = list(tensors_in(outputs))
        self._let_go()
        for storage in self.owners.referenced({key[0] for key in self._kept}):
            own(self._leaves.pop(storage, ()))
        if self._metered:
            self.state.scores.plan.walk(outputs, self._began)
        if self.batch.loss_rows is not None:
            self.state.reach.learn(outputs, self.matrix, self._assumed)
        returned = {storage_key(part) for x in outputs for part in storages(x)}
        for cell in self.deferred:
            cell.settle(self, returned)
        if self._key is not None:
            self._key.ended()
        if self.ledger is not None:
            self.ledger.close(outputs)
        # autograd may keep the hooks, and with them this object, as long as the graph
        for table in (
            self._shared,
            self._derived,
            self._estimated,
            self._aggregates,
            self._content,
            self._leaves,
            self._copied,
        ):
            table.clear()
        for seen in (self._made, self._exposed, self._changes, self._kept, self.owners.roles, self.origins):
            seen.clear()
        self._alive.clear()
        self._changing = None
        self.deferred.clear()
        self.tape.clear()

    # -- sharing and holding ----------------------------------------------------------------------------------------

    @property
    def config(self) -> Config | None:
        """Of the innermost module that is running; `None` leaves everything exact."""
        return self.configs[-1] if self.configs and self.exact_within is None else None

    @property
    def module(self) -> str:
        """Name of the innermost module that is running; empty for the outermost."""
        return self.names[-1] if self.names else ""

    def _hold(self, x: Tensor, role: str) -> None:
        for part in storages(x):
            storage = self._alive.hold(part)
            self.owners.roles.setdefault(storage, role if part is x else f"{role}, {part.dtype}")
            if not is_whole(part):
                self.owners.numbers.add(storage)

    def held(self, x: Tensor) -> bool:
        """Whether someone else keeps the memory of x through the backward pass: inputs, parameters, buffers."""
        return all(storage_key(part) in self.owners.roles for part in storages(x))

    def free(self, x: Tensor) -> bool:
        """Whether x, a strided tensor, can be computed from in the backward pass at no cost.

        It is kept exactly already, or somebody else holds it and has never changed it between the passes.
        """
        key = self.key(x)
        if key in self._kept or any((form, key) in self._shared for form in ("lossless", "copy", "leaf")):
            return True
        role = self.owners.roles.get(key[0])
        return role is not None and self.owners.relied(x, role)

    def key(self, x: Tensor) -> tuple[Any, ...]:
        """Identity of a tensor's content: live storage, version, geometry. Never its address."""
        storage = self._alive.hold(x)
        count = version(x) + (self._changes[storage] << 32) if storage in self._changes else version(x)
        dtype = x.dtype
        late = x.is_neg(), dtype.is_complex and x.is_conj()  # signs that torch writes out late
        return storage, count, x.storage_offset(), x.shape, x.stride(), dtype, late

    def _owned(self, node: Node, x: Tensor) -> None:
        """Remember the content of a tensor that somebody else owns, before it is read."""
        if not self._is_made(x):
            node.role = self.owners.role(storage_key(x))
            node.content = self.owners.read(x, node.role)

    def _is_made(self, x: Tensor) -> bool:
        """Whether this pass has made the memory of x."""
        storage = storage_key(x)
        if storage in self.owners.roles or storage in self._exposed:
            return False
        base = x if x._base is None else x._base
        made = base.grad_fn is not None and base.grad_fn._sequence_nr() >= self._began
        return made or storage in self._made

    def made(self, x: Tensor) -> None:
        """This pass has made the memory of x; nobody else can write to it out of sight."""
        if strided(x):
            self._made.add(self._alive.hold(x))

    def steady(self, x: Tensor) -> bool:
        """Whether what is kept may rest on the content that x has now, a tensor that somebody else holds.

        Of one that may change between the passes this is learnt from earlier ones: `dibit.engine.owners`.
        """
        parts = storages(x)
        nodes = [self.tape.node(part) for part in parts]  # remembers the content
        return self._settled(x) and all(self._secure(node, copied=False) is not None for node in nodes)

    def _settled(self, x: Tensor) -> bool:
        return all(self.owners.steady(part, self.owners.roles.get(storage_key(part), "")) for part in storages(x))

    def _secure(self, node: Node, copied: bool = True) -> Exact | Narrowed | None:
        """What is kept of the tensor of a node, so that it has the content in the backward pass that it was read with.

        Args:
            copied: small graphs are, rather than relied upon; else the tensor itself is what somebody will read.

        Returns:
            By reference what this pass has made, what is kept anyway and what nobody changes; else a copy. `None`: the
            content is not to be had any more.
        """
        x = node.tensor()
        assert x is not None
        root, key = node.root, self.key(x)
        if root is not None and key not in self._kept:
            for copy in (self._shared.get(("copy", key)), self._shared.get(("lossless", key))):
                if isinstance(copy, Narrowed) or (copy is not None and storage_key(copy.x) != storage_key(x)):
                    return copy
            whole = root.tensor()
            steady = self.owners.relied(x, root.role) if copied else self.owners.steady(x, root.role)
            if whole is None or (root.content is None and (is_whole(x) or not steady)):
                return None
            if not steady:
                if x.device.type == "cpu" and fingerprint(whole) != root.content:
                    return None
                return self._copy(x)
            if is_whole(x):
                self.owners.guard.rely(self.key(whole), whole, root.content, root.role)
        return self._leaf(x)

    def _copy(self, x: Tensor) -> Exact | Narrowed:
        """A copy that nobody else can write to, once for equal content."""
        kept = narrow(x.detach())
        if storage_key(kept.x) == storage_key(x):
            kept = kept.on(kept.x.clone())
        self._shared["copy", self.key(x)] = kept = self._once(kept)
        self.tape.cuts.clear()
        return kept

    # -- mixed precision --------------------------------------------------------------------------------------------

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy of x that autocast makes for the rule that runs."""
        if x.dtype == dtype:
            return x
        copy = x.to(dtype)
        self.origins[self.key(copy)] = x
        return copy

    def origin(self, x: Tensor) -> Tensor:
        """What x is autocast's copy of, or x."""
        return self.origins.get(self.key(x), x) if self.origins and strided(x) else x

    # -- residuals --------------------------------------------------------------------------------------------------

    def keep(self, x: Tensor, *, leaf: bool, config: Config | None = None, copied: bool = False) -> Residual:
        """A residual of x.

        Args:
            x: floating point (..., D). Of a copy that autocast made, the residual may stand for what it is a copy of.
            leaf: it enters gradients of parameters only, so one draw may serve all leaves of the same tensor. A path
                residual enters gradients of what comes before and is always drawn anew.
            config: default: that of the running module.
            copied: plain torch keeps something that was computed from x, not x itself.
        """
        own = self.config
        assert own is not None
        config = config or own
        origin = self.origin(x)
        if own.inputs == "reference":
            if self.held(origin) and self._by_reference(x, origin, copied):
                return self.note(Reference(origin, x.shape, self._used(origin)))
            if self._derived and (derived := self._had_again(origin)) is not None:
                return self.note(derived)
            if (again := self._again(origin, encoded_bytes(x.shape, config))) is not None:
                return self.note(again)
        if not leaf:
            return self.note(self._encode(x, config, "path"))
        key = (self.key(origin), x.dtype, config)
        found = self._shared.get(key)
        if found is None:
            found = self._shared[key] = self._leaf_residual(x, origin, config)
        return self.note(found)

    def keep_factor(self, x: Tensor, config: Config, fixed: bool = False) -> Residual:
        """A path residual (..., D) that multiplies the gradient element by element.

        Args:
            x: the factor.
            config: its codec; more bits are kept where the noise of the whole gradient asks for it.
            fixed: but not of this one.
        """
        if config.noise is None or not x.numel():
            return self.keep(x, leaf=False, config=config)
        self.factor, plan = self.place("factor"), self.state.scores.plan
        if self.measured:
            self._metered = True
            plan.measured(self.factor, rounding_of(x.detach(), config))
        return self.keep(x, leaf=False, config=plan.factor_config(self.factor, config, x.numel(), fixed))

    def _leaf_residual(self, x: Tensor, origin: Tensor, config: Config) -> Residual:
        if config.noise is None:
            return self._encode(x, config, "leaf", watched=True)
        name, plan = self._name(), self.state.scores.plan
        estimate = self.estimate(origin)
        config = plan.leaf_config(name, config, x.shape, estimate is not None, self.state.root)
        if estimate is not None and config.inputs == "reference":
            return replace(estimate, key=name)
        return self._encode(x, config, "leaf", watched=True, name=name)

    def _by_reference(self, x: Tensor, origin: Tensor, copied: bool = False) -> bool:
        """Whether a reference to what somebody else holds will do: plain torch keeps one, or nobody changes it."""
        if origin is x and not copied:
            if strided(x):
                self._kept.add(self.key(x))
            return True
        return self.steady(origin)

    def _used(self, x: Tensor) -> Callable[[], None] | None:
        """What a reference to somebody else's numbers calls when a backward pass reads it."""
        storage = storage_key(x) if strided(x) else 0
        if storage not in self.owners.numbers:
            return None
        return self.owners.guard.uses.expect(storage, self.owners.roles[storage])

    def keep_affine(self, x: Tensor, affine: Affine, config: Config, *, watched: bool) -> Residual:
        """A path residual of (x - shift) * scale, a tensor that nobody else has.

        Args:
            watched: its user tells the `Compressed.watch` what it is multiplied with.
        """
        return self.note(self._encode(x, config, "path", affine, watched))

    def cheap(self, x: Tensor, config: Config, gathered: Config | None = None, uses: int = 1) -> bool:
        """Whether x can be kept exactly for less than its codes would take, or those of what it was gathered from.

        Args:
            uses: how often codes would be kept.
        """
        x = self.origin(x)
        if self.free(x):
            return True
        limit = uses * encoded_bytes(x.shape, config)
        found = self.tape.gathered(x) if gathered is not None else None
        if gathered is not None and found is not None and (source := found[0].tensor()) is not None:
            limit = min(limit, encoded_bytes(source.shape, gathered))
        return self.tape.cut(x, limit) is not None

    def exact(self, x: Tensor) -> Residual:
        """A residual that loses nothing."""
        origin = self.origin(x)
        if self.held(origin) and self._by_reference(x, origin):
            return self.note(Reference(origin, x.shape, self._used(origin)))
        kept = (self._again(origin, nbytes(x)) if origin is not x else None) or self.exactly(x)
        return self.note(kept if isinstance(kept, Recomputed) else Lossless(kept))

    def gathered(self, x: Tensor, config: Config) -> Residual:
        """A path residual: of the smaller tensor that x was gathered, viewed or expanded from, if there is one."""
        origin = self.origin(x)
        found = self.tape.gathered(origin)
        beside = None if found is None else self._secured(found[1])
        if found is None or beside is None:
            return self.keep(x, leaf=False, config=config)
        source = found[0]
        tensor = source.tensor()
        assert tensor is not None
        if source.root is not None and not self._settled(tensor) and self._secure(source) is None:
            return self.keep(x, leaf=False, config=config)
        row, self.row = self.row, None  # the ledger gets one entry, of the whole
        kept = self.keep(tensor, leaf=False, config=config, copied=True)
        self.row = row
        program = self.tape.program(origin, [source, *found[1]])
        return self.note(Gathered(kept, beside, program, self.tape.shared))

    def _again(self, x: Tensor, limit: float) -> Recomputed | None:
        while (leaves := self.tape.cut(x, limit)) is not None:
            forms = self._secured(leaves)
            if forms is not None:
                return Recomputed(forms, self.tape.program(x, leaves), self.tape.shared)
        return None

    def _secured(self, leaves: Sequence[Node]) -> tuple[Exact | Narrowed, ...] | None:
        """What is kept of the leaves of a cut; `None` where one is lost, which no later cut will have."""
        forms = []
        for node in leaves:
            form = self._secure(node)
            if form is None:
                self.tape.lose(node)
                return None
            forms.append(form)
        return tuple(forms)

    def _encode(
        self, x: Tensor, config: Config, purpose: str, affine: Affine | None = None, watched: bool = False,
        name: str = "",
    ) -> Compressed:  # fmt: skip
        salt = (self.state.salt,) if self.state.salt else ()
        scores = watch = candidates = None
        key = name
        if watched and (self.batch.loss_rows is not None or _by_gradient(config)):
            key = name or self._name()
            rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
            if _by_gradient(config):
                scores, watch = self._scores(key, rows, x.shape, affine is None)
            config, scores, candidates = self._reached(key, config, rows, scores)
        packed = encode(x, config, self.seed(purpose, x.device, *salt), affine, scores, candidates)
        if self.state.observer is not None:
            x = x if affine is None else affine(x)
            self.state.observer(self.module, function_name(self.function), x, packed)
        return Compressed(packed, watch, key, self.module, self._key)

    def _name(self) -> str:
        """Of the residual that the running function keeps, the same in every pass."""
        name = f"{self.module}:{function_name(self.function)}"
        self._keys[name] = number = self._keys.get(name, 0) + 1
        return f"{name}:{number}"

    def place(self, kind: str) -> str:
        """The name of the operation that is running among those of its kind, the same in every measured pass."""
        name = f"{self.module}:{function_name(self.function)}"
        self._places[name] = number = self._places.get(name, 0) + 1
        return f"{name}:{number}/{kind}"

    @property
    def measured(self) -> bool:
        """Whether the error of what is running is measured in this pass."""
        config, plan = self.config, self.state.scores.plan
        if config is None or config.noise is None:
            return False
        plan.expect(config)  # a part that was unpickled has not said so
        # a captured graph waits for nothing, and keeps the rows it was captured with
        return plan.measures and not (torch.cuda.is_available() and capturing(torch.device("cuda")))

    def meter(self, key: str) -> Meter | None:
        """Of a residual or norm of this name, where it is to be measured."""
        if not self.measured:
            return None
        self._metered = True
        return Meter(self.state.scores.plan, key)

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
        lengths = norm_scores(rows) if self.measured or leaf.uneven else None
        if lengths is not None and self.measured:
            leaf.uneven = unevenness(lengths) > UNEVEN
        return by_length(scores, lengths) if leaf.uneven and lengths is not None else scores

    def _reached(
        self, key: str, config: Config, rows: Tensor, scores: Tensor | None
    ) -> tuple[Config, Tensor | None, int | None]:
        """Leave out the rows that the loss does not reach: config, scores and how many rows may be kept."""
        loss_rows, reduce = self.batch.loss_rows, config.reduce
        if loss_rows is None or self.matrix is None or isinstance(reduce, Project):
            return config, scores, None
        found = self.state.reach.reached(key, self.matrix, loss_rows, rows.shape[0])
        if found is None or not 0 < found[1] < rows.shape[0]:
            return config, scores, None
        self._assumed[key] = self.state.reach.steps[key]
        if scores is None:
            by_norm = reduce is not None and reduce.by == "norm"
            scores = norm_scores(rows) if by_norm else rows.new_zeros(rows.shape[0], dtype=torch.uint8)
        scores = torch.where(found[0], scores, LEFT_OUT)
        return config if reduce is not None else replace(config, reduce=Sample(1)), scores, found[1]

    def references(self, *tensors: Tensor) -> None:
        """The plain gradient rests on these themselves."""
        self._kept.update(self.key(part) for x in tensors for part in storages(x))

    def derived(self, y: Tensor, residual: Residual) -> None:
        """Remember that y can be had again from what others hold (features, their dropout, their aggregate)."""
        self._derived[self.key(y)] = residual

    def normed(
        self, y: Tensor, kept: Any, weight: Tensor | None, bias: Tensor | None, masks: Sequence[Mask | Reseeded] = ()
    ) -> None:
        """Remember that a norm's result y, after masks, can be estimated from what the norm keeps if it keeps all."""
        if isinstance(kept, Compressed) and kept.packed.config.reduce is None and kept.packed.shape == y.shape:
            weight, bias = (None if x is None else x.detach().clone() for x in (weight, bias))
            found: Normed | Passed = Normed(kept, weight, bias)
            for mask in masks:
                found = Passed(found, mask)
            self._estimated[self.key(y)] = found

    def estimate(self, x: Tensor) -> Normed | Passed | None:
        """What is known of a norm's result, also after ReLU and dropout."""
        return self._estimated.get(self.key(x)) if self._estimated else None

    def estimate_before_change(self, x: Tensor) -> Normed | Passed | None:
        """The same of a tensor that the function that runs is about to write to."""
        key, found = self._changing or (None, None)
        return found if found is not None and key == self.key(x) else None

    def passed(self, source: Normed | Passed | None, y: Tensor, mask: Mask | Reseeded, scale: float = 1.0) -> None:
        """Remember that y is what a mask passes of what `estimate` gave, and scales."""
        if source is not None:
            self._estimated[self.key(y)] = Passed(source, mask, scale)

    def aggregated(self, y: Tensor, graph: Graph, x: Tensor) -> None:
        """Remember that y = A x, as long as somebody else keeps x alive."""
        if self.held(x):
            self.tape.node(x)  # remembers the content
        self._aggregates[self.key(y)] = graph, weakref.ref(x), self.key(x)

    def source(self, y: Tensor) -> tuple[Graph, Tensor] | None:
        """A and x of a y = A x whose gradient nobody has asked for, where the recipe does not insist on keeping y."""
        if not self._aggregates or self.config is None or self.config.inputs != "reference":
            return None
        found = self._aggregates.get(self.key(y)) or self._average(y)
        if found is None:
            return None
        graph, ref, key = found
        x = ref()
        if x is None or self.key(x) != key or y._backward_hooks or y.retains_grad:
            return None
        return graph, x

    def _average(self, y: Tensor) -> tuple[Graph, weakref.ref[Tensor], Any] | None:
        """The same of a y that is a sum over neighbours divided by their number."""
        parts = division(self.tape, y)
        if parts is not None:
            for key, (graph, ref, source) in self._aggregates.items():
                if self._is_mean(parts, key, graph):
                    return replace(graph, mean=True), ref, source
        return None

    def _had_again(self, x: Tensor) -> Residual | None:
        """How x is had again from what others hold; of sums over neighbours, also their average."""
        found = self._derived.get(self.key(x))
        parts = division(self.tape, x) if found is None else None
        if parts is None:
            return found
        for key, source in self._derived.items():
            if isinstance(source, Aggregated) and self._is_mean(parts, key, source.graph):
                return replace(source, graph=replace(source.graph, mean=True))
        return None

    def _is_mean(self, parts: tuple[Node, Node], key: Any, graph: Graph) -> bool:
        """Whether a division is of the sum over a graph's neighbours that has this key, by their number."""
        if graph.mean or parts[0] is not self.tape.nodes.get(key):
            return False
        return counts(parts[1], self.tape.nodes.get(self.key(graph.parts[0])))

    def share(self, x: Tensor) -> Tensor:
        """A constant of the graph structure, kept once for equal content; int64 as int32 where it fits."""
        if self.held(x):
            return x
        packed = self._lossless(x)
        return packed.x if isinstance(packed, Exact | Narrowed) else x

    def pack_index(self, index: Tensor) -> Exact | Narrowed:
        """An index for a rule that saves it itself: by reference, or once and in int32."""
        kept: Exact | Narrowed = exact(index) if self.held(index) else self._lossless(index)
        if self.ledger is not None and self.row is not None and not self.held(index):
            self.ledger.kept_tensor(self.row, kept.x)
        return kept

    # -- the ledger -------------------------------------------------------------------------------------------------

    def note(self, residual: Residual | Any) -> Any:
        """Enter a residual in the ledger under the operation that is running."""
        if self.ledger is not None and self.row is not None:
            self.row.how = f"{self.row.how}; {residual.how}" if self.row.how else residual.how
            for x in residual.tensors:
                if not self.held(x):
                    self.ledger.kept_tensor(self.row, x)
        return residual

    def plain(self, *saved: Tensor | int | None) -> None:
        """What the running operation would keep without Dibit: tensors, or bytes that only it would allocate.

        Of a leaf that a rule got as it is, that is the copy which autocast would make.
        """
        if self.ledger is None or self.row is None:
            return
        for x in saved:
            if isinstance(x, int):
                self.row.plain += x
            elif x is not None and self.low not in (None, x.dtype):
                if not self.low_cached or self.key(x) not in self._copied:
                    self._copied.add(self.key(x))
                    self.row.plain += x.numel() * self.low.itemsize
            elif x is not None and not self.held(x):
                self.ledger.plain_tensor(self.row, x)
                self.row.shape = self.row.shape or tuple(x.shape)

    def open(self, function: Any) -> None:
        """Begin a ledger row for an operation that a rule takes."""
        if self.ledger is not None:
            self.row = self.ledger.add(Row(self.module, function_name(function), "", ()))

    # -- hooks ------------------------------------------------------------------------------------------------------

    def pack(self, x: Tensor) -> Kept:
        kept: Kept
        if self.inside:  # a rule's own tensors: entered in the ledger where they were made
            kept = exact(x)
            if strided(x) and (leaves := self._leaves.get(storage_key(x))) is not None:
                leaves.append(kept)
            return kept
        free = self.held(x)
        if strided(x):
            self.tape.saved(x)
        kept = exact(x) if free or self.config is None or not strided(x) else self.exactly(x)
        if self.ledger is not None and not free:
            row = Row(self.module, function_name(self.function), kept.how, tuple(x.shape))
            self.ledger.add(row)
            self.ledger.plain_tensor(row, x)
            self.enter(row, kept)
        return kept

    def exactly(self, x: Tensor) -> Kept:
        """x in the fewest bytes that lose nothing: from what is kept anyway, narrowed, once for equal content."""
        if ("lossless", self.key(x)) not in self._shared:
            own = nbytes(x) * (0.5 if x.dtype == torch.int64 else 1)
            again = self._again(x, own)
            if again is not None:
                return again
        return self._lossless(x)

    def _leaf(self, x: Tensor) -> Exact | Narrowed:
        key = ("leaf", self.key(x))
        if key in self._shared:
            return self._shared[key]  # type: ignore[no-any-return]
        x = x.detach()  # what is kept must not hold the graph that it belongs to
        if not self.held(x) and x.untyped_storage().nbytes() > 2 * nbytes(x):
            x = x.clone()  # a small view would keep all that it is a view of
        if self.held(x):  # of integers the content is compared: neither their version nor their owner's `set_` matters
            kept: Exact | Narrowed = exact(x.data if is_whole(x) else x)
        else:
            kept = self._lossless(x)
        self._shared[key] = kept = self._may_change(kept)
        self.tape.cuts.clear()  # what starts from x costs less now
        return kept

    def before_change(self, x: Any) -> None:
        """An operation is about to change x in place. Plain torch would not mind where it keeps the result alone."""
        if isinstance(x, list | tuple):
            for item in x:
                self.before_change(item)
        elif is_a(x, Tensor) and strided(x):
            storage = self._alive.hold(x)
            if storage not in self.owners.roles and not self._is_made(x):
                self._alias_changes(x, storage)
            own(self._leaves.pop(storage, ()))
            estimated = self.estimate(x)
            self._changes[storage] = self._changes.get(storage, 0) + 1
            self._changing = None if estimated is None else (self.key(x), estimated)
            self.owners.changed(storage)

    def _alias_changes(self, x: Tensor, storage: int) -> None:
        """The same of storages on the same memory: what DLPack gives back has one of its own."""
        address = x.untyped_storage().data_ptr()
        for node in list(self.tape.nodes.values()):
            other = node.ref()
            if other is not None and other.untyped_storage().data_ptr() == address != 0:
                alias = self._alive.hold(other)
                if alias != storage:
                    own(self._leaves.pop(alias, ()))
                    self._changes[alias] = self._changes.get(alias, 0) + 1
                    self._exposed.add(alias)

    def exposed(self, x: Any) -> None:
        """The memory of x is handed to somebody whose writes cannot be seen: NumPy, DLPack, a kernel by its address."""
        if is_a(x, Tensor) and strided(x):
            self.before_change(x)
            self._exposed.add(self._alive.hold(x))

    def _let_go(self) -> None:
        """What somebody else holds, returned, stored or caught, is out of sight from now on: leaves become copies."""
        self.origins.clear()
        for storage, leaves in self._leaves.items():
            if storage in self.owners.roles:
                continue
            others = holders(leaves[0].x)
            if others is None or others > len({leaf.x._cdata for leaf in leaves}):
                own(leaves)
                if self.ledger is not None:
                    for leaf in leaves:
                        self.ledger.copied(storage, leaf.x)

    def enter(self, row: Row, kept: Kept) -> None:
        """Enter in the ledger what a form takes."""
        assert self.ledger is not None
        for form in kept.leaves if isinstance(kept, Recomputed) else (kept,):
            if not self.held(form.x):
                self.ledger.kept_tensor(row, form.x)

    def _lossless(self, x: Tensor) -> Exact | Narrowed:
        if x.is_floating_point() and x.numel() != max(x.shape, default=0):
            return exact(x)  # an activation: its content is its own
        key = ("lossless", self.key(x))
        if key not in self._shared:
            kept = narrow(x)
            node = self.tape.nodes.get(self.key(x))
            # Of a tensor that an operation has inside, nobody can say whether it will be written to.
            if isinstance(kept, Narrowed) or (node is not None and node.call is not None and self._is_made(x)):
                kept = self._once(kept)
            self._shared[key] = kept
            self.tape.cuts.clear()  # what starts from x costs less now
        return self._shared[key]

    def _once(self, kept: Exact | Narrowed) -> Exact | Narrowed:
        """On an earlier constant of the same content: indices and normalised weights are made anew in each layer."""
        if kept.x.nbytes < SMALL and kept.x.device.type != "cpu":
            return kept  # comparing would wait for the device
        known = self._content.setdefault((type(kept), kept.x.dtype, kept.x.shape), [])
        for other in known:
            unchanged = not isinstance(other, Exact) or version(other.x) == other.version
            if unchanged and torch.equal(other.x, kept.x):
                self._may_change(other)
                return self._may_change(kept.on(other.x))
        known.append(kept)
        return kept

    def _may_change(self, kept: Exact | Narrowed) -> Exact | Narrowed:
        """What stands for more than plain torch's own reference becomes a copy where somebody else can write to it."""
        if isinstance(kept, Exact):
            kept.x = kept.x.detach()  # a tensor of its own, to be told from those of others
            self._leaves.setdefault(storage_key(kept.x), []).append(kept)
        return kept


def _name_node(result: Any, name: str) -> None:
    """Let the walk through autograd's graph know what multiplies the gradient here."""
    node = getattr(result, "grad_fn", None)
    if isinstance(node, torch.autograd.function.BackwardCFunction) and not getattr(node, "measured", ""):
        node.measured = name  # type: ignore[attr-defined]


def _by_gradient(config: Config) -> bool:
    return isinstance(config.reduce, Sample) and config.reduce.by == "gradient"


def _only_matrix(inputs: Any) -> Tensor | None:
    """The sparse matrix among the arguments, if there is just one."""
    found = [x for x in tensors_in(inputs) if x.layout == torch.sparse_csr]
    return found[0] if len(found) == 1 else None


def function_name(function: Any) -> str:
    name = resolve_name(function) or getattr(function, "__name__", str(function))
    return name.removeprefix("torch.").removeprefix("nn.functional.").removeprefix("Tensor.")


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """All tensors in nested containers, graph objects (`Data`, `SparseTensor`) included; no code of theirs is run."""
    if is_a(value, Tensor):
        yield value
        for part in _inside(value) if depth < _DEEPEST else ():
            yield from tensors_in(part, depth + 1)
    elif depth >= _DEEPEST or value is None or is_a(value, (int, float, str, torch.nn.Module, type)):
        return
    else:
        held: Iterable[Any] | None = items(value)
        if held is None:
            held = own_attributes(value).values() or mapped(value) or _scripted(value)
        for item in list(held):
            yield from tensors_in(item, depth + 1)


def _inside(x: Tensor) -> list[Any]:
    """The tensors that a subclass such as EdgeIndex is around, as it tells the compiler."""
    if type(x) in (Tensor, torch.nn.Parameter) or not defines(x, "__tensor_flatten__"):
        return []
    try:
        return [getattr(x, name) for name in x.__tensor_flatten__()[0]]  # type: ignore[attr-defined]
    except Exception:  # one that cannot be flattened has nothing that it shows
        return []


def _scripted(value: Any) -> list[Tensor]:
    """Of an object of TorchScript: torch_sparse.SparseTensor keeps a scripted storage."""
    if not str(static(type(value), "__module__")).startswith("torch"):
        return []
    try:
        names = ("row", "rowptr", "col", "value", "colptr", "csr2csc", "csc2csr")
        parts = [getattr(value.storage, f"_{name}", None) for name in names]
        return [part for part in parts if isinstance(part, Tensor)]
    except Exception:  # it has no storage
        return []
