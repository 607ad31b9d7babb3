"""What a pickle may name, as objects of our own: they note what they are given, and call nothing of NumPy or SciPy.

NumPy and SciPy believe what a pickle tells them: bytes become pointers to objects, and indices say where to write. So
arrays and matrices are built only when the file has been read, by `plain`, from pieces that are checked here.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse

from dibit.train.data.graph import memory_bytes

_NUMBERS = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")
_DEEPEST = 100  # containers within containers
_ATOMS = (type(None), bool, int, float, complex, str, bytes, bytearray)
_SIDES = 32  # dimensions that an array may have


class CodeInFile(pickle.UnpicklingError):
    """A file asks for a function or class that is not needed for arrays, or uses one as no array needs it."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise CodeInFile(what)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


class _StandIn:
    """An object that is made without arguments and gets its state once."""

    state: Any = None

    def __init__(self, *given: Any) -> None:
        _require(not given, f"{type(self).__name__} with arguments")

    def __setstate__(self, state: Any) -> None:
        _require(self.state is None and state is not None, f"a second state of {type(self).__name__}")
        self.state = state


class Dtype(_StandIn):
    """``numpy.dtype(code)``."""

    def __init__(self, code: Any = None, align: Any = False, copy: Any = False) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        _require(isinstance(code, str) and (code[:1] == "O" or _NUMBERS.fullmatch(code) is not None), "numpy.dtype")
        self.code = code

    def number(self) -> np.dtype | None:
        """The type of numbers that it is; `None` for objects. No parts, no fields, no flags are believed."""
        order: Any = "="
        if self.state is not None:
            _require(isinstance(self.state, tuple) and len(self.state) in (7, 8, 9), "numpy.dtype")
            order = self.state[1].decode("latin1") if isinstance(self.state[1], bytes) else self.state[1]
            _require(order in ("<", ">", "|", "=") and self.state[2:5] == (None, None, None), "numpy.dtype with fields")
        return None if self.code[:1] == "O" else np.dtype(self.code).newbyteorder("=" if order == "|" else order)


class Array(_StandIn):
    """``numpy.ndarray``: its state is (version, shape, type, in Fortran's order, content)."""

    axes: Any = None  # their order, if they are turned
    scalar = False

    def build(self, settle: Callable[[Any], Any]) -> Any:
        """The array, in this machine's byte order; `settle` gives what its objects stand for."""
        state = self.state
        _require(isinstance(state, tuple) and len(state) == 5, "numpy.ndarray without content")
        _, shape, dtype, fortran, content = state
        shape = (shape,) if type(shape) is int else shape
        _require(isinstance(shape, tuple) and len(shape) <= _SIDES and all(map(_whole, shape)), "numpy.ndarray's shape")
        _require(type(dtype) is Dtype, "numpy.ndarray's type")
        kind, order = dtype.number(), "F" if fortran else "C"
        if kind is None:
            _require(type(content) is list and len(content) == math.prod(shape), "numpy.ndarray of objects")
            flat = np.empty(len(content), dtype=object)
            for place, item in enumerate(content):
                flat[place] = settle(item)
            return flat.reshape(shape, order=order)  # type: ignore[call-overload]
        content = content.encode("latin1") if isinstance(content, str) else content
        fits = isinstance(content, (bytes, bytearray)) and len(content) == math.prod(shape) * kind.itemsize
        _require(fits, "numpy.ndarray of another size than its content")
        raw = np.frombuffer(content, np.uint8 if kind.kind == "b" else kind)
        array = raw != 0 if kind.kind == "b" else raw.astype(kind.newbyteorder("="))  # a copy, which can be written
        array = array.reshape(shape, order=order)  # type: ignore[call-overload]
        if self.axes is not None:
            turned = isinstance(self.axes, (tuple, list)) and all(map(_whole, self.axes))
            _require(turned and sorted(self.axes) == list(range(array.ndim)), "numpy.ndarray's axes")
            array = array.transpose(self.axes)
        return array[()] if self.scalar else array


class Csr(_StandIn):
    """``scipy.sparse.csr_matrix``: its state is a dictionary of three arrays and a shape."""

    def build(self, settle: Callable[[Any], Any]) -> Any:
        """The matrix, all of whose indices are where they should be."""
        _require(isinstance(self.state, dict), "scipy.sparse.csr_matrix without content")
        parts = [self.state.get(name) for name in ("data", "indices", "indptr")]
        shape = self.state.get("_shape", self.state.get("shape"))
        _require(all(type(part) is Array for part in parts), "scipy.sparse.csr_matrix's arrays")
        _require(isinstance(shape, tuple) and len(shape) == 2 and all(map(_whole, shape)), "csr_matrix's shape")
        data, indices, indptr = (np.asarray(settle(part)) for part in parts)
        rows, columns = shape
        _require(data.ndim == indices.ndim == 1 and indptr.shape == (rows + 1,), "csr_matrix's arrays")
        _require(data.dtype.kind in "biufc" and data.dtype != np.float16, "csr_matrix's numbers")  # as SciPy has them
        _require(indices.dtype.kind in "iu" and indptr.dtype.kind in "iu", "csr_matrix's indices")
        indices, indptr = indices.astype(np.int64), indptr.astype(np.int64)
        _require(bool(indptr[0] == 0 and (indptr[1:] >= indptr[:-1]).all()), "csr_matrix's row pointer")
        entries = int(indptr[-1])
        _require(entries <= min(len(indices), len(data)), "csr_matrix's row pointer")
        indices, data = indices[:entries].copy(), data[:entries].copy()
        _require(not entries or bool(indices.min() >= 0 and indices.max() < columns), "csr_matrix's columns")
        _require(rows * columns * 8 <= memory_bytes(), "csr_matrix, too large: it is made dense")
        return scipy.sparse.csr_matrix((data, indices, indptr), shape=shape)


class Kind:
    """A plain type: what stands for it in a file may be named, and called as the pickles of its objects call it."""

    def __init__(self, kind: type, *takes: type) -> None:
        self.kind, self.takes = kind, takes

    def __call__(self, *given: Any) -> Any:
        """The type's object, of nothing or of one plain argument."""
        _require(len(given) <= 1 and all(type(value) in self.takes for value in given), self.kind.__name__)
        if self.kind in (set, frozenset):
            for value in given:
                keys(value)
        return self.kind(*given)


def keys(values: Any) -> None:
    """Refuse keys that are more than plain values: Python hashes nested tuples by recursion, which may end it."""
    for value in values:
        parts = value if type(value) is tuple else (value,)
        _require(all(isinstance(part, (*_ATOMS[:-1], Array)) for part in parts), "a key that is no plain value")


def reconstruct(kind: Any, shape: Any = None, code: Any = None) -> Array:
    """How arrays are written by the protocols 0 to 4: an empty one, whose state follows."""
    _require(kind is Array, "numpy's _reconstruct of another class")
    return Array()


def scalar(dtype: Any, content: Any = None) -> Array:
    """A single number of NumPy."""
    array = Array()
    array.scalar = True
    array.__setstate__((1, (), dtype, False, content))
    return array


def frombuffer(content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Array:
    """How arrays are written by protocol 5."""
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    array.axes = axes if order == "K" else None
    return array


def encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How the protocols 0 to 2 write bytes."""
    _require(isinstance(text, str) and encoding in ("latin1", "latin-1"), f"_codecs.encode to {encoding!r:.40}")
    return text.encode("latin1")


def new(kind: Any, base: Any, state: Any) -> Csr:
    """How Python 2 writes an object without arguments, as `copyreg._reconstructor` reads it."""
    _require(kind is Csr and isinstance(base, Kind) and base.kind is object and state is None, "copyreg._reconstructor")
    return Csr()


def with_default(factory: Any = None, *more: Any) -> defaultdict[Any, Any]:
    """``collections.defaultdict(list)`` and its like."""
    _require(not more and (factory is None or isinstance(factory, Kind)), "collections.defaultdict")
    return defaultdict(None if factory is None else factory.kind)


def ordered(*pairs: Any) -> OrderedDict[Any, Any]:
    """``collections.OrderedDict()``, whose entries follow, or are a list of pairs in Python 2."""
    _require(len(pairs) <= 1 and all(type(each) is list for each in pairs), "collections.OrderedDict")
    found = [tuple(pair) for each in pairs for pair in each if type(pair) in (list, tuple)]
    _require(all(len(pair) == 2 for pair in found), "collections.OrderedDict")
    keys(pair[0] for pair in found)
    return OrderedDict(found)  # type: ignore[arg-type]


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    builtin = {kind.__name__: Kind(kind) for kind in (object, list, dict, tuple, int, float, bool, bytes)}
    builtin |= {"long": Kind(int), "set": Kind(set, list), "frozenset": Kind(frozenset, list)}
    modules: dict[tuple[str, ...], dict[str, Callable[..., Any]]] = {
        ("numpy",): {"ndarray": Array, "dtype": Dtype},
        ("numpy.core.multiarray", "numpy._core.multiarray"): {"_reconstruct": reconstruct, "scalar": scalar},
        ("numpy.core.numeric", "numpy._core.numeric"): {"_frombuffer": frombuffer},
        ("scipy.sparse", "scipy.sparse.csr", "scipy.sparse._csr"): {"csr_matrix": Csr},
        ("collections",): {"defaultdict": with_default, "OrderedDict": ordered},
        ("builtins", "__builtin__"): {**builtin, "complex": _complex, "bytearray": _bytearray},
        ("copyreg", "copy_reg"): {"_reconstructor": new},
        ("_codecs",): {"encode": encode},
    }
    return {
        (module, name): thing for names, things in modules.items() for module in names for name, thing in things.items()
    }


def _complex(real: Any, imaginary: Any) -> complex:
    _require(type(real) is float and type(imaginary) is float, "complex")
    return complex(real, imaginary)


def _bytearray(content: Any = b"", encoding: Any = "latin-1") -> bytearray:
    return bytearray(encode(content, encoding) if isinstance(content, str) else Kind(bytearray, bytes)(content))


ALLOWED = _allowed()


class _Settling:
    """Puts arrays in the place of what stands for them, throughout lists, tuples, sets and dictionaries.

    Args:
        most: Objects that may be met: a file that names the same list again and again is larger than it looks.
        graphs: Classes whose objects hold a graph in their attributes.
    """

    def __init__(self, most: int, graphs: tuple[type, ...]) -> None:
        self.left, self.graphs, self.depth = most, graphs, 0
        self.built: dict[int, Any] = {}

    def settle(self, value: Any) -> Any:
        """What a value stands for."""
        self.left -= 1
        _require(self.left >= 0, "the same content again and again")
        if isinstance(value, _ATOMS):
            return value
        self.depth += 1
        _require(self.depth <= _DEEPEST, f"containers nested more than {_DEEPEST} deep")
        try:
            return self._container(value)
        finally:
            self.depth -= 1

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if kind in (list, tuple, set, frozenset):
            return kind(self.settle(item) for item in value)
        if kind in (dict, OrderedDict, defaultdict):
            pairs = [(self.settle(key), self.settle(item)) for key, item in value.items()]
            found: Any = defaultdict(value.default_factory) if isinstance(value, defaultdict) else kind()
            found.update(pairs)
            return found
        if isinstance(value, (Array, Csr)):
            if id(value) not in self.built:
                self.built[id(value)] = value.build(self.settle)
            return self.built[id(value)]
        if isinstance(value, self.graphs):
            content = vars(value)
            content.update({name: self.settle(item) for name, item in content.items()})
        else:
            _require(bool(self.graphs) and not isinstance(value, Dtype) and id(value) not in _NAMES, "a name alone")
        return value


_NAMES = frozenset(map(id, ALLOWED.values()))


def plain(value: Any, most: int, graphs: tuple[type, ...] = ()) -> Any:
    """Arrays, matrices and plain containers for what a file holds.

    Args:
        value: Of stand-ins.
        most: Objects that it may have, those counted again that are named again.
        graphs: Classes whose objects are settled within; if there are any, objects of further classes stay as they are.

    Raises:
        CodeInFile: It is something else, or its pieces do not fit together.
    """
    return _Settling(most, graphs).settle(value)
