"""The tables in the terminal: ours beside the papers', and what is not confirmed says so."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from dibit.reproduce.terminal import print_section
from dibit.tools.errors import UserError
from tests.reproduce.examples import all_sections, section

NUMBERS = {
    "memory": ["30.45", "30.47", "910.23", "No log of the authors exists for flickr"],
    "blocks": ["25.48", "> 15 % less", "about 5 % faster", "0.938 to 0.983"],
    "variance": ["1.304", "19.71 %", "Monte Carlo"],
    "distribution": ["EXACT: the clipped normal is nearer", "CN[1/G]", "220,032"],
    "accuracy": ["−0.42 to +0.18", "cora, sage, 3 × 128, 60 epochs", "Not run on ogbn-arxiv"],
    "tuned": [
        *("default minus FP32, points of test accuracy: −0.61", "95 % interval −1.03 to −0.19, mean of 3 cells"),
        "default: of 3 cells 1 harmless (amazon-computers-sage), 1 undecided (cora-gcn), 1 harmful (amazon-computers-",
        *(
            "default takes 1.03 times plain’s epochs",
            "cora-gcn: plain training is −3.70 points from the published mean",
        ),
        *("amazon-computers-sage-15-layers, 15 × 64, norm layer, 1000", "93.25"),
    ],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_and_the_papers_beside_them(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_section(all_sections()[name])
    printed = capsys.readouterr().out.replace("\u00a0", " ")
    assert [number for number in NUMBERS[name] if number not in printed] == []
    assert "…" not in printed  # no cell was cut


def test_remembered_numbers_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    print_section(all_sections()["accuracy"])
    printed = capsys.readouterr().out
    assert printed.count("71.95 ± 0.16 †") == printed.count("71.95 ± 0.16") == 1
    assert "† Remembered, not confirmed" in printed


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("memory", {"shapes": []}),
        ("blocks", {"timing": None, "graphs": [], "paper": {}}),
        ("variance", {"table": [], "measured": []}),
        ("distribution", {"bins": 60, "graphs": [], "verdicts": []}),
        ("accuracy", {"rows": [], "skipped": [], "paper": []}),
        ("tuned", {"rows": [], "together": {}}),
    ],
)
def test_empty_and_unfinished(name: str, results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_section(section(name, results, finished=False))
    printed = capsys.readouterr().out
    assert "No results yet." in printed
    assert "a part of the whole" in printed


def test_markup_in_a_name_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = all_sections()["accuracy"]
    for row in accuracy["results"]["rows"]:
        row["graph"] = "[red]graph[/red]"
    print_section(accuracy)
    assert "[red]graph[/red], sage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"section": "memory", "finished": True}, "expected a value at results"),
        (section("memory", {"shapes": [{"name": "x", "nodes": 1, "edges": 1}]}), "results.shapes[0].rows"),
        (section("colours", {}), "There is no section 'colours'"),
        ([], "There is no section ''"),
    ],
)
def test_what_is_not_a_section(found: Any, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        print_section(found)
    assert sentence in str(error.value)


def test_a_narrow_terminal_breaks_lines_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    for content in all_sections().values():
        print_section(content)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # colours take no room
    assert max(map(len, printed.splitlines())) <= 70
    assert "…" not in printed


@pytest.mark.slow
def test_importing_dibit_stays_light() -> None:
    program = (
        "import sys, dibit.reproduce.report, dibit.reproduce.terminal\n"
        "print([name for name in ('matplotlib', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
