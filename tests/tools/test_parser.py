"""The parser of every command: what it takes, and the sentence for what it does not."""

from __future__ import annotations

from typing import Literal

import pytest

from dibit.tools.errors import UserError
from dibit.tools.parser import Parser


def parser() -> Parser:
    made = Parser("dibit test", "A command.")
    made.add_argument("section", metavar="SECTION", help="What to do.")
    made.flag("batch_size", int, "Nodes of a batch, 100 % of them.", default=8, least=1)
    made.flag("rate", float | None, "A number.")
    made.flag("layers", int, "Several numbers.", "L", default=[3, 8], several=True, least=0)
    made.flag("names", str, "Several texts.", "NAME", several=True)
    made.flag("side", Literal["left", "right"], "A word.", default="left")
    made.flag("block", int | Literal["row"] | None, "A number or a word.")
    made.flag("file", str, "Given repeatedly.", action="append")
    made.flag("quiet", bool, "A switch.", default=False)
    made.flag("bias", bool, "Another.", default=True)
    return made


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("", {}),
        ("--batch-size 4", {"batch_size": 4}),
        ("--batch_size=4 --batch_size 5", {"batch_size": 5}),
        ("--rate -1e-3", {"rate": -0.001}),
        ("--rate -.5", {"rate": -0.5}),
        ("--rate null --block null", {"rate": None, "block": None}),
        ("--layers 1 2 --names null a=b", {"layers": [1, 2], "names": ["null", "a=b"]}),
        ("--side right --block row", {"side": "right", "block": "row"}),
        ("--block 64", {"block": 64}),
        ("--file a --file=b", {"file": ["a", "b"]}),
        ("--quiet --no-bias", {"quiet": True, "bias": False}),
        ("--quiet --no-quiet", {"quiet": False}),
        ("--file=", {"file": [""]}),
    ],
)
def test_what_is_given(words: str, given: dict[str, object]) -> None:
    for order in (["memory", *words.split()], [*words.split(), "--no-bias", "memory"]):
        bias = {"bias": False} if "--no-bias" in order else {}
        assert parser().given(order) == {"section": "memory", **given, **bias}


def test_what_is_left_out_has_its_default() -> None:
    assert vars(parser().parse(["memory", "--rate", "2"])) == {
        "section": "memory",
        "batch_size": 8,
        "rate": 2.0,
        "layers": [3, 8],
        "names": None,
        "side": "left",
        "block": None,
        "file": None,
        "quiet": False,
        "bias": True,
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "The following arguments are required: SECTION. See dibit test --help."),
        ("memory --batch-sise 3", "There is no flag --batch-sise. Did you mean '--batch-size'"),
        (
            "memory --batch 3",
            "There is no flag --batch. Did you mean '--batch-size' or '--rate' or '--bias'? See dibit test --help.",
        ),
        ("memory --hepl", "There is no flag --hepl. Did you mean '--help'? See dibit test --help."),
        ("memory -- x", "There is no flag --. "),
        ("memory blocks", "There is nothing to do with 'blocks', which is neither a flag nor the value of one. See"),
        ("memory -x", "There is nothing to do with '-x', "),
        ("memory --batch-size", "--batch-size has no value, expected a whole number. See dibit test --help."),
        ("memory --layers --quiet", "--layers has no value, expected a whole number. See dibit test --help."),
        ("memory --block=", "--block is '', expected a whole number or 'row'."),
        ("memory --batch-size 2.5", "--batch-size is '2.5', expected a whole number."),
        ("memory --batch-size null", "--batch-size is 'null', expected a whole number."),
        ("memory --batch-size 0", "--batch-size is 0, expected a whole number of at least 1."),
        ("memory --layers 2 -1", "--layers is -1, expected a whole number of at least 0."),
        ("memory --layers -1 2", "--layers is -1, expected a whole number of at least 0."),
        ("memory --layers 2 x", "--layers is 'x', expected a whole number."),
        ("memory --rate nan", "--rate is 'nan', expected a finite number."),
        ("memory --side rihgt", "--side is 'rihgt', expected 'left' or 'right'. Did you mean 'right'?"),
        ("memory --block " + "9" * 21, f"--block is {'9' * 21}, expected a whole number of at most 19 digits."),
        ("memory --quiet=yes", "--quiet takes no value, but is 'yes'; give it alone, or leave it out."),
        ("memory --quiet -1", "--quiet takes no value, but is '-1'; give it alone, or leave it out."),
    ],
)
def test_what_cannot_be_parsed(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parser().given(words.split())
    assert str(error.value).startswith(sentence)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert not parser().helps(["memory", "--quiet"])
    assert capsys.readouterr().out == ""
    assert parser().helps(["--nothing", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "usage: dibit test",
        "--batch-size N Nodes of a batch, 100 % of them. (default: 8)",
        "--rate X A number. --layers",
        "--layers L [L ...] Several numbers. (default: 3 8)",
        "--side left|right A word. (default: left)",
        "--block N|row A number or a word. --file",
        "--quiet, --no-quiet A switch. --bias",
        "--bias, --no-bias Another. (default: True)",
    ):
        assert part in text
