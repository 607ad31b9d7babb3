"""Results are kept as they come, and nothing that is not ours is touched."""

from pathlib import Path

import pytest

from dibit.reproduce.store import Store, read
from dibit.tools.errors import UserError


def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    store.check()
    store.open()
    calls = []

    def compute() -> dict[str, object]:
        calls.append(1)
        return {"a": (1, 2)}

    value, seconds, computed = store.unit({"what": "x", "n": 1}, compute)
    assert (value, computed) == ({"a": [1, 2]}, True)  # as a reader of the file gets it
    assert store.unit({"what": "x", "n": 1}, compute) == ({"a": [1, 2]}, seconds, False)
    assert store.unit({"what": "x", "n": 2}, compute)[2]
    assert len(calls) == 2


def test_a_failed_measurement_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.unit({"what": "x"}, fail)
    assert list((tmp_path / "units").iterdir()) == []


def test_overwrite_forgets_only_what_is_ours(tmp_path: Path) -> None:
    Store(tmp_path).open()
    store = Store(tmp_path)
    store.unit({"what": "x"}, lambda: 1)
    store.section("memory", {"section": "memory"})
    (tmp_path / "notes.txt").write_text("mine")
    assert read(tmp_path / "memory.json") == {"section": "memory"}
    again = Store(tmp_path, overwrite=True)
    again.check()
    again.open()
    assert not (tmp_path / "memory.json").exists()
    assert again.unit({"what": "x"}, lambda: 2)[0] == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds something else \(thesis.tex\), expected a new folder"):
        Store(tmp_path).check()
    with pytest.raises(UserError, match="is a file, expected a folder"):
        Store(tmp_path / "thesis.tex").check()


def test_a_broken_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(UserError, match=r"memory.json cannot be read .*; remove it, or start anew"):
        read(tmp_path / "memory.json")
