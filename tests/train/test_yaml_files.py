"""Any file given to ``--config`` gives settings or one sentence."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dibit.cli import main
from dibit.train import Settings, UserError
from dibit.train.arguments import parse

NAMES = tuple(Settings().flat())
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))
WHOLE = {
    "null byte": "layers: 3\0",
    "null in a name": 'out: "a\\0b"',
    "null in a data set": 'dataset: "a\\0b.npz"',
    "half a character": 'dataset: "\\ud800.npz"',
    "5,000 digits": f"layers: {'1' * 5000}",
    "5,000 digits as a key": f"{'1' * 5000}: 1",
    "5,000 digits with a tag": f"layers: !!int {'1' * 5000}",
    "400 digits": f"lr: {'1' * 400}",
    "3,000 brackets": "layers: " + "[" * 3000,
    "3,000 closed brackets": "layers: " + "[" * 3000 + "]" * 3000,
    "brackets alone": "[" * 3000,
    "braces": "{" * 3000,
    "a million brackets": "layers: " + "[" * 900_000,
    "nested lines": "".join(" " * i + "a:\n" for i in range(1000)),
    "dashes": "- " * 3000,
    "questions": "? " * 3000,
    "keys of keys": "? [a]\n: 1",
    "a bomb": BOMB,
    "itself": "layers: &a [*a]",
    "itself at the top": "&a {layers: *a}",
    "unknown alias": "layers: *nothing",
    "merge": "<<: {layers: 3}",
    "a list": "- layers: 3",
    "a number": "3",
    "a text": "layers",
    "two documents": "layers: 3\n---\nlayers: 4",
    "twice": "layers: 3\nlayers: 4",
    "twice, written differently": "batch-size: 3\nbatch_size: 4",
    "no date": "layers: 2001-99-99",
    "tags": "layers: !!timestamp x",
    "bool tag": "layers: !!bool x",
    "binary": "dataset: !!binary '%'",
    "python": "dataset: !!python/object/apply:os.system ['touch x']",
    "an unknown tag": "layers: !nothing 3",
    "tabs": "\tlayers: 3",
    "unclosed": "dataset: 'x",
    "directive": "%YAML 9.9\n---\nlayers: 3",
    "sexagesimal": "layers: 1:99:99",
    "infinite": "lr: .inf",
    "no value": "layers:",
    "no number": "lr: .nan",
    "long": "dataset: " + "x" * 1_000_001,
}


def read(path: Path) -> Settings | str:
    """Settings, or the sentence; anything else fails the test that asks."""
    try:
        found = parse(["--config", str(path)])
        found.check()
    except UserError as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert len(sentence) < 700
        return sentence
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_files_that_hold_no_settings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert isinstance(read(path), str)
    assert os.listdir(tmp_path) == ["run.yaml"]


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"layers: 3\xff", "layers: 3".encode("utf-16"), b"\x80\x04K\x01.", bytes(range(256)), b"\x00"],
    ids=repr,
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert isinstance(read(path), str)


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing\n", "---\n", "~", "null", "{}", "\ufeff", "---\n...\n"], ids=repr
)
def test_files_without_settings_are_the_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert read(path) == Settings()


def test_what_yaml_has_for_single_values_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "\ufeff%YAML 1.1\n---\nlayers: &n 2\nheads: *n\nlr: 5e-3\n'hidden': !!int 64\ncompare: Yes\ndataset: \"null\"\n"
        "clip: ~\npatience:\nroot: >\n  a folder\ndevice: 2001-01-01\nweight-decay: 1.\n"
        "block: 'row'\nnorm: 'no'\nseed: 1_0\nout: null\n"
    )
    found = parse(["--config", str(path)]).flat()
    expected = {"layers": 2, "heads": 2, "lr": 5e-3, "hidden": 64, "compare": True, "dataset": "null", "clip": None}
    expected |= {
        "patience": None,
        "root": "a folder\n",
        "device": "2001-01-01",
        "weight_decay": 1.0,
        "block": "row",
        "norm": "no",
        "seed": 10,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["out"] is None


def test_things_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    names = [
        *(tmp_path / f"{n}.yaml" for n in ("loop", "device", "folder", "nothing")),
        Path("a" * 5000),
        Path("a\0.yaml"),
    ]
    assert all(isinstance(read(path), str) for path in names)


_words = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(
        [
            "{",
            "}",
            "[",
            "]",
            "- ",
            "? ",
            ": ",
            "\n",
            " ",
            "\t",
            "&a ",
            "*a",
            "!!int ",
            "!!float ",
            "!!map ",
            "!x ",
            "'",
            '"',
            "|\n",
            ">\n",
            "---\n",
            "...\n",
            "%",
            "@",
            "`",
            "<<",
            "~",
            "null",
            "true",
            ".nan",
            "1e999",
            "-1",
            "0x",
            "2001-99-99",
            "\0",
            "\x85",
            "\ud800",
            "\ufeff",
            "#",
            "\\",
            "9" * 4301,
            "\r",
        ]
    ),
    st.text(max_size=5),
    st.integers().map(str),
    st.floats().map(str),
)
_lines = st.tuples(st.sampled_from(NAMES), st.sampled_from([": ", ":", " : "]), _words, _words).map("".join)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.lists(_words, max_size=12).map("".join), st.lists(_lines, max_size=5).map("\n".join)))
@example("layers: 3\n" * 2)
def test_any_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    read(tmp_path / "run.yaml")


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(NAMES), _words)
def test_any_word_for_a_flag(name: str, word: str) -> None:
    with contextlib.suppress(UserError):
        parse([f"--{name.replace('_', '-')}", word]).check()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    read(tmp_path / "run.yaml")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("layers: " + "[" * 3000, "layers: " + "1" * 5000, 'out: "a\\0b"', "layers: \0"):
        (tmp_path / "run.yaml").write_text(text)
        assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
