"""Data sets by name read arrays from the files in --root, and never run what else lies in them."""

from __future__ import annotations

import os
import pickle
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import torch_geometric.datasets as datasets
from torch_geometric.data import Data

from dibit.cli import main
from dibit.train import DataSettings, UserError
from dibit.train.data import load_graph
from dibit.train.data.guard import CodeInFile, arrays_only

NODES, TRAIN, TEST = 640, 30, 60
FILES = ("x", "tx", "allx", "y", "ty", "ally", "graph")


class Call:
    """Unpickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def evil(marker: Path) -> dict[str, Call]:
    """Objects that write a file when they are unpickled."""
    text = str(marker)
    return {
        "os.system": Call(os.system, f"touch {text}"),
        "subprocess": Call(subprocess.call, ["touch", text]),
        "eval": Call(eval, f"open({text!r}, 'w')"),
        "exec": Call(exec, f"open({text!r}, 'w')"),
        "open": Call(open, text, "w"),
        "numpy.save": Call(np.save, text, 1),
        "Path.touch": Call(Path.touch, marker),
        "torch.save": Call(torch.save, 1, text),
    }


KINDS = sorted(evil(Path("x")))


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, and the module names of old NumPy and SciPy."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, data: bytes) -> None:
        self.write(b"T" + len(data).to_bytes(4, "little") + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes

    def save_global(self, obj: Any, name: str | None = None) -> None:
        modules = {"scipy.sparse._csr": "scipy.sparse.csr", "numpy._core.multiarray": "numpy.core.multiarray"}
        module = modules.get(obj.__module__)
        if module is None:
            super().save_global(obj, name)
            return
        self.write(f"c{module}\n{name or obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[type] = save_global
    dispatch[type(len)] = save_global
    dispatch[type(FILES.count)] = save_global


def dumped(value: Any, how: int | str) -> bytes:
    """A pickle of a protocol, or as Python 2 wrote it."""
    if how != "python2":
        return pickle.dumps(value, protocol=int(how))
    import io

    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2, fix_imports=True).dump(value)
    return buffer.getvalue()


def planetoid(folder: Path, how: int | str = 2, **instead: Any) -> dict[str, Any]:
    """Raw files as Planetoid's; `instead` replaces what a file holds."""
    rng = np.random.default_rng(0)
    x = scipy.sparse.random(NODES, 12, 0.3, "csr", dtype=np.float32, random_state=0)
    y = np.eye(3, dtype=np.int32)[np.arange(NODES) % 3]
    graph = defaultdict(list)
    for a, b in rng.integers(NODES, size=(4 * NODES, 2)).tolist():
        graph[a].append(b)
        graph[b].append(a)
    known = NODES - TEST
    content: dict[str, Any] = {"x": x[:TRAIN], "tx": x[known:], "allx": x[:known]}
    content |= {"y": y[:TRAIN], "ty": y[known:], "ally": y[:known], "graph": graph}
    raw = folder / "Cora" / "raw"
    raw.mkdir(parents=True)
    for name, value in {**content, **instead}.items():
        (raw / f"ind.cora.{name}").write_bytes(value if isinstance(value, bytes) else dumped(value, how))
    (raw / "ind.cora.test.index").write_text("".join(f"{i}\n" for i in range(known, NODES)))
    return {"x": x, "y": y, "graph": graph}


def load(root: Path, **settings: Any) -> Any:
    return load_graph(DataSettings(dataset="cora", root=str(root), **settings), seed=0)


@pytest.mark.parametrize("how", [0, 1, 2, 3, 4, 5, "python2"])
def test_raw_files_of_every_protocol_are_read(tmp_path: Path, how: int | str) -> None:
    content = planetoid(tmp_path / "cora", how)
    graph = load(tmp_path)
    np.testing.assert_array_equal(graph.x.numpy(), content["x"].toarray())
    assert graph.y.tolist() == content["y"].argmax(1).tolist()
    pairs = {(a, b) for a, ends in content["graph"].items() for b in ends if a != b}
    assert set(zip(*graph.edge_index.tolist(), strict=True)) == pairs
    assert [len(part) for part in (graph.split(0).train, graph.split(0).val, graph.split(0).test)] == [30, 500, 60]
    again = load(tmp_path)  # from what PyTorch Geometric has written meanwhile
    assert again.fingerprint() == graph.fingerprint()


@pytest.mark.parametrize("how", [0, 2, 4])
@pytest.mark.parametrize("file", FILES)
def test_a_raw_file_that_would_run_code_is_refused(tmp_path: Path, file: str, how: int) -> None:
    marker = tmp_path / "marker"
    for i, (kind, call) in enumerate(evil(marker).items()):
        root = tmp_path / str(i)
        planetoid(root / "cora", how, **{file: {"nested": [call]}})
        with pytest.raises(UserError, match=r"would run code when it is read \(.*pass --trust") as error:
            load(root)
        assert "\n" not in str(error.value)
        assert not marker.exists(), kind


@pytest.mark.parametrize("file", ["data.pt", "pre_transform.pt", "pre_filter.pt"])
@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
def test_a_processed_file_that_would_run_code_is_refused(
    tmp_path: Path, file: str, old_format: bool, recwarn: pytest.WarningsRecorder
) -> None:
    planetoid(tmp_path / "cora")
    load(tmp_path)
    marker = tmp_path / "marker"
    path = tmp_path / "cora" / "Cora" / "processed" / file
    for kind, call in evil(marker).items():
        torch.save(call, path, _use_new_zipfile_serialization=not old_format)
        with pytest.raises(UserError, match=r"would run code when it is read \("):
            load(tmp_path)
        assert not marker.exists(), kind
    assert not any("add_safe_globals" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("name", ["twitch-de", "github", "facebookpagepage", "lastfmasia", "deezereurope"])
def test_object_arrays_that_would_run_code_are_refused(tmp_path: Path, name: str) -> None:
    """PyTorch Geometric reads these with ``allow_pickle=True``."""
    marker = tmp_path / "marker"
    file = {
        "twitch-de": "DE/raw/DE.npz",
        "github": "raw/github.npz",
        "facebookpagepage": "raw/facebook.npz",
        "lastfmasia": "raw/lastfm_asia.npz",
        "deezereurope": "raw/deezer_europe.npz",
    }[name]
    path = tmp_path / name / file
    path.parent.mkdir(parents=True)
    arrays = {"edges": np.array([[0, 1], [1, 2]]), "features": np.eye(3), "target": np.array([0, 1, 0])}
    np.savez(path, **{**arrays, "features": np.array([evil(marker)["open"]], dtype=object)})
    with pytest.raises(UserError, match="would run code"):
        load_graph(DataSettings(dataset=name, root=str(tmp_path)), seed=0)
    assert not marker.exists()
    np.savez(path, **arrays)
    assert load_graph(DataSettings(dataset=name, root=str(tmp_path)), seed=0).num_nodes == 3


def test_trust_is_asked_for_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    graph = planetoid(tmp_path / "a" / "cora")["graph"]
    planetoid(tmp_path / "b" / "cora", graph=[Call(open, str(marker), "w").__reduce__()[0], graph])
    (tmp_path / "b" / "cora" / "Cora" / "raw" / "ind.cora.graph").write_bytes(pickle.dumps(Graph(graph, marker)))
    words = ["train", "--dataset", "cora", "--root", str(tmp_path / "b"), "--epochs", "1", "--hidden", "8", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "--trust" in sentence
    assert not marker.exists()
    assert not (tmp_path / "run").exists()
    assert main([*words, "--out", str(tmp_path / "run"), "--trust"]) == 0
    assert marker.exists()


class Graph(dict[int, list[int]]):
    """A dictionary that writes a file when it is unpickled."""

    def __init__(self, items: Any, marker: Path) -> None:
        super().__init__(items)
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (dict(self), self.marker)


def _made(items: dict[int, list[int]], marker: Path) -> dict[int, list[int]]:
    marker.touch()
    return items


def test_environment_that_trusts_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OGB's own call of `torch.load` says nothing of what it allows."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"

    def planetoid_by_torch(root: str, name: str) -> Any:
        return torch.load(tmp_path / "data.pt")

    monkeypatch.setattr(datasets, "Planetoid", planetoid_by_torch)
    (tmp_path / "cora").mkdir()
    torch.save(evil(marker)["open"], tmp_path / "data.pt")
    with pytest.raises(UserError, match="would run code"):
        load(tmp_path)
    assert not marker.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    eye = torch.eye(20)
    masks = {f"{part}_mask": torch.arange(20) % 3 == i for i, part in enumerate(("train", "val", "test"))}
    data = Data(x=eye, edge_index=torch.tensor([[0], [1]]), y=torch.arange(20) % 2, **masks)
    torch.save([data], tmp_path / "data.pt")  # as OGB's cache: PyTorch Geometric's own classes
    assert load(tmp_path).num_nodes == 20


def test_what_is_patched_is_put_back_and_other_threads_are_left_alone(tmp_path: Path) -> None:
    before = pickle.load, pickle.loads, pickle.Unpickler
    blob = pickle.dumps(evil(tmp_path / "marker")["open"])
    results: list[Any] = []
    with arrays_only():
        with arrays_only():
            assert pickle.loads(pickle.dumps({"a": [1, 2.5, True, None, "b", b"c", {3}, 4j]}))["a"][0] == 1
        with pytest.raises(CodeInFile, match=r"open"):
            pickle.loads(blob)
        thread = threading.Thread(target=lambda: results.append(pickle.loads(blob)))
        thread.start()
        thread.join()
    assert len(results) == 1
    results[0].close()
    assert (pickle.load, pickle.loads, pickle.Unpickler) == before


def test_sparse_matrices_are_checked(tmp_path: Path) -> None:
    """SciPy's loops write where the indices say."""
    wrong = scipy.sparse.csr_matrix(np.eye(12, dtype=np.float32))
    wrong.indices = wrong.indices + 10**6
    planetoid(tmp_path / "cora", tx=wrong)
    with pytest.raises(UserError, match=r"has a file that is damaged.*csr_matrix's columns"):
        load(tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_damaged_raw_files_are_a_sentence(tmp_path: Path, file: str) -> None:
    planetoid(tmp_path / "whole" / "cora")
    content = (tmp_path / "whole" / "cora" / "Cora" / "raw" / f"ind.cora.{file}").read_bytes()
    rng = np.random.default_rng(0)
    for i in range(12):
        cut = content[: int(rng.integers(len(content)))]
        flipped = bytearray(content)
        flipped[int(rng.integers(min(len(content), 300)))] ^= 1 << int(rng.integers(8))
        root = tmp_path / str(i)
        planetoid(root / "cora", **{file: bytes(flipped) if i % 2 else cut})
        try:
            load(root)  # a flipped bit of a number goes unseen: pickles have no checksum
        except UserError as error:
            sentence = str(error)
        else:
            continue
        assert "\n" not in sentence
        assert "cora" in sentence
