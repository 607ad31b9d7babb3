"""Which files a command has made in its folder: those alone may be removed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dibit.train.errors import UserError
from dibit.train.files import part, reason, write_atomically


class Manifest:
    """The list of a command's files, kept in a file of the folder; each is listed before it is made.

    Args:
        folder: All files are below it.
        name: Of the list's own file.
        maker: The command, such as "dibit train".
    """

    def __init__(self, folder: Path, name: str, maker: str) -> None:
        self.folder, self.path, self.maker = folder, folder / name, maker
        self._files: list[str] | None = None  # not read yet

    def read(self) -> None:
        """Read the list of a folder that was made before.

        Raises:
            UserError: There is none, or it is damaged, or names what lies elsewhere.
        """
        by_hand = "give another --out, or delete by hand what is no longer needed"
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            told = {}
        except (OSError, ValueError, RecursionError) as error:
            why = reason(error) if isinstance(error, OSError) else "it is not valid JSON"
            raise UserError(f"The list of files {self.path} cannot be read: {why}; {by_hand}.") from error
        if isinstance(told, dict) and "files" not in told:
            raise UserError(
                f"The folder {self.folder} has no list of the files that {self.maker} made there, in {self.path.name}: "
                f"an older version made it, or the list was removed; {by_hand}."
            )
        files = told["files"] if isinstance(told, dict) else None
        if not isinstance(files, list) or not all(isinstance(name, str) and _inside(name) for name in files):
            raise UserError(
                f"The list of files {self.path} is not as {self.maker} writes it, a list 'files' of names below the "
                f"folder; {by_hand}."
            )
        self._files = files

    def write(self) -> None:
        """Write the list, an empty one in a new folder."""
        content = json.dumps({"made by": self.maker, "files": self._files or []}, indent=1) + "\n"
        write_atomically(self.path, content.encode(), alone=True)

    def add(self, *paths: Path) -> None:
        """List files that are about to be made, and what a kill may leave of them."""
        known = self._known()
        names = [each.relative_to(self.folder).as_posix() for path in paths for each in (path, part(path))]
        new = [name for name in names if name not in known]
        if new:
            self._files = known + new
            self.write()

    def _known(self) -> list[str]:
        if self._files is None:
            if self.path.exists():
                self.read()
            else:
                self._files = []
        assert self._files is not None
        return self._files

    def remove(self, keep: tuple[str, ...] = (), below: Path | None = None) -> None:
        """Remove the files that are listed, and the folders that are empty then. Links are never followed: one in the
        place of a file goes, one in the place of a folder stays, with all that it leads to.

        Args:
            keep: Names of files that stay.
            below: Only what is below this folder.

        Raises:
            OSError: A file cannot be removed, or is a folder.
        """
        start = None if below is None else below.relative_to(self.folder).as_posix() + "/"
        known = self._known()
        gone = [name for name in known if name not in keep and (start is None or name.startswith(start))]
        for name in gone:
            _unlink(self.folder, PurePosixPath(name))
        folders = {parent for name in gone for parent in PurePosixPath(name).parents if parent.name}
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            _rmdir(self.folder, folder)
        removed = set(gone)
        self._files = [name for name in known if name not in removed]
        self.write()


def _inside(name: str) -> bool:
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") for part in parts)


@contextlib.contextmanager
def _opened(root: Path, folder: PurePosixPath) -> Iterator[int | None]:
    """A descriptor of a folder below root, reached without following a link; `None` if there is no such folder."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    found = os.open(root, flags)
    try:
        for name in folder.parts:
            try:
                below = os.open(name, flags | os.O_NOFOLLOW, dir_fd=found)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                yield None
                return
            os.close(found)
            found = below
        yield found
    finally:
        os.close(found)


def _unlink(root: Path, name: PurePosixPath) -> None:
    with _opened(root, name.parent) as folder:
        if folder is None:
            return
        try:
            if stat.S_ISDIR(os.stat(name.name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(root / name))
            os.unlink(name.name, dir_fd=folder)
        except FileNotFoundError:
            return


def _rmdir(root: Path, name: PurePosixPath) -> None:
    with _opened(root, name.parent) as folder:
        if folder is None:
            return
        try:
            os.rmdir(name.name, dir_fd=folder)
        except OSError as error:  # gone already, a link, or with something in it that is not ours
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                raise
