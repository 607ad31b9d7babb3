"""Residuals whose form is settled when the forward pass ends, since it depends on what the model returns.

If the derivative of a function can be computed from its result, and the model returns that result, the result is kept
by reference. That is exact and costs nothing: the caller has it anyway, and plain torch keeps the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dibit._torch.private.autograd import keeps_graph
from dibit._torch.private.tensors import TensorWeakRef
from dibit._torch.storage_identity import storage_key, version
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import FREED
from dibit.residuals.exact import Exact


class KeptApart:
    """What a function keeps outside of `save_for_backward`; it is freed when autograd frees the saved tensors."""

    spent = False

    def settle(self, forward: ForwardPass, returned: set[int]) -> None:
        """The forward pass ends; `returned`: identities of the storages that the model returns."""
        raise NotImplementedError

    def drop(self) -> None:
        """Free what is kept."""
        raise NotImplementedError

    def use(self) -> None:
        """A backward pass begins."""
        if self.spent:
            raise RuntimeError(FREED)

    def used(self) -> None:
        """A backward pass has what it needs."""
        if not keeps_graph():
            self.spent = True
            self.drop()


class Slope(KeptApart):
    """A derivative, kept as codes, or computed from the function's result if the model returns that.

    Args:
        kept: residual of the derivative.
        of: the derivative as a function of the result.
    """

    def __init__(self, forward: ForwardPass, kept: Any, of: Callable[[Tensor], Tensor]) -> None:
        self.kept, self.of = kept, of
        self.result: Any = None  # weakly until the pass ends
        self.version = -1
        forward.settle_later(self)

    def watch(self, y: Tensor) -> None:
        """The result, once autograd knows it."""
        self.result, self.version = TensorWeakRef(y), version(y)

    def settle(self, forward: ForwardPass, returned: set[int]) -> None:
        y, self.result = None if self.result is None else self.result(), None
        if y is None or version(y) != self.version or storage_key(y) not in returned:
            return
        forward.accounting.replaced(self.kept, y)
        self.kept, self.result = None, Exact(y.detach(), self.version)

    def apply(self, grad: Tensor) -> Tensor:
        self.use()
        grad = grad * self.of(self.result.restore()).to(grad.dtype) if self.kept is None else self.kept.apply(grad)
        self.used()
        return grad

    def drop(self) -> None:
        self.kept = self.result = None
