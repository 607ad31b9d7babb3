"""Progress of a reproduction on stderr: a bar on a terminal, a line a measurement elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from dibit.tools.errors import require


class Progress:
    """Counts measurements; a context manager.

    Args:
        section: what is measured.
        total: measurements in all, read or computed.
        quiet: print nothing.
    """

    NOTE_EVERY = 20.0  # seconds between the notes of one long measurement, off a terminal

    def __init__(self, section: str, total: int, quiet: bool = False) -> None:
        self.section, self.total, self.quiet = section, total, quiet
        self.done = 0
        self.label = ""
        self.last = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            rich, console = require("rich.progress", "study"), require("rich.console", "study")
            self.bar = rich.Progress(
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(bar_width=12),
                rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(),
                rich.TextColumn("{task.fields[status]}", markup=False),
                console=console.Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.section, total=self.total, status="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, label: str) -> None:
        """A measurement begins."""
        self.label, self.last = label, time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, status=label)

    def note(self, text: str, label: str | None = None) -> None:
        """How far the running measurement is, or the one of this label where several run."""
        self.label = label or self.label
        if self.bar is not None:
            self.bar.update(self.task, status=f"{self.label}: {text}")
        elif not self.quiet and time.monotonic() - self.last > self.NOTE_EVERY:
            self.last = time.monotonic()
            print(f"{self.section}  {self.label}: {text}", file=sys.stderr, flush=True)

    def end(self, seconds: float, computed: bool, label: str) -> None:
        """The measurement of this label is there."""
        self.done += 1
        self.label = label
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif not self.quiet and computed:
            line = f"{self.section}  {self.done}/{self.total}  {self.label}  {seconds:.1f} s"
            print(line, file=sys.stderr, flush=True)
