"""Progress on stderr: a bar on a terminal, a few lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from typing import Any

from dibit.tools.errors import require

_SILENCE = 10.0  # seconds


class Progress:
    """Progress of one training; a context manager.

    Args:
        label: What is trained.
        epochs: Epochs in all.
        done: Epochs that lie behind.
        quiet: Print nothing.
    """

    LINES = 10  # log lines a training, off a terminal

    def __init__(self, label: str, epochs: int, done: int, quiet: bool = False) -> None:
        self.label, self.epochs, self.quiet = label, epochs, quiet
        self.done = done
        self.bar: Any = None
        self.said = time.monotonic()

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            rich, console = require("rich.progress"), require("rich.console")
            self.bar = rich.Progress(
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(bar_width=10),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[status]}", markup=False),
                console=console.Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.epochs, completed=self.done, status="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def epoch(self, epoch: int, loss: float, val: float | None, seconds: float, noise: float | None = None) -> None:
        """Report one finished epoch.

        Args:
            epoch: From 1.
            loss: Of the training nodes.
            val: Last validation result, 0 to 1.
            seconds: Of the training step.
            noise: Squared error of the gradient over its square, where it was measured after this epoch.
        """
        shown = "-" if val is None else f"{100 * val:.2f} %"
        noisy = "" if noise is None else f"noise {noise:.2g}  "
        status = f"loss {loss:.4f}  val {shown}  {noisy}{seconds:.3f} s/epoch"
        if self.bar is not None:
            self.bar.update(self.task, completed=epoch, status=status)
            return
        self.said = time.monotonic()
        if not self.quiet and (epoch % max(1, self.epochs // self.LINES) == 0 or epoch == self.epochs):
            print(f"{self.label}  epoch {epoch}/{self.epochs}  {status}", file=sys.stderr, flush=True)

    def within(self, what: str, done: int, of: int) -> None:
        """Report the parts of an epoch or of an evaluation, where there are several: on a terminal as they come, in a
        log every ten seconds."""
        if self.quiet or of == 1:
            return
        if self.bar is not None:
            self.bar.update(self.task, status=f"{what} {done}/{of}")
        elif time.monotonic() - self.said > _SILENCE:
            self.said = time.monotonic()
            print(f"{self.label}  {what} {done}/{of}", file=sys.stderr, flush=True)

    def say(self, sentence: str) -> None:
        """Print a sentence beside the progress."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(sentence, highlight=False, markup=False, emoji=False)
        else:
            print(sentence, file=sys.stderr, flush=True)
