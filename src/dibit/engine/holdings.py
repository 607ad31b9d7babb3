"""Whose memory a tensor lies in, and which content it has: what every residual asks first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dibit._torch.private.autograd import next_sequence_number, sequence_number
from dibit._torch.private.tensors import base_of, flattened, scripted
from dibit._torch.storage_identity import Alive, storage_key, storages, strided, version
from dibit._torch.user_objects import attributes as own_attributes
from dibit._torch.user_objects import is_a, items, mapped
from dibit.engine.owners import Owners, is_whole

_DEEPEST = 6  # nested containers that are searched for the caller's tensors


class Holdings:
    """What somebody else holds through the backward pass, what this pass has made, and how often it wrote to it.

    Args:
        owners: on the content of which tensors of others a pass may rely.

    Attributes:
        roles: by storage, as what somebody else holds it: an argument, a parameter, a buffer.
        referenced: keys of tensors that plain torch would also keep by reference.
        copies: by the key of a copy that autocast made, the original.
    """

    def __init__(self, owners: Owners) -> None:
        self.owners = owners
        self.roles = owners.roles
        self.referenced: set[Any] = set()
        self.copies: dict[Any, Tensor] = {}
        self.began = next_sequence_number()  # nodes of autograd with a higher number are of this pass
        self._alive = Alive()  # keeps identities in the tables below from being used again
        self._made: set[int] = set()  # storages of what this pass has made without a gradient
        self._exposed: set[int] = set()  # storages that somebody may write to out of sight
        self._changes: dict[int, int] = {}  # by storage: how often this pass wrote to it, past version counters too

    def hold(self, x: Tensor, role: str) -> None:
        """Somebody else holds x in this role."""
        for part in storages(x):
            storage = self._alive.hold(part)
            self.roles.setdefault(storage, role if part is x else f"{role}, {part.dtype}")
            if not is_whole(part):
                self.owners.numbers.add(storage)

    def held(self, x: Tensor) -> bool:
        """Whether someone else keeps the memory of x through the backward pass: inputs, parameters, buffers."""
        return all(storage_key(part) in self.roles for part in storages(x))

    def key(self, x: Tensor) -> tuple[Any, ...]:
        """Identity of a tensor's content: live storage, version, geometry. Never its address."""
        storage = self._alive.hold(x)
        count = version(x) + (self._changes[storage] << 32) if storage in self._changes else version(x)
        dtype = x.dtype
        late = x.is_neg(), dtype.is_complex and x.is_conj()  # signs that torch writes out late
        return storage, count, x.storage_offset(), x.shape, x.stride(), dtype, late

    def storage(self, x: Tensor) -> int:
        """Identity of a strided tensor's storage, which stays its own as long as the pass."""
        return self._alive.hold(x)

    def is_made(self, x: Tensor) -> bool:
        """Whether this pass has made the memory of x."""
        storage = storage_key(x)
        if storage in self.roles or storage in self._exposed:
            return False
        base = base_of(x)
        made = base.grad_fn is not None and sequence_number(base.grad_fn) >= self.began
        return made or storage in self._made

    def made(self, x: Tensor) -> None:
        """This pass has made the memory of x; nobody else can write to it out of sight."""
        if strided(x):
            self._made.add(self._alive.hold(x))

    def settled(self, x: Tensor) -> bool:
        """Whether a residual may rely on the content of x, which somebody else holds, by what earlier passes showed."""
        return all(self.owners.steady(part, self.roles.get(storage_key(part), "")) for part in storages(x))

    def refer(self, *tensors: Tensor) -> None:
        """Note that plain torch, too, would keep these tensors by reference."""
        self.referenced.update(self.key(part) for x in tensors for part in storages(x))

    def on_use(self, x: Tensor) -> Callable[[], None] | None:
        """A callback for a reference to the caller's tensor x, to be called when a backward pass reads it.

        `None` if x is not floating-point: then its content is compared instead.
        """
        storage = storage_key(x) if strided(x) else 0
        if storage not in self.owners.numbers:
            return None
        return self.owners.guard.uses.expect(storage, self.roles[storage])

    # -- writes -----------------------------------------------------------------------------------------------------

    def count_change(self, storage: int) -> None:
        """The pass writes to a storage: its tensors have another content from now on."""
        self._changes[storage] = self._changes.get(storage, 0) + 1

    def expose(self, storage: int) -> None:
        """Somebody may write to a storage out of sight: NumPy, DLPack, a kernel by its address."""
        self._exposed.add(storage)

    def is_exposed(self, x: Tensor) -> bool:
        """Whether somebody may write to x out of sight."""
        return self.storage(x) in self._exposed

    # -- autocast's copies ------------------------------------------------------------------------------------------

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy of x that autocast makes for the rule that runs."""
        if x.dtype == dtype:
            return x
        copy = x.to(dtype)
        self.copies[self.key(copy)] = x
        return copy

    def origin(self, x: Tensor) -> Tensor:
        """What x is autocast's copy of, or x."""
        return self.copies.get(self.key(x), x) if self.copies and strided(x) else x

    def clear(self) -> None:
        """The pass has ended: identities may be used again."""
        for seen in (self._made, self._exposed, self._changes, self.referenced, self.roles, self.copies):
            seen.clear()
        self._alive.clear()


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
            held = own_attributes(value).values() or mapped(value) or scripted(value)
        for item in list(held):
            yield from tensors_in(item, depth + 1)


def only_matrix(inputs: Any) -> Tensor | None:
    """The sparse matrix among the arguments, if there is just one."""
    found = [x for x in tensors_in(inputs) if x.layout == torch.sparse_csr]
    return found[0] if len(found) == 1 else None


def _inside(x: Tensor) -> list[Any]:
    """The tensors that a subclass such as EdgeIndex is around."""
    if type(x) in (Tensor, torch.nn.Parameter):
        return []
    try:
        return flattened(x)
    except Exception:  # one that cannot be flattened has nothing that it shows
        return []
