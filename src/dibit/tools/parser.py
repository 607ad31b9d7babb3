"""The parser of every command: argparse tells flags from values and prints help, what a value means is read here."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from dibit.tools.errors import UserError, nearest, shown

_NEGATIVE = re.compile(r"-[.\d]")
_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")


@dataclass(frozen=True)
class Flag:
    """A flag, as `Parser.flag` describes it."""

    name: str
    kind: Any
    default: Any = None
    least: int | None = None
    several: bool = False


class Parser(argparse.ArgumentParser):
    """The flags of one command; every error is a `UserError`."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, exit_on_error=False, argument_default=argparse.SUPPRESS)
        self.flags: dict[str, Flag] = {}  # by each spelling, such as --bias and --no-bias

    def flag(
        self,
        name: str,
        kind: Any,
        text: str,
        metavar: str | None = None,
        group: Any = None,
        action: Any = None,
        **how: Any,
    ) -> None:
        """Add a flag.

        Args:
            name: Such as ``batch_size`` for ``--batch-size``; a flag of bool is ``--no-...`` too.
            kind: bool, int, float, str, a `Literal` of words, or a union of these and None.
            text: What ``--help`` says, but for the default.
            metavar: How ``--help`` names the value; without it N (a whole number), X (a number) or TEXT.
            group: The group of ``--help``, from ``add_argument_group``.
            action: ``"append"`` for a flag that may be repeated; its values make a list.
            **how: ``default``, the value where the flag is left out; ``least``, the smallest number that is accepted;
                ``several=True`` for a flag that takes one or more values, which make a list.
        """
        flag = Flag(name, kind, **how)
        if flag.default is not None and flag.default is not False:
            text += f" (default: {' '.join(map(str, flag.default)) if flag.several else flag.default})"
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            options = {"metavar": metavar or _metavar(kind), "nargs": "+" if flag.several else None, "action": action}
        added = (group or self).add_argument(option(name), help=text.replace("%", "%%"), **options)
        self.flags |= dict.fromkeys(added.option_strings, flag)

    def helps(self, words: Sequence[str]) -> bool:
        """Print the help if the words ask for it; return whether they do."""
        if asked := not {"-h", "--help"}.isdisjoint(words):
            self.print_help()
        return asked

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """Read the words of a command line; return what they give, by name, and no defaults.

        Raises:
            UserError: An unknown flag, a value that is missing or of another type, a word too many.
        """
        try:
            found, rest = self.parse_known_args(self._plain(words))
        except argparse.ArgumentError as error:
            if error.argument_name not in self.flags:
                self.error(error.message)
            expected = _expected(self.flags[error.argument_name].kind)
            self.error(f"{error.argument_name} has no value, expected {expected}")
        if rest:
            self.error(f"there is nothing to do with {shown(rest[0])!r}, which is neither a flag nor the value of one")
        return {name: self._value(name, text) for name, text in vars(found).items()}

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the words of a command line as `given` does; what is left out has its default."""
        return argparse.Namespace(**{flag.name: flag.default for flag in self.flags.values()} | self.given(words))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")

    def _plain(self, words: Sequence[str]) -> list[str]:
        """The words, each flag's name with dashes, and a negative number joined to its flag."""
        plain: list[str] = []
        for word in words:
            last = self.flags.get(plain[-1]) if plain else None
            if _NEGATIVE.match(word) and last is not None and not last.several:  # argparse knows no -1e-3
                word = f"{plain.pop()}={word}"
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                name = name.replace("_", "-")
                if name not in self.flags:
                    hint = nearest(name, (*self.flags, "--help"))
                    raise UserError(f"There is no flag {shown(name)}.{hint} See {self.prog} --help.")
                word = name + equals + value
                if equals and self.flags[name].kind is bool:
                    self.error(f"{name} takes no value, but is {shown(value)!r}; give it alone, or leave it out")
            plain.append(word)
        return plain

    def _value(self, name: str, text: Any) -> Any:
        flag = self.flags.get(option(name))
        if flag is None:  # an argument that is no flag
            return text
        if isinstance(text, list):
            return [self._value(name, each) for each in text]
        value = value_of(name, None if text == "null" and NoneType in get_args(flag.kind) else text, flag.kind)
        if flag.least is not None and value < flag.least:
            raise UserError(f"{option(name)} is {shown(value)}, expected a whole number of at least {flag.least}.")
        return value


def option(name: str) -> str:
    """The flag of a name: ``--batch-size`` of ``batch_size``."""
    return "--" + name.replace("_", "-")


def value_of(name: str, given: object, kind: Any) -> Any:
    """Return what was written as a value of its type.

    Args:
        name: Of the flag or the key.
        given: The text; or true, false, null of a file, or something of it that is no value.
        kind: As in `Flag`.

    Raises:
        UserError: It is not of that type.
    """
    kinds, words = _parts(kind)
    if (given is None and NoneType in kinds) or (isinstance(given, bool) and bool in kinds) or given in words:
        return given
    if isinstance(given, str):
        for each in kinds:
            value = _READERS[each](given) if each in _READERS else None
            if value is not None:
                return value
        if int in kinds and _WHOLE.fullmatch(given.strip()):
            raise UserError(f"{option(name)} is {shown(given)}, expected a whole number of at most 19 digits.")
    raise UserError(f"{option(name)} is {shown(given)!r}, expected {_expected(kind)}.{nearest(str(given), words)}")


def usage(prog: str, options: str, description: str, commands: Mapping[str, str]) -> str:
    """The help of a command that has others: what each of them does, by name."""
    width = max(map(len, commands)) + 2
    lines = [f"  {name:{width}}{text} ({prog} {name} --help)" for name, text in commands.items()]
    return "\n".join([f"usage: {prog} {options} ...", "", description, "", "commands:", *lines])


def _parts(kind: Any) -> tuple[tuple[Any, ...], list[str]]:
    """The types of a union, or the one type; and the words of its literals."""
    kinds = (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)
    return kinds, [word for each in kinds if get_origin(each) is Literal for word in get_args(each)]


def _whole(text: str) -> int | None:
    return int(text) if _WHOLE.fullmatch(text.strip()) and len(text.strip()) <= 20 else None


def _real(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


_READERS: dict[Any, Any] = {int: _whole, float: _real, str: str}
_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _expected(kind: Any) -> str:
    """What a value may be, in a sentence's words."""
    kinds, words = _parts(kind)
    return " or ".join([*(_WORDS[each] for each in kinds if each in _WORDS), *map(repr, words)])


def _metavar(kind: Any) -> str:
    kinds, words = _parts(kind)
    return "|".join([*(_METAVARS[each] for each in kinds if each in _METAVARS), *words])
