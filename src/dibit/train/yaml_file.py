"""Flat settings in YAML: names and single values, read event by event, so that no file can make it build more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dibit.tools.errors import UserError, require, shown

_LARGEST = 1_000_000  # bytes
_DEEPEST = 50  # lists in lists: looked through for errors, not built; PyYAML's time grows with the square
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("", "~", "null"), None),
}
_TAGS = (None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")))


@dataclass(frozen=True)
class Several:
    """A list or a mapping, which no setting is; its first line, for messages."""

    line: str

    def __str__(self) -> str:
        return self.line


Value: TypeAlias = str | bool | Several | None


def read_flat(path: str | Path) -> dict[str, Value]:
    """Read a YAML mapping of names to single values.

    Args:
        path: Of a text in UTF-8.

    Returns:
        Each value as it is written; true, false and null (unquoted, and YAML's other words for them) as Python's;
        a list or a mapping as `Several`.

    Raises:
        UserError: It cannot be read, is not YAML, or is no mapping of names.
    """
    text = _text(path)
    yaml = require("yaml")
    try:
        return _mapping(yaml, yaml.parse(text, Loader=yaml.SafeLoader), text, path)
    except yaml.YAMLError as error:
        raise UserError(
            f"The settings file {shown(path)} is not valid YAML: {shown(' '.join(str(error).split()), 200)}"
        ) from error


def _text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"Cannot read the settings file {shown(path)}: {reason}.") from error
    if len(content) > _LARGEST:
        raise UserError(
            f"The settings file {shown(path)} has more than {_LARGEST:,} bytes; expected lines such as 'layers: 3'."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"Cannot read the settings file {shown(path)}: it is not a text file in UTF-8.") from error


def _mapping(yaml: Any, events: Iterator[Any], text: str, path: str | Path) -> dict[str, Value]:
    nothing = UserError(f"The settings file {shown(path)} holds no settings; expected lines such as 'layers: 3'.")
    values: dict[str, Value] = {}
    names: dict[str, str] = {}  # as settings have them: as they are written
    anchors: dict[str, Value] = {}

    def value_of(event: Any, what: str) -> Value:
        """The value that begins with an event."""
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise UserError(
                    f"In {shown(path)}, {what} refers to {shown(event.anchor)!r}, which nothing before it is."
                )
            return anchors[event.anchor]
        if not isinstance(event, yaml.ScalarEvent):
            depth = 1
            while depth:
                after = next(events)
                depth += isinstance(after, yaml.CollectionStartEvent) - isinstance(after, yaml.CollectionEndEvent)
                if depth > _DEEPEST:
                    raise UserError(f"In {shown(path)}, {what} has lists in lists, expected a single value.")
            return Several(text[event.start_mark.index :].partition("\n")[0])
        if event.tag not in _TAGS:
            raise UserError(f"In {shown(path)}, {what} has the tag {shown(event.tag)!r}, expected a plain value.")
        value: Value = event.value
        if event.implicit[0] and event.style is None:
            value = _WORDS.get(event.value.lower(), event.value)
        if event.anchor is not None:
            anchors[event.anchor] = value
        return value

    next(events)  # the beginning of the stream
    document = next(events)
    if isinstance(document, yaml.StreamEndEvent):
        return {}
    first = next(events)
    if not isinstance(first, yaml.MappingStartEvent):
        if isinstance(first, yaml.ScalarEvent) and value_of(first, "it") is None:
            return {}
        raise nothing
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent):
            raise UserError(
                f"The settings file {shown(path)} has a key that is no name; expected lines such as 'layers: 3'."
            )
        key = event.value
        name = key.replace("-", "_")
        if name in names:
            twice = key if key == names[name] else f"{names[name]} and {key}"
            raise UserError(f"The settings file {shown(path)} gives {shown(twice)} twice; expected once.")
        names[name] = key
        values[name] = value_of(next(events), shown(name))
    next(events)  # the end of the document
    if not isinstance(next(events), yaml.StreamEndEvent):
        raise UserError(f"The settings file {shown(path)} holds more than one document ('---'); expected one.")
    return values
