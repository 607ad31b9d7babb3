"""Which tensors are one: identity of storages, and which tensors have a storage that can be asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit._torch.private.tensors import (
    Alive,
    Weak,
    coo_parts,
    holders,
    is_fake,
    is_lazy,
    is_wrapped,
    storage_key,
    version,
)

__all__ = ["Alive", "Weak", "holders", "storage_key", "storages", "strided", "version"]

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def strided(x: Tensor) -> bool:
    """Whether storage, shape and strides of a tensor can be asked for, and say what it holds.

    They cannot of nested tensors, of those that another library lays out, of wrappers of `torch.func`, of tensors
    without values; and quantised ones have a scale beside. All these are left exact, by reference.
    """
    if type(x) in _PLAIN:
        return x.layout == torch.strided and not (x.is_nested or x.is_quantized or x.is_meta or is_wrapped(x))
    if is_fake(x) or is_lazy(x):
        return False
    try:
        known = x.layout == torch.strided and not (x.is_nested or x.is_quantized or x.is_meta or is_wrapped(x))
        return known and bool((storage_key(x), x.storage_offset(), x.shape, x.stride(), version(x)))
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
        return coo_parts(x)
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    return []
