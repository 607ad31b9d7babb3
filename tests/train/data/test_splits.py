"""Several published splits: ``--split`` takes one, whichever way round the masks lie."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric.datasets as datasets

from dibit.cli import main
from dibit.train import DataSettings, UserError
from dibit.train.data import load_graph
from tests.train.conftest import small_arrays

PARTS = ("train_mask", "val_mask", "test_mask")


def masks(splits: int, nodes: int = 60, turned: bool = False) -> dict[str, np.ndarray]:
    """Of (N, K), or (K, N): split k is the nodes by (node + k) modulo 3."""
    part = (np.arange(nodes)[:, None] + np.arange(splits)) % 3
    found = {name: part == i for i, name in enumerate(PARTS)}
    return {name: np.ascontiguousarray(mask.T) for name, mask in found.items()} if turned else found


def load(path: Path, **settings: Any) -> Any:
    return load_graph(DataSettings(dataset=str(path), **settings), seed=0)


@pytest.mark.parametrize("turned", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("splits", [1, 2, 10, 59, 61])
def test_each_split_of_a_file(tmp_path: Path, splits: int, turned: bool) -> None:
    path = tmp_path / "g.npz"
    np.savez(path, **small_arrays(), **masks(splits, turned=turned))
    for number in {0, 1, splits - 1} & set(range(splits)):
        split = load(path, split=number).split(seed=7)
        for part, i in zip((split.train, split.val, split.test), range(3), strict=True):
            assert part.tolist() == [node for node in range(60) if (node + number) % 3 == i]
    every = load(path)
    for seed in (0, 4, splits, splits + 1):  # without --split the seed takes one
        assert every.split(seed).train.equal(load(path, split=seed % splits).split(0).train)
    last = "0, or leave it out" if splits == 1 else f"a number from 0 to {splits - 1}"
    with pytest.raises(UserError, match=f"--split is {splits}, but g has {splits} published splits?; expected {last}"):
        load(path, split=splits)


def test_one_split_and_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", **small_arrays(), **{name: mask[:, 0] for name, mask in masks(1).items()})
    assert load(tmp_path / "one.npz", split=0).split(0).train.tolist() == list(range(0, 60, 3))
    with pytest.raises(UserError, match=r"--split is 1, but one has 1 published split; expected 0, or leave it out"):
        load(tmp_path / "one.npz", split=1)
    np.savez(tmp_path / "none.npz", **small_arrays())
    with pytest.raises(UserError, match=r"--split is 0, but none has no published split; leave --split out"):
        load(tmp_path / "none.npz", split=0)
    with pytest.raises(UserError, match="--split is 0, but planted:200 has no published split"):
        load(Path("planted:200"), split=0)
    with pytest.raises(UserError, match="--split is -1, expected a whole number of at least 0"):
        DataSettings(split=-1).check()


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "g.npz"
    ten = masks(10)

    def refused(**changed: np.ndarray) -> str:
        np.savez(path, **small_arrays(), **{**ten, **changed})
        with pytest.raises(UserError) as error:
            load(path)
        return str(error.value)

    assert "does not tell nodes from splits" in refused(**masks(60))
    assert "different numbers of splits" in refused(val_mask=masks(9)["val_mask"])
    assert "expected bool of shape (60,), or (60, K) or (K, 60)" in refused(val_mask=ten["val_mask"][:50])
    assert "(60, 0)" in refused(val_mask=np.zeros((60, 0), bool))
    assert "val_mask is int64" in refused(val_mask=ten["val_mask"].astype(int))
    assert "(60, 10, 1)" in refused(val_mask=ten["val_mask"][..., None])
    twice = ten["val_mask"].copy()
    twice[0, 4] = twice[1, 4] = twice[2, 4] = True
    assert "more than one of train_mask, val_mask, test_mask in split 4" in refused(val_mask=twice)


def test_masks_of_one_and_of_several_splits_go_together(tmp_path: Path) -> None:
    """As WikiCS has them: one test mask for all splits; each part may lie another way round."""
    part = np.arange(60) // 20
    train = np.stack([(part == 0) & (np.arange(60) % 4 != k) for k in range(4)])
    val = np.stack([(part == 0) & (np.arange(60) % 4 == k) for k in range(4)], axis=1)
    np.savez(tmp_path / "g.npz", **small_arrays(), train_mask=train, val_mask=val, test_mask=part == 2)
    split = load(tmp_path / "g.npz", split=3).split(0)
    assert split.val.tolist() == [3, 7, 11, 15, 19]
    assert split.test.tolist() == list(range(40, 60))


@pytest.mark.parametrize("name", ["cornell", "chameleon", "actor", "roman-empire", "wikics"])
@pytest.mark.parametrize("turned", [False, True], ids=["NK", "KN"])
def test_data_sets_with_ten_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, turned: bool) -> None:
    own = {key: torch.from_numpy(mask) for key, mask in masks(10, nodes=30, turned=turned).items()}
    data = SimpleNamespace(
        x=torch.eye(30), edge_index=torch.tensor([[0], [1]]), y=torch.arange(30) % 2, num_nodes=30, **own
    )
    for kind in ("WebKB", "WikipediaNetwork", "Actor", "HeterophilousGraphDataset", "WikiCS"):
        monkeypatch.setattr(datasets, kind, lambda root, **more: [data])
    for number in (0, 9):
        graph = load_graph(DataSettings(dataset=name, root=str(tmp_path), split=number), seed=0)
        assert graph.split(5).val.tolist() == [node for node in range(30) if (node + number) % 3 == 1]
    with pytest.raises(UserError, match=f"--split is 10, but {name} has 10 published splits"):
        load_graph(DataSettings(dataset=name, root=str(tmp_path), split=10), seed=0)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "g.npz", **small_arrays(), **masks(10, turned=True))
    words = ["train", "--dataset", str(tmp_path / "g.npz"), "--hidden", "8", "--epochs", "1", "--quiet"]
    assert main([*words, "--split", "9", "--out", str(tmp_path / "run")]) == 0
    assert "split: 9" in (tmp_path / "run" / "settings.yaml").read_text()
    capsys.readouterr()
    assert main([*words, "--split", "10", "--out", str(tmp_path / "other")]) == 2
    assert "--split is 10, but g has 10 published splits; expected a number from 0 to 9." in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
