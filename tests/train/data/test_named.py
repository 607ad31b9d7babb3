"""Data sets by name: the table is right, failures are sentences and leave nothing behind."""

from __future__ import annotations

import inspect
import re
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric.datasets as datasets

from dibit.tools.errors import install
from dibit.train import DataSettings, UserError
from dibit.train.data import load_graph, named


@pytest.mark.parametrize("name", [n for n, s in named.NAMES.items() if s.loader != "ogb"])
def test_constructors_take_the_arguments(name: str) -> None:
    source = named.NAMES[name]
    place = {} if source.loader == "KarateClub" else {"root": "x"}
    inspect.signature(getattr(datasets, source.loader)).bind(**place, **source.arguments)


def test_names_are_canonical() -> None:
    assert all(name == named.canonical(name) for name in named.NAMES)
    assert named.canonical(" OGBN_Arxiv ") == "ogbn-arxiv"
    assert {"cora", "reddit2", "yelp", "amazonproducts", "ogbn-products", "ogbn-proteins"} <= set(named.NAMES)


def test_karate_comes_with_pyg(tmp_path: Path) -> None:
    graph = load_graph(DataSettings(dataset="Karate", root=str(tmp_path / "data")), seed=0)
    assert (graph.num_nodes, graph.num_classes) == (34, 4)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("given", "hint"),
    [("coar", "'cora'"), ("ogbn-arxv", "'ogbn-arxiv'"), ("plantd", "'planted'"), ("qqqq", "npz")],
)
def test_unknown_name(given: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"no data set '{given}'.*{hint}"):
        load_graph(DataSettings(dataset=given), seed=0)


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("unreachable"),
        EOFError("EOF when reading a line"),
        ConnectionResetError(104, "reset"),
    ],
)
@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "root-in-use"])
def test_failed_download_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, existing: bool
) -> None:
    def fail(root: str, name: str) -> None:
        (Path(root) / "raw").mkdir(parents=True)
        (Path(root) / "raw" / "half").write_text("half")
        raise error

    monkeypatch.setattr(datasets, "Planetoid", fail)
    root = tmp_path / "some" / "data"
    if existing:
        (root / "flickr").mkdir(parents=True)
    with pytest.raises(UserError, match=r"could not be downloaded, which needs a network .*copy the folder"):
        load_graph(DataSettings(dataset="cora", root=str(root)), seed=0)
    left = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")]
    assert sorted(left) == (["some", "some/data", "some/data/flickr"] if existing else [])


def test_folder_gets_its_name_when_complete_and_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def planetoid(root: str, name: str) -> Any:
        calls.append(root)
        (Path(root) / "done").write_text(name)
        data = SimpleNamespace(
            x=torch.rand(20, 3).to_sparse_csr(),
            edge_index=torch.tensor([[0, 1], [1, 0]]),
            y=torch.arange(20).view(-1, 1) % 2,
            num_nodes=20,
            train_mask=torch.arange(20).view(-1, 1).expand(20, 3) < torch.tensor([5, 6, 7]),
            val_mask=torch.arange(20) == 10,
            test_mask=torch.arange(20) == 11,
        )
        return [data]

    monkeypatch.setattr(datasets, "Planetoid", planetoid)
    for _ in range(2):
        graph = load_graph(DataSettings(dataset="CORA", root=str(tmp_path)), seed=0)
    assert (tmp_path / "cora" / "done").read_text() == "Cora"
    assert calls[1] == str(tmp_path / "cora") != calls[0]
    assert [p.name for p in tmp_path.iterdir()] == ["cora"]
    assert graph.x.shape == (20, 3)
    assert [len(graph.split(seed).train) for seed in range(4)] == [5, 6, 7, 5]  # one published split a seed


def test_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--root .* cannot be written"):
        load_graph(DataSettings(dataset="cora", root=str(tmp_path / "file" / "data")), seed=0)


def test_ogb_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ogb", None)
    with pytest.raises(UserError, match=re.escape(install("ogb"))):
        load_graph(DataSettings(dataset="ogbn-arxiv", root=str(tmp_path / "data")), seed=0)
    assert not (tmp_path / "data").exists()


def test_ogb_split_and_edge_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OGB's own classes, replaced: its split as indices, features on the edges, several labels a node."""

    class Proteins(list[Any]):
        def __init__(self, root: str, name: str) -> None:
            edge_index = torch.tensor([[0, 1, 2], [1, 0, 1]])
            attr = torch.tensor([[1.0], [2.0], [5.0]])
            y = torch.tensor([[0, 1], [1, 0], [1, 1]])
            super().__init__([SimpleNamespace(x=None, edge_index=edge_index, edge_attr=attr, y=y, num_nodes=3)])

        def get_idx_split(self) -> dict[str, torch.Tensor]:
            return {part: torch.tensor([i]) for i, part in enumerate(("train", "valid", "test"))}

    monkeypatch.setattr(
        named,
        "require",
        lambda m, extra="train": (
            __import__("aiohttp") if m == "aiohttp" else SimpleNamespace(PygNodePropPredDataset=Proteins)
        ),
    )
    graph = load_graph(DataSettings(dataset="ogbn-proteins", root=str(tmp_path)), seed=0)
    assert graph.metric == "rocauc"
    np.testing.assert_array_equal(graph.x.numpy(), [[2], [3], [0]])
    assert graph.split(0).val.tolist() == [1]
