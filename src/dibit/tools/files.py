"""Writing files that are whole or absent."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

from dibit.tools.errors import UserError, shown

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def write_atomically(path: Path, content: bytes | memoryview, alone: bool = False) -> None:
    """Write a file so that a kill at any moment leaves the old content or the new, never a part.

    Args:
        path: Where to; what is no regular file (a pipe, /dev/null) is written to as it is.
        content: All of it.
        alone: Nobody else writes this file, since its folder is locked. What a kill leaves then has a name that is
            known (`part`), and goes with the next write; and a link in the file's place is replaced, not followed.

    Raises:
        OSError: With `path` as its `filename`; the old content is still there.
    """
    try:
        if alone:
            _replace(path, part(path), content)
        elif path.exists() and not stat.S_ISREG(path.stat().st_mode):
            path.write_bytes(content)
        else:
            target = Path(os.path.realpath(path))
            _replace(target, _beside(target), content)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the name that nobody knows


def _beside(path: Path) -> Path:
    """A new name in the same folder."""
    return path.with_name(f".{path.name[:40]}-{secrets.token_hex(4)}.part")


def part(path: Path) -> Path:
    """Where `write_atomically` collects the content of a file that it alone writes."""
    return path.with_name(f".{path.name}.part")


def _replace(path: Path, temporary: Path, content: bytes | memoryview) -> None:
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # whatever lies there is not followed, if it is a link
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_out(path: Path) -> None:
    """Raise `UserError` if a folder cannot be there: a file is in its way, or a name is too long."""
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            where = "" if there == path else f", {shown(there)}"
            raise UserError(f"--out {shown(path)}{where} is a file, expected a folder.")
        most = os.pathconf(there, "PC_NAME_MAX")
        if any(len(os.fsencode(name)) > most for name in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise refused(path, error) from error


def json_path(given: str | None, flag: str = "--json") -> Path | None:
    """Return the path for a file of results, or say why it cannot be written: before the work, not after it."""
    if given is None:
        return None
    path = Path(given)
    try:
        if path.is_dir():
            raise UserError(f"{flag} {shown(path)} is a folder, expected a file.")
        if not path.parent.is_dir():
            raise UserError(f"{flag} {shown(path)}: the folder {shown(path.parent)} does not exist; create it first.")
        if path.exists() and not path.is_file():  # a pipe, /dev/null
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            trial = _beside(Path(os.path.realpath(path)))
            os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            trial.unlink()
    except OSError as error:
        if error.errno in _FULL:  # there may be room at the end
            return path
        raise UserError(
            f"{flag} {shown(path)} cannot be written: {reason(error)}; give a file in a folder that can be written."
        ) from error
    return path


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in the system's words."""
    return error.strerror or str(error)


def refused(folder: Path, error: OSError) -> UserError | OSError:
    """What to raise when a command cannot begin to write in its folder: where there is no room the error itself, else
    that another folder has to be given."""
    if error.errno in _FULL:
        return error
    at = "" if error.filename in (None, str(folder)) else f" ({shown(error.filename, 200)})"
    return UserError(f"The folder --out {shown(folder, 200)} cannot be written: {reason(error)}{at}.")
