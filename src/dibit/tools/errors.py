"""What goes wrong because of what was typed, as one sentence."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

_LONGEST_WORD = 200


class UserError(ValueError):
    """Input that cannot be used: what was given, what was expected, what to do.

    The command line prints the sentence and ends with status 2; nothing has been written by then.
    """


class TrainingError(RuntimeError):
    """Training that cannot go on, such as a loss that is no longer finite (status 1)."""


class Interrupted(Exception):
    """Training stopped by Ctrl-C after its checkpoint was written (status 130)."""


def printable(text: str) -> str:
    """Return a text with its control characters, line breaks too, written out: a file's name may hold any."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(given: object, most: int = 80) -> str:
    """Return what was given as part of a sentence: the middle of something very long is left out."""
    text = printable(str(given))
    return text if len(text) <= most else f"{text[: most - 20]}...{text[-17:]}"


def nearest(word: str, known: Iterable[str], most: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"`` with the known words nearest to `word`, or ``""``."""
    if len(word) > _LONGEST_WORD:  # nothing is near, and looking takes time
        return ""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=most, cutoff=0.55)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(by_lower[c]) for c in close)}?"


def require(module: str, extra: str = "train") -> ModuleType:
    """Import `module`, or say in one sentence which extra of Dibit brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            package = f"{package} ({error.name} is missing)"
        raise UserError(f"This needs {package}, which is not installed: {install(extra)}") from error


def install(extra: str) -> str:
    """Return the command that installs an extra of Dibit: from where Dibit itself was installed, or else by name."""
    around = Path(__file__).parents[3]
    clone = around if (around / "pyproject.toml").is_file() else _source()
    if clone is None or not clone.is_dir():
        return f"pip install 'dibit[{extra}]'"
    place = "." if clone.samefile(".") else clone
    return f"pip install {'-e ' if clone == around else ''}{shlex.quote(f'{place}[{extra}]')}"


def _source() -> Path | None:
    """The folder that Dibit was installed from, as pip notes it; None: it came from an index."""
    try:
        noted = importlib.metadata.distribution("dibit").read_text("direct_url.json")
        url = urlsplit(json.loads(noted or "{}").get("url", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    return Path(unquote(url.path)) if url.scheme == "file" else None
