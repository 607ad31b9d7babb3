"""A user's own graph from an ``.npz`` file (the format is in docs/data.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.sparse

from dibit.tools.errors import UserError, nearest, shown
from dibit.train.data.archive import Archive
from dibit.train.data.graph import Features, Raw, memory_bytes
from dibit.train.data.splits import NAMES as MASKS
from dibit.train.data.splits import Masks, oriented, overlap

_CSR = ("x_indptr", "x_indices", "x_values", "x_shape")
_KNOWN = ("edge_index", "x", *_CSR, "y", *MASKS, "num_classes")
MOST_CLASSES = 100_000  # of a graph with fewer nodes than that: an output layer that fits anywhere


def load_npz(path: str | Path) -> Raw:
    """Read a graph and check every array against the format.

    Raises:
        UserError: With the file, what is wrong in it, and what was expected.
    """
    path = Path(path)
    with Archive(path, memory_bytes()) as archive:
        names = archive.names
        arrays = {name: archive.read(name) for name in _KNOWN if name in names}
    return _Reader(path, names, arrays).graph()


class _Reader:
    """Checks the arrays of one file.

    Args:
        path: Of the file, for messages.
        names: Of all its arrays, for messages.
        arrays: Those of the format.
    """

    def __init__(self, path: Path, names: list[str], arrays: Mapping[str, np.ndarray]) -> None:
        self.stem, self.names, self.arrays = path.stem, names, arrays
        self.file, self.place = f"The file {shown(path)}", f"In {shown(path)}"

    def graph(self) -> Raw:
        """The whole graph."""
        x = self._features()
        nodes = x.shape[0]
        y, classes = self._labels(nodes)
        edge_index, masks = self._edges(nodes), self._masks(nodes)
        return Raw(self.stem, x, edge_index, y, classes, masks, "accuracy" if y.ndim == 1 else "f1")

    def _array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            hint = nearest(name, [a for a in self.names if a not in _KNOWN], most=1)
            have = shown(", ".join(sorted(self.names)) or "nothing", 200)
            raise UserError(f"{self.file} has no array {name!r} (it holds {have}); see docs/data.md.{hint}")
        return self.arrays[name]

    def _whole(self, name: str) -> np.ndarray:
        """An array of whole numbers, int64."""
        array = self._array(name)
        if array.dtype.kind not in "iu":
            raise UserError(f"{self.place}, {name} is {array.dtype}, expected whole numbers (int32 or int64).")
        if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
            raise UserError(f"{self.place}, {name} holds {array.max()}, expected numbers below 2**63.")
        return array.astype(np.int64)

    def _features(self) -> Features:
        sparse = [name for name in _CSR if name in self.arrays]
        if "x" not in self.arrays and sparse:
            return self._sparse_features()
        x = self._array("x")
        if sparse:
            raise UserError(
                f"{self.file} has both x and {', '.join(sparse)}; expected dense features or those of a CSR matrix, "
                "not both. Leave one out."
            )
        if x.ndim != 2:
            raise UserError(f"{self.place}, x is {x.dtype} of shape {x.shape}, expected numbers of shape (N, F).")
        return x

    def _sparse_features(self) -> Features:
        indptr, indices, shape = (self._whole(name) for name in ("x_indptr", "x_indices", "x_shape"))
        values = self._array("x_values")
        if shape.shape != (2,) or (shape < 1).any():
            raise UserError(f"{self.place}, x_shape is {shown(shape.tolist())}, expected two positive numbers, (N, F).")
        nodes, width = (int(n) for n in shape)
        if indptr.shape != (nodes + 1,) or indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any():
            raise UserError(f"{self.place}, x_indptr is not the row pointer of a CSR matrix of {nodes:,} rows.")
        if values.shape != indices.shape or values.ndim != 1 or indptr[-1] != len(indices):
            raise UserError(
                f"{self.place}, x_indices has shape {indices.shape} and x_values {values.shape}, expected "
                f"({int(indptr[-1]):,},) for both, the last entry of x_indptr."
            )
        if len(indices) and (indices.min() < 0 or indices.max() >= width):
            raise UserError(
                f"{self.place}, x_indices runs from {indices.min()} to {indices.max()}, expected 0 to {width - 1}."
            )
        if values.dtype.kind == "b" or values.dtype.itemsize not in (1, 2, 4, 8) or values.dtype == np.float16:
            values = values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)  # SciPy has no such matrix
        return scipy.sparse.csr_matrix((values, indices, indptr), shape=(nodes, width))

    def _labels(self, nodes: int) -> tuple[np.ndarray, int]:
        y = self._array("y")
        if y.ndim not in (1, 2) or y.shape[0] != nodes or 0 in y.shape:
            raise UserError(
                f"{self.place}, y has shape {y.shape}, expected ({nodes:,},), or ({nodes:,}, C) for several labels a "
                "node."
            )
        y = y.astype(np.int64) if y.dtype == bool else self._whole("y")
        if y.ndim == 2 and y.shape[1] > 1:
            return self._several(y)
        return self._one(y.reshape(-1))

    def _several(self, y: np.ndarray) -> tuple[np.ndarray, int]:
        if y.min() < 0 or y.max() > 1:
            raise UserError(f"{self.place}, y of shape {y.shape} holds {y.min()} to {y.max()}, expected 0 and 1.")
        given = self._num_classes()
        if given is not None and given != y.shape[1]:
            raise UserError(
                f"{self.place}, num_classes is {shown(given)}, but y of shape {y.shape} has {y.shape[1]:,} labels a "
                "node; expected the same number. Leave num_classes out."
            )
        return y.astype(np.float32), y.shape[1]

    def _one(self, y: np.ndarray) -> tuple[np.ndarray, int]:
        if (y < -1).any():
            raise UserError(f"{self.place}, y has the label {y.min()}; expected -1 (unlabelled) or 0, 1, 2, ...")
        if (y < 0).all():
            raise UserError(f"{self.place}, every node is unlabelled (y is -1); expected labels to train on.")
        classes, given = int(y.max()) + 1, self._num_classes()
        most = len(y) if given is None else given
        if classes > most:
            raise UserError(
                f"{self.place}, y has the label {classes - 1}, out of range: "
                f"{'the number of nodes' if given is None else 'num_classes'} is {most:,}; expected "
                f"labels from 0 to {most - 1:,}."
            )
        if most > max(len(y), MOST_CLASSES):
            raise UserError(
                f"{self.place}, num_classes is {most:,}, expected at most {max(len(y), MOST_CLASSES):,} for "
                f"{len(y):,} nodes."
            )
        return y, classes if given is None else given

    def _num_classes(self) -> int | None:
        if "num_classes" not in self.arrays:
            return None
        number = self._whole("num_classes")
        if number.size != 1 or number.ndim > 1 or number.item() < 1:
            raise UserError(
                f"{self.place}, num_classes is {shown(number.tolist())}, expected one number of at least 1."
            )
        return int(number.item())

    def _edges(self, nodes: int) -> np.ndarray:
        edge_index = self._array("edge_index")
        if edge_index.ndim != 2 or edge_index.shape[0] != 2:
            raise UserError(f"{self.place}, edge_index has shape {edge_index.shape}, expected (2, E).")
        edge_index = self._whole("edge_index") if edge_index.size else np.zeros((2, 0), np.int64)
        if edge_index.size and (edge_index.min() < 0 or edge_index.max() >= nodes):
            raise UserError(
                f"{self.place}, edge_index names the nodes {edge_index.min()} to {edge_index.max()}, out of range; "
                f"expected 0 to {nodes - 1}, one number for each of the {nodes:,} rows of the features."
            )
        return edge_index

    def _masks(self, nodes: int) -> Masks | None:
        if not any(name in self.arrays for name in MASKS):
            return None
        train, val, test = (self._array(name) for name in MASKS)
        masks = oriented((train, val, test), nodes, self.place)
        twice = overlap(masks)
        if twice.any():
            where = f" in split {int(twice.any(axis=0).argmax())}" if twice.shape[1] > 1 else ""
            raise UserError(
                f"{self.place}, some nodes are in more than one of {', '.join(MASKS)}{where}; expected none."
            )
        return masks
