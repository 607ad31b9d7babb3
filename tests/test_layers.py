"""The folders are layers: a file imports from its own layer or from one below, and no two files import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dibit"
DOCS = Path(__file__).parents[1] / "docs"

# From the top down. Names on one line do not import each other.
LAYERS = (
    "__main__",
    "cli",
    "reproduce bench doctor",
    "experiments",
    "train",
    "lightning study functions",
    "dibit",  # the package itself: what `import dibit` gives
    "api gradient_noise",
    "hooks",
    "compile",
    "edges",
    "rules",
    "engine",
    "residuals",
    "recompute codec",
    "recipes",
    "config nn portable",
    "tools",
    "_torch",
)
FLOOR = {name: -number for number, names in enumerate(LAYERS) for name in names.split()}


def modules() -> dict[str, Path]:
    """All modules of Dibit by their dotted names."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


# What a file names in a string and loads when it is first needed, though it does not lie below it.
LATE = {
    "dibit": {"dibit.{name}"},  # `dibit.study` and `dibit.functions`, as attributes of the package
    "dibit.codec.dispatch": {  # a backend, when its device is first used; a package may bring another one
        "dibit.codec.backends.cpu",
        "dibit.codec.backends.triton",
    },
}


def imports(name: str, tree: ast.Module, known: Iterable[str]) -> set[str]:
    """Modules of Dibit that a file imports or names in a string, anywhere in it.

    Of a string with variable parts, the text is given, such as "dibit.{name}", if it may stand for a module that does
    not lie beside the file or below its folder.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found |= {full} if full in known else {base} if base in known else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & {*known} - {"dibit"}
        elif isinstance(node, ast.JoinedStr):
            text = ast.unparse(node)[2:-1]
            if re.fullmatch(r"dibit\.[\w.{}]+", text):
                folder = text.partition("{")[0]
                inside = {other for other in known if other.startswith(folder)}
                found |= inside if folder.count(".") > 1 else {text}
    return found - {name}


KNOWN = modules()
NAMED = {name: imports(name, ast.parse(path.read_text()), KNOWN) for name, path in KNOWN.items()}
ARROWS = {name: named - LATE.get(name, set()) for name, named in NAMED.items()}


def room(name: str) -> str:
    """The folder, or the file in the package's root, that a module lies in."""
    return name.split(".")[1] if "." in name else name


def test_every_room_has_its_floor() -> None:
    """A new folder, or a file beside them, gets a place in `LAYERS` and in the diagram of docs/architecture.md."""
    found = {room(name) for name in KNOWN}
    assert found == set(FLOOR), f"add {found - set(FLOOR)} to LAYERS above and to the diagram of docs/architecture.md"


def test_the_diagram_shows_the_layers() -> None:
    """The names at the left of the first drawing in docs/architecture.md, from the top down."""
    drawing = (DOCS / "architecture.md").read_text(encoding="utf-8").split("```")[1].splitlines()
    shown = [line[:48].replace("dibit/__init__.py", "dibit").split() for line in drawing]
    assert [set(names) for names in shown if names not in ([], ["|"])] == [set(names.split()) for names in LAYERS]


def test_every_page_is_listed() -> None:
    table = (DOCS / "README.md").read_text(encoding="utf-8")
    lacks = [path.name for path in DOCS.glob("*.md") if path.name != "README.md" and f"\n| [{path.name}](" not in table]
    assert not lacks, f"add a line for each of {lacks} to the table of docs/README.md"


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_imports_point_down(name: str) -> None:
    floor = FLOOR.get(room(name))
    if floor is None:
        pytest.skip("its folder has no place yet: see test_every_room_has_its_floor")
    lowest = -len(LAYERS)
    others = [other for other in ARROWS[name] if room(other) != room(name)]
    up = [other for other in others if other not in KNOWN or FLOOR.get(room(other), lowest) >= floor]
    assert not up, (
        f"{name} imports {up}, which are not below it; move what it needs down, or hand it over as an argument"
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import_module('dibit.cli')", {"dibit.cli"}),
        ("BACKENDS = {'cpu': ('dibit.codec.backends.cpu', 'numba')}", {"dibit.codec.backends.cpu"}),
        ("import_module(f'dibit.codec.backends.{name}')", {n for n in KNOWN if n.startswith("dibit.codec.backends.")}),
        ("import_module(f'dibit.{name}')", {"dibit.{name}"}),
        ("raise ImportError(f'dibit.lightning needs {name}')", set()),
        ("print('dibit')", set()),
    ],
)
def test_names_in_strings_are_imports(line: str, found: set[str]) -> None:
    assert imports("dibit.api", ast.parse(line), KNOWN) == found


def test_what_is_loaded_late_is_still_loaded_there() -> None:
    for name, late in LATE.items():
        assert late <= NAMED[name]


def test_no_circles() -> None:
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"an import circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in ARROWS[name] & {*KNOWN}:
                walk(other, (*way, name))
            done.add(name)

    for name in KNOWN:
        walk(name, ())
