"""Pickles read by an interpreter that knows `standins` alone, in Python, where a hostile file ends in an exception.

The interpreter written in C takes gigabytes for a number in a file, and Python ends when it hashes tuples nested a
million times.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

from dibit._torch.private.operations import python_unpickler
from dibit.train.data.standins import ALLOWED, Array, CodeInFile, Csr, Dtype, keys, plain

_CALLS = frozenset(map(id, ALLOWED.values()))
_DICTIONARIES = (dict, OrderedDict, defaultdict)
_NEVER = (
    pickle.PERSID,
    pickle.BINPERSID,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
)
_MOST_TUPLES = 10_000  # of a file of torch, which has some for each tensor


class _Counted:
    """A file that counts what is read."""

    def __init__(self, file: Any) -> None:
        self.file, self.count = file, 0

    def read(self, size: int = -1) -> bytes:
        return self._noted(self.file.read(size))

    def readline(self) -> bytes:
        return self._noted(self.file.readline())

    def _noted(self, content: bytes) -> bytes:
        self.count += len(content)
        return content


_Unpickler = python_unpickler()


class ArraysUnpickler(_Unpickler):  # type: ignore[misc,valid-type]
    """Rebuilds arrays, sparse matrices and plain containers, or raises `pickle.UnpicklingError`."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    append: Callable[[Any], None]

    def __init__(self, file: Any, *, fix_imports: bool = True, encoding: str = "ASCII", errors: str = "strict") -> None:
        self._counted = _Counted(file)
        super().__init__(self._counted, fix_imports=fix_imports, encoding=encoding, errors=errors)

    def load(self) -> Any:
        """The content of the file."""
        try:
            return plain(super().load(), self._counted.count)
        except (pickle.UnpicklingError, EOFError, MemoryError):
            raise
        except Exception as error:  # of a damaged file: no such opcode, an empty stack, a number that is none
            raise pickle.UnpicklingError(f"it is no whole pickle ({type(error).__name__})") from error

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for what the file names."""
        if (module, name) not in ALLOWED:
            raise CodeInFile(f"{module}.{name}")
        return ALLOWED[module, name]

    def _call(self, thing: Any, given: Any) -> None:
        if id(thing) not in _CALLS or type(given) is not tuple:
            raise CodeInFile("a call of something that is no function")
        self.append(thing(*given))

    def _reduce(self) -> None:
        given = self.stack.pop()
        self._call(self.stack.pop(), given)

    def _newobj_ex(self) -> None:
        if self.stack.pop():
            raise CodeInFile("a call with names")
        self._reduce()

    def _inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        given = self.pop_mark()
        self._call(self.find_class(module, name), tuple(given))

    def _obj(self) -> None:
        thing, *given = self.pop_mark()
        self._call(thing, tuple(given))

    def _build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) not in (Array, Csr, Dtype):
            raise CodeInFile(f"a state of {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise CodeInFile(f"more items of {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _update(self, items: list[Any]) -> None:
        if type(self.stack[-1]) not in _DICTIONARIES:
            raise CodeInFile(f"entries of {type(self.stack[-1]).__name__}")
        keys(items[::2])
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise CodeInFile(f"more items of {type(self.stack[-1]).__name__}")
        keys(items)
        self.stack[-1].update(items)

    def _frozenset(self) -> None:
        items = self.pop_mark()
        keys(items)
        self.append(frozenset(items))

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))  # what is there, not what the number says

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _setitems(self) -> None:
        self._update(self.pop_mark())

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code: run for code, run in _Unpickler.dispatch.items() if bytes([code]) not in _NEVER},
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.INST[0]: _inst,
        pickle.OBJ[0]: _obj,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
        pickle.DICT[0]: _dict,
        pickle.BYTEARRAY8[0]: _bytearray8,
    }


def check_nesting(content: bytes, pickles: int) -> None:
    """Refuse pickles that torch is about to read, if they have so many tuples that hashing one could end Python.

    Args:
        content: Begins with the pickles.
        pickles: Their number.
    """
    file, tuples = io.BytesIO(content), 0
    try:
        for _ in range(pickles):
            for opcode, _, _ in pickletools.genops(file):
                tuples += opcode.name.startswith("TUPLE")
                if tuples > _MOST_TUPLES:
                    raise CodeInFile(f"more than {_MOST_TUPLES:,} tuples")
    except ValueError as error:
        raise pickle.UnpicklingError("it is no whole pickle") from error
