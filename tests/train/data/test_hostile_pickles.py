"""No file of a data set ends Python or runs code, whatever its pickles say; what is whole is read."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch_geometric.data import Data

from dibit.train.data.guard import arrays_only
from tests.train.data import hostile

pytestmark = pytest.mark.slow

_READ = """
import contextlib, io, pickle, resource, sys, warnings
from pathlib import Path
import torch
from dibit.train.data.guard import arrays_only
from tests.train.data import hostile

how, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
warnings.simplefilter("ignore")
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
marker, now, read = folder / "marker", open(folder / "now", "w"), 0
for name, content in getattr(hostile, how)(marker, seed):
    now.seek(0)
    now.truncate()
    now.write(name)
    now.flush()
    with contextlib.suppress(Exception), arrays_only(graphs=True):
        file = io.BytesIO(content)
        hostile.used(pickle.load(file, encoding="latin1") if how == "pickles" else torch.load(file))
        read += 1
    assert not marker.exists(), name
print("read", read)
"""


@pytest.mark.parametrize(("how", "seed"), [("pickles", 0), ("torch_files", 1)])
def test_nothing_ends_python_or_runs(how: str, seed: int, tmp_path: Path) -> None:
    words = [sys.executable, "-c", _READ, how, str(tmp_path), str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, ((tmp_path / "now").read_text(), done.stderr[-2000:])
    assert int(done.stdout.split()[1]) > 10, "some are whole after all"
    assert not (tmp_path / "marker").exists()


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if scipy.sparse.issparse(expected):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.toarray(), expected.toarray())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, (list, tuple)) or (isinstance(expected, np.ndarray) and expected.dtype == object):
        assert isinstance(expected, (list, tuple)) or found.shape == expected.shape
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert (found.dtype, found.shape) == (expected.dtype.newbyteorder("="), expected.shape)
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def whole() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    cube = rng.standard_normal((3, 4, 5))
    found = {**hostile.whole_files(), "turned": cube.transpose(2, 0, 1), "fortran": np.asfortranarray(cube)}
    found |= {
        "empty": np.zeros((0, 3)),
        "number": np.array(3),
        "swapped": np.arange(4, dtype=">i4"),
        "part": cube[:, 1],
    }
    found |= {"plain": [1, 2.5, None, True, "a", b"b", bytearray(b"c"), {1, (2, "x")}, frozenset([3]), 1j, 2**70]}
    for code in "?bBhHiIlLefdFD":
        found[f"array of {code}"] = rng.integers(0, 2, (2, 3)).astype(code)
        found[f"scalar of {code}"] = found[f"array of {code}"][0, 0]
        if code != "e":
            found[f"matrix of {code}"] = scipy.sparse.csr_matrix(found[f"array of {code}"])
    return found


@pytest.mark.parametrize("protocol", range(6))
def test_what_is_whole_is_read(protocol: int) -> None:
    for name, value in whole().items():
        with arrays_only():
            found = pickle.loads(pickle.dumps([value, {name: value}], protocol))
        same(found, [value, {name: value}])


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
def test_graphs_with_arrays_are_read_by_torch(old_format: bool) -> None:
    arrays = {name: value for name, value in whole().items() if isinstance(value, (np.ndarray, np.generic))}
    arrays = {name: value for name, value in arrays.items() if value.dtype != object and value.size}
    data = Data(x=torch.eye(3), edge_index=torch.tensor([[0], [1]]), kept=arrays)
    buffer = io.BytesIO()
    torch.save((data, {"x": torch.tensor([0, 3])}, arrays), buffer, _use_new_zipfile_serialization=not old_format)
    buffer.seek(0)
    with arrays_only(graphs=True):
        found, slices, again = torch.load(buffer)
    assert torch.equal(found.x, data.x)
    assert slices["x"].tolist() == [0, 3]
    same(found.kept, arrays)
    same(again, arrays)


def test_numpy_arrays_of_objects_are_read(tmp_path: Path) -> None:
    objects = hostile.whole_files()["objects"]
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    with arrays_only():
        same(np.load(tmp_path / "a.npy", allow_pickle=True), objects)


def test_a_zip_that_is_no_file_of_torch() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", "b")
    buffer.seek(0)
    with arrays_only(graphs=True), pytest.raises(RuntimeError, match="archive"):
        torch.load(buffer)
