"""Scores: the size of each row's gradient in the last step, one byte a row. The next step samples its rows by them.

Scores are stored outside the module's buffers: the `state_dict` is the plain model's, and each process has its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dibit._torch.private.tensors import is_lazy
from dibit._torch.storage_identity import strided, version
from dibit.codec.seed_stream import capturing, given, go_on
from dibit.engine.loss_reach import LossReach
from dibit.engine.noise.row_plan import RowPlan
from dibit.engine.owners import History
from dibit.residuals.gradient_norms import GradientNormObserver, decayed

_PARAMETERS, _ELEMENTS = 16, 16  # parameters whose values are compared, and values of each
_HISTORY = "steady/"  # before the roles of `History`
_ROWS = "rows/"  # before the names of `RowPlan.state_dict`
_REACH = "reach/"  # before the keys of `LossReach.state_dict`, beside those of the scores
_DRAWS = "draws/"  # before the names of `seed_stream.given`


@dataclass
class Scores:
    """The table of one model.

    Scores change when the optimiser has changed a parameter, not before: passes that add up to one step are sampled
    alike. A change shows in the version counters. If they have not changed after a backward pass, a few values of the
    parameters are compared, since some optimisers step through `p.data`. In a CUDA graph scores change with each
    replay, in a table that belongs to the graph from then on.

    Attributes:
        known: by residual, uint8 (nodes,).
        reach: what passes with `loss_rows` have shown; it goes into checkpoints with the scores.
        history: on the content of which tensors of others a pass may rely; likewise.
        plan: how many rows each residual keeps, by the measured noise of the gradient; likewise.
    """

    known: dict[str, Tensor] = field(default_factory=dict)
    reach: LossReach = field(default_factory=LossReach)
    history: History = field(default_factory=History)
    plan: RowPlan = field(default_factory=RowPlan)
    _pending: dict[str, list[tuple[Tensor | None, GradientNormObserver]]] = field(default_factory=dict, repr=False)
    _next: dict[str, Tensor] = field(default_factory=dict, repr=False)  # with the batches since the last change
    _used: set[str] = field(default_factory=set, repr=False)  # by passes since the last step
    _used_before: set[str] = field(default_factory=set, repr=False)  # and before that one
    _stamp: int | None = field(default=None, repr=False)
    _values: list[float] | None = field(default=None, repr=False)  # of the parameters, where the stamp stood still
    _warned: bool = field(default=False, repr=False)
    _captured: list[Tensor] = field(default_factory=list, repr=False)  # read and written by CUDA graphs

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """A forward pass begins; if the parameters have changed, what was measured counts from now on."""
        parameters = [p for p in parameters if not is_lazy(p)]
        stamp = sum(map(version, parameters))
        if any(capturing(table.device) for table in self.known.values()):
            return  # what a graph reads must be there before it
        if stamp == self._stamp:
            if not self._pending and not self._next:
                return
            before, self._values = self._values, _values(parameters)
            if before is None or before == self._values:
                self._gather()
                return
        else:
            self._values = None
        self._stamp = stamp
        self.plan.decide()
        # Drop residuals that neither of two steps has kept: the first pass keeps some that later ones do without.
        self.known = {key: table for key, table in self._latest().items() if key in self._used | self._used_before}
        self._used_before, self._used = self._used, set()
        self._next.clear()
        self._pending.clear()

    def _gather(self) -> None:
        """Put the batches measured so far into one table: however many there are before a step, memory stays flat."""
        for key, measured in self._pending.items():
            if measured[0][0] is not None:
                self._next[key] = _folded(self._next.get(key, self.known.get(key)), measured)
                for _, watch in measured:
                    watch.scores = None  # the observer reports again if another backward pass measures more
        self._pending = {key: measured for key, measured in self._pending.items() if measured[0][0] is None}

    def _latest(self) -> dict[str, Tensor]:
        """What is known, with all that was measured since."""
        found = {**self.known, **self._next}
        for key, measured in self._pending.items():
            table = _folded(found.get(key), measured)
            if table is not None:
                found[key] = table
        return found

    def lookup(self, key: str, x: Tensor, ids: Tensor | None) -> Tensor | None:
        """Scores of the rows of a residual x, uint8 (rows,); `None` where nothing is known of them."""
        if key not in self.known:
            return None
        table = self.known[key] = self.known[key].to(x.device)
        rows = x.shape[0]
        if ids is not None:
            ids = ids[:rows]
            if ids.numel() != rows:
                return None
            known = ids < table.numel()
            return torch.where(known, table[ids.clamp(max=table.numel() - 1)], 0)
        if table.numel() == rows:
            return table.clone() if capturing(table.device) else table  # the backward pass draws the same rows again
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"dibit: the scores of {key.partition(':')[0]!r} are of {table.numel():,} rows, but this batch has "
                f"{rows:,}; rows are kept by their norms instead. With mini-batches, name the nodes: "
                "with dibit.batch(model, node_ids=...).",
                stacklevel=2,
            )
        del self.known[key]
        return None

    def watch(self, key: str, ids: Tensor | None) -> GradientNormObserver:
        """Measure the gradient of a residual in the backward pass that follows."""
        self._used.add(key)
        live = self.known.get(key) if ids is None else None
        if live is not None and capturing(live.device):
            self._captured.append(live)
            return GradientNormObserver(lambda _: None, live)
        return GradientNormObserver(partial(self._measured, key, ids))

    def _measured(self, key: str, ids: Tensor | None, watch: GradientNormObserver) -> None:
        earlier = self._pending.get(key, []) if ids is not None else []  # of the whole graph the last one counts
        self._pending[key] = [*earlier, (ids, watch)]

    def state_dict(self) -> dict[str, Tensor]:
        """All that training has taught, for a checkpoint made between two steps: with it, what follows is bit for bit
        what would have followed.

        Returns:
            The scores by residual, uint8 (nodes,); by "reach/" and residual how far the loss reaches, int64 (), as
            far as passes were given `loss_rows`; by "steady/" and argument or attribute whether passes may rely
            on its content, bool (); by "rows/" what was measured of the gradient's error, and how many rows are kept
            for it, float64 (values,); after "draws/" what the codec's next draws depend on beside torch's generator,
            int64 (), which is of this process rather than of the model.
        """
        self.history.settle()
        learnt = {_HISTORY + role: torch.tensor(True) for role, steady in self.history.steady.items() if steady}
        learnt |= {_REACH + key: steps for key, steps in self.reach.state_dict().items()}
        learnt |= {_DRAWS + name: torch.tensor(value) for name, value in given().items()}
        return {**self._latest(), **self.rows(), **learnt}

    def rows(self) -> dict[str, Tensor]:
        """The part of `state_dict` that the plan of rows makes."""
        return {_ROWS + key: table for key, table in self.plan.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave, of this version or an older one; other devices are allowed.

        Raises:
            TypeError: a value is neither a uint8 tensor with one dimension nor, after "reach/" or "draws/", an int64
                number nor, after "steady/", a bool nor, after "rows/", a float64 tensor with one dimension.
        """
        scores, reach, steady, draws, rows = {}, {}, {}, {}, {}
        for key, value in state.items():
            dtype, dims = (value.dtype, value.dim()) if isinstance(value, Tensor) else (None, 0)
            if (dtype, dims) == (torch.uint8, 1):
                scores[key] = value
            elif (dtype, dims) == (torch.int64, 0) and key.startswith(_REACH):
                reach[key.removeprefix(_REACH)] = value
            elif (dtype, dims) == (torch.int64, 0) and key.startswith(_DRAWS):
                draws[key.removeprefix(_DRAWS)] = int(value)
            elif (dtype, dims) == (torch.bool, 0) and key.startswith(_HISTORY):
                steady[key.removeprefix(_HISTORY)] = bool(value)
            elif (dtype, dims) == (torch.float64, 1) and key.startswith(_ROWS):
                rows[key.removeprefix(_ROWS)] = value
            else:
                what = f"{dtype} of shape {tuple(value.shape)}" if dtype is not None else type(value).__name__
                raise TypeError(
                    f"the scores of {key!r} are {what}; expected uint8 (nodes,), as dibit.scores(model).state_dict() "
                    "gives them."
                )
        self.known = scores
        self._used = set(scores)
        self.reach.load_state_dict(reach)
        self.plan.load_state_dict(rows)
        self.history = History(steady)
        if {"state", "first", "again"} <= draws.keys():  # an older version has written none
            go_on(draws["state"], draws["first"], draws["again"])
        self._next.clear()
        self._pending.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "known": dict(self.known),
            "reach": self.reach,
            "history": self.history,
            "plan": self.plan,
            "_warned": self._warned,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**vars(Scores()), "_used": set(state["known"]), **state})


def _values(parameters: list[Tensor]) -> list[float]:
    """Some values of some trained parameters: enough to notice that an optimiser has stepped."""
    usual = [p for p in parameters if type(p) is nn.Parameter and strided(p)]
    trained = [p.detach() for p in usual if p.requires_grad and p.numel()]
    some = trained[:: len(trained) // _PARAMETERS + 1]
    parts = [p.view(-1)[:: p.numel() // _ELEMENTS + 1] for p in some if p.is_contiguous() and not p.is_complex()]
    return [float(x) for part in parts for x in part.tolist()]


def _folded(table: Tensor | None, measured: Iterable[tuple[Tensor | None, GradientNormObserver]]) -> Any:
    """A table with all that was measured, in order."""
    for ids, watch in measured:
        if watch.scores is not None:
            table = _updated(table, ids, watch.scores)
    return table


def _updated(old: Tensor | None, ids: Tensor | None, new: Tensor) -> Tensor:
    """A table with new scores of these nodes, or of all.

    An earlier, larger score fades by a half of its squared norm at a time: a row whose gradient happened to be small,
    by dropout's draw, is not forgotten at once. (Measured: it halves the gradient's error late in training.) Where
    the new score is not finite, the old one stays.
    """
    if ids is None:
        return decayed(torch.zeros_like(new) if old is None or old.numel() != new.numel() else old, new)
    ids = ids[: new.numel()]
    table = new.new_zeros(max(0 if old is None else old.numel(), int(ids.max()) + 1 if ids.numel() else 0))
    if old is not None:
        table[: old.numel()] = old
    table[ids] = decayed(table[ids], new)
    return table
