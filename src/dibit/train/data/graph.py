"""A graph for node classification: raw, as a source gives it, and prepared for training."""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from dibit.tools.errors import UserError, shown
from dibit.train.data.splits import Masks, chosen
from dibit.train.settings import DataSettings

Features: TypeAlias = Any  # np.ndarray or scipy.sparse.csr_matrix; SciPy carries no types


@dataclass(frozen=True)
class Raw:
    """A graph as its source gives it.

    Attributes:
        name: What to call it.
        x: Features, (N, F), dense or CSR.
        edge_index: int64 (2, E), from row 0 to row 1.
        y: int64 (N,) classes, -1 = unlabelled; or float32 (N, C) of 0 and 1, several labels a node.
        num_classes: C.
        masks: Training, validation and test nodes, bool (N,) or (N, number of published splits); None if the
            source publishes no split.
        metric: "accuracy", "f1" (micro-F1) or "rocauc" (mean over the labels).
    """

    name: str
    x: Features
    edge_index: np.ndarray
    y: np.ndarray
    num_classes: int
    masks: Masks | None = None
    metric: str = "accuracy"


@dataclass(frozen=True)
class Split:
    """Indices of the training, validation and test nodes, int64."""

    train: Tensor
    val: Tensor
    test: Tensor


@dataclass(frozen=True)
class NodeDataset:
    """A graph ready for training.

    Attributes:
        name: What to call it.
        x: float32 (N, F).
        edge_index: int64 (2, E), sorted by row 1, then row 0; without duplicates, and with no self-loops or one a node.
        y: int64 (N,), -1 = unlabelled; or float32 (N, C).
        num_classes: C.
        masks: See `Raw`.
        metric: See `Raw`.
    """

    name: str
    x: Tensor
    edge_index: Tensor
    y: Tensor
    num_classes: int
    masks: Masks | None
    metric: str

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.x.shape[0]

    def split(self, seed: int) -> Split:
        """Return the published split, or draw one: 60 % training, 20 % validation, 20 % test, class by class.

        Of several published splits, `seed` chooses one: seed modulo their number. Unlabelled nodes are in no
        part.
        """
        labelled = self.y.numpy() >= 0 if self.y.dim() == 1 else np.ones(self.num_nodes, dtype=bool)
        if self.masks is not None:
            parts = [mask if mask.ndim == 1 else mask[:, seed % mask.shape[1]] for mask in self.masks]
        else:
            parts = self._random_parts(labelled, seed)
        indices = [np.flatnonzero(part & labelled) for part in parts]
        for what, index in zip(("training", "validation", "test"), indices, strict=True):
            if not len(index):
                raise UserError(
                    f"The graph {shown(self.name)} has no labelled {what} node; expected at least one. Check y and the "
                    "masks."
                )
        return Split(*(torch.from_numpy(index) for index in indices))

    def _random_parts(self, labelled: np.ndarray, seed: int) -> list[np.ndarray]:
        """Queue the nodes of each class in random order, and cut every queue at 0.6 and 0.8."""
        order = np.random.default_rng([seed, 60_20_20]).permutation(np.flatnonzero(labelled))
        classes = self.y.numpy()[order] if self.y.dim() == 1 else np.zeros(len(order), dtype=np.int64)
        order = order[np.argsort(classes, kind="stable")]
        sizes = np.bincount(classes, minlength=1)
        start = np.repeat(np.cumsum(sizes) - sizes, sizes)
        place = (np.arange(len(order)) - start + 0.5) / np.repeat(sizes, sizes)
        parts = []
        for low, high in ((0.0, 0.6), (0.6, 0.8), (0.8, 1.0)):
            part = np.zeros(self.num_nodes, dtype=bool)
            part[order[(place >= low) & (place < high)]] = True
            parts.append(part)
        return parts

    def fingerprint(self) -> str:
        """Return sizes and a checksum of the content: two runs on the same fingerprint see the same graph."""
        checksum = 0
        arrays: list[np.ndarray] = [t.contiguous().numpy() for t in (self.x, self.edge_index, self.y)]
        for array in (*arrays, *(self.masks or ())):
            checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, checksum)
        sizes = "-".join(str(n) for n in (*self.x.shape, self.edge_index.shape[1], self.num_classes))
        return f"{sizes}-{checksum:08x}"


def prepare(raw: Raw, settings: DataSettings, seed: int) -> NodeDataset:
    """Check a raw graph, reduce and scale its features as the settings say, and order its edges."""
    nodes, name = raw.x.shape[0], shown(raw.name)
    if not nodes or not raw.x.shape[1]:
        raise UserError(f"The graph {name} has features of shape {raw.x.shape}; expected (nodes, features).")
    masks = chosen(raw.masks, settings.split, raw.name)
    _check_finite(raw.x.data if scipy.sparse.issparse(raw.x) else raw.x, name)
    if settings.svd:
        reduced = truncated_svd(raw.x, settings.svd, seed, name)
        _check_finite(reduced, name)
        x = _dense(reduced, name)
    else:
        x = _dense(raw.x, name)
    if settings.standardize:
        deviation = x.std(axis=0, dtype=np.float64)
        x = (x - x.mean(axis=0, dtype=np.float64)) / np.where(deviation > 0, deviation, 1.0)
    return NodeDataset(
        name=raw.name,
        x=torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)),
        edge_index=torch.from_numpy(_ordered(raw.edge_index, nodes, settings.undirected, settings.self_loops)),
        y=torch.from_numpy(np.ascontiguousarray(raw.y)),
        num_classes=raw.num_classes,
        masks=masks,
        metric=raw.metric,
    )


def _check_finite(values: np.ndarray, name: str) -> None:
    """Refuse what is not a number, and what float32 has no room for."""
    count = int((~np.isfinite(values)).sum())
    if count:
        raise UserError(
            f"The features of {name} have {count:,} entries that are NaN or infinite; expected numbers. Replace them "
            "first."
        )
    largest = np.finfo(np.float32).max
    if values.dtype.itemsize > 4 and values.dtype.kind == "f":
        count = int((np.abs(values) > largest).sum())
        if count:
            raise UserError(
                f"The features of {name} have {count:,} entries beyond {largest:.2g}, the largest number of float32; "
                "expected smaller ones. Scale or replace them first."
            )


def truncated_svd(x: Features, rank: int, seed: int, name: str) -> np.ndarray:
    """Return U S of the `rank` largest singular values, float32 (N, rank): `x` in its leading directions.

    The mean is not taken out. The start vector comes from `seed`, and the largest entry of every direction is
    made positive, so that the result is the same in every run.
    """
    if rank >= min(x.shape):
        raise UserError(
            f"--svd is {rank}, expected less than {min(x.shape):,}, the smaller side of the features of "
            f"{name} ({x.shape[0]:,} x {x.shape[1]:,})."
        )
    from scipy.sparse.linalg import ArpackError, svds

    start = np.random.default_rng(seed).standard_normal(min(x.shape))
    matrix = x.astype(np.float32 if x.dtype == np.float32 else np.float64)
    largest = float(abs(matrix).max())
    if not largest:
        return np.zeros((x.shape[0], rank), np.float32)
    # The squares in between must neither overflow nor vanish; a power of two changes no digit.
    _, exponent = math.frexp(largest)
    if scipy.sparse.issparse(matrix):
        matrix.data = np.ldexp(matrix.data, -exponent)
    else:
        matrix = np.ldexp(matrix, -exponent)
    try:
        u, s, vt = svds(matrix, k=rank, v0=start.astype(matrix.dtype))
    except ArpackError as error:
        raise UserError(
            f"--svd is {rank}, and the singular values of the features of {name} cannot be computed "
            f"({shown(' '.join(str(error).split()))}); give another number, or leave --svd out."
        ) from error
    order = np.argsort(-s, kind="stable")
    signs = np.sign(vt[np.arange(rank), np.abs(vt).argmax(axis=1)])
    reduced = np.ldexp((u * s * signs)[:, order].astype(np.float64), exponent)
    if np.abs(reduced).max() > float(np.finfo(np.float32).max):
        raise UserError(
            f"--svd is {rank}, and the features of {name}, up to {largest:.2g}, are too large for it: the result is "
            "beyond float32. Scale them first."
        )
    return reduced.astype(np.float32)


def memory_bytes() -> int:
    """Return the machine's memory in bytes (2**63 where the system does not tell)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return 2**63


def _dense(x: Features, name: str) -> np.ndarray:
    """Return float32 features, or say that they would not fit."""
    size = x.shape[0] * x.shape[1] * 4
    if size > memory_bytes() // 2:
        raise UserError(
            f"The features of {name}, {x.shape[0]:,} x {x.shape[1]:,}, take {size / 2**30:,.1f} GB when "
            f"dense, more than half of this machine's memory ({memory_bytes() / 2**30:,.1f} GB); use --svd "
            "K, such as --svd 100."
        )
    return np.asarray(x.todense() if scipy.sparse.issparse(x) else x, dtype=np.float32)


def _ordered(edge_index: np.ndarray, nodes: int, undirected: bool, self_loops: bool) -> np.ndarray:
    """Sort edges by target, then source; drop duplicates and self-loops; add reverses and a loop a node if asked."""
    source, target = edge_index.astype(np.int64, copy=False)
    if undirected:
        source, target = np.concatenate([source, target]), np.concatenate([target, source])
    kept = source != target
    key = target[kept] * nodes + source[kept]
    if self_loops:
        key = np.concatenate([key, np.arange(nodes) * (nodes + 1)])
    key = np.unique(key)
    return np.stack([key % nodes, key // nodes])
