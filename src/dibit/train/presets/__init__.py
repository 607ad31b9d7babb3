"""The papers' settings as files: where they are, and by which names ``--config`` finds them."""

from __future__ import annotations

import os
from pathlib import Path

from dibit.tools.errors import UserError, nearest, shown

FOLDER = Path(__file__).parent


def preset_files() -> dict[str, Path]:
    """Return the papers' settings, files for ``dibit train --config``, by name (arxiv-sage, ...)."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def settings_file(given: str) -> Path:
    """Return the file that ``--config`` means: a path that exists, else one of `preset_files` by its name.

    Raises:
        UserError: It is neither, and does not look like the path of a file either.
    """
    path = Path(given)
    if given and (os.path.exists(given) or path.name != given or path.suffix):
        return path  # reading it says what is wrong with it
    files = preset_files()
    if given not in files:
        known = f", or one of {', '.join(files)}" if files else ""
        raise UserError(
            f"--config is {shown(given)!r}, expected the path of a YAML file{known}.{nearest(given, files)}"
        )
    return files[given]
