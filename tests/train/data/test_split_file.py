"""``--split-file``: node numbers or masks in place of the data set's own split; what does not fit is one sentence."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dibit.cli import main
from dibit.train import DataSettings, UserError
from dibit.train.data import NodeDataset, load_graph
from dibit.train.data.split_file import load_split
from dibit.train.data.splits import Masks
from tests.train.conftest import small_arrays
from tests.train.data import damaged

N = 24
PARTS = ("train", "val", "test")
MASKS = ("train_mask", "val_mask", "test_mask")
NUMBERS = dict(zip(PARTS, np.split(np.random.default_rng(0).permutation(N)[:20], (10, 15)), strict=True))
BY_MASK = {f"{name}_mask": np.isin(np.arange(N), own) for name, own in NUMBERS.items()}


def outcome(path: Path, nodes: int = N) -> Masks | str:
    """The masks, or the sentence; anything else fails the test that asks."""
    try:
        return load_split(path, nodes)
    except UserError as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert len(sentence) < 700
        assert sentence.endswith((".", "?"))
        return sentence


def of(path: Path, arrays: dict[str, Any]) -> Masks | str:
    np.savez(path, **arrays)
    return outcome(path)


def expected(arrays: dict[str, Any], nodes: int = N) -> Masks | None:
    """What the format says, in plain Python; None: it is to be refused."""
    names = ["train", "valid" if "val" not in arrays else "val", "test"]
    by_mask, by_number = (set(arrays) & set(known) for known in (MASKS, (*PARTS, "valid")))
    if (by_mask and by_number) or {"val", "valid"} <= set(arrays):
        return None
    if by_mask:
        if by_mask != set(MASKS) or any(np.asarray(arrays[name]).dtype != bool for name in MASKS):
            return None
        found = [np.asarray(arrays[name]) for name in MASKS]
        if any(mask.ndim not in (1, 2) or not mask.size or list(mask.shape).count(nodes) != 1 for mask in found):
            return None
        found = [mask.T if mask.shape[0] != nodes else mask for mask in found]
        if len({mask.shape[1] for mask in found if mask.ndim == 2}) > 1:
            return None
        columns = [mask.reshape(nodes, -1).T.tolist() for mask in found]
        most = max(map(len, columns))
        columns = [column * most if len(column) == 1 else column for column in columns]  # one mask for all splits
        if any(sum(node) > 1 for split in zip(*columns, strict=True) for node in zip(*split, strict=True)):
            return None
        return found[0], found[1], found[2]
    if not set(names) <= set(arrays):
        return None
    own = [np.asarray(arrays[name]) for name in names]
    if any(part.ndim != 1 or part.dtype.kind not in "iu" or not part.size for part in own):
        return None
    every = [number for part in own for number in part.tolist()]
    if len(set(every)) < len(every) or not all(0 <= number < nodes for number in every):
        return None
    train, val, test = (np.isin(np.arange(nodes), part) for part in own)
    return train, val, test


def agree(path: Path, arrays: dict[str, Any], what: object = "") -> bool:
    """Whether the file is accepted; a failure, if it is against the format."""
    found, right = of(path, arrays), expected(arrays)
    if right is None:
        assert isinstance(found, str), f"{what} is accepted"
        return False
    assert not isinstance(found, str), f"{what}: {found}"
    for mask, own in zip(found, right, strict=True):
        assert mask.dtype == bool
        assert np.array_equal(mask, own), what
    return True


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "<i4", ">i2", "i1", "u1", "<u4", ">u8"])
@pytest.mark.parametrize("name", ["val", "valid"])
def test_node_numbers(tmp_path: Path, name: str, dtype: str) -> None:
    arrays = {part if part != "val" else name: own.astype(dtype) for part, own in NUMBERS.items()}
    found = of(tmp_path / "s.npz", {**arrays, "comment": np.array("mine")})
    assert not isinstance(found, str)
    for mask, own in zip(found, NUMBERS.values(), strict=True):
        assert np.flatnonzero(mask).tolist() == sorted(own.tolist())


def test_masks_and_several_splits(tmp_path: Path) -> None:
    assert agree(tmp_path / "s.npz", BY_MASK)
    for splits in (1, 2, 10, N - 1, N + 1):
        part = (np.arange(N)[:, None] + np.arange(splits)) % 4
        several = {name: part == i for i, name in enumerate(MASKS)}
        assert agree(tmp_path / "s.npz", several)
        turned = {name: np.ascontiguousarray(mask.T) for name, mask in several.items()}
        assert agree(tmp_path / "s.npz", turned)
        assert agree(tmp_path / "s.npz", {**several, "test_mask": turned["test_mask"]})


def graph_with(folder: Path, own: dict[str, Any], **settings: Any) -> NodeDataset:
    np.savez(folder / "g.npz", **small_arrays(nodes=N), **{n: np.roll(m, 1) for n, m in BY_MASK.items()})
    np.savez(folder / "s.npz", **own)
    chosen = DataSettings(dataset=str(folder / "g.npz"), split_file=str(folder / "s.npz"), **settings)
    return load_graph(chosen, seed=0)


def test_it_takes_the_place_of_the_graphs_own(tmp_path: Path) -> None:
    graph = graph_with(tmp_path, NUMBERS)
    for seed in (0, 1):
        split = graph.split(seed)
        assert split.train.tolist() == sorted(NUMBERS["train"])
        assert split.val.tolist() == sorted(NUMBERS["val"])
        assert split.test.tolist() == sorted(NUMBERS["test"])
    own = load_graph(DataSettings(dataset=str(tmp_path / "g.npz")), seed=0)
    assert own.split(0).train.tolist() == np.flatnonzero(np.roll(BY_MASK["train_mask"], 1)).tolist()
    assert graph.fingerprint() != own.fingerprint()


def test_for_a_generated_graph(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", train=np.arange(50), val=np.arange(50, 70), test=np.arange(70, 100))
    chosen = DataSettings(dataset="planted:100", split_file=str(tmp_path / "s.npz"))
    assert load_graph(chosen, seed=0).split(3).val.tolist() == list(range(50, 70))


def test_split_takes_one_of_several(tmp_path: Path) -> None:
    part = (np.arange(N)[:, None] + np.arange(5)) % 3
    several = {name: part == i for i, name in enumerate(MASKS)}
    for number in range(5):
        split = graph_with(tmp_path, several, split=number).split(0)
        assert split.test.tolist() == [node for node in range(N) if (node + number) % 3 == 2]
        assert graph_with(tmp_path, several).split(number + 5).test.equal(split.test)
    with pytest.raises(UserError, match="--split is 5, but g has 5 published splits; expected a number from 0 to 4"):
        graph_with(tmp_path, several, split=5)
    assert graph_with(tmp_path, NUMBERS, split=0).split(0).train.tolist() == sorted(NUMBERS["train"])
    with pytest.raises(UserError, match="--split is 1, but g has 1 published split"):
        graph_with(tmp_path, NUMBERS, split=1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no val": ({"val": None}, "has no array 'val' (it holds test, train); expected the node numbers train, val and"),
    "nothing": (dict.fromkeys(PARTS), "has no array 'train' (it holds nothing)"),
    "val and valid": ({"valid": NUMBERS["val"]}, "there are both val and valid, expected one of them; leave one out."),
    "numbers and masks": (BY_MASK, "there are both train and train_mask, expected one of them; leave one out."),
    "a mask too few": (
        {**dict.fromkeys(PARTS), **BY_MASK, "val_mask": None},
        "has no array 'val_mask' (it holds test_mask, train_mask)",
    ),
    "floats": ({"val": np.arange(3.0)}, "val is float64 of shape (3,), expected node numbers, whole and of shape"),
    "two axes": ({"train": NUMBERS["train"][:, None]}, "train is int64 of shape (10, 1), expected node numbers"),
    "a number": ({"test": np.array(3)}, "test is int64 of shape (), expected node numbers"),
    "a mask by the name of numbers": (
        {"train": BY_MASK["train_mask"]},
        "train is bool of shape (24,), expected node numbers, whole and of shape (count,), at least one; a mask goes "
        "by the name train_mask.",
    ),
    "a mask by the name of valid": (
        {"val": None, "valid": BY_MASK["val_mask"]},
        "valid is bool of shape (24,), expected node numbers, whole and of shape (count,), at least one; a mask goes "
        "by the name val_mask.",
    ),
    "empty": ({"val": np.zeros(0, int)}, "val is int64 of shape (0,), expected node numbers, whole and of shape"),
    "empty floats": ({"val": np.zeros(0)}, "val is float64 of shape (0,), expected node numbers"),
    "too large": ({"test": np.array([3, N])}, f"test names the nodes 3 to {N}, expected 0 to {N - 1}, one for each of"),
    "below 0": ({"test": np.array([-1, 2], "i1")}, f"test names the nodes -1 to 2, expected 0 to {N - 1}"),
    "unsigned and huge": (
        {"test": np.array([1, 2**64 - 1], np.uint64)},
        "test names the nodes 1 to 18446744073709551615, expected 0 to 23",
    ),
    "twice in a part": (
        {"train": np.array([5, 7, 5, 5])},
        "train names node 5 3 times, expected each node once; leave the others out.",
    ),
    "in two parts": (
        {"val": NUMBERS["train"][:1]},
        f"node {NUMBERS['train'][0]} is in more than one part of the split, expected every node in one at most",
    ),
    "objects": ({"val": np.array([1, None], object)}, "val holds Python objects, which are never unpickled"),
    "texts": ({"val": np.array(["1", "2"])}, "val is <U1, expected numbers"),
    "masks of another graph": (
        {**dict.fromkeys(PARTS), **{name: mask[:20] for name, mask in BY_MASK.items()}},
        "train_mask is bool of shape (20,), expected bool of shape (24,)",
    ),
    "masks of whole numbers": (
        {**dict.fromkeys(PARTS), **{name: mask.astype(int) for name, mask in BY_MASK.items()}},
        "train_mask is int64 of shape (24,), expected bool of shape (24,)",
    ),
    "masks that share a node": (
        {**dict.fromkeys(PARTS), **BY_MASK, "val_mask": BY_MASK["train_mask"]},
        f"node {min(NUMBERS['train'])} is in more than one part of the split",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(tmp_path: Path, case: str) -> None:
    changes, sentence = REFUSED[case]
    arrays = {name: array for name, array in {**NUMBERS, **changes}.items() if array is not None}
    found = of(tmp_path / "s.npz", arrays)
    assert isinstance(found, str)
    assert sentence in found
    assert str(tmp_path / "s.npz") in found or len(str(tmp_path)) > 60


@pytest.mark.parametrize("base", [NUMBERS, BY_MASK], ids=["numbers", "masks"])
def test_odd_arrays(tmp_path: Path, base: dict[str, np.ndarray]) -> None:
    accepted = []
    for name, array in base.items():
        for how, odd in damaged.variants(array):
            accepted.append(agree(tmp_path / "s.npz", {**base, name: odd}, f"{name} {how}"))
        accepted.append(agree(tmp_path / "s.npz", {other: a for other, a in base.items() if other != name}))
        accepted.append(agree(tmp_path / "s.npz", {**base, f"{name}s": array}))
    assert 10 < sum(accepted) < len(accepted) - 60


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.lists(st.integers(-1, N), max_size=6), min_size=3, max_size=3),
    whole=st.lists(st.booleans(), min_size=3, max_size=3),
    names=st.sampled_from([PARTS, ("train", "valid", "test"), MASKS, ("test", "train", "valid"), ("train", "val")]),
    dtype=st.sampled_from(["i1", "<i8", ">i4", "<f4", "?", "<u8"]),
)
def test_any_numbers(
    tmp_path: Path, parts: list[list[int]], whole: list[bool], names: tuple[str, ...], dtype: str
) -> None:
    arrays = {}
    for name, part, right in zip(names, parts, whole, strict=False):
        numbers = np.array(part, np.int64)
        arrays[name] = np.isin(np.arange(N), numbers) if name in MASKS and right else numbers.astype(dtype)
    agree(tmp_path / "s.npz", arrays, arrays)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_damage_anywhere(tmp_path: Path, method: int) -> None:
    content = damaged.zipped(damaged.members(NUMBERS), method)
    whole = outcome(damaged.written(tmp_path / "s.npz", content))
    assert not isinstance(whole, str)
    refused = 0
    for name, changed in damaged.damaged_files(content, 30, seed=method):
        found = outcome(damaged.written(tmp_path / "s.npz", changed))
        refused += isinstance(found, str)
        if not isinstance(found, str):  # what no array lies under
            assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True)), name
    assert refused > 100


def test_things_that_are_no_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "split.npz", **NUMBERS)
    paths = {name: tmp_path / f"{name}.npz" for name in ("link", "dangling", "folder", "pipe", "device", "spilt")}
    paths["link"].symlink_to(tmp_path / "split.npz")
    paths["dangling"].symlink_to(tmp_path / "nowhere.npz")
    paths["folder"].mkdir()
    os.mkfifo(paths["pipe"])
    paths["device"].symlink_to("/dev/zero")
    paths["null"] = Path("a\0b.npz")
    paths["long"] = Path("a" * 5000 + ".npz")
    paths["below a file"] = tmp_path / "split.npz" / "x.npz"
    damaged.written(tmp_path / "text.npz", b"train: 1, 2, 3")
    found = {name: outcome(path) for name, path in {**paths, "text": tmp_path / "text.npz"}.items()}
    assert not isinstance(found.pop("link"), str)
    assert all(isinstance(each, str) for each in found.values()), found
    assert "does not exist; expected a split as .npz. Did you mean 'split.npz'" in str(found["spilt"])
    assert "is a folder; expected a split as .npz" in str(found["folder"])
    assert "is a pipe" in str(found["pipe"])
    assert "is not an .npz file" in str(found["text"])


def test_more_than_memory_is_said_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dibit.train.data.split_file.memory_bytes", lambda: 50)
    found = of(tmp_path / "s.npz", NUMBERS)
    assert "more than this machine's memory (0.0 GB); expected a smaller split." in str(found)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "g.npz", **small_arrays(nodes=N))
    np.savez(tmp_path / "s.npz", **NUMBERS)
    np.savez(tmp_path / "bad.npz", **{**NUMBERS, "val": np.array([N])})
    none = {**dict.fromkeys(MASKS, np.zeros(N, bool)), "train_mask": BY_MASK["train_mask"]}
    np.savez(tmp_path / "none.npz", **none)
    common = ["train", "--dataset", str(tmp_path / "g.npz"), "--hidden", "8", "--epochs", "1", "--quiet"]
    assert main([*common, "--split-file", str(tmp_path / "s.npz"), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    for name, sentence in (
        ("bad.npz", "val names the nodes 24 to 24"),
        ("none.npz", "has no labelled validation node"),
        ("gone.npz", "does not exist; expected a split"),
    ):
        assert main([*common, "--split-file", str(tmp_path / name), "--out", str(tmp_path / "other")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("dibit: error: ")
        assert sentence in said
        assert said.count("\n") == 1
        assert not (tmp_path / "other").exists()
