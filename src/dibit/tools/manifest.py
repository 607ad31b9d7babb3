"""Which files a command has made in its folder: those alone may be removed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dibit.tools.errors import UserError, shown
from dibit.tools.files import part, reason, write_atomically


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
        if self.path.is_symlink():
            raise UserError(f"The list of files {self.path} is a link, expected a file; {by_hand}.")
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            content = {}
        except (OSError, ValueError, RecursionError) as error:
            why = reason(error) if isinstance(error, OSError) else "it is not valid JSON"
            raise UserError(f"The list of files {self.path} cannot be read: {why}; {by_hand}.") from error
        if isinstance(content, dict) and "files" not in content:
            raise UserError(
                f"The folder {self.folder} has no list of the files that {self.maker} made there, in {self.path.name}: "
                f"an older version made it, or the list was removed; {by_hand}."
            )
        files = content["files"] if isinstance(content, dict) else None
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

    def check(self, *paths: Path) -> None:
        """Look whether files may be made, or made anew: nothing else lies there, and no link leads elsewhere.

        Raises:
            UserError: One may not; the sentence names it.
            OSError: It cannot be looked at, as where its name is too long.
        """
        known = set(self._known())
        for file in (each for path in paths for each in (path, part(path))):
            name = PurePosixPath(file.relative_to(self.folder).as_posix())
            for inner in (*reversed(name.parents[:-1]), name):
                at = self.folder / inner
                try:
                    mode = os.lstat(at).st_mode
                except FileNotFoundError:
                    break
                if stat.S_ISLNK(mode):
                    why = f"is a link to {shown(os.readlink(at))}, through which {self.maker} does not write"
                elif inner != name:
                    why = "" if stat.S_ISDIR(mode) else "is a file, expected a folder"
                elif not stat.S_ISREG(mode):
                    why = "is no file"
                else:
                    why = "" if str(name) in known else f"was not made by {self.maker}, which would replace it"
                if why:
                    raise UserError(f"In the folder {self.folder}, {inner} {why}; move it away, or give another --out.")

    def adopt(self, *paths: Path) -> None:
        """Take files that are there as the command's own, in a folder that has no list yet."""
        if self._files is None and not os.path.lexists(self.path):
            found = [path for path in paths if os.path.lexists(path)]
            self._files = [path.relative_to(self.folder).as_posix() for path in found]

    def add(self, *paths: Path) -> None:
        """List files that are about to be made, and what a kill may leave of them.

        Raises:
            UserError: See `check`.
        """
        self.check(*paths)
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
        for really in (False, True):  # a folder in a file's place is said before anything is gone
            for name in gone:
                _unlink(self.folder, PurePosixPath(name), really)
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


def _unlink(root: Path, name: PurePosixPath, really: bool) -> None:
    with _opened(root, name.parent) as folder:
        if folder is None:
            return
        try:
            if stat.S_ISDIR(os.stat(name.name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(root / name))
            if really:
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
