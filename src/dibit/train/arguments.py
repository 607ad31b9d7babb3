"""Flags and YAML to `Settings` and back, derived from the dataclasses in `dibit.train.settings`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from dibit.tools.errors import UserError, nearest, require, shown
from dibit.tools.parser import Parser, value_of
from dibit.train.presets import settings_file
from dibit.train.settings import RECIPES, Settings, group_fields, groups
from dibit.train.yaml_file import read_flat

_DESCRIPTION = """\
Train a graph neural network on the full graph while keeping a compressed copy of the activations for the
backward pass. Without any flag: a generated graph of 20,000 nodes, a GraphSAGE of 3 layers, the default
recipe. With --compare the same training runs without compression as well, and a table shows accuracy, memory
and time of both.
"""


def build_parser() -> Parser:
    """Build the parser of ``dibit train``: one flag a setting, its help text from the docstring."""
    parser = Parser("dibit train", _DESCRIPTION)
    parser.usage = "dibit train [--help] [--config FILE] [--SETTING VALUE ...]"  # of each there would be 20 lines
    text = (
        "Read settings from a YAML file, or one of the papers' settings by its name, such as arxiv-sage "
        "(docs/train.md); flags win over it."
    )
    parser.flag("config", str, text, "FILE", action="append")
    hints = _hints()
    for kind in groups().values():
        title, texts = _described(kind)
        group = parser.add_argument_group(title)
        for f in group_fields(kind):
            text = texts.get(f.name, "")
            if f.name == "recipe":
                text = f"One of {', '.join(RECIPES)}. {text}"
            parser.flag(f.name, hints[f.name], text, default=f.default, group=group)
    return parser


def parse(argv: Sequence[str]) -> Settings:
    """Read the command line; values from ``--config`` files, then from flags, whatever their order.

    Args:
        argv: The words after ``dibit train``.

    Returns:
        Settings, each of the right type, not yet checked for meaning.

    Raises:
        UserError: An unknown flag or key, a file that cannot be read, a value of the wrong type.
    """
    flags = build_parser().given(argv)
    values: dict[str, Any] = {}
    for path in flags.pop("config", ()):
        values |= read_yaml(settings_file(path))
    out = flags.get("out", values.get("out"))
    if flags.get("resume") and out and (run := Path(out) / "settings.yaml").is_file():
        values = read_yaml(run) | values  # the user's own file wins over what the folder says
    return Settings.from_flat(values | flags)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file of flat keys, each of the right type.

    Raises:
        UserError: It cannot be read, has an unknown key or one that is there twice, or a value of the wrong type.
    """
    result = read_flat(path)
    hints = _hints()
    for key, value in result.items():
        if key not in hints:
            raise UserError(f"The settings file {shown(path)} has the unknown key {shown(key)!r}.{nearest(key, hints)}")
        if hints[key] is bool and not isinstance(value, bool):
            raise UserError(f"In {shown(path)}, {key} is {shown(value)!r}, expected true or false.")
    return {key: value_of(key, value, hints[key]) for key, value in result.items()}


def to_yaml(settings: Settings) -> str:
    """Write settings as YAML that `parse` reads back, grouped by topic."""
    yaml = require("yaml")
    flat, parts = settings.flat(), []
    for kind in groups().values():
        title = (kind.__doc__ or "").splitlines()[0]
        body = {f.name: flat[f.name] for f in group_fields(kind)}
        parts.append(f"# {title}\n" + yaml.safe_dump(body, sort_keys=False, allow_unicode=True))
    return "\n".join(parts)


@cache
def _hints() -> dict[str, Any]:
    """The type of each setting, by its flat name."""
    return {name: hint for kind in groups().values() for name, hint in get_type_hints(kind).items()}


def _described(kind: type) -> tuple[str, dict[str, str]]:
    """The first line of a group's docstring, and the text of each setting below ``Attributes:``."""
    head, _, listed = (inspect.getdoc(kind) or "").partition("\n\nAttributes:\n")
    entries = [entry.partition(": ") for entry in re.split(r"\n(?! )", textwrap.dedent(listed))]
    return head.rstrip("."), {name: " ".join(text.split()) for name, _, text in entries}
