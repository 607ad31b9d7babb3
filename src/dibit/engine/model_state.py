"""What `compress` attaches to a model, and how it is found again."""

from __future__ import annotations

import pickle
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from typing import Any

from torch import Tensor, nn

from dibit._torch.private.modules import pre_hooks
from dibit._torch.private.tensors import is_lazy
from dibit._torch.storage_identity import storages
from dibit._torch.user_objects import attributes, defines, is_a, items, static
from dibit.codec import Packed
from dibit.engine.ledger import Ledger, Row
from dibit.engine.loss_reach import LossReach
from dibit.engine.owners import History
from dibit.engine.row_scores import Scores
from dibit.portable import Portable

Rule = Callable[..., Any]
# Sees what is compressed: module, operation, the tensor before its reduction, what is kept of it.
Observer = Callable[[str, str, Tensor, Packed], None]

_NOTHING = nn.Module()
# What most attributes of a module are: its settings, and the dictionaries of its parts.
_NO_TENSORS = frozenset((type(None), bool, int, float, str, dict, OrderedDict))


@dataclass(eq=False)
class ModelState(Portable, kind="State"):
    """Shared by the hooks of a model's modules; copied and pickled with them."""

    model: InitVar[nn.Module | None]
    rules: dict[Any, Rule] = field(default_factory=dict)
    passive: bool = False  # only observe: `track` on a plain model
    trackers: list[Callable[[list[Row]], None]] = field(default_factory=list)  # get the rows of each pass
    salt: int = 0  # other draws of the codec, the same dropout masks: the study of a gradient's error
    observer: Observer | None = None
    warned: bool = False
    said_exact: bool = False  # it has warned that gradients inside the forward pass keep that exact
    seeds: bool = False  # some module's config draws dropout's masks from seeds
    scripted: bool = False  # TorchScript runs some of the modules
    asks: bool | None = None  # a forward pass asks for a gradient; `None`: not known yet
    scores: Scores = field(default_factory=Scores)

    def __post_init__(self, model: nn.Module | None) -> None:
        self.belongs_to(model)

    def belongs_to(self, model: nn.Module | None) -> None:
        """What hangs on a model holds it weakly: a part may be copied, saved and kept without the whole."""
        self._root = None if model is None else weakref.ref(model)

    @property
    def root(self) -> nn.Module:
        """The compressed model; an empty module where only parts of it are left."""
        model = None if self._root is None else self._root()
        return _NOTHING if model is None else model

    @property
    def reach(self) -> LossReach:
        """How far the loss reaches, as passes with `loss_rows` have shown."""
        return self.scores.reach

    @property
    def history(self) -> History:
        """Which tensors of others came through the backward passes unchanged."""
        return self.scores.history

    @property
    def ledger(self) -> Ledger | None:
        """A new one for a pass, where someone tracks."""
        return Ledger(trackers=tuple(self.trackers)) if self.trackers else None

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that live as long as the model, with their names: parameters, buffers, cached graph structure."""
        yield from ((name, p) for name, p in self.root.named_parameters() if not is_lazy(p))
        yield from ((name, b) for name, b in self.root.named_buffers() if not is_lazy(b))
        for path, module in self.root.named_modules():
            for name, value in list(attributes(module).items()):
                if type(value) in _NO_TENSORS:
                    continue
                for x in (items(value) or ()) if is_a(value, (tuple, list)) else (value,):
                    if is_a(x, Tensor):
                        if storages(x) and not x.requires_grad:
                            yield f"{path}.{name}".lstrip("."), x
                    elif defines(x, "to_torch_sparse_csr_tensor"):  # a cached SparseTensor
                        for part in _parts(x):
                            yield f"{path}.{name}".lstrip("."), part

    def copied(self) -> dict[str, Any]:
        return {**vars(self), "trackers": [], "observer": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelState:
        twin: ModelState = super().__deepcopy__(memo)
        twin.belongs_to(memo.get(id(self.root)))  # not there if a part is copied alone
        return twin

    def packed(self) -> dict[str, Any]:
        rules, lost = {}, []
        for function, rule in self.rules.items():
            try:
                pickle.dumps((function, rule))
                rules[function] = rule
            except (pickle.PicklingError, AttributeError, TypeError):
                lost.append(getattr(function, "__name__", str(function)))
        if lost:
            warnings.warn(
                f"dibit: the rules for {', '.join(lost)} cannot be pickled, so the saved {type(self.root).__name__} is "
                "without them; call dibit.compress(model, rules=...) once more after loading it, or make them "
                "functions of a module's top level.",
                stacklevel=3,
            )
        return {
            "rules": pickle.dumps(rules),
            "passive": self.passive,
            "warned": self.warned,
            "seeds": self.seeds,
            "asks": self.asks,
            "scripted": self.scripted,
            "scores": {**self.scores.known, **self.scores.rows()},
            "steps": dict(self.reach.steps),
        }

    def unpacked(self, packed: dict[str, Any]) -> None:
        rules, known, steps = pickle.loads(packed["rules"]), packed["scores"], packed["steps"]
        names = ("passive", "warned", "seeds", "asks", "scripted")
        own = {name: packed[name] for name in names if name in packed}  # an older version wrote fewer
        ModelState.__init__(self, None, rules, **own)
        self.scores.load_state_dict(known)
        self.reach.steps = steps


def _parts(x: Any) -> list[Tensor]:
    """The tensors of a SparseTensor."""
    if not str(static(type(x), "__module__")).startswith("torch_sparse"):
        return []  # something else that has a method of this name
    try:
        return [part for part in (*x.coo(), x.storage.rowptr()) if isinstance(part, Tensor)]
    except Exception:  # of another version
        return []


class Hook(Portable):
    """A forward pre-hook of ours, which knows its module's name in the compressed model."""

    def __init__(self, state: ModelState, name: str) -> None:
        self.state, self.name = state, name

    def called(self, module: nn.Module) -> None:
        """A pass begins with this hook's module: the model itself, or a part that has lost the model."""
        if self.state.root is not module and (not self.name or self.state.root is _NOTHING):
            self.state.belongs_to(module)


@dataclass
class Found:
    """A compressed model of which a module holds the whole or a part.

    Attributes:
        state: what `compress` attached to it.
        path: its name in that module; of a part of it, the name of the first that is found.
        names: of its modules that were found, as the compressed model calls them.
    """

    state: ModelState
    path: str
    names: set[str]

    @property
    def whole(self) -> bool:
        return "" in self.names


def state_of(model: nn.Module) -> ModelState | None:
    """What `compress` attached to this module, if anything."""
    hooks: Any = pre_hooks(model).values()
    return next((hook.state for hook in hooks if is_a(hook, Hook)), None)


def states_in(model: nn.Module, passive: bool = False) -> list[Found]:
    """All compressed models in a module, or which it is a part of; or `passive` ones, which are only tracked."""
    found: dict[int, Found] = {}
    hook: Any
    for path, module in model.named_modules():
        for hook in pre_hooks(module).values():
            if is_a(hook, Hook) and hook.state.passive == passive:
                found.setdefault(id(hook.state), Found(hook.state, path, set())).names.add(hook.name)
    return list(found.values())
