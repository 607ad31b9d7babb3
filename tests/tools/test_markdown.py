"""Markdown: tables, texts that are shown as they are, and what a terminal makes of them."""

from __future__ import annotations

import pytest

from dibit.tools.markdown import Marked, plain, show, strong, table


def test_columns_and_groups_that_hold_nothing_are_left_out() -> None:
    columns = [
        ("a", str),
        ("b", lambda row: "–"),
        ("c", lambda row: Marked("*3*")),
        ("d", lambda row: strong("|")),
        ("e", lambda row: "word"),
    ]
    caption, made, note = table("x", columns, [("", ["1"]), ("none", []), ("own", ["2"])], ["a note"]).split("\n\n")
    assert (caption, note) == ("**x**", "a note")
    assert made.splitlines() == [
        *("| a | c | d | e |", "| ---: | ---: | ---: | --- |", "| 1 | *3* | **\\|** | word |"),
        *("| **own** |  |  |  |", "| 2 | *3* | **\\|** | word |"),
    ]


def test_what_stands_out_is_something() -> None:
    assert (strong(""), strong("–")) == ("", "–")


def test_the_terminal_shows_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "a|b *c* _d_ `e` [f](g) <h> & # $i$ \\ ~~j~~ ![k](l) [red]m[/red] :smile: 1,024"
    show([plain(odd), table("", [("", str)], [("", [odd, "x" * 200])])], 120)
    printed = capsys.readouterr().out
    assert printed.count(odd) == 2
    assert printed.count("x") == 200  # broken, not cut
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 120
