"""The folder of a reproduction: each result is written as soon as it exists, and is not computed twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from dibit.tools import lock
from dibit.tools.errors import UserError
from dibit.tools.files import check_out, refused, write_atomically
from dibit.tools.lock import Lock
from dibit.tools.manifest import Manifest

MARKER = "reproduce.json"
PAGE, MARKDOWN = "report.html", "report.md"
SECTIONS = ("memory", "blocks", "variance", "distribution", "accuracy", "tuned")
DAYS = ("tuned",)  # sections that take so long that "all" is without them


class Store:
    """Results below one folder: `units/` holds single measurements by what they measured, `SECTION.json` the tables.

    A context manager, at the end of which the folder is no longer locked.

    Args:
        path: of the folder.
        overwrite: forget what it holds.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite
        self.lock = Lock(path)
        self.manifest = Manifest(path, MARKER, "dibit reproduce")

    def check(self) -> None:
        """Raise `UserError` if the folder holds something that is not ours, or is in use."""
        check_out(self.path)
        self.lock.look()
        content = sorted(p.name for p in self.path.iterdir() if p.name != lock.NAME) if self.path.is_dir() else []
        if content and MARKER not in content:
            raise UserError(
                f"The folder {self.path} holds something else ({content[0]}), expected a new folder or one that dibit "
                "reproduce made; give another --out, or empty it."
            )
        if content:
            try:
                self.lock.acquire()
            except OSError as error:
                raise refused(self.path, error) from error
            self.manifest.read()
            try:
                self.manifest.check(*self._files())
            except OSError as error:
                raise refused(self.path, error) from error

    def open(self) -> None:
        """Create the folder, or empty it of our own files where it is to be overwritten.

        Raises:
            UserError: it cannot be written, or is in use.
            OSError: there is no room.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            self.check()
            if self.overwrite:
                self.manifest.remove()
            self.manifest.write()
            (self.path / "units").mkdir(exist_ok=True)
        except OSError as error:
            raise refused(self.path, error) from error

    def _files(self) -> list[Path]:
        """What is there of what may be written, but for what a kill has left of a file (`write_atomically`)."""
        files = [self.path / name for name in (PAGE, MARKDOWN, *(f"{section}.json" for section in SECTIONS))]
        within = [path for name in ("units", "runs", "figures") for path in (self.path / name).rglob("*")]
        return files + [path for path in within if path.is_symlink() or not (path.is_dir() or path.suffix == ".part")]

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()

    def unit(self, key: dict[str, Any], compute: Callable[[], Any]) -> tuple[Any, float, bool]:
        """One measurement: read if it is there, else computed and written.

        Args:
            key: everything that it depends on, as plain values.
            compute: gives a value that JSON can hold.

        Returns:
            The value, the seconds it took when it was computed, and whether it was computed now.
        """
        held = self.held(key)
        if held is not None:
            return *held, False
        self.expect(key)  # what may not be replaced is said before hours of work
        start = time.perf_counter()
        value = compute()
        seconds = time.perf_counter() - start
        return self.keep(key, value, seconds), seconds, True

    def held(self, key: dict[str, Any]) -> tuple[Any, float] | None:
        """A measurement that is there: its value and the seconds it took."""
        path = self._unit(key)
        if not path.is_file():
            return None
        found = read(path)
        return (found["value"], found["seconds"]) if found.get("key") == key else None

    def expect(self, key: dict[str, Any]) -> None:
        """Say now whether a measurement may not be written (`UserError`)."""
        self.manifest.add(self._unit(key))

    def keep(self, key: dict[str, Any], value: Any, seconds: float) -> Any:
        """Write a measurement; returns its value as a reader of the file gets it."""
        write(self._unit(key), {"key": key, "value": value, "seconds": seconds})
        return json.loads(json.dumps(value))

    def _unit(self, key: dict[str, Any]) -> Path:
        return self.path / "units" / f"{self.name(key)}.json"

    @staticmethod
    def name(key: dict[str, Any]) -> str:
        """A short name for a measurement, the same in every run."""
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
        return f"{key['what']}-{digest}"

    def section(self, name: str, content: dict[str, Any]) -> None:
        """Write a section's table."""
        path = self.path / f"{name}.json"
        self.manifest.add(path)
        write(path, content)


def read(path: Path) -> Any:
    """The content of a JSON file of ours."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"The result {path} cannot be read ({error}); remove it, or start anew (--overwrite)."
        ) from error


def write(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
