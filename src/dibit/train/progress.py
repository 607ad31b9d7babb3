"""Progress of one training."""

from __future__ import annotations

import time

from dibit.tools.progress import Progress

_SILENCE = 10.0  # seconds


class EpochProgress(Progress):
    """Progress of one training in epochs."""

    LINES = 10  # log lines a training, off a terminal

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
        due = epoch % max(1, self.total // self.LINES) == 0 or epoch == self.total
        if self.show(completed=epoch, status=status) or not due:
            self.said = time.monotonic()
        else:
            self.line(f"epoch {epoch}/{self.total}  {status}")

    def within(self, what: str, done: int, of: int) -> None:
        """Report the parts of an epoch or of an evaluation, where there are several: on a terminal as they come, in a
        log every ten seconds."""
        if of > 1 and not self.show(status=f"{what} {done}/{of}") and self.silent_for(_SILENCE):
            self.line(f"{what} {done}/{of}")
