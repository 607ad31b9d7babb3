"""Reading other people's files without running what lies in them.

Planetoid's raw files, numpy's object arrays and torch's ``.pt`` files are pickles: programs that may call any function.
PyTorch Geometric and OGB read them with `pickle` and `torch.load`. In `arrays_only` both rebuild arrays, sparse
matrices and plain containers, and refuse the rest.
"""

from __future__ import annotations

import io
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from dibit._torch.private.operations import archived
from dibit.train.data.pickles import ArraysUnpickler, check_nesting
from dibit.train.data.standins import ALLOWED, CodeInFile, plain

__all__ = ["CodeInFile", "anything", "arrays_only"]

_ONLY, _ANY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_LOCK = threading.RLock()  # the names below are replaced for everybody, the refusal is for the thread that reads
_reading = threading.local()
_LEGACY = 5  # pickles that a file of torch's old format begins with


class _Unpickler(pickle.Unpickler):
    """`pickle.Unpickler`, which in a thread that is in `arrays_only` knows arrays alone."""

    def __init__(self, file: Any, **how: Any) -> None:
        super().__init__(file, **how)
        how.pop("buffers", None)
        self._arrays = ArraysUnpickler(file, **how) if getattr(_reading, "here", False) else None

    def load(self) -> Any:
        """What the file holds, or `pickle.UnpicklingError`."""
        return super().load() if self._arrays is None else self._arrays.load()


def _load(file: Any, **how: Any) -> Any:
    return _Unpickler(file, **how).load()


def _loads(data: Any, **how: Any) -> Any:
    return _Unpickler(io.BytesIO(data), **how).load()


@contextmanager
def arrays_only(*, graphs: bool = False) -> Iterator[None]:
    """What this thread reads with `pickle`, `numpy.load` or `torch.load` is arrays and plain containers, or refused.

    Args:
        graphs: `torch.load` rebuilds PyTorch Geometric's `Data`, too, as OGB writes it.

    Raises:
        pickle.UnpicklingError: From the reading function, for anything else.
    """
    replaced: list[tuple[Any, str, Any]] = [(pickle, "load", _load), (pickle, "loads", _loads)]
    replaced += [(pickle, "Unpickler", _Unpickler), (torch, "load", partial(_torch_load, torch.load, graphs))]
    known = torch.serialization.safe_globals(_for_torch() if graphs else [])
    with _LOCK, _environment({_ONLY: "1", _ANY: None}), known, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Weights only load failed")  # said by the error that follows
        before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
        outer = getattr(_reading, "here", False)
        for module, name, own in replaced:
            setattr(module, name, own)
        _reading.here = True
        try:
            yield
        finally:
            _reading.here = outer
            for module, name, original in before:
                setattr(module, name, original)


def _for_torch() -> list[Any]:
    """What `torch.load` does not know of by itself: arrays, and the parts of a graph that PyTorch Geometric forgets."""
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    arrays = [(thing, f"{module}.{name}") for (module, name), thing in ALLOWED.items() if module.startswith("numpy")]
    return [DataEdgeAttr, DataTensorAttr, GlobalStorage, *arrays]


def _torch_load(load: Callable[..., Any], graphs: bool, file: Any, *args: Any, **how: Any) -> Any:
    """`torch.load`, whose own reader of pickles refuses code, with arrays built from checked pieces."""
    if not getattr(_reading, "here", False):
        return load(file, *args, **how)
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return _torch_load(load, graphs, opened, *args, **how)
    start = file.tell()
    content = file.read()
    file.seek(start)
    if content[:4] == b"PK\x03\x04":
        record = archived(content, "data.pkl")
        if record is None:
            raise pickle.UnpicklingError(f"torch {torch.__version__} cannot look into it before it is loaded")
        check_nesting(record, 1)
    else:
        check_nesting(content, _LEGACY)
    return plain(load(file, *args, **how), len(content), _graphs() if graphs else (_Nothing,))


def _graphs() -> tuple[type, ...]:
    from torch_geometric.data.data import BaseData
    from torch_geometric.data.storage import BaseStorage

    return BaseData, BaseStorage


class _Nothing:
    """A class that has no objects, in the place of one that is not installed."""


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
