"""What one operation keeps for its backward pass.

A residual is asked for as little as its user needs: a linear layer takes `outer`, which never rebuilds N x D.
Its tensors travel through `save_for_backward`, so that torch frees them with the graph and notices changes in place;
the rest of it, its description, is an attribute of the context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from dibit._torch.private.autograd import keeps_graph
from dibit.codec import Packed


class Saved(ABC):
    """What a backward pass reads: tensors, and a description of them."""

    @property
    @abstractmethod
    def how(self) -> str:
        """For the ledger: in what form the tensor is kept."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that takes memory."""

    @abstractmethod
    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same on tensors that come back from autograd.

        Args:
            tensors: as many as `tensors` has; or none, as `save` gives it, for the description alone. So take
                `tensors[0] if tensors else torch.empty(0)`.
        """

    def loaded(self) -> None:  # noqa: B027 - most have nothing to do
        """Called when `load` reads this residual in the backward pass."""


class Residual(Saved):
    """What stands for a tensor."""

    @abstractmethod
    def value(self) -> Tensor:
        """The tensor, or an unbiased estimate of it, in its own shape and dtype."""

    @property
    def encoded(self) -> Packed | None:
        """Its codes, where it is kept by the codec as it is."""
        return None

    @property
    def aggregated(self) -> tuple[Any, Residual] | None:
        """The constant graph over which this is a sum, and what is kept of the tensor that was summed."""
        return None

    @property
    def relu(self) -> tuple[Residual, Tensor] | None:
        """What is kept of the tensor whose ReLU this is, and packed bits, set where it passes."""
        return None

    @property
    def stages(self) -> Any:
        """The `Stages` that this is computed in, where it is the result of a norm, perhaps of ReLU and dropout, too."""
        return None

    def rounded(self) -> tuple[Packed | None, Any]:
        """The codes whose rounding is in `value`, and the mean square of what multiplies it there."""
        return self.encoded, 1.0

    def observe(self, dy: Tensor) -> None:
        """The backward pass is about to multiply it by these rows (N, D)."""

    def outer(self, dy: Tensor) -> Tensor:
        """dY^T X, or an unbiased estimate: (O, D) for dy (N, O) and x (N, D), of the dtype of dy or a wider one."""
        return outer(self.value(), dy)


class GradientMap(Saved):
    """What maps the gradient of an element-wise operation's result to that of its argument."""

    @abstractmethod
    def apply(self, grad: Tensor) -> Tensor:
        """The gradient of the argument, of the shape of `grad`."""


def outer(x: Tensor, dy: Tensor) -> Tensor:
    """dY^T X: (O, D) for dy (N, O) and x (..., D) of N rows, in the dtype of dy."""
    return dy.T @ x.reshape(-1, x.shape[-1]).to(dy.dtype)


def save(ctx: Any, *parts: Saved | Tensor | None) -> None:
    """Keep these for the backward pass of an `autograd.Function`; `load` gives them back in order."""
    tensors: list[Tensor] = []
    layout: list[tuple[Saved | None, int]] = []
    for part in parts:
        if part is None:
            layout.append((None, 0))
        elif isinstance(part, Tensor):
            tensors.append(part)
            layout.append((None, 1))
        else:
            tensors += part.tensors
            layout.append((part.with_tensors(()), len(part.tensors)))
    ctx.layout = layout
    ctx.save_for_backward(*tensors)


def load(ctx: Any) -> list[Any]:
    """What `save` kept: residuals on the tensors that autograd held, tensors, `None`.

    Calls `loaded` of each residual.
    """
    tensors = ctx.saved_tensors
    found: list[Any] = []
    at = 0
    for residual, count in released(ctx, "layout"):
        held, at = tensors[at : at + count], at + count
        if residual is None:
            found.append(held[0] if count else None)
        else:
            residual.loaded()
            found.append(residual.with_tensors(held))
    return found


FREED = (
    "the backward pass came through this graph a second time, after what it needs was freed; call "
    "backward(retain_graph=True) the first time."
)


def released(ctx: Any, attribute: str) -> Any:
    """An attribute of a context, which goes when autograd frees what it has saved: the graph itself may live on."""
    value = getattr(ctx, attribute)
    if value is None:
        raise RuntimeError(FREED)
    if not keeps_graph():
        setattr(ctx, attribute, None)
    return value
