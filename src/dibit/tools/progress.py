"""Progress on stderr: a bar on a terminal, a few lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

from dibit.tools.errors import require


class Progress:
    """One bar; a context manager.

    Args:
        label: what goes on.
        total: steps in all.
        done: steps that lie behind.
        quiet: print nothing.
        extra: of Dibit, that brings what draws the bar.
    """

    def __init__(self, label: str, total: int, done: int = 0, quiet: bool = False, extra: str = "train") -> None:
        self.label, self.total, self.done, self.quiet = label, total, done, quiet
        self.said = time.monotonic()
        self._extra = extra
        self._bar: Any = None

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            rich, console = require("rich.progress", self._extra), require("rich.console", self._extra)
            self._bar = rich.Progress(
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(bar_width=10),
                rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(),
                rich.TextColumn("{task.fields[status]}", markup=False),
                console=console.Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, status="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, **fields: Any) -> bool:
        """Change the bar (`completed`, `status`), if there is one."""
        if self._bar is not None:
            self._bar.update(self._task, **fields)
        return self._bar is not None

    def line(self, text: str) -> None:
        """A line of the log, off a terminal."""
        self.said = time.monotonic()
        if not self.quiet:
            print(f"{self.label}  {text}", file=sys.stderr, flush=True)

    def silent_for(self, seconds: float) -> bool:
        """Whether the log has said nothing for so long."""
        return time.monotonic() - self.said > seconds

    def say(self, sentence: str) -> None:
        """Print a sentence beside the progress."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(sentence, highlight=False, markup=False, emoji=False)
        else:
            print(sentence, file=sys.stderr, flush=True)


class MeasurementProgress(Progress):
    """Counts measurements.

    Args:
        section: what is measured.
        total: measurements in all, read or computed.
        quiet: print nothing.
    """

    NOTE_EVERY = 20.0  # seconds between the notes of one long measurement, off a terminal

    def __init__(self, section: str, total: int, quiet: bool = False) -> None:
        super().__init__(section, total, quiet=quiet, extra="study")
        self.name = ""

    def begin(self, name: str) -> None:
        """A measurement begins."""
        self.name, self.said = name, time.monotonic()
        self.show(status=name)

    def note(self, text: str, name: str | None = None) -> None:
        """How far the running measurement is, or the one of this name where several run."""
        self.name = name or self.name
        if not self.show(status=f"{self.name}: {text}") and self.silent_for(self.NOTE_EVERY):
            self.line(f"{self.name}: {text}")

    def end(self, seconds: float, computed: bool, name: str) -> None:
        """The measurement of this name is there."""
        self.done += 1
        self.name = name
        if not self.show(completed=self.done) and computed:
            self.line(f"{self.done}/{self.total}  {name}  {seconds:.1f} s")
