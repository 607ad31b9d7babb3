"""The list of private APIs: where each one is, what it is for, and what is lost where it is missing."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

KNOWN = "2.6 to 2.14"  # versions of torch that have all of it, but for what is younger (`PrivateApi.since`)
WITHOUT = "DIBIT_WITHOUT"  # an environment variable: names of the list, separated by commas, to do without
_NOTHING_IS_COMPRESSED = "nothing is compressed"
_said = False


@dataclass(frozen=True)
class PrivateApi:
    """One private API.

    Attributes:
        name: the dotted name by which it is reached.
        purpose: what Dibit does with it.
        lost: what is lost without it; empty where a public spelling does the same.
        needed: nothing can be compressed without it.
        since: the version of torch that has it first; before that it is missed silently.
        tool: not for compression but for commands beside it; looked up only when it is used.
        look: finds it, or raises, where its name alone does not lead there.
    """

    name: str
    purpose: str
    lost: str = ""
    needed: bool = False
    since: str = ""
    tool: bool = False
    look: Callable[[], Any] | None = None

    @functools.cached_property
    def value(self) -> Any:
        """The API itself, `None` where it is missing."""
        if self.name in os.environ.get(WITHOUT, "").replace(",", " ").split():
            return None
        try:
            return _by_name(self.name) if self.look is None else self.look()
        except Exception:  # whatever a version of torch that Dibit does not know may raise
            return None

    @property
    def found(self) -> bool:
        return self.value is not None

    @property
    def younger(self) -> bool:
        """Whether the torch that runs is a known one of before this API."""
        return bool(self.since) and torch.__version__ < self.since


APIS: dict[str, PrivateApi] = {}


def enter(name: str, purpose: str, lost: str = "", *, needed: bool = False, **more: Any) -> PrivateApi:
    """Enter an API in the list; for the arguments see `PrivateApi`."""
    api = APIS[name] = PrivateApi(name, purpose, _NOTHING_IS_COMPRESSED if needed else lost, needed, **more)
    return api


def find(name: str, purpose: str, lost: str = "", **more: Any) -> Any:
    """Enter an API in the list and look it up; `None` where it is missing."""
    return enter(name, purpose, lost, **more).value


def missing() -> list[PrivateApi]:
    """The APIs whose absence costs something."""
    return [api for api in APIS.values() if api.lost and not api.found]


def warn_if_missing() -> None:
    """Say once in a process what compression loses because torch lacks some API; for a function that users call."""
    global _said
    gone = [api for api in APIS.values() if api.lost and not (api.tool or api.younger or api.found)]
    if gone and not _said:
        _said = True
        losses = [_NOTHING_IS_COMPRESSED] if any(api.needed for api in gone) else [api.lost for api in gone]
        warnings.warn(
            f"dibit: torch {torch.__version__} is without {', '.join(api.name for api in gone)}, which Dibit uses. "
            f"What is lost: {'; '.join(dict.fromkeys(losses))}. Gradients stay right. Dibit knows torch {KNOWN}. "
            "See 'dibit doctor'.",
            stacklevel=3,
        )


def _by_name(name: str) -> Any:
    """What a dotted name stands for; raises where there is nothing."""
    path, _, rest = name.partition(".")
    found: Any = importlib.import_module(path)
    for attribute in rest.split("."):
        path = f"{path}.{attribute}"
        try:
            found = getattr(found, attribute)
        except AttributeError:
            found = importlib.import_module(path)  # a module that nobody has imported yet
    return found
