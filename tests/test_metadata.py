"""What is written in more than one place: versions, the names of the commands and of the recipes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import dibit
from dibit._torch.private import KNOWN
from dibit.cli import COMMANDS
from dibit.recipes import BOUNDED, RECIPES
from dibit.train import settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_citation_has_the_version_of_the_package() -> None:
    assert f"\nversion: {dibit.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def passed(column: int) -> list[tuple[int, ...]]:
    """The versions in a column of docs/versions.md, major and minor, on which no test failed."""
    rows = [line.strip("| ").split(" | ") for line in (DOCS / "versions.md").read_text().splitlines()]
    rows = [row for row in rows if len(row) == 7 and row[5] == "0"]
    return sorted(tuple(map(int, row[column].split(".")[:2])) for row in rows)


def test_the_known_versions_of_torch_are_those_that_were_tried() -> None:
    first, *_, last = passed(1)
    assert f"{first[0]}.{first[1]} to {last[0]}.{last[1]}" == KNOWN, "see docs/versions.md"


def test_the_package_names_the_versions_of_python_that_were_tried() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    for version in passed(0):
        name = f"Programming Language :: Python :: {'.'.join(map(str, version))}"
        assert name in classifiers, f"docs/versions.md has it, the classifiers of pyproject.toml have not: {name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_a_page_and_a_line_in_the_diagram(command: str) -> None:
    table = (DOCS / "README.md").read_text().partition("## Pages")[2].partition("\n## ")[0]
    pages = re.findall(r"^\| \[[\w-]+\.md\]\(([\w-]+\.md)\)", table, flags=re.MULTILINE)
    shows = re.compile(rf"^ *dibit {command}\b", flags=re.MULTILINE)  # a call of it in a block of code
    assert any(shows.search((DOCS / page).read_text()) for page in pages), (
        f"no page in the table of docs/README.md shows how to call dibit {command}; write one, or a part of another"
    )
    diagram = (DOCS / "architecture.md").read_text().split("```")[1]
    (line,) = [line for line in diagram.splitlines() if re.search(r" cli\b", line)]
    assert re.search(rf"\bdibit {command}\b", line), (
        f"the line of cli in the diagram of docs/architecture.md does not name dibit {command}"
    )
    module = COMMANDS[command][0].split(".")[1]
    assert re.search(rf"^ +(\w+ +)*{module}\b", diagram, flags=re.MULTILINE), (
        f"the diagram of docs/architecture.md has no line for {module}, where dibit {command} lies"
    )


# Pages that name all recipes: the start of the line, and how a name is written there.
LISTS = (
    ("docs/README.md", "| recipe |", "`{}`"),
    ("docs/train.md", "`--recipe` is ", "`{}`"),
    ("docs/loops.md", "model = dibit.compress(model, ", '"{}"'),
    ("docs/operations.md", '| `"{}"`', '`"{}"`'),
    ("CHANGELOG.md", "- `dibit.compress(model)` trains ", '"{}"'),
)


@pytest.mark.parametrize(("page", "start", "written"), LISTS, ids=[page for page, *_ in LISTS])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_on_all_pages(recipe: str, page: str, start: str, written: str) -> None:
    _, begin, rest = (ROOT / page).read_text(encoding="utf-8").partition("\n" + start.format(recipe))
    assert written.format(recipe) in begin + rest.partition("\n\n")[0], f"name {recipe!r} in {page}"


@pytest.mark.parametrize("recipe", BOUNDED)
def test_the_bound_of_a_recipe_is_where_noise_is_explained(recipe: str) -> None:
    bound = f"{RECIPES[recipe].noise:g}"
    assert f"{bound} of {recipe!r}" in (settings.CompressionSettings.__doc__ or ""), "the help of --noise"
    (row,) = [line for line in (DOCS / "train.md").read_text().splitlines() if line.startswith("| `--noise ")]
    assert f"{bound} in `{recipe}`" in row
