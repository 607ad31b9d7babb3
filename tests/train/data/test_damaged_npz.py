"""A damaged or odd ``.npz`` either trains on what is in it, or ends in one sentence."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from dibit.cli import main
from dibit.train import DataSettings, UserError
from dibit.train.data import NodeDataset, load_graph
from tests.train.data import damaged

FAST = ("--epochs", "1", "--hidden", "8", "--layers", "2", "--device", "cpu", "--quiet")


def outcome(path: Path) -> NodeDataset | str:
    """The graph, or the sentence; anything else fails the test that asks."""
    try:
        graph = load_graph(DataSettings(dataset=str(path)), seed=0)
        graph.split(0)
    except UserError as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert len(sentence) < 700
        assert sentence.endswith((".", "?"))
        return sentence
    return graph


def numbers(array: np.ndarray) -> Any:
    """Exact Python numbers."""
    return array.tolist()


def check_right(graph: NodeDataset, arrays: dict[str, Any]) -> None:
    """The graph is what the arrays say, number by number."""
    if "x" in arrays:
        x = np.asarray(arrays["x"])
    else:
        parts = [np.asarray(arrays[f"x_{part}"]) for part in ("values", "indices", "indptr")]
        parts = [parts[0].astype(np.float64), *(part.astype(np.int64) for part in parts[1:])]
        x = scipy.sparse.csr_matrix(tuple(parts), shape=tuple(int(n) for n in arrays["x_shape"])).toarray()
    assert np.isfinite(graph.x.numpy()).all()
    np.testing.assert_array_equal(graph.x.numpy(), x.astype(np.float32))
    y = np.asarray(arrays["y"])
    assert numbers(graph.y.numpy()) == numbers(y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y)
    edges = np.asarray(arrays["edge_index"])
    given = {(a, b) for a, b in zip(*numbers(edges), strict=True) if a != b}
    assert set(zip(*graph.edge_index.tolist(), strict=True)) == given
    if "num_classes" in arrays:
        assert graph.num_classes == int(np.asarray(arrays["num_classes"]).item())
    if graph.masks is not None:
        for mask, part in zip(graph.masks, damaged.PARTS, strict=True):
            own = np.asarray(arrays[part])
            assert own.dtype == bool
            assert (mask == (own if own.shape[0] == graph.num_nodes else own.T)).all()


@pytest.mark.parametrize("compressed", [False, True], ids=["savez", "savez_compressed"])
def test_odd_arrays(tmp_path: Path, compressed: bool) -> None:
    seen = {"right": 0, "refused": 0}
    for name, arrays in damaged.odd_arrays():
        path = tmp_path / "g.npz"
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        found = outcome(path)
        seen["refused" if isinstance(found, str) else "right"] += 1
        if isinstance(found, NodeDataset):
            try:
                check_right(found, arrays)
            except (AssertionError, TypeError, ValueError, KeyError) as error:
                raise AssertionError(f"{name} is accepted though wrong: {error}") from error
    assert seen["right"] > 80, seen
    assert seen["refused"] > 250, seen


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = outcome(damaged.written(Path("whole.npz"), damaged.zipped(damaged.members(damaged.dense()))))
    assert isinstance(whole, NodeDataset)
    accepted = []
    for name, content in damaged.odd_files():
        found = outcome(damaged.written(Path("g.npz"), content))
        if isinstance(found, NodeDataset):
            accepted.append(name)
            assert found.fingerprint() == whole.fingerprint(), name
    fine = [
        "deflate",
        "bzip2",
        "lzma",
        *(f"{m}, another array: {o}" for m in ("deflate", "bzip2", "lzma") for o in ("10**12", "a bomb")),
        "names without .npy",
        "with a comment before it",
    ]
    assert set(fine) <= set(accepted)
    assert not [name for name in accepted if "twice" in name or "x.npy shape" in name or "type" in name]
    assert sorted(os.listdir(tmp_path)) == ["g.npz", "whole.npz"]  # nothing in a header was run


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_damage_anywhere(tmp_path: Path, kind: str, method: int) -> None:
    """What is accepted has the content of the undamaged file: its checksums see the rest."""
    arrays = damaged.dense() if kind == "dense" else damaged.sparse()
    content = damaged.zipped(damaged.members(arrays), method)
    whole = outcome(damaged.written(tmp_path / "whole.npz", content))
    assert isinstance(whole, NodeDataset)
    refused = 0
    for name, changed in damaged.damaged_files(content, 60, seed=method + len(kind)):
        found = outcome(damaged.written(tmp_path / "g.npz", changed))
        refused += isinstance(found, str)
        if isinstance(found, NodeDataset):  # what no array lies under, or an optional array's name in the directory
            same = found.x.equal(whole.x) and found.y.equal(whole.y) and found.edge_index.equal(whole.edge_index)
            assert same, name
    assert refused > 200


def test_things_that_are_no_files(tmp_path: Path) -> None:
    good = damaged.written(tmp_path / "good.npz", damaged.zipped(damaged.members(damaged.dense())))
    paths = {
        name: tmp_path / f"{name}.npz" for name in ("link", "dangling", "loop", "folder", "pipe", "device", "null")
    }
    paths["link"].symlink_to(good)
    paths["dangling"].symlink_to(tmp_path / "nowhere.npz")
    paths["loop"].symlink_to(paths["loop"])
    paths["folder"].mkdir()
    os.mkfifo(paths["pipe"])
    paths["device"].symlink_to("/dev/zero")
    paths["null"] = Path("a\0b.npz")
    paths["long"] = Path("a" * 5000 + ".npz")
    paths["below a file"] = good / "x.npz"
    found = {name: outcome(path) for name, path in paths.items()}
    assert isinstance(found.pop("link"), NodeDataset)
    assert all(isinstance(each, str) for each in found.values()), found
    assert "does not exist" in str(found["dangling"])
    assert "is a folder" in str(found["folder"])
    assert "is a pipe" in str(found["pipe"])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_no_permission(tmp_path: Path) -> None:
    good = damaged.written(tmp_path / "good.npz", damaged.zipped(damaged.members(damaged.dense())))
    good.chmod(0)
    assert "Permission denied" in str(outcome(good))


def test_more_than_memory_is_said_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dibit.train.data.npz.memory_bytes", lambda: 500)
    path = damaged.written(tmp_path / "g.npz", damaged.zipped(damaged.members(damaged.dense())))
    assert "more than this machine's memory" in str(outcome(path))


HARMLESS = {
    "no edges": {"edge_index": np.zeros((2, 0), int)},
    "self-loops alone": {"edge_index": np.tile(np.arange(24), (2, 1))},
    "y (N, 1)": {"y": (np.arange(24) % 2)[:, None]},
    "y bool": {"y": np.arange(24) % 2 == 0},
    "one class": {"y": np.zeros(24, int), "num_classes": 1},
    "num_classes (1,)": {"num_classes": np.array([3])},
    "big-endian": {
        name: np.asarray(a).astype(np.asarray(a).dtype.newbyteorder(">")) for name, a in damaged.dense().items()
    },
    "Fortran": {"x": np.asfortranarray(damaged.dense()["x"])},
    "half": {"x": damaged.dense()["x"].astype(np.float16)},
    "long double": {"x": damaged.dense()["x"].astype(np.longdouble)},
    "x bool": {"x": damaged.dense()["x"] > 0},
    "several labels, no edges": {"y": np.eye(3, dtype=bool)[np.arange(24) % 3], "edge_index": np.zeros((2, 0), int)},
}


@pytest.mark.parametrize(
    ("case", "model"),
    [*((case, "sage") for case in HARMLESS), *(("no edges", model) for model in ("gcn", "gin", "gat", "gcn2"))],
)
@pytest.mark.slow
def test_harmless_oddities_train(tmp_path: Path, case: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "g.npz", **{**damaged.dense(), **HARMLESS[case]})
    words = ["train", "--dataset", str(tmp_path / "g.npz"), *FAST, "--model", model, "--out", str(tmp_path / "run")]
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("loader", ["neighbor", "cluster", "shadow"])
def test_graphs_without_edges_train_in_batches(tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "g.npz", **{**damaged.dense(), **HARMLESS["no edges"]})
    words = [
        "train",
        "--dataset",
        str(tmp_path / "g.npz"),
        *FAST,
        "--loader",
        loader,
        "--parts",
        "4",
        "--clusters",
        "2",
    ]
    status = main([*words, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert status == 0 or (status == 2 and "pip install" in said), said
