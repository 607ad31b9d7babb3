"""Tables in Markdown."""

from dibit.reproduce.records import paper, strong, table


def test_columns_that_hold_nothing_are_left_out() -> None:
    columns = [
        ("a", str),
        ("b", lambda row: "–"),
        ("c", lambda row: paper("3", "remembered")),
        ("d", lambda row: strong("|")),
        ("e", lambda row: "word"),
    ]
    caption, made, note = table("x", columns, [("", ["1"]), ("none", []), ("own", ["2"])]).split("\n\n")
    assert caption == "**x**"
    assert made.splitlines() == [
        *("| a | c | d | e |", "| ---: | ---: | ---: | --- |", "| 1 | *3 †* | **\\|** | word |"),
        *("| **own** |  |  |  |", "| 2 | *3 †* | **\\|** | word |"),
    ]
    assert note.startswith("† Remembered, not confirmed")
