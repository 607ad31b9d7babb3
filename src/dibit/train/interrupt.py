"""Ctrl-C that lets an epoch come to its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dibit.tools.progress import Progress


@contextmanager
def stop_after_epoch(progress: Progress) -> Iterator[threading.Event]:
    """Let Ctrl-C finish the epoch, so that the checkpoint is of a whole step; a second one stops at once."""
    stop = threading.Event()

    def note(_signal: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        progress.say("Finishing this epoch; Ctrl-C again stops at once, at the last checkpoint.")

    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python lets only the main thread set handlers
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
