"""TensorBoard's event files, written at once and under a name that is known before."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dibit.tools.errors import require


class Events:
    """A new event file in a folder; a context manager.

    TensorBoard's own writer chooses the name itself and writes from a thread, where a full disk is met by nobody.

    Args:
        path: Of the file, see `name`.
        step: What earlier files say of this step and later ones is hidden: an interrupted run comes back to it.

    Raises:
        OSError: Here and in each method, when the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        record = require("tensorboard.summary.writer.record_writer")
        self._event = require("tensorboard.compat.proto.event_pb2")
        self._summary = require("tensorboard.compat.proto.summary_pb2")
        self.path = path
        self._file = open(path, "xb")  # noqa: SIM115  closed in __exit__
        self._records = record.RecordWriter(self._file)
        try:
            self._write(file_version="brain.Event:2", step=step)
            session = self._event.SessionLog(status=self._event.SessionLog.START)
            self._write(session_log=session, step=step)
        except OSError:
            self._file.raw.close()
            raise

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Note a number."""
        values = [self._summary.Summary.Value(tag=name, simple_value=value)]
        self._write(summary=self._summary.Summary(value=values), step=step)

    def _write(self, **content: Any) -> None:
        try:
            self._records.write(self._event.Event(wall_time=time.time(), **content).SerializeToString())
            self._file.flush()
        except OSError as error:
            error.filename = str(self.path)
            raise

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        raw = self._file.raw
        if kind is None:
            self._file.close()
        raw.close()  # what a full disk has refused is not tried again


class NoEvents:
    """In its place, in processes that write nothing."""

    def add_scalar(self, *_: object) -> None:
        """Nothing."""

    def __enter__(self) -> NoEvents:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""


def name(folder: Path) -> str:
    """The name of the next event file of a folder, as TensorBoard expects it."""
    number = sum(1 for _ in folder.glob("events.out.tfevents.*"))
    stem = f"events.out.tfevents.{int(time.time()):010d}"
    names = (f"{stem}.{each}" for each in range(number, number + 1000))
    return next(each for each in names if not os.path.lexists(folder / each))
