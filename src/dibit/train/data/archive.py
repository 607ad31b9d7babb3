"""Arrays in an ``.npz`` file: every size is checked before memory is taken for it, and nothing is unpickled."""

from __future__ import annotations

import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from dibit.tools.errors import UserError, nearest, shown

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000  # bytes; numpy's own limit, and a plain array's header has about a hundred
_CHUNK = 1 << 24  # bytes
_MOST_AXES = 32  # of any NumPy's arrays
# A header is a Python literal; those of plain arrays are read without evaluating anything.
_DESCR = re.compile(r"""['"]descr['"]\s*:\s*['"]([^'"]*)['"]\s*,?\s*""")
_STRUCTURED = re.compile(r"""['"]descr['"]\s*:\s*\[\s*\(""")
_ORDER = re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)\s*,?\s*""")
_SHAPE = re.compile(r"""['"]shape['"]\s*:\s*\(((?:\s*\d{1,18}L?\s*,)*\s*(?:\d{1,18}L?)?\s*)\)\s*,?\s*""")


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype
    fortran: bool
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Archive:
    """An open ``.npz`` file.

    Args:
        path: A regular file, or a link to one.
        memory: Bytes that an array may take.
        what: What the file should hold, for messages.

    Attributes:
        path: As given.
        names: Of the arrays, without ``.npy``.

    Raises:
        UserError: It cannot be read as a zip file.
    """

    def __init__(self, path: Path, memory: int, what: str = "graph") -> None:
        self.path = path
        self._memory, self._what = memory, what
        with self._explained():
            _check_kind(path, what)
            if not zipfile.is_zipfile(path):
                raise UserError(
                    f"The file {shown(path)} is not an .npz file, or is cut off; expected what numpy.savez writes."
                )
            self._zip = zipfile.ZipFile(path)
        self._members: dict[str, list[zipfile.ZipInfo]] = {}
        for info in self._zip.infolist():
            self._members.setdefault(info.filename.removesuffix(".npy"), []).append(info)
        self.names = list(self._members)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, name: str) -> np.ndarray:
        """Return one array of whole or real numbers or bool, in this machine's byte order.

        Raises:
            UserError: It is there twice, is of another kind, is damaged, or does not fit into memory.
        """
        members = self._members[name]
        if len(members) > 1:
            raise UserError(
                f"The file {shown(self.path)} holds {name} {len(members)} times, expected once; write it again with "
                "numpy.savez."
            )
        if members[0].flag_bits & 1:
            raise UserError(f"In {shown(self.path)}, {name} is encrypted; write the file again with numpy.savez.")
        with self._explained(name), self._zip.open(members[0]) as file:
            header = self._header(file, name)
            start = file.tell()
            if members[0].file_size - start != header.nbytes:
                raise ValueError(
                    f"{name} of shape {header.shape} takes {header.nbytes:,} bytes, and the file has "
                    f"{members[0].file_size - start:,}"
                )
            if header.nbytes > self._memory:
                raise UserError(
                    f"In {shown(self.path)}, {name} of shape {header.shape} takes {header.nbytes / 2**30:,.1f} GB, "
                    f"more than this machine's memory ({self._memory / 2**30:,.1f} GB); expected a smaller "
                    f"{self._what}."
                )
            array = np.empty(math.prod(header.shape), header.dtype)
            _fill(file, array, name)
            array = array.reshape(header.shape, order="F" if header.fortran else "C")
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def _header(self, file: IO[bytes], name: str) -> _Header:
        """Read what an array says of itself, and check that it is a plain one."""
        begin = file.read(8)
        if len(begin) < 8 or begin[:6] != _MAGIC or begin[6] not in (1, 2, 3):
            raise ValueError(f"{name} is no array in numpy's format")
        length = int.from_bytes(file.read(2 if begin[6] == 1 else 4), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"the header of {name} has {length:,} bytes, expected about a hundred")
        text = file.read(length).decode("utf-8" if begin[6] == 3 else "latin1").strip()
        parts = [pattern.search(text) for pattern in (_DESCR, _ORDER, _SHAPE)]
        if parts[0] is None and _STRUCTURED.search(text):
            raise UserError(f"In {shown(self.path)}, {name} is a structured array, expected plain numbers.")
        descr, order, shape = (None if part is None else part[1] for part in parts)
        rest = text
        for part in parts:
            rest = rest if part is None else rest.replace(part[0], "", 1)
        if descr is None or order is None or shape is None or rest not in ("{}", "{ }"):
            raise ValueError(f"the header of {name} is not numpy's: {shown(text)}")
        dtype = _dtype(descr)
        if dtype is None:
            raise ValueError(f"{name} is of the unknown type {shown(descr)!r}")
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are never unpickled")
        if dtype.kind not in "biuf":
            raise UserError(f"In {shown(self.path)}, {name} is {dtype}, expected numbers (whole, real or bool).")
        sizes = tuple(int(n.rstrip("L ")) for n in shape.split(",") if n.strip())
        if len(sizes) > _MOST_AXES:
            raise ValueError(f"{name} has {len(sizes)} axes, expected one or two")
        return _Header(dtype, order == "True", sizes)

    @contextmanager
    def _explained(self, name: str | None = None) -> Iterator[None]:
        """Turn whatever a damaged file makes zipfile, zlib, bz2 and lzma raise into one sentence."""
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(missing(self.path, "does not exist", self._what)) from error
        except MemoryError as error:
            raise UserError(
                f"In {shown(self.path)}, {name or 'an array'} does not fit into memory; expected a smaller "
                f"{self._what}."
            ) from error
        except Exception as error:  # the reading libraries' own errors are of two dozen types
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            place = "" if name is None or name in reason else f"{name}: "
            raise UserError(
                f"The file {shown(self.path)} cannot be read ({place}{shown(reason or type(error).__name__, 160)}); "
                "write it again with numpy.savez."
            ) from error


def missing(path: Path, kind: str, what: str) -> str:
    """Say that a path is not the file it should be, with the names beside it that are near."""
    beside = [p.name for p in path.parent.glob("*.npz")] if os.path.isdir(path.parent) else []
    return f"The file {shown(path)} {kind}; expected a {what} as .npz.{nearest(path.name, beside)}"


def _check_kind(path: Path, what: str) -> None:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise UserError(missing(path, "is a folder", what))
    if not stat.S_ISREG(mode):  # a pipe, for one, would be waited for
        raise UserError(missing(path, "is a pipe, a socket or a device", what))


def _dtype(descr: str) -> np.dtype | None:
    try:
        return np.dtype(descr)
    except (TypeError, ValueError, SyntaxError):
        return None


def _fill(file: IO[bytes], array: np.ndarray, name: str) -> None:
    """Read the whole member to its end, where its checksum is compared."""
    view = array.view(np.uint8).data
    done = 0
    while done < len(view):
        got = file.read(min(_CHUNK, len(view) - done))
        if not got:
            raise ValueError(f"{name} ends after {done:,} of {len(view):,} bytes")
        view[done : done + len(got)] = got
        done += len(got)
    if file.read(1):
        raise ValueError(f"{name} goes on after its {len(view):,} bytes")
