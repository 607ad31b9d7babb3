"""A user's own graph from an ``.npz`` file (the format is in docs/data.md)."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import scipy.sparse

from dibit.train.data.graph import Features, Raw
from dibit.train.errors import UserError, nearest

_CSR = ("x_indptr", "x_indices", "x_values", "x_shape")
_MASKS = ("train_mask", "val_mask", "test_mask")
_KNOWN = ("edge_index", "x", *_CSR, "y", *_MASKS, "num_classes")


def load_npz(path: str | Path) -> Raw:
    """Read a graph and check every array against the format.

    Raises:
        UserError: With the file, what is wrong in it, and what was expected.
    """
    path = Path(path)
    arrays = _read(path)
    x = _features(arrays, path)
    nodes = x.shape[0]
    y, classes = _labels(arrays, nodes, path)
    edge_index = _edges(arrays, nodes, path)
    metric = "accuracy" if y.ndim == 1 else "f1"
    return Raw(path.stem, x, edge_index, y, classes, _masks(arrays, nodes, path), metric)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        beside = [p.name for p in path.parent.glob("*.npz")] if path.parent.is_dir() else []
        raise UserError(f"The file {path} {kind}; expected a graph as .npz.{nearest(path.name, beside)}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"The file {path} is not an .npz file, or is cut off; expected what numpy.savez writes.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The file {path} cannot be read ({detail}); write it again with numpy.savez.") from error


def _array(arrays: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    if name not in arrays:
        hint = nearest(name, [a for a in arrays if a not in _KNOWN], most=1)
        have = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"The file {path} has no array {name!r} (it holds {have}); see docs/data.md.{hint}")
    return arrays[name]


def _whole(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"In {path}, {name} is {array.dtype}, expected whole numbers (int32 or int64).")
    return array.astype(np.int64)


def _features(arrays: dict[str, np.ndarray], path: Path) -> Features:
    if "x" in arrays:
        x = arrays["x"]
        if x.ndim != 2 or not np.issubdtype(x.dtype, np.number) or np.iscomplexobj(x):
            raise UserError(f"In {path}, x is {x.dtype} of shape {x.shape}, expected numbers of shape (N, F).")
        return x
    if not any(name in arrays for name in _CSR):
        _array(arrays, "x", path)
    indptr, indices, values, shape = (_array(arrays, name, path) for name in _CSR)
    indptr, indices, shape = (
        _whole(a, name, path) for a, name in ((indptr, "x_indptr"), (indices, "x_indices"), (shape, "x_shape"))
    )
    if shape.shape != (2,) or (shape < 1).any():
        raise UserError(f"In {path}, x_shape is {shape.tolist()}, expected two positive numbers, (N, F).")
    nodes, width = (int(n) for n in shape)
    if indptr.shape != (nodes + 1,) or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise UserError(f"In {path}, x_indptr is not the row pointer of a CSR matrix of {nodes:,} rows.")
    if values.shape != indices.shape or values.ndim != 1 or indptr[-1] != len(indices):
        raise UserError(
            f"In {path}, x_indices has shape {indices.shape} and x_values {values.shape}, expected "
            f"({int(indptr[-1]):,},) for both, the last entry of x_indptr."
        )
    if len(indices) and (indices.min() < 0 or indices.max() >= width):
        raise UserError(
            f"In {path}, x_indices runs from {indices.min()} to {indices.max()}, expected 0 to {width - 1}."
        )
    if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
        raise UserError(f"In {path}, x_values is {values.dtype}, expected numbers.")
    return scipy.sparse.csr_matrix((values, indices, indptr), shape=(nodes, width))


def _labels(arrays: dict[str, np.ndarray], nodes: int, path: Path) -> tuple[np.ndarray, int]:
    y = _array(arrays, "y", path)
    if y.ndim not in (1, 2) or y.shape[0] != nodes:
        raise UserError(
            f"In {path}, y has shape {y.shape}, expected ({nodes:,},), or ({nodes:,}, C) for several labels a node."
        )
    y = _whole(y.astype(np.uint8) if y.dtype == bool else y, "y", path)
    if y.ndim == 2:
        if y.size and (y.min() < 0 or y.max() > 1):
            raise UserError(f"In {path}, y of shape {y.shape} holds {y.min()} to {y.max()}, expected 0 and 1.")
        return y.astype(np.float32), y.shape[1]
    if (y < -1).any():
        raise UserError(f"In {path}, y has the label {y.min()}; expected -1 (unlabelled) or 0, 1, 2, ...")
    if (y < 0).all():
        raise UserError(f"In {path}, every node is unlabelled (y is -1); expected labels to train on.")
    classes = int(y.max()) + 1
    most = int(_whole(arrays["num_classes"], "num_classes", path)) if "num_classes" in arrays else nodes
    if classes > most:
        raise UserError(
            f"In {path}, y has the label {classes - 1}, out of range: "
            f"{'num_classes' if 'num_classes' in arrays else 'the number of nodes'} is {most:,}; expected "
            f"labels from 0 to {most - 1:,}."
        )
    return y, max(classes, most) if "num_classes" in arrays else classes


def _edges(arrays: dict[str, np.ndarray], nodes: int, path: Path) -> np.ndarray:
    edge_index = _array(arrays, "edge_index", path)
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise UserError(f"In {path}, edge_index has shape {edge_index.shape}, expected (2, E).")
    edge_index = _whole(edge_index, "edge_index", path)
    if edge_index.size and (edge_index.min() < 0 or edge_index.max() >= nodes):
        raise UserError(
            f"In {path}, edge_index names the nodes {edge_index.min()} to {edge_index.max()}, out of range; "
            f"expected 0 to {nodes - 1}, one number for each of the {nodes:,} rows of the features."
        )
    return edge_index


def _masks(arrays: dict[str, np.ndarray], nodes: int, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    if not any(name in arrays for name in _MASKS):
        return None
    train, val, test = (_array(arrays, name, path) for name in _MASKS)
    for name, mask in zip(_MASKS, (train, val, test), strict=True):
        if mask.shape != (nodes,) or mask.dtype != bool:
            raise UserError(
                f"In {path}, {name} is {mask.dtype} of shape {mask.shape}, expected bool of shape ({nodes:,},)."
            )
    if ((train & val) | (train & test) | (val & test)).any():
        raise UserError(f"In {path}, some nodes are in more than one of {', '.join(_MASKS)}; expected none.")
    return train, val, test
