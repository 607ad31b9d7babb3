"""Section files: reading them, and checking what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dibit.reproduce import store
from dibit.reproduce.store import SECTIONS
from dibit.tools.errors import UserError, require, shown

if TYPE_CHECKING:
    from dibit.reproduce.schema import SectionFile


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the section files that exist in a folder, checked, in the page's order.

    Returns:
        {name: section}; MB of 2^20 bytes, accuracies from 0 to 1, seconds. Characters that cannot be printed
        are replaced, for the text goes into terminals, HTML and SVG.

    Raises:
        UserError: the folder does not exist, or a file is not a section that `dibit reproduce` wrote.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; dibit reproduce --out writes it.")
    found = {}
    for name in SECTIONS:
        if (path := folder / f"{name}.json").is_file():
            section = store.read(path)
            parse(section, name, path)
            found[name] = _printable(section)
    return found


def parse(section: Any, name: str, path: Path | None = None) -> SectionFile[Any]:
    """Return what a section file holds, in the form of `dibit.reproduce.views`.

    Args:
        section: The file's content.
        name: Of the section.
        path: Of the file, for errors.

    Raises:
        UserError: The first place where `section` is not what section `name` holds.
    """
    require("pydantic", "study")
    from pydantic import ValidationError

    from dibit.reproduce.schema import SectionFile
    from dibit.reproduce.views import VIEWS

    file = shown(path or f"{name}.json", 200)
    try:
        if (held := SectionFile[Any].model_validate(section).section) != name:
            raise UserError(f"{file} holds the section {shown(repr(held))}; was the file renamed?")
        kind: Any = VIEWS[name].Results
        return SectionFile[kind].model_validate(section)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        missing = first["type"] == "missing"
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).lstrip(".")
        expected = "a value" if missing else first["msg"].removeprefix("Input should be ").partition(" or instance")[0]
        got = "" if missing else f", got {shown(repr(first['input']), 40)}"
        raise UserError(
            f"{file} is not what dibit reproduce {name} writes: expected {expected}"
            f"{f' at {shown(place)}' if place else ''}{got}; move it away, and dibit reproduce {name} writes it again "
            "from what was measured."
        ) from error


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "\ufffd" for c in value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value
