"""Flags and YAML to `Settings` and back, derived from the dataclasses in `dibit.train.settings`."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dibit.tools.errors import UserError, nearest, require, shown
from dibit.train.presets import settings_file
from dibit.train.settings import Settings, group_fields, groups
from dibit.train.yaml_file import Value, read_flat

_DESCRIPTION = """\
Train a graph neural network on the full graph while keeping a compressed copy of the activations for the
backward pass. Without any flag: a generated graph of 20,000 nodes, a GraphSAGE of 3 layers, the default
recipe. With --compare the same training runs without compression as well, and a table shows accuracy, memory
and time of both.
"""


def build_parser() -> Any:
    """Build the parser of ``dibit train``: one flag a setting, its help text from the docstring."""
    jsonargparse = require("jsonargparse")
    docstrings = require("docstring_parser")
    parser = jsonargparse.ArgumentParser(
        prog="dibit train",
        description=_DESCRIPTION,
        exit_on_error=False,
        formatter_class=argparse.HelpFormatter,  # the parser's own adds types in Python's words
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="Read settings from a YAML file, or one of the papers' settings by its name, such as arxiv-sage "
        "(docs/train.md); flags win over it.",
    )
    for kind in groups().values():
        doc = docstrings.parse(kind.__doc__ or "")
        texts = {p.arg_name: " ".join((p.description or "").split()) for p in doc.params}
        hints = get_type_hints(kind)
        group = parser.add_argument_group((doc.short_description or "").rstrip("."))
        for f in group_fields(kind):
            default = "" if f.default is None or f.default is False else f" (default: {f.default})"
            flag, text = _flag(f.name), texts[f.name] + default
            if hints[f.name] is bool:
                group.add_argument(flag, action=jsonargparse.ActionYesNo(no_prefix="no-"), default=None, help=text)
            else:  # a text here: `_converted` reads flags and files alike
                group.add_argument(flag, type=_text, metavar=_metavar(hints[f.name]), default=None, help=text)
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
    parser = build_parser()
    flags, configs = _flags_and_configs(argv, parser)
    values: dict[str, Any] = {}
    for path in configs:
        values |= read_yaml(settings_file(path))
    if "--resume" in flags:
        values |= _settings_of_run(flags, values)
    try:
        parsed = parser.parse_args(flags)
    except (argparse.ArgumentError, argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise UserError(_sentence(str(error))) from error
    hints = _hints()
    for name, hint in hints.items():
        if parsed[name] is not None:
            given = None if parsed[name] == "null" and NoneType in get_args(hint) else parsed[name]
            values[name] = _converted(name, given, hint)
    return Settings.from_flat(values)


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
    return {key: _converted(key, value, hints[key]) for key, value in result.items()}


def to_yaml(settings: Settings) -> str:
    """Write settings as YAML that `parse` reads back, grouped by topic."""
    yaml = require("yaml")
    flat, parts = settings.flat(), []
    for kind in groups().values():
        title = (kind.__doc__ or "").splitlines()[0]
        body = {f.name: flat[f.name] for f in group_fields(kind)}
        parts.append(f"# {title}\n" + yaml.safe_dump(body, sort_keys=False, allow_unicode=True))
    return "\n".join(parts)


_NEGATIVE = re.compile(r"-[.\d]")


def _flags_and_configs(argv: Sequence[str], parser: Any) -> tuple[list[str], list[str]]:
    """Split the words into flags (underscores made dashes, unknown ones refused) and ``--config`` files."""
    known = {option for action in parser._actions for option in action.option_strings}
    flags: list[str] = []
    configs: list[str] = []
    words = iter(argv)
    for word in words:
        if _NEGATIVE.match(word) and flags and flags[-1] in known:  # -1e-3 is a value, not a flag
            flags[-1] += f"={word}"
            continue
        if not word.startswith("--"):
            flags.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name == "--config":
            path = value if equals else next(words, None)
            if path is None:
                raise UserError("--config needs the path of a YAML file.")
            configs.append(path)
        elif name in known:
            flags.append(name + equals + value)
        else:
            raise UserError(f"There is no flag {shown(name)}.{nearest(name, known)} See dibit train --help.")
    return flags, configs


def _settings_of_run(flags: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that ``--resume`` goes on with, from its folder."""
    out = values.get("out")
    words = list(flags)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--out":
            out = following
        elif word.startswith("--out="):
            out = word.partition("=")[2]
    path = Path(out) / "settings.yaml" if out else None
    # What the folder says comes below what the user's own file says.
    return {**read_yaml(path), **values} if path is not None and path.is_file() else {}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@cache
def _hints() -> dict[str, Any]:
    """The type of each setting, by its flat name."""
    return {name: hint for kind in groups().values() for name, hint in get_type_hints(kind).items()}


def _converted(name: str, given: Value, hint: Any) -> Any:
    """Return what was written as a value of a setting's type.

    Args:
        name: Of the setting.
        given: The text, or true, false, null of a file.
        hint: bool, int, float, str, a union of these, None and words.

    Raises:
        UserError: It is not of that type.
    """
    kinds = get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,)
    if given is None and NoneType in kinds:
        return None
    if isinstance(given, bool) and bool in kinds:
        return given
    for kind in kinds:
        if not isinstance(given, str):
            break
        value = _READERS[kind](given) if kind in _READERS else given if given in get_args(kind) else None
        if value is not None:
            return value
    if int in kinds and isinstance(given, str) and _WHOLE.fullmatch(given.strip()):
        raise UserError(f"{_flag(name)} is {shown(given)}, expected a whole number of at most 19 digits.")
    words = [_KINDS.get(kind) or " or ".join(map(repr, get_args(kind))) for kind in kinds if kind is not NoneType]
    raise UserError(f"{_flag(name)} is {shown(given)!r}, expected {' or '.join(words)}.")


def _text(given: str) -> str:
    """As it is: of `str` the parser would make YAML first."""
    return given


_WHOLE = re.compile(r"[+-]?[0-9][0-9_]*")


def _whole(text: str) -> int | None:
    text = text.strip()
    try:
        return int(text) if _WHOLE.fullmatch(text) and len(text) <= 20 else None
    except ValueError:  # 1__0
        return None


def _real(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


_READERS: dict[Any, Any] = {int: _whole, float: _real, str: str}
_KINDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


def _metavar(hint: Any) -> str:
    """Name a flag's value by its type: N for whole numbers, X for numbers, TEXT; and the words it may be instead."""
    kinds = get_args(hint) or (hint,)
    kind = "N" if int in kinds else "X" if float in kinds else "TEXT"
    return "|".join((kind, *(word for part in kinds if get_origin(part) is Literal for word in get_args(part))))


def _sentence(message: str) -> str:
    """Make the parser's message one line that names the flag."""
    message = " ".join(message.split())
    if message.startswith("unrecognized arguments: "):
        words = message.removeprefix("unrecognized arguments: ")
        return f"There is nothing to do with {shown(words)!r}; every setting is a flag, see dibit train --help."
    return shown(message.removeprefix("argument "), 200)
