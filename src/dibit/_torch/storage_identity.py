"""Which tensors are one: identity of storages, and what keeps an identity from being used again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_free = torch.UntypedStorage._free_weak_ref


def storage_key(x: Tensor) -> int:
    """Identity of a live storage. Only valid while the tensor is held, or an `Alive` that holds its storage weakly."""
    return x.untyped_storage()._cdata


def version(x: Tensor) -> int:
    """The version counter of a tensor's storage; 0 for one made in `inference_mode`, which has none."""
    return 0 if x.is_inference() else x._version


def strided(x: Tensor) -> bool:
    """Whether storage, shape and strides of a tensor can be asked for, and say what it holds.

    They cannot of nested tensors, of those that another library lays out, of wrappers of `torch.func`, of tensors
    without values; and quantised ones have a scale beside. All these are left exact, by reference.
    """
    if type(x) in _PLAIN:
        return x.layout == torch.strided and not (x.is_nested or x.is_quantized or x.is_meta or _wrapped(x))
    if issubclass(type(x), FakeTensor) or is_lazy(x):
        return False
    try:
        known = x.layout == torch.strided and not (x.is_nested or x.is_quantized or x.is_meta or _wrapped(x))
        return known and bool((x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), version(x)))
    except Exception:  # a subclass may answer with whatever it likes
        return False


def storages(x: Tensor) -> list[Tensor]:
    """The strided tensors that hold a tensor's memory: itself, or the parts of a sparse one; or none."""
    if strided(x):
        return [x]
    try:
        return _parts(x)
    except Exception:  # of a subclass, or a wrapper around a sparse tensor
        return []


def _parts(x: Tensor) -> list[Tensor]:
    if is_lazy(x) or x.layout == torch.strided:
        return []
    if x.layout == torch.sparse_coo:
        return [x._indices(), x._values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    return []


_use_count = getattr(torch._C, "_storage_Use_Count", None)


def holders(x: Tensor) -> int | None:
    """How many tensors (and NumPy arrays and the like, each by a tensor of its own) hold the memory of a strided one.

    `None` where this version of torch cannot tell.
    """
    if _use_count is None:
        return None
    storage = x.untyped_storage()
    return int(_use_count(storage._cdata)) - 1  # less Python's own object for the storage


class Weak:
    """A strided tensor's memory, held weakly: as long as anybody has any tensor on it."""

    def __init__(self, x: Tensor) -> None:
        self._reference = x.untyped_storage()._weak_ref()
        self._geometry = x.storage_offset(), x.shape, x.stride()
        self._like = x.dtype, x.device
        self._conj, self._neg = x.is_conj(), x.is_neg()

    def tensor(self) -> Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._reference)
        if storage is None:
            return None
        dtype, device = self._like
        x = torch.empty(0, dtype=dtype, device=device).set_(storage, *self._geometry)  # type: ignore[call-overload]
        x = torch._neg_view(x) if self._neg else x
        return x.conj() if self._conj else x

    def __del__(self) -> None:
        _free(self._reference)


class Alive:
    """Weak references to storages: their memory may go, their identities are not given out again while this lives.

    One object for all of them: torch's own `StorageWeakRef` runs Python code when it dies, thousands of times a step,
    and a Ctrl-C that arrives there is lost.
    """

    def __init__(self) -> None:
        self._references: dict[int, Any] = {}

    def hold(self, x: Tensor) -> int:
        """Hold the storage of a strided tensor weakly; its identity."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._references:
            self._references[key] = storage._weak_ref()
        return key

    def clear(self) -> None:
        while self._references:
            _free(self._references.popitem()[1])

    def __del__(self) -> None:
        self.clear()

    def __reduce__(self) -> Any:
        return Alive, ()  # a copy holds nothing
