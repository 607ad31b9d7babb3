"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import weakref
from pathlib import Path

from dibit.tools.errors import UserError, shown
from dibit.tools.files import reason

NAME = ".lock"
_held: set[int] = set()


def _let_go() -> None:
    """In a forked process (a loader's worker): the lock stays with its parent, and ends with it."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


class Lock:
    """A lock on a folder that the system takes back when the process ends, however it ends.

    Args:
        folder: Must exist when the lock is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self._end: weakref.finalize | None = None  # type: ignore[type-arg]

    def acquire(self) -> None:
        """Take the lock; nothing happens if this object has it already.

        Raises:
            UserError: Another process has it, or this folder cannot be locked.
            OSError: The folder cannot be written.
        """
        while self._end is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = _holder(file)
                os.close(file)
                raise UserError(
                    f"The folder {self.folder} is in use by {holder}; wait until it has ended, or give another --out."
                ) from error
            except OSError as error:
                os.close(file)
                raise UserError(
                    f"The folder {self.folder} cannot be locked ({reason(error)}), as on some network drives; give an "
                    "--out on another drive."
                ) from error
            if not _is(file, self.path):  # the one before has ended in between, and has taken its file away
                os.close(file)
                continue
            _held.add(file)
            self._end = weakref.finalize(self, _release, self.path, file, os.getpid())
            try:
                os.ftruncate(file, 0)
                os.write(file, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
            except OSError as error:
                self.release()
                error.filename = str(self.path)
                raise

        self.look(below=True)

    def look(self, below: bool = False) -> None:
        """Refuse a folder above which a run is, or below which: one of them would write into the other's folders.

        Args:
            below: Look there, too.

        Raises:
            UserError: There is one.
        """
        whole = Path(os.path.realpath(self.folder))
        inner = (Path(place) / NAME for place, _, files in os.walk(whole) if NAME in files)
        for path in (*(place / NAME for place in whole.parents), *(inner if below else ())):
            holder = None if path.parent == whole else _found(path)
            if holder is not None:
                self.release()
                raise UserError(
                    f"The folder {self.folder} is {'in' if path.parent in whole.parents else 'above'} {path.parent}, "
                    f"which is in use by {holder}; wait until it has ended, or give another --out."
                )

    def release(self) -> None:
        """Give the lock back, and take its file away."""
        if self._end is not None:
            self._end()
            self._end = None


def _release(path: Path, file: int, process: int) -> None:
    if os.getpid() == process and file in _held:
        path.unlink(missing_ok=True)  # before the lock goes: whoever opens it now sees that it is gone
        _held.discard(file)
        os.close(file)


def _is(file: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _found(path: Path) -> str | None:
    """Who has a lock of another folder; `None` if nobody has."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # none, or not ours to read
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(file)
    except OSError:
        return None
    finally:
        os.close(file)
    return None


def _holder(file: int) -> str:
    """Who has the lock, as it wrote itself; it may be about to, and another program may have written anything."""
    try:
        content = json.loads(os.pread(file, 1000, 0))
        process, host = content["process"], content["host"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
    if type(process) is not int or not isinstance(host, str) or not 0 < process < 2**31:
        return "another process"
    return f"process {process} on {shown(host)}"
