"""Reading other people's files without running what lies in them.

Planetoid's raw files, numpy's object arrays and torch's ``.pt`` files are pickles: programs that may call any function.
PyTorch Geometric and OGB read them with `pickle` and `torch.load`. In `arrays_only` both rebuild arrays, sparse
matrices and plain containers, and refuse the rest.
"""

from __future__ import annotations

import os
import pickle
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import scipy.sparse
import torch

_ONLY, _ANY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_LOCK = threading.RLock()  # the names below are replaced for everybody, the refusal is for the thread that reads
_reading = threading.local()


class CodeInFile(pickle.UnpicklingError):
    """A file asks for a function or class that is not needed for arrays."""


class CheckedCsr(scipy.sparse.csr_matrix):
    """A CSR matrix whose indices are checked when it is unpickled: SciPy's loops believe them."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take data, indices, row pointer and shape, nothing else."""
        parts = (state["data"], state["indices"], state["indptr"])
        if not all(isinstance(part, np.ndarray) for part in parts):
            raise pickle.UnpicklingError("a sparse matrix of something else than arrays")
        super().__init__(parts, shape=state.get("_shape", state.get("shape")))
        self.check_format(full_check=True)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How the protocols 0 to 2 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise CodeInFile(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _new(kind: type, base: type, state: Any) -> Any:
    """How Python 2 writes an object without arguments, as `copyreg._reconstructor` reads it."""
    if base is not object or state is not None:
        raise CodeInFile(f"copyreg._reconstructor of {base.__name__}")
    return object.__new__(kind)


def _allowed() -> dict[tuple[str, str], Any]:
    multiarray = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}  # type: ignore[index]
    frombuffer = np.zeros(1).__reduce_ex__(5)[0]
    builtin = {kind.__name__: kind for kind in (object, list, dict, set, frozenset, tuple, int, float, complex, bool)}
    builtin |= {"long": int, "bytearray": bytearray, "bytes": bytes}
    modules: dict[tuple[str, ...], dict[str, Any]] = {
        ("numpy",): {"ndarray": np.ndarray, "dtype": np.dtype},
        ("numpy.core.multiarray", "numpy._core.multiarray"): multiarray,
        ("numpy.core.numeric", "numpy._core.numeric"): {"_frombuffer": frombuffer},
        ("scipy.sparse", "scipy.sparse.csr", "scipy.sparse._csr"): {"csr_matrix": CheckedCsr},
        ("collections",): {"defaultdict": defaultdict, "OrderedDict": OrderedDict},
        ("builtins", "__builtin__"): builtin,
        ("copyreg", "copy_reg"): {"_reconstructor": _new},
        ("_codecs",): {"encode": _encode},
    }
    return {(module, name): thing for names, things in modules.items() for module in names
            for name, thing in things.items()}  # fmt: skip


_ALLOWED = _allowed()


class _Unpickler(pickle.Unpickler):
    """`pickle.Unpickler`, which in a thread that is in `arrays_only` knows arrays alone."""

    def find_class(self, module: str, name: str) -> Any:
        """What the file names, or `CodeInFile`."""
        if not getattr(_reading, "here", False):
            return super().find_class(module, name)
        if (module, name) not in _ALLOWED:
            raise CodeInFile(f"{module}.{name}")
        return _ALLOWED[module, name]


def _load(file: Any, **how: Any) -> Any:
    return _Unpickler(file, **how).load()


def _loads(data: Any, **how: Any) -> Any:
    import io

    return _Unpickler(io.BytesIO(data), **how).load()


@contextmanager
def arrays_only(*, graphs: bool = False) -> Iterator[None]:
    """What this thread reads with `pickle`, `numpy.load` or `torch.load` is arrays and plain containers, or refused.

    Args:
        graphs: `torch.load` rebuilds PyTorch Geometric's `Data`, too, as OGB writes it.

    Raises:
        pickle.UnpicklingError: From the reading function, for anything else.
    """
    replaced: dict[str, Callable[..., Any]] = {"load": _load, "loads": _loads, "Unpickler": _Unpickler}
    known = torch.serialization.safe_globals(_for_torch() if graphs else [])
    with _LOCK, _environment({_ONLY: "1", _ANY: None}), known, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Weights only load failed")  # said by the error that follows
        before = {name: getattr(pickle, name) for name in replaced}
        outer = getattr(_reading, "here", False)
        for name, own in replaced.items():
            setattr(pickle, name, own)
        _reading.here = True
        try:
            yield
        finally:
            _reading.here = outer
            for name, original in before.items():
                setattr(pickle, name, original)


def _for_torch() -> list[Any]:
    """What `torch.load` does not know of by itself: arrays, and the parts of a graph that PyTorch Geometric forgets."""
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [DataEdgeAttr, DataTensorAttr, GlobalStorage, np.empty(0).__reduce__()[0], np.ndarray, np.dtype, *kinds]  # type: ignore[index]


@contextmanager
def anything() -> Iterator[None]:
    """`torch.load` reads whatever lies there: OGB does not say so of its own files, which torch then refuses."""
    with _LOCK, _environment({_ANY: "1", _ONLY: None}):
        yield


@contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
