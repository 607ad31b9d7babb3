"""Flags and YAML to `Settings` and back, derived from the dataclasses in `dibit.train.settings`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dibit.train.errors import UserError, nearest, require
from dibit.train.recipes import settings_file
from dibit.train.settings import Settings, group_fields, groups

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
            shown = "" if f.default is None or f.default is False else f" (default: {f.default})"
            flag, common = _flag(f.name), {"default": f.default, "help": texts[f.name] + shown}
            if hints[f.name] is bool:
                group.add_argument(flag, action=jsonargparse.ActionYesNo(no_prefix="no-"), **common)
            else:
                group.add_argument(flag, type=hints[f.name], metavar=_metavar(hints[f.name]), **common)
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
        # Keys and values of the files are parsed as flags are, so that types and messages are the same.
        defaults = parser.parse_object(values) if values else None
        parsed = parser.parse_args(flags, namespace=defaults)
    except (argparse.ArgumentError, argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise UserError(_sentence(str(error))) from error
    names = Settings().flat()
    return Settings.from_flat({name: parsed[name] for name in names})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file of flat keys."""
    yaml = require("yaml")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"Cannot read the settings file {path}: {reason}.") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"The settings file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UserError(f"The settings file {path} holds no settings; expected lines such as 'layers: 3'.")
    known = Settings().flat()
    result = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in result:
        if key not in known:
            raise UserError(f"The settings file {path} has the unknown key {key!r}.{nearest(key, known)}")
        if isinstance(known[key], bool) and not isinstance(result[key], bool):
            raise UserError(f"In {path}, {key} is {result[key]!r}, expected true or false.")
    # YAML 1.1 reads 1e-3 (no dot) as a word; the parser reads words as flags are read.
    return result


def to_yaml(settings: Settings) -> str:
    """Write settings as YAML that `parse` reads back, grouped by topic."""
    yaml = require("yaml")
    flat, parts = settings.flat(), []
    for kind in groups().values():
        title = (kind.__doc__ or "").splitlines()[0]
        body = {f.name: flat[f.name] for f in group_fields(kind)}
        parts.append(f"# {title}\n" + yaml.safe_dump(body, sort_keys=False, allow_unicode=True))
    return "\n".join(parts)


def _flags_and_configs(argv: Sequence[str], parser: Any) -> tuple[list[str], list[str]]:
    """Split the words into flags (underscores made dashes, unknown ones refused) and ``--config`` files."""
    known = {option for action in parser._actions for option in action.option_strings}
    flags: list[str] = []
    configs: list[str] = []
    words = iter(argv)
    for word in words:
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
            raise UserError(f"There is no flag {name}.{nearest(name, known)} See dibit train --help.")
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


def _metavar(hint: Any) -> str:
    """Name a flag's value by its type: N for whole numbers, X for numbers, TEXT; and the words it may be instead."""
    kinds = get_args(hint) or (hint,)
    kind = "N" if int in kinds else "X" if float in kinds else "TEXT"
    return "|".join((kind, *(word for part in kinds if get_origin(part) is Literal for word in get_args(part))))


def _sentence(message: str) -> str:
    """Make the parser's message one line that names the flag."""
    message = " ".join(message.split())
    if message.startswith('Parser key "'):
        key, _, rest = message.removeprefix('Parser key "').partition('":')
        value = re.search(r".*(?:Got|Given) value: (.*)$", rest)  # the last: a union names it more than once
        types, _, _ = (rest.partition("Subtypes:")[2] or rest).partition("Errors:")
        kinds = [_KINDS.get(kind, word) for kind, word in re.findall(r"class '(\w+)'|Literal\[(.*?)\]", types)]
        if value and any(kinds):
            return f"{_flag(key)} is {value[1]!r}, expected {' or '.join(filter(None, kinds))}."
        return f"{_flag(key)}: {rest.strip()}"
    if message.startswith("unrecognized arguments: "):
        words = message.removeprefix("unrecognized arguments: ")
        return f"There is nothing to do with {words!r}; every setting is a flag, see dibit train --help."
    return message.removeprefix("argument ")


_KINDS = {"int": "a whole number", "float": "a finite number", "str": "a text"}
