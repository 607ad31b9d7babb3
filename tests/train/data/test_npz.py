"""A user's own graph: what is read, and what is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from dibit.train import DataSettings, UserError
from dibit.train.data import NodeDataset, graph, load_graph
from tests.train.conftest import small_arrays


def load(path: Path, **settings: Any) -> NodeDataset:
    return load_graph(DataSettings(dataset=str(path), **settings), seed=0)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def csr(x: np.ndarray) -> dict[str, Any]:
    m = scipy.sparse.csr_matrix(x)
    return {"x_indptr": m.indptr, "x_indices": m.indices, "x_values": m.data, "x_shape": np.array(m.shape)}


def test_dense_and_sparse_features_are_the_same(tmp_path: Path) -> None:
    arrays = small_arrays()
    dense = load(save(tmp_path / "dense.npz", **arrays))
    x = arrays.pop("x")
    sparse = load(save(tmp_path / "sparse.npz", **arrays, **csr(x)))
    assert torch.equal(dense.x, torch.from_numpy(x))
    assert torch.equal(dense.x, sparse.x)
    assert dense.fingerprint() == sparse.fingerprint()
    assert (dense.num_classes, dense.y.dtype, dense.metric) == (3, torch.int64, "accuracy")


def test_edges_are_sorted_by_target_without_duplicates_and_loops(tmp_path: Path) -> None:
    arrays = small_arrays(nodes=6) | {"edge_index": np.array([[2, 1, 2, 3, 0], [1, 2, 1, 3, 1]])}
    path = save(tmp_path / "g.npz", **arrays)
    assert load(path).edge_index.tolist() == [[0, 2, 1], [1, 1, 2]]
    assert load(path, undirected=True).edge_index.tolist() == [[1, 0, 2, 1], [0, 1, 1, 2]]


def test_random_split_is_60_20_20_of_each_class_and_comes_from_the_seed(tmp_path: Path) -> None:
    arrays = small_arrays(nodes=300)
    arrays["y"][:30] = -1
    g = load(save(tmp_path / "g.npz", **arrays))
    split = g.split(7)
    parts = [split.train, split.val, split.test]
    together = torch.cat(parts)
    assert sorted(together.tolist()) == list(range(30, 300))  # each labelled node once, no unlabelled one
    for part, share in zip(parts, (54, 18, 18), strict=True):
        assert torch.bincount(g.y[part]).tolist() == [share] * 3
    assert torch.equal(g.split(7).train, split.train)
    assert not torch.equal(g.split(8).train, split.train)


def test_published_split_without_unlabelled_nodes(tmp_path: Path) -> None:
    arrays = small_arrays()
    arrays["y"][0] = -1
    masks = {f"{part}_mask": np.arange(60) // 20 == i for i, part in enumerate(("train", "val", "test"))}
    split = load(save(tmp_path / "g.npz", **arrays, **masks)).split(3)
    assert split.train.tolist() == list(range(1, 20))
    assert split.test.tolist() == list(range(40, 60))


def test_several_labels_a_node(tmp_path: Path) -> None:
    arrays = small_arrays()
    arrays["y"] = np.eye(3, dtype=bool)[arrays["y"]]
    g = load(save(tmp_path / "g.npz", **arrays))
    assert (g.metric, g.num_classes, g.y.dtype) == ("f1", 3, torch.float32)
    assert [len(p) for p in (g.split(0).train, g.split(0).val, g.split(0).test)] == [36, 12, 12]


def test_svd_and_standardize(tmp_path: Path) -> None:
    arrays = small_arrays()
    x = arrays["x"].astype(np.float64)
    path = save(tmp_path / "g.npz", **arrays)
    reduced = load(path, svd=3)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    expected = np.abs(u[:, :3] * s[:3])
    np.testing.assert_allclose(np.abs(reduced.x.numpy()), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(reduced.x, load(path, svd=3).x)
    scaled = load(path, svd=3, standardize=True).x.double()
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)
    constant = save(tmp_path / "c.npz", **{**arrays, "x": np.ones((60, 2))})
    assert load(constant, standardize=True).x.abs().max() == 0  # not NaN


def test_real_graphs(real: Callable[[str], Path]) -> None:
    cora = load(real("cora"))
    assert (cora.num_nodes, cora.x.shape[1], cora.edge_index.shape[1], cora.num_classes) == (
        2708,
        1433,
        10556,
        7,
    )
    split = cora.split(0)
    assert (len(split.train), len(split.val), len(split.test)) == (140, 500, 1000)
    assert load(real("pubmed"), svd=20).x.shape == (19717, 20)


def test_features_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = small_arrays()
    x = arrays.pop("x")
    wide = csr(x) | {"x_shape": np.array([60, 10**12])}
    with pytest.raises(UserError, match=r"when dense, more than half of this machine's memory .* use --svd K"):
        load(save(tmp_path / "g.npz", **arrays, **wide))
    monkeypatch.setattr(graph, "memory_bytes", lambda: 60 * 8 * 4 * 2)
    load(save(tmp_path / "g.npz", **arrays, **csr(x)))  # exactly half


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.pop(name)


def _set(name: str, index: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


def _put(**new: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update(new)


MASKS = {f"{part}_mask": np.arange(60) // 20 == i for i, part in enumerate(("train", "val", "test"))}
NONE = np.zeros(60, dtype=bool)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without("edge_index"), r"no array 'edge_index' \(it holds x, y\)"),
        (_without("x"), "no array 'x'"),
        (_without("y"), "no array 'y'"),
        (
            lambda a: a.update(edges_index=a.pop("edge_index")),
            "no array 'edge_index'.*Did you mean 'edges_index'",
        ),
        (_set("y", 3, -2), "the label -2; expected -1"),
        (_put(num_classes=2), "label 2, out of range: num_classes is 2; expected labels from 0 to 1"),
        (_set("y", 3, 60), "label 60, out of range: the number of nodes is 60"),
        (_put(y=np.full(60, -1)), "every node is unlabelled"),
        (_put(y=np.zeros(60)), "y is float64, expected whole numbers"),
        (_put(y=np.zeros(59, dtype=int)), r"y has shape \(59,\), expected \(60,\)"),
        (_put(y=np.full((60, 4), 2)), "holds 2 to 2, expected 0 and 1"),
        (
            _set("edge_index", (0, 0), 60),
            "edge_index names the nodes 0 to 60, out of range; expected 0 to 59",
        ),
        (_set("edge_index", (1, 0), -1), "edge_index names the nodes -1 to 59"),
        (_put(edge_index=np.zeros((3, 4), dtype=int)), r"edge_index has shape \(3, 4\), expected \(2, E\)"),
        (_put(edge_index=np.zeros((2, 4))), "edge_index is float64"),
        (_set("x", (0, 0), np.nan), "1 entries that are NaN or infinite"),
        (_set("x", (0, slice(None)), np.inf), "8 entries that are NaN or infinite"),
        (_put(x=np.zeros(60)), r"x is float64 of shape \(60,\)"),
        (_put(x=np.zeros((0, 4))), "expected"),
        (_put(train_mask=NONE), "no array 'val_mask'"),
        (
            _put(**MASKS | {"val_mask": NONE[:50]}),
            r"val_mask is bool of shape \(50,\), expected bool of shape \(60,\)",
        ),
        (_put(**MASKS | {"val_mask": NONE.astype(int)}), "val_mask is int64"),
        (
            _put(**MASKS | {"val_mask": MASKS["test_mask"]}),
            "more than one of train_mask, val_mask, test_mask",
        ),
        (_put(**MASKS | {"train_mask": NONE}), "no labelled training node"),
        (_put(**MASKS | {"test_mask": NONE}), "no labelled test node"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    arrays = small_arrays()
    change(arrays)
    path = save(tmp_path / "graph.npz", **arrays)
    with pytest.raises(UserError, match=sentence) as error:
        load(path).split(0)
    assert "\n" not in str(error.value)
    assert "graph" in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without("x_shape"), "no array 'x_shape'"),
        (_put(x_shape=np.array([60, 2])), "x_indices runs from 0 to 7, expected 0 to 1"),
        (_put(x_shape=np.array([61, 8])), "x_indptr is not the row pointer of a CSR matrix of 61 rows"),
        (_put(x_shape=np.array([60])), "x_shape is"),
        (_set("x_indptr", 5, 10**6), "x_indptr is not"),
        (_put(x_values=np.zeros(3)), r"x_values \(3,\), expected"),
    ],
)
def test_sparse_features_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    arrays = small_arrays()
    arrays |= csr(arrays.pop("x"))
    change(arrays)
    with pytest.raises(UserError, match=sentence):
        load(save(tmp_path / "graph.npz", **arrays))


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    good = save(tmp_path / "graph.npz", **small_arrays())
    with pytest.raises(UserError, match=r"grpah.npz does not exist.*Did you mean 'graph.npz'"):
        load(tmp_path / "grpah.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path / "folder.npz")
    (tmp_path / "text.npz").write_text("not a graph")
    with pytest.raises(UserError, match=r"not an .npz file"):
        load(tmp_path / "text.npz")
    content = good.read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut off"):
        load(tmp_path / "cut.npz")
    middle = len(content) // 2
    (tmp_path / "rot.npz").write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "rot.npz")
    np.savez(tmp_path / "pickled.npz", **small_arrays() | {"x": np.array([{}, None], dtype=object)})
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "pickled.npz")


def test_svd_of_too_high_rank(small: Path) -> None:
    with pytest.raises(UserError, match="--svd is 8, expected less than 8"):
        load(small, svd=8)


@pytest.mark.parametrize(
    ("file", "given"),
    [
        ("cora", "Cora"),
        ("amazon_computers", "amazon-computers"),
        ("facebook_pagepage", "facebookpagepage"),
        ("OGBN-Arxiv", "ogbn_arxiv"),
        ("my-schools", "my_schools"),  # a name that no package knows
    ],
)
def test_a_name_is_looked_for_as_a_file_first(tmp_path: Path, file: str, given: str) -> None:
    arrays = small_arrays()
    save(tmp_path / f"{file}.npz", **arrays)
    save(tmp_path / f"{file}2.npz", **small_arrays(seed=1))  # another name
    (tmp_path / given).mkdir()  # where PyTorch Geometric keeps its own
    found = load_graph(DataSettings(dataset=given, root=str(tmp_path)), seed=0)
    assert found.name == file
    assert torch.equal(found.x, torch.from_numpy(arrays["x"]))


def test_a_file_is_treated_as_the_data_set_of_its_name(tmp_path: Path) -> None:
    """`ogbn-arxiv` is made undirected, `ogbn-proteins` judged by ROC-AUC; a file of another name is as it is."""
    arrays = small_arrays() | {"edge_index": np.array([[0, 1], [1, 2]])}
    several = arrays | {"y": np.eye(3, dtype=bool)[arrays["y"]]}
    for name in ("ogbn-arxiv", "cora", "mine"):
        save(tmp_path / f"{name}.npz", **arrays)
    for name in ("ogbn-proteins", "yelp", "others"):
        save(tmp_path / f"{name}.npz", **several)
    graphs = {p.stem: load_graph(DataSettings(dataset=p.stem, root=str(tmp_path)), 0) for p in tmp_path.iterdir()}
    assert {n: g.edge_index.shape[1] for n, g in graphs.items() if g.y.ndim == 1} == {
        "ogbn-arxiv": 4,
        "cora": 2,
        "mine": 2,
    }
    assert {n: g.metric for n, g in graphs.items() if g.y.ndim == 2} == {
        "ogbn-proteins": "rocauc",
        "yelp": "f1",
        "others": "f1",
    }


def test_files_of_one_name_and_of_no_name(tmp_path: Path) -> None:
    for name in ("amazon_photo", "AmazonPhoto", "schools"):
        save(tmp_path / f"{name}.npz", **small_arrays())
    sentence = r"AmazonPhoto.npz and amazon_photo.npz both bear the name 'amazon-photo'; expected one. Give --dataset"
    with pytest.raises(UserError, match=sentence):
        load_graph(DataSettings(dataset="amazon-photo", root=str(tmp_path)), seed=0)
    with pytest.raises(UserError, match=r"no data set 'shcools'\. Did you mean 'schools'"):
        load_graph(DataSettings(dataset="shcools", root=str(tmp_path)), seed=0)


def test_real_graphs_by_name(real: Callable[[str], Path]) -> None:
    root = str(real("facebook_pagepage").parent)
    assert load_graph(DataSettings(dataset="facebookpagepage", root=root, svd=4), seed=0).num_nodes == 22_470


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("sparse", [False, True])
def test_svd_of_features_of_every_size(tmp_path: Path, dtype: str, sparse: bool) -> None:
    """Zero, of rank one, tiny, huge: the same directions, or a sentence."""
    rng = np.random.default_rng(0)
    nodes = len(small_arrays()["y"])
    shapes = {"any": rng.standard_normal((nodes, 8)), "one value": np.ones((nodes, 8)), "rank one": np.eye(nodes, 8)}
    shapes["rank one"][:, 1:] = 0
    for name, x in shapes.items():
        for power in (0, -150, -126, -100, -60, 60, 100, 126):
            given = np.ldexp(x, power).astype(dtype)
            arrays = {**small_arrays(), "x": given}
            if sparse:
                m = scipy.sparse.csr_matrix(arrays.pop("x"))
                arrays |= {
                    "x_indptr": m.indptr,
                    "x_indices": m.indices,
                    "x_values": m.data,
                    "x_shape": np.array(m.shape),
                }
            np.savez(tmp_path / "graph.npz", **arrays)
            sizes = np.linalg.svd(given.astype(np.float64), compute_uv=False)[:3]
            try:
                found = load(tmp_path / "graph.npz", svd=3).x.numpy().astype(np.float64)
            except UserError as error:
                refused = str(error)
            else:
                refused = ""
            if refused:
                assert "are too large for it: the result is beyond float32" in refused
                assert sizes[0] > 3e38
                continue
            atol = 1e-4 * sizes[0] + 1e-44
            np.testing.assert_allclose(np.linalg.norm(found, axis=0), sizes, atol=atol, err_msg=f"{name} 2**{power}")
    np.savez(tmp_path / "graph.npz", **{**small_arrays(), "x": np.zeros((nodes, 8), dtype)})
    assert not load(tmp_path / "graph.npz", svd=3).x.any()
