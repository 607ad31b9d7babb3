"""Pickles that NumPy, SciPy or Python itself would end the process with, or that run code."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

RECONSTRUCT = np.empty(0).__reduce__()[0]
SCALAR = np.float64(0).__reduce__()[0]
FROMBUFFER = np.zeros(1).__reduce_ex__(5)[0]
CODES = ("f8", "O8", "O", "V8", "i8", "S8", "M8[s]", "m8", "U2", "b1", "f4,O", "f16", "c16")
FLAGS = (0, 1, 27, 63, -1, 2**31 - 1)
ODD = (None, -1, 0, 3, 2**40, 2**63, b"A" * 8, "A" * 8, (), (1,), (-1,), (2**40,), (2**62, 4), [1], {}, 1.5, b"")


class Made:
    """Unpickles as a call, with a state that follows."""

    def __init__(self, call: Callable[..., Any], *given: Any, states: tuple[Any, ...] = ()) -> None:
        self.call, self.given, self.states = call, given, states

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.call, self.given, *self.states[:1])


def twice(value: Made, *states: Any) -> bytes:
    """A pickle of an object that gets further states."""
    body = pickle.dumps(value, 2)[:-1]
    return body + b"".join(pickle.dumps(state, 2)[2:-1] + b"b" for state in states) + b"."


def types() -> Iterator[tuple[str, Any]]:
    """Types that say other things of themselves than they are."""
    for code, flags in itertools.product(CODES, FLAGS):
        flagged = (3, "|", None, None, None, 8, 8, flags)
        yield f"{code} with flags {flags}", Made(np.dtype, code, False, True, states=(flagged,))
        fields = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, flags)
        yield f"{code} with fields and flags {flags}", Made(np.dtype, code, False, True, states=(fields,))
    yield (
        "a subarray",
        Made(np.dtype, "V8", False, True, states=((3, "|", (np.dtype("O"), (1,)), None, None, 8, 1, 0),)),
    )
    for order in ("<", ">", "=", "|", "x", "", None, 3):
        yield f"order {order!r}", Made(np.dtype, "f8", False, True, states=((3, order, None, None, None, -1, -1, 0),))


def array(dtype: Any, shape: Any, content: Any, fortran: Any = False) -> Made:
    """An array as the protocols 0 to 4 write it."""
    return Made(RECONSTRUCT, np.ndarray, (0,), b"b", states=((1, shape, dtype, fortran, content),))


def arrays() -> Iterator[tuple[str, Any]]:
    """Arrays whose pieces do not fit together, made in every way."""
    number = np.dtype("f8")
    for name, dtype in types():
        yield f"array of {name}", array(dtype, (1,), b"A" * 8)
        yield f"ndarray of {name}", Made(np.ndarray, (1,), dtype, b"A" * 8)
        yield f"scalar of {name}", Made(SCALAR, dtype, b"A" * 8)
        yield f"frombuffer of {name}", Made(FROMBUFFER, b"A" * 8, dtype, (1,), "C")
    for odd in ODD:
        yield f"shape {odd!r}", array(number, odd, b"A" * 8)
        yield f"content {odd!r}", array(number, (1,), odd)
        yield f"objects {odd!r}", array(np.dtype("O"), (2,), odd)
        yield f"type {odd!r}", array(odd, (1,), b"A" * 8)
        yield f"order {odd!r}", array(number, (1,), b"A" * 8, odd)
        yield (
            f"reconstruct {odd!r}",
            Made(RECONSTRUCT, np.ndarray, odd, b"O", states=((1, (1,), number, False, b"A" * 8),)),
        )
        yield f"ndarray state {odd!r}", Made(RECONSTRUCT, np.ndarray, (0,), b"b", states=(odd,))
        yield f"frombuffer axes {odd!r}", Made(FROMBUFFER, b"A" * 8, number, (1,), "K", odd)
        yield f"frombuffer shape {odd!r}", Made(FROMBUFFER, b"A" * 8, number, odd, "C")
        yield f"ndarray of buffer at {odd!r}", Made(np.ndarray, (4,), number, b"A" * 8, odd)
        yield f"ndarray with strides {odd!r}", Made(np.ndarray, (4,), number, None, 0, odd)
        yield f"scalar {odd!r}", Made(SCALAR, number, odd)
        yield f"set of {odd!r}", Made(set, odd)
        for kind in (bytearray, bytes, list, dict, tuple, frozenset, complex, OrderedDict, defaultdict, object, int):
            yield f"{kind.__name__} of {odd!r}", Made(kind, odd)
    yield "64 dimensions and more", array(number, (1,) * 70, b"A" * 8)


def matrices() -> Iterator[tuple[str, Any]]:
    """Sparse matrices with indices anywhere, by their state and by arguments."""
    good = {"data": np.ones(3), "indices": np.array([0, 1, 2]), "indptr": np.array([0, 1, 2, 3]), "_shape": (3, 10)}
    pieces: list[Any] = [
        np.array(a) for a in ([0, 10**8, 1], [-1, 0, 1], [0, 1], [0, 1, 2, 3, 4], [], [[0, 1, 2]], [0.5] * 3)
    ]
    pieces += [np.array([0, 10**9, 1, 3]), np.array([0, 3, 2, 3]), np.array([0, 1, 2, 10**6]), np.array([-5, 1, 2, 3])]
    pieces += [array(Made(np.dtype, "O8", False, True, states=((3, "|", None, None, None, 8, 8, 0),)), (3,), b"A" * 24)]
    pieces += [
        np.array([True] * 3),
        np.ones(3, "f2"),
        np.array(["a"] * 3),
        np.array([None] * 3),
        1,
        None,
        "abc",
        [0, 1, 2],
    ]
    shapes = [(3, 0), (-3, 10), (0, 0), (3, 2**62), (2**62, 10), (3,), 3, None, (3, 10, 1), (3.0, 10), ("3", 10)]
    for part in good:
        for piece in shapes if part == "_shape" else pieces:
            state = {**good, part: piece}
            how = f"{part} {piece!r:.60}"
            yield f"matrix by state: {how}", Made(scipy.sparse.csr_matrix, states=(state,))
            three = tuple(state[name] for name in ("data", "indices", "indptr"))
            yield f"matrix by arguments: {how}", Made(scipy.sparse.csr_matrix, three, state["_shape"])
    for odd in ODD:
        yield f"matrix of {odd!r}", Made(scipy.sparse.csr_matrix, odd)
        yield f"matrix with state {odd!r}", Made(scipy.sparse.csr_matrix, states=(odd,))


def codes() -> Iterator[tuple[str, bytes]]:
    """Sequences of opcodes that no pickler writes."""
    head = b"\x80\x04"
    deep = b")" + b"\x85" * 500_000
    yield "a deep tuple as a key", head + b"}" + deep + b"Ns."
    yield "a deep tuple in a set", head + b"\x8f(" + deep + b"\x90."
    yield "a deep tuple in a frozenset", head + b"(" + deep + b"\x91."
    yield "a deep tuple", head + deep + b"."
    yield "deep lists", head + b"]" * 100_000 + b"a" * 99_999 + b"."
    yield "a list in itself", head + b"]\x94h\x00a."
    yield "a dictionary in itself", head + b"}\x94K\x00h\x00s."
    yield (
        "lists that double",
        head + b"]" + b"".join(b"\x94]h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(60)) + b".",
    )
    yield "wide lists that double", head + b"(" + b"K\x01" * 1000 + b"l" + b"2\x86" * 40 + b"."
    yield "tuples that double as a key", head + b"}" + b")" + b"2\x86" * 60 + b"Ns."
    yield "a place in the memo", head + b"Nr" + struct.pack("<I", 2**32 - 1) + b"."
    yield "a place in the memo, as text", head + b"Np4611686018427387903\n."
    for code, size in ((b"\x8b", "<i"), (b"\x8a", "<B"), (b"B", "<I"), (b"X", "<I"), (b"\x8e", "<Q"), (b"\x8d", "<Q")):
        for number in (127, 2**31 - 1, 2**36, 2**63 - 1, 2**64 - 1):
            if number < 256 ** struct.calcsize(size) and not (size == "<i" and number >= 2**31):
                yield f"{code!r} of {number}", head + code + struct.pack(size, number) + b"1."
    yield "a large bytearray", b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"1."
    yield "a large frame", head + b"\x95" + struct.pack("<Q", 2**40) + b"N."
    yield "a long number", head + b"I" + b"9" * 100_000 + b"\n."
    yield "out of band", b"\x80\x05\x97\x98."
    yield "persistent", head + b"Pabc\n."
    yield "an extension", head + b"\x82\x01."
    for name in (
        "numpy\nndarray",
        "numpy\ndtype",
        "scipy.sparse\ncsr_matrix",
        "__builtin__\nlist",
        "_codecs\nencode",
        "collections\nOrderedDict",
    ):
        named = f"c{name}\n".encode()
        yield f"{name!r} alone", head + named + b"."
        yield f"a state of {name!r}", head + named + b"}\x8c\x05stateK\x01sb."
        yield f"slots of {name!r}", head + named + b"(N}\x8c\x0c__defaults__)stb."
        yield f"{name!r} extended", head + named + b"K\x01a."
        yield f"an entry of {name!r}", head + named + b"K\x01K\x01s."
        yield f"{name!r} by OBJ", head + b"(" + named + b"K\x05o."
        yield f"{name!r} by INST", head + b"(K\x05i" + name.encode() + b"\n."
        yield f"{name!r} with names", head + named + b")}\x8c\x05shapeK\x05s\x92."
        yield f"a factory {name!r}", head + b"ccollections\ndefaultdict\n" + named + b"\x85R."
        yield f"a call of a call of {name!r}", head + named + b")R)R."
    csr, parts = (
        Made(
            scipy.sparse.csr_matrix,
            states=({"data": np.ones(1), "indices": np.zeros(1, int), "indptr": np.array([0, 1]), "_shape": (1, 1)},),
        ),
        np.array([999]),
    )
    yield (
        "a second state of a matrix",
        twice(csr, {"data": np.ones(1), "indices": parts, "indptr": np.array([0, 1]), "_shape": (1, 1)}),
    )
    yield (
        "a second state of an array",
        twice(array(np.dtype("f8"), (1,), b"A" * 8), (1, (2**20,), np.dtype("f8"), False, b"")),
    )
    yield "an array of itself", pickle.dumps(array(np.dtype("O"), (1,), []), 2)[:-1].replace(b"]", b"]h\x00a") + b"."


def whole_files() -> dict[str, Any]:
    """What raw files of data sets hold."""
    matrix = scipy.sparse.random(20, 12, 0.3, "csr", dtype=np.float32, random_state=0)
    graph = defaultdict(list, {i: [i, i + 1, np.int64(3)] for i in range(20)})
    objects = np.array([[1, "a"], [np.ones(3), None]], dtype=object)
    return {
        "matrix": matrix,
        "labels": np.eye(3, dtype=np.int32)[np.arange(20) % 3],
        "graph": graph,
        "objects": objects,
    }


def mutations(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Whole files with bits, bytes and ranges changed, and pieces of one put into another."""
    rng = np.random.default_rng(seed)
    blobs = [pickle.dumps(value, protocol) for value in whole_files().values() for protocol in (0, 2, 4, 5)]
    for number in range(count):
        blob = bytearray(blobs[number % len(blobs)])
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(len(blob)))
            how = int(rng.integers(5))
            end = min(len(blob), place + int(rng.integers(1, 40)))
            if how == 0:
                blob[place] ^= 1 << int(rng.integers(8))
            elif how == 1:
                blob[place] = int(
                    rng.choice(list(b"(.0125JKMNRUX)abdehiloqrstu}]\x81\x85\x86\x87\x8c\x90\x91\x92\x93\x94"))
                )
            elif how == 2:
                del blob[place:end]
            elif how == 3:
                blob[place:place] = blob[place:end]
            else:
                other = blobs[int(rng.integers(len(blobs)))]
                start = int(rng.integers(len(other)))
                blob[place:end] = other[start : start + end - place]
        yield f"mutation {number} of seed {seed}", bytes(blob)


def pickles(marker: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """All of them, as files."""
    yield "a command", pickle.dumps(Made(os.system, f"touch {marker}"))
    for name, value in itertools.chain(arrays(), matrices()):
        for protocol in (0, 2, 4):
            try:
                yield f"{name}, protocol {protocol}", pickle.dumps(value, protocol)
            except (pickle.PicklingError, ValueError):  # an argument that this protocol does not have
                continue
    yield from codes()
    yield from mutations(3000, seed)


def used(value: Any) -> None:
    """Look at everything that was read, as a data set would."""
    if isinstance(value, dict):
        for item in value.items():
            used(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            used(item)
    elif scipy.sparse.issparse(value):
        used((value @ np.ones(value.shape[1])).sum())
        used(np.asarray(value.todense()))
    elif isinstance(value, (np.ndarray, np.generic)):
        assert isinstance(value, np.ndarray) is False or value.flags.writeable
        io.StringIO().write(repr(value) + str(value.dtype))
        used(value.tolist())


def torch_files(marker: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """The same within files of torch, in the new format and the old one."""
    import torch

    values: Iterator[tuple[str, Any]] = itertools.chain(
        [("a command", Made(os.system, f"touch {marker}")), ("whole", {"a": np.ones(3), "b": np.float64(3)})],
        ((name, {"a": value}) for name, value in itertools.chain(arrays(), matrices())),
    )
    for number, (name, value) in enumerate(values):
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer, _use_new_zipfile_serialization=bool(number % 2))
        except (pickle.PicklingError, ValueError, RuntimeError):
            continue
        yield name, buffer.getvalue()
    for name, blob in itertools.chain(codes(), mutations(500, seed)):
        for new in (True, False):
            yield f"{name}, {'new' if new else 'old'} format", _file_of_torch(blob, new)


def _file_of_torch(blob: bytes, new: bool) -> bytes:
    """A file of torch with a pickle of one's own."""
    import torch

    buffer = io.BytesIO()
    if new:
        writer = torch._C.PyTorchFileWriter(buffer)
        writer.write_record("data.pkl", blob, len(blob))
        writer.write_record("byteorder", b"little", 6)
        writer.write_end_of_file()
        return buffer.getvalue()
    serialization: Any = torch.serialization
    for value in (serialization.MAGIC_NUMBER, serialization.PROTOCOL_VERSION, {"little_endian": True}):
        pickle.dump(value, buffer, 2)
    buffer.write(blob)
    pickle.dump([], buffer, 2)
    return buffer.getvalue()
