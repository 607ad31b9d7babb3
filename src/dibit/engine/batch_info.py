"""What only the caller knows of a batch: which nodes its rows are, and of which rows the loss is made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dibit._torch.private.modes import compiled_from
from dibit._torch.storage_identity import storages
from dibit.engine.model_state import Found, ModelState, states_in

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # return what is returned inside


@dataclass(frozen=True)
class BatchInfo:
    """What the caller gave to `dibit.batch`.

    Attributes:
        node_ids: int64 (rows,) or `None`.
        loss_rows: int64 (some,), bool (rows,) or `None`.
        least: rows that an output must have for `loss_rows`.
    """

    node_ids: Tensor | None = None
    loss_rows: Tensor | None = None
    least: int = 0

    def check_inputs(self, state: ModelState, given: list[Tensor]) -> None:
        """A pass of a compressed model begins with these tensors.

        Raises:
            ValueError: there is nothing of as many rows as there are `node_ids`, or `loss_rows` are not in the graph.
        """
        if self.node_ids is not None:
            ids = self.node_ids.numel()
            known = [x for x in given if storages(x)]
            if ids not in (x.shape[0] for x in (*known, *(x for _, x in state.constants())) if x.dim()):
                shapes = ", ".join(str(tuple(x.shape)) for x in known) or "nothing"
                raise ValueError(
                    f"batch got {ids:,} node_ids, but {type(state.root).__name__} was called with tensors of other "
                    f"lengths ({shapes}); expected the number of each row's node, such as batch.n_id."
                )
        if self.loss_rows is not None:
            for x in given:
                if x.layout == torch.sparse_csr and x.shape[0] == x.shape[1]:
                    self._compare(x.shape[0], "the matrix has")

    def check_output(self, state: ModelState, returned: list[Tensor]) -> None:
        """The same pass has returned these.

        Raises:
            ValueError: `loss_rows` are not rows of it.
        """
        rows = [x.shape[0] for x in returned if storages(x) and x.dim()]
        if self.loss_rows is not None and rows and not any(map(self._fits, rows)):
            self._compare(max(rows), f"the output of {type(state.root).__name__} has")

    def _fits(self, rows: int) -> bool:
        assert self.loss_rows is not None
        return rows == self.least if self.loss_rows.dtype == torch.bool else rows >= self.least

    def _compare(self, rows: int, what: str) -> None:
        if not self._fits(rows):
            assert self.loss_rows is not None
            mask = self.loss_rows.dtype == torch.bool
            given = f"a mask of {self.least:,} rows" if mask else f"row {self.least - 1:,}"
            raise ValueError(
                f"batch got loss_rows with {given}, but {what} {rows:,} rows; expected rows of the model's output, or "
                "a mask of as many."
            )


class _Local(threading.local):
    def __init__(self) -> None:
        self.batches: list[tuple[list[nn.Module], BatchInfo]] = []


_local = _Local()
_NOTHING = BatchInfo()


@contextlib.contextmanager
def batch(model: nn.Module, node_ids: Tensor | None = None, loss_rows: Tensor | None = None) -> Iterator[None]:
    """Tell a compressed model, for the forward passes in this block, what only the caller knows of its batch.

    `node_ids`: with `Sample(by="gradient")` scores then go by node, so that mini-batches have them too. A residual with
    fewer rows than the batch is taken for its first rows, as PyTorch Geometric's loaders and `trim_to_layer` order
    them. A wrong order costs precision, never correctness. A node may occur twice.

    `loss_rows`: rows that the loss cannot reach are not kept, from the second pass on; the gradient stays what it was.
    That takes a model that works row by row but for aggregations by one `torch.sparse` CSR matrix among its inputs; a
    BatchNorm in training lets every row before it be reached, and so does whatever is not known to work row by row.
    A row may occur twice.

    Where nothing of the model is compressed, nothing happens: one loop serves the plain model too.

    Args:
        model: the one that `dibit.compress` got, a part of it, or what contains it: then for each model inside.
        node_ids: int64 (rows,), numbers of the nodes in the whole graph, such as `batch.n_id` of a `NeighborLoader`.
        loss_rows: int64 (some,) or bool (rows,): the loss is made of these rows of the model's output, and no others.
            Pass the same tensor at each step: what it reaches is computed once. The model is then the compressed one,
            as it is or within DDP, `torch.compile` or `AveragedModel`: others may go on to mix the rows.

    Raises:
        TypeError: the model is no module, or `node_ids` or `loss_rows` are no whole numbers.
        ValueError: they are not one-dimensional, or negative; or `loss_rows` are given for a part of a compressed
            model, or for what contains one and returns something else. The forward pass raises it where the length of
            `node_ids` is that of no tensor that the model was called with, or `loss_rows` are not rows of its output.

    Example:
        >>> for batch in loader:
        ...     with dibit.batch(model, node_ids=batch.n_id):
        ...         out = model(batch.x, batch.edge_index)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"batch got a {type(model).__name__}; expected the model that dibit.compress got.")
    least = 0
    if node_ids is not None:
        _check("node_ids", node_ids, "such as batch.n_id", torch.int64, torch.int32)
        node_ids = node_ids.long()
    found = states_in(model)
    if loss_rows is not None:
        least = _check("loss_rows", loss_rows, "the rows of the output, or a mask of them", torch.int64, torch.bool)
        _check_returns(model, found)
    entry = [model, *(each.state.root for each in found)], BatchInfo(node_ids, loss_rows, least)
    batches = _local.batches  # of this thread: a generator may be closed in another
    batches.append(entry)
    try:
        yield
    finally:
        batches[:] = [each for each in batches if each is not entry]  # blocks of two generators may cross


def _check_returns(model: nn.Module, found: list[Found]) -> None:
    """What a model returns is what the compressed model in it returns."""
    inside: Any = model
    while (compiled := compiled_from(inside)) is not None or isinstance(inside, _WRAPPERS):
        inside = inside.module if compiled is None else compiled
    for each in found:
        if each.state.root is not inside:
            own = type(each.state.root).__name__
            what = f"a part of the compressed {own}" if not each.whole else f"a {type(model).__name__} around {own}"
            raise ValueError(
                f"batch got loss_rows for {what}; they are rows of what the compressed model returns: "
                "call dibit.batch with that model."
            )


def _check(name: str, value: object, what: str, *dtypes: torch.dtype) -> int:
    """Check an argument of `batch`; returns the least number of rows that a tensor with these rows or nodes has."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"batch got {name} of type {got}; expected an int64 tensor, {what}.")
    least, most = 0, value.numel() - 1
    if value.dtype != torch.bool and value.numel():
        least, most = (int(x) for x in value.aminmax())
    if value.dim() != 1 or least < 0:
        negative = " with negative numbers" if value.dim() == 1 else ""
        raise ValueError(f"batch got {name} of shape {tuple(value.shape)}{negative}; expected (rows,), from 0 on.")
    return most + 1


def innermost(model: nn.Module) -> BatchInfo | None:
    """What the innermost `batch` block of this thread says about the compressed model."""
    for models, info in reversed(_local.batches):
        if any(each is model for each in models):
            return info
    return None


def current(model: nn.Module) -> BatchInfo:
    """The same; empty where there is no block."""
    return innermost(model) or _NOTHING
