"""What only the caller knows of a batch: which nodes its rows are, and of which rows the loss is made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Told by `batch`.

    Attributes:
        node_ids: int64 (rows,) or `None`.
        loss_rows: int64 (some,), bool (rows,) or `None`.
    """

    node_ids: Tensor | None = None
    loss_rows: Tensor | None = None


class _Local(threading.local):
    def __init__(self) -> None:
        self.batches: list[tuple[nn.Module, Batch]] = []


_local = _Local()
_NOTHING = Batch()


@contextlib.contextmanager
def batch(model: nn.Module, node_ids: Tensor | None = None, loss_rows: Tensor | None = None) -> Iterator[None]:
    """Tell a compressed model, for the forward passes in this block, what only the caller knows of its batch.

    `node_ids`: with `Sample(by="gradient")` scores then go by node, so that mini-batches have them too. A residual with
    fewer rows than the batch is taken for its first rows, as PyTorch Geometric's loaders and `trim_to_layer` order
    them. A wrong order costs precision, never correctness.

    `loss_rows`: rows that the loss cannot reach are not kept, from the second pass on; the gradient stays what it was.
    That takes a model that works row by row but for aggregations by one `torch.sparse` CSR matrix among its inputs; a
    BatchNorm in training lets every row before it be reached, and so does whatever is not known to work row by row.

    Where the model is not compressed, nothing happens.

    Args:
        model: the one that `dibit.compress` got.
        node_ids: int64 (rows,), numbers of the nodes in the whole graph, such as `batch.n_id` of a `NeighborLoader`.
        loss_rows: int64 (some,) or bool (rows,): the loss is made of these rows of the model's output, and no others.
            Pass the same tensor at each step: what it reaches is computed once.

    Raises:
        TypeError, ValueError: `node_ids` or `loss_rows` are no whole numbers, not one-dimensional, or negative.

    Example:
        >>> for batch in loader:
        ...     with dibit.batch(model, node_ids=batch.n_id):
        ...         out = model(batch.x, batch.edge_index)
    """
    if node_ids is not None:
        _check("node_ids", node_ids, "such as batch.n_id", torch.int64, torch.int32)
        node_ids = node_ids.long()
    if loss_rows is not None:
        _check("loss_rows", loss_rows, "the rows of the output, or a mask of them", torch.int64, torch.bool)
    _local.batches.append((model, Batch(node_ids, loss_rows)))
    try:
        yield
    finally:
        _local.batches.pop()


def _check(name: str, value: object, what: str, *dtypes: torch.dtype) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"batch got {name} of type {got}; expected an int64 tensor, {what}.")
    if value.dim() != 1 or (value.dtype != torch.bool and value.numel() and int(value.min()) < 0):
        negative = " with negative numbers" if value.dim() == 1 else ""
        raise ValueError(f"batch got {name} of shape {tuple(value.shape)}{negative}; expected (rows,), from 0 on.")


def current(model: nn.Module) -> Batch:
    """What the innermost `batch` block of this thread told of the model."""
    return next((told for known, told in reversed(_local.batches) if known is model), _NOTHING)
