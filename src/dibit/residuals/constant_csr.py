"""A constant sparse matrix and its transposed product, which is all that an aggregation needs to go back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dibit._torch.autocast import at_least_single
from dibit._torch.storage_identity import storage_key
from dibit.codec import ops
from dibit.codec.numpy_views import array


@dataclass(frozen=True)
class ConstantCSR:
    """A constant matrix in compressed rows, by its parts: autograd keeps those, and checks them.

    Attributes:
        parts: row pointers (N + 1,), columns (E,), values (E,); int64 or int32, and floating point.
        shape: (N, M).
        mean: each row is divided by its number of stored elements.
        counted: identity of the caller's tensor (E,) that has the row of each element, where there is one.
    """

    parts: tuple[Tensor, ...]
    shape: torch.Size
    mean: bool
    counted: Any = None
    count: ClassVar[int] = 3  # of the parts

    @property
    def pattern(self) -> tuple[Any, ...]:
        """Identity of the pattern, while its parts live."""
        return pattern(*self.parts[:2])

    def with_tensors(self, parts: Sequence[Tensor]) -> ConstantCSR:
        """The same on parts that come back from autograd."""
        return replace(self, parts=tuple(parts))

    def divides_by(self, divisor: Tensor) -> bool:
        """Whether the elements of a divisor (N, 1) are known to be the number of elements of each row, at least 1."""
        return False

    def product(self, x: Tensor) -> Tensor:
        """A x: (N, D) for x (M, D)."""
        crow, col, values = self.parts
        matrix = torch.sparse_csr_tensor(crow, col, values, self.shape, check_invariants=False)
        if self.mean and x.device.type == "cpu":
            return torch.sparse.mm(matrix, x, "mean")
        y = torch.sparse.mm(matrix, x)
        return y / crow.diff().clamp_(min=1)[:, None] if self.mean else y

    def transposed_product(self, dy: Tensor) -> Tensor:
        """A^T dY: (M, D) for dy (N, D), in the dtype of the values; on the CPU in float32 for values of half precision.

        On the CPU one counting sort and one parallel product; torch sorts and converts at each backward pass.
        """
        crow, col, values = self.parts
        rows, columns = self.shape
        if dy.device.type == "cpu":
            values = at_least_single(values)
        dy = dy.to(values.dtype)
        if self.mean:  # the values take the division, E of them instead of N x D
            count = crow.diff()
            share = count.clamp(min=1).to(values.dtype).reciprocal_()
            values = share.repeat_interleave(count, output_size=values.numel()).mul_(values)
        if dy.device.type != "cpu" or not values.numel():
            return torch.sparse_csc_tensor(crow, col, values, (columns, rows), check_invariants=False) @ dy
        from scipy.sparse import csc_array

        # A's arrays in compressed rows are A^T's in compressed columns
        csr = csc_array((array(values), array(col), array(crow)), shape=(columns, rows)).tocsr()
        indptr, indices, data = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
        return ops.aggregate(indptr, indices, data, dy.contiguous())


def pattern(crow: Tensor, col: Tensor) -> tuple[Any, ...]:
    """Identity of a matrix's live row pointers and columns."""
    return storage_key(crow), crow.storage_offset(), storage_key(col), col.storage_offset()
