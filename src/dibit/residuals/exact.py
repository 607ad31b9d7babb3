"""Forms that lose nothing: a tensor as it is, in fewer bytes, or as the operations that make it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dibit._torch.storage_identity import storages, version
from dibit.codec import ops
from dibit.codec.backends import reference
from dibit.recompute.program import Program, Shared
from dibit.residuals.base import Residual

_INT32 = torch.iinfo(torch.int32)


@dataclass
class Exact:
    """A tensor kept as it is by a hook. Hooks switch autograd's version check off, so the check is made here."""

    x: Tensor
    version: int
    how = "exact"

    def restore(self) -> Tensor:
        if not self.unchanged:
            raise RuntimeError(
                f"a tensor{_of_shape(self.x)} that the backward pass needs was changed in place after the "
                f"forward pass (version {version(self.x)}, expected {self.version}); use the out-of-place operation."
            )
        return self.x

    def with_tensor(self, x: Tensor) -> Exact:
        return exact(x)

    @property
    def unchanged(self) -> bool:
        """Whether nobody has written to what is kept."""
        return version(self.x) == self.version

    def exposed(self) -> Exact | None:
        """Replace the tensor by a detached alias, so that it can later be swapped for a copy; returns itself.

        The alias also tells this holder of the memory apart from others.
        """
        self.x = self.x.detach()
        return self

    @property
    def leaves(self) -> tuple[Exact]:
        """What takes memory."""
        return (self,)

    def residual(self) -> Residual:
        """The same for a rule."""
        return Lossless(self)


def _of_shape(x: Tensor) -> str:
    return f" of shape {tuple(x.shape)}" if storages(x) else ""  # not all can be asked


def exact(x: Tensor) -> Exact:
    """x as it is now; what is kept does not hold the graph that x belongs to."""
    return Exact(x.detach() if x.requires_grad else x, version(x))


def detach_copies(kept: Iterable[Exact]) -> None:
    """Replace tensors by copies, equal ones by one copy: their memory is about to change, or may from now on."""
    copies: dict[Any, Tensor] = {}
    for one in kept:
        key = one.x.storage_offset(), one.x.shape, one.x.stride(), one.x.dtype, one.x.is_conj(), one.x.is_neg()
        one.x = copies[key] if key in copies else copies.setdefault(key, one.x.clone())
        one.version = version(one.x)


@dataclass
class Narrowed:
    """A tensor kept in fewer bytes without loss: bools as bits, int64 as int32, expanded dimensions as one."""

    x: Tensor
    dtype: torch.dtype
    base: torch.Size
    shape: torch.Size
    how = "lossless"

    def restore(self) -> Tensor:
        if self.dtype == torch.bool:
            flat = reference.unpack(self.x.view(1, -1), self.base.numel(), 1).view(self.base).bool()
            return flat.expand(self.shape)
        return self.x.to(self.dtype).view(self.base).expand(self.shape)

    def with_tensor(self, x: Tensor) -> Narrowed:
        """The same on a tensor that comes back from autograd."""
        return Narrowed(x, self.dtype, self.base, self.shape)

    unchanged = True  # nobody else has it

    def exposed(self) -> None:
        """Nobody else can write to what is kept; see `Exact.exposed`."""

    @property
    def leaves(self) -> tuple[Narrowed]:
        """What takes memory."""
        return (self,)

    def residual(self) -> Residual:
        """The same for a rule."""
        return Lossless(self)


@dataclass(frozen=True)
class Recomputed(Residual):
    """The operations that made a tensor, and the few bytes that those start from: `Tape.cut`."""

    leaves: tuple[Exact | Narrowed, ...]
    program: Program
    shared: Shared
    how = "computed again"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(leaf.x for leaf in self.leaves)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Recomputed:
        return replace(self, leaves=with_tensors(self.leaves, tensors))

    def residual(self) -> Residual:
        return self

    def restore(self) -> Tensor:
        return self.program.run([leaf.restore() for leaf in self.leaves], self.shared)

    def value(self) -> Tensor:
        return self.restore()


@dataclass(frozen=True)
class Reference(Residual):
    """Kept by someone else (features, parameters): exact, and free.

    Attributes:
        used: called when a backward pass reads it.
    """

    x: Tensor | None
    shape: torch.Size
    used: Callable[[], None] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return () if self.x is None else (self.x,)

    how = "reference"

    def with_tensors(self, tensors: Sequence[Tensor]) -> Reference:
        return Reference(tensors[0] if tensors else None, self.shape, self.used)

    def value(self) -> Tensor:
        assert self.x is not None
        if self.used is not None:
            self.used()
        return self.x


@dataclass(frozen=True)
class Lossless(Residual):
    """Exact, in the fewest bytes of its own."""

    form: Exact | Narrowed

    @property
    def how(self) -> str:
        return self.form.how

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.form.x,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Lossless:
        return Lossless(*with_tensors((self.form,), tensors))

    def value(self) -> Tensor:
        return self.form.restore()


LosslessForm = Exact | Narrowed | Recomputed


def with_tensors(forms: Sequence[Exact | Narrowed], tensors: Sequence[Tensor]) -> tuple[Exact | Narrowed, ...]:
    """The same forms on tensors that come back from autograd (none: their description alone)."""
    held = tensors or [torch.empty(0)] * len(forms)
    return tuple(form.with_tensor(x) for form, x in zip(forms, held, strict=True))


def narrow(x: Tensor) -> Exact | Narrowed:
    """x in the fewest bytes of its own that lose nothing."""
    strides = zip(x.shape, x.stride(), strict=True)
    base = x[tuple(slice(0, 1) if stride == 0 and size > 1 else slice(None) for size, stride in strides)]
    if x.dtype == torch.bool and base.numel() >= 16:
        return Narrowed(ops.pack_mask(base.to(torch.float32)), x.dtype, base.shape, x.shape)
    if x.dtype == torch.int64 and base.numel() >= 4:
        low, high = base.aminmax()
        if low >= _INT32.min and high <= _INT32.max:
            return Narrowed(base.to(torch.int32).reshape(-1), x.dtype, base.shape, x.shape)
    return exact(x)
