"""Graphs as ``.npz`` files that are odd or damaged in every way that the format allows."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from tests.train.conftest import small_arrays

Arrays = dict[str, Any]
PARTS = ("train_mask", "val_mask", "test_mask")
DTYPES = (
    "?",
    "i1",
    "u1",
    "<i2",
    ">i2",
    "<u4",
    ">i4",
    "<i8",
    ">i8",
    "<u8",
    ">u8",
    "<f2",
    ">f2",
    "<f4",
    ">f4",
    "<f8",
    ">f8",
    "g",
    "F",
    "D",
    "m8[s]",
    "M8[s]",
    "S3",
    "U3",
    "V8",
    "O",
)


def dense() -> Arrays:
    """A graph with everything the format has: dense features, masks, num_classes."""
    arrays = small_arrays(nodes=24)
    masks = {name: np.arange(24) % 4 == i for i, name in enumerate(PARTS)}
    return {**arrays, **masks, "num_classes": np.array(3)}


def sparse() -> Arrays:
    """The same with the features as a CSR matrix."""
    arrays = dense()
    m = scipy.sparse.csr_matrix(arrays.pop("x"))
    return {**arrays, "x_indptr": m.indptr, "x_indices": m.indices, "x_values": m.data, "x_shape": np.array(m.shape)}


def odd_arrays() -> Iterator[tuple[str, Arrays]]:
    """One array at a time missing, of another type, another shape, or with another value somewhere."""
    for kind, base in (("dense", dense()), ("sparse", sparse())):
        for name in base:
            if kind == "sparse" and not name.startswith("x_"):
                continue
            for how, array in variants(np.asarray(base[name])):
                yield f"{kind}: {name} {how}", {**base, name: array}
            without = {other: array for other, array in base.items() if other != name}
            yield f"{kind}: {name} missing", without
            yield f"{kind}: {name} renamed", {**without, f"{name}s": base[name]}
    yield "x and CSR", {**dense(), **sparse()}
    yield "nothing", {}
    labels = np.eye(3, dtype=int)[dense()["y"]]
    several = {**dense(), "y": labels}
    yield "several labels", several
    yield "several labels, num_classes 7", {**several, "num_classes": np.array(7)}
    yield "several labels, a 2", {**several, "y": labels * 2}
    for name, array in (
        ("all unlabelled", np.full(24, -1)),
        ("one class", np.zeros(24, int)),
        ("(N, 1)", labels[:, :1]),
    ):
        yield f"y {name}", {**dense(), "y": array}
    for number in (0, -1, 2, 10**12, 2**63 - 1, 100_000):
        yield f"num_classes {number}", {**dense(), "num_classes": np.array(number)}
    for name, edges in (
        ("none", np.zeros((2, 0), int)),
        ("none, as floats", np.zeros((2, 0))),
        ("self-loops", np.tile(np.arange(24), (2, 1))),
        ("one", np.array([[0], [1]])),
        ("twice", np.repeat([[0], [1]], 50, axis=1)),
    ):
        yield f"edges {name}", {**dense(), "edge_index": edges}
    for count in (1, 2, 10, 23, 24, 25):
        for turned in (False, True):
            masks = {part: np.tile(dense()[part][:, None], (1, count)) for part in PARTS}
            yield (
                f"{count} splits{' turned' * turned}",
                {**dense(), **{part: mask.T if turned else mask for part, mask in masks.items()}},
            )
    for part in PARTS:
        yield f"{part} empty", {**dense(), part: np.zeros(24, bool)}
        yield f"{part} full", {**dense(), part: np.ones(24, bool)}


def variants(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """An array in other types and shapes, and with other values."""
    for code in DTYPES:
        try:
            yield f"as {code}", array.astype(code)
        except (TypeError, ValueError):
            yield f"as {code}", np.zeros(array.shape, code)
    yield "structured", np.zeros(array.shape, [("a", "<f4"), ("b", "<i4")])
    yield "in Fortran's order", np.asfortranarray(array)
    yield "turned", np.ascontiguousarray(array.T)
    yield "with one axis more", array[None]
    yield "with one axis more at the end", array[..., None]
    yield "flat", array.reshape(-1)
    yield "scalar", np.array(1, array.dtype)
    for axis in range(array.ndim):
        yield f"cut to 0 along {axis}", np.take(array, [], axis)
        yield f"cut along {axis}", np.take(array, range(array.shape[axis] - 1), axis)
        yield f"twice along {axis}", np.concatenate([array, array], axis)
    extremes: list[Any] = [0, 1, -1, -2, 10**6]
    if array.dtype.kind in "iu":
        extremes += [np.iinfo(np.int64).min, np.iinfo(np.int64).max, 2**31, 2**32 + 1]
    for value in extremes:
        wide = array.astype(np.int64 if array.dtype.kind in "iu" else array.dtype)
        wide[(0,) * wide.ndim] = value
        yield f"with {value}", wide
    unsigned = array.astype(np.uint64)
    unsigned[(0,) * unsigned.ndim] = 2**64 - 1
    yield "with 2**64 - 1", unsigned
    if array.dtype.kind == "f":
        for value in (np.nan, np.inf, -np.inf, 1e39, -1e300, 3e38, 1e-300):
            wide = array.astype(np.float64)
            wide[(0,) * wide.ndim] = value
            yield f"with {value}", wide


def npy(array: Any) -> bytes:
    """One array as a file of its own."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


def with_header(header: str, data: bytes, version: int = 1) -> bytes:
    """An array with a header of one's own."""
    text = header.encode("utf-8") + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def odd_headers() -> Iterator[tuple[str, bytes]]:
    """Members that are called ``x.npy``."""
    x = np.ascontiguousarray(dense()["x"])
    data, whole = x.tobytes(), npy(x)
    yield "empty", b""
    yield "text", b"hello"
    yield "a pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR."
    yield "magic alone", whole[:6]
    for cut in (7, 8, 9, 10, 40, 128, 129, len(whole) - 1):
        yield f"cut at {cut}", whole[:cut]
    yield "with a byte more", whole + b"\0"
    for version in (0, 1, 2, 3, 4, 255):
        yield (
            f"version {version}",
            with_header(_header(x.shape), data, max(version, 1))[:6]
            + bytes([version, 0])
            + (with_header(_header(x.shape), data, max(version, 1))[8:]),
        )
    for shape in ((10**12,), (2**62, 4), (24, 9), (24, 7), (23, 8), (0, 8), (24,), (2**63, 0), ()):
        yield f"shape {shape}", with_header(_header(shape), data)
    for axes in (32, 33, 63, 65, 70, 400):
        yield f"{axes} axes", with_header(_header((1,) * (axes - 2) + x.shape), data)
    for text in (
        "(60, True)",
        "(24, -8)",
        "(24, 8.0)",
        "(24, '8')",
        "24",
        "[24, 8]",
        "(24, 8",
        "(" * 200 + ")" * 200,
        "(1e3,)",
        f"({'9' * 5000},)",
        "None",
        "(24, 8, 1, " * 50 + ")",
    ):
        yield f"shape written {text[:20]}", with_header(_header(text), data)
    for descr in (
        "'|O'",
        "'<x9'",
        "'<f4,<f4'",
        "None",
        "[('a', '<f4')]",
        "'<f" + "4" * 500 + "'",
        "'<U" + "9" * 30 + "'",
        "''",
        "'\\x00'",
        "'(2,2)f4'",
        "'f0'",
        "'V0'",
        "'S0'",
        "'i,' * 1000",
    ):
        yield f"type {descr[:20]}", with_header(_header(x.shape, descr), data)
    for text in (
        "[" * 3000,
        "-" * 5000 + "1",
        "{" * 200,
        "{}",
        "",
        "lambda: 0",
        "{'a': 1}",
        "__import__('os').system('touch x')",
        _header(x.shape) * 2,
        _header(x.shape).replace("False", "0"),
        " " * 60_000,
        "\0" * 50,
        "{'shape': (24, 8)}",
        _header(x.shape).replace("{", "{'more': 1, "),
    ):
        yield f"header {text[:20]!r}", with_header(text, data)


def _header(shape: Any, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def members(arrays: Arrays) -> list[tuple[str, bytes]]:
    """What `numpy.savez` writes for these arrays."""
    return [(f"{name}.npy", npy(array)) for name, array in arrays.items()]


def odd_files() -> Iterator[tuple[str, bytes]]:
    """Whole files that are odd as a zip."""
    whole = members(dense())
    for name, content in odd_headers():
        yield f"x.npy {name}", zipped([(n, content if n == "x.npy" else c) for n, c in whole])
    for method, word in ((zipfile.ZIP_DEFLATED, "deflate"), (zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")):
        yield word, zipped(whole, method)
        for name, content in (("10**12", with_header(_header((10**12,)), b"")), ("a bomb", npy(np.zeros(10**6, "f4")))):
            yield f"{word}, another array: {name}", zipped([*whole, ("other.npy", content)], method)
    yield "text", b"not a graph"
    yield "empty", b""
    yield "an empty zip", zipped([])
    yield "a folder in it", zipped([("x.npy/", b""), *whole])
    yield "names without .npy", zipped([(n.removesuffix(".npy"), c) for n, c in whole])
    yield "with a comment before it", b"#!/bin/sh\n" + zipped(whole)
    for i, (name, content) in enumerate(whole):
        yield f"{name} twice", zipped([*whole, (name, content)])
        yield f"{name} with and without .npy", zipped([*whole, (name.removesuffix(".npy"), content)])
        yield f"{name} in a folder", zipped([(f"a/{n}" if j == i else n, c) for j, (n, c) in enumerate(whole)])
    for offset, value, what in (
        (8, 1, "encrypted"),
        (10, 93, "method 93"),
        (10, 8, "stored as if deflated"),
        (6, 99, "version 99"),
    ):
        content = bytearray(zipped(whole))
        at = content.find(b"PK\x01\x02")
        content[at + offset] = content[at + offset] | value if what == "encrypted" else value
        yield what, bytes(content)
    for field, size in ((24, 2**31), (20, 2**31), (42, 2**31), (24, 1), (20, 1)):  # sizes and the place of the member
        content = bytearray(zipped(whole, zipfile.ZIP_DEFLATED))
        at = content.find(b"PK\x01\x02")
        content[at + field : at + field + 4] = struct.pack("<I", size)
        yield f"field {field} says {size}", bytes(content)


def damaged_files(content: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """A file cut off, and with flipped bits and overwritten ranges, anywhere."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        place = int(rng.integers(len(content)))
        yield f"cut at {place}", content[:place]
        bit = int(rng.integers(8))
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(changed)
        changed = bytearray(content)
        end = min(len(content), place + int(rng.integers(1, 65)))
        changed[place:end] = rng.bytes(end - place)
        yield f"bytes {place} to {end}", bytes(changed)
        yield f"without bytes {place} to {end}", content[:place] + content[end:]
    directory = content.find(b"PK\x01\x02")
    for place in range(directory, len(content)):  # where zip files say what lies where
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        yield f"a bit of byte {place}, in the directory", bytes(changed)


def written(path: Path, content: bytes) -> Path:
    """The content as a file."""
    path.write_bytes(content)
    return path
