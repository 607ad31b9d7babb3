"""Checkpoints: written atomically, with a digest, and resumed only by the same training."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dibit.tools.errors import UserError
from dibit.tools.files import reason, write_atomically
from dibit.train.settings import Settings

FORMAT = 2  # of what a training's checkpoint holds; 1 had neither settings nor a digest

# What may differ between a training and its continuation: where things are, how long it goes on, what is printed, and
# the machine (on another device sums come in another order). Of the graph and the split the content is compared.
FREE = frozenset(
    "root split_file epochs json resume overwrite checkpoint_every quiet out device trust".split()  # noqa: SIM905
)
# A checkpoint says these of itself: one command trains with several recipes and seeds.
_OWN = frozenset(("recipe", "seed", "seeds", "compare"))
# The digest is the comment that a zip archive may end with: torch.load reads the file as any other.
_SEAL = b"dibit blake2b "
_SIZE = len(_SEAL) + 64
_PIECE = 1 << 24  # bytes that are read at once


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, atomically and with a digest; nobody else writes this file.

    Raises:
        OSError: See `write_atomically`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(-2, os.SEEK_END)  # the length of the archive's comment, 0 so far
    buffer.write(_SIZE.to_bytes(2, "little"))
    digest = _digest([buffer.getbuffer()])
    buffer.write(_SEAL + digest)
    write_atomically(path, buffer.getbuffer(), alone=True)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, to the CPU; nothing but tensors and plain values is unpickled.

    Raises:
        UserError: It cannot be read, is something else, or is not what was written.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _unreadable(path, "it is not a file")
        with open(path, "rb") as file:
            size = max(file.seek(0, os.SEEK_END) - _SIZE, 0)
            file.seek(size)
            seal = file.read()
            if not seal.startswith(_SEAL):
                raise _unreadable(path, "it is no checkpoint of this version of Dibit, or it is cut off")
            file.seek(0)
            if seal != _SEAL + _digest(iter(lambda: file.read(min(_PIECE, size - file.tell())), b"")):
                raise _unreadable(path, "it is damaged: its content has another digest than what was written")
            file.seek(0)
            state = _unpickled(path, file)
    except OSError as error:
        raise _unreadable(path, reason(error)) from error
    if not isinstance(state, dict):
        raise _unreadable(path, f"it holds a {type(state).__name__}")
    return state


def _unpickled(path: Path, file: BinaryIO) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch says of content that bears a digest of ours and is none of ours
        raise _unreadable(path, " ".join(str(error).split())[:120]) from error


def of_this_training(path: Path, now: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint of a training that goes on; `None` if there is none yet.

    Args:
        path: Of the checkpoint.
        now: What it must agree with: `recipe`, `seed`, `config`, `settings` (flat), `graph`, `split`.

    Raises:
        UserError: It is another training's; the sentence names what differs, with both values.
    """
    if not os.path.lexists(path):
        return None
    saved = load(path)
    if saved.get("format") != FORMAT:
        raise _unreadable(path, "it is no checkpoint of a training by this version of Dibit")
    found = difference(saved["settings"], now["settings"], FREE | _OWN)
    if saved["graph"] != now["graph"]:
        found = found or difference(saved["settings"], now["settings"], (FREE | _OWN) - {"split_file"})
        files = " or ".join(str(name) for name in map(now["settings"].get, ("dataset", "split_file")) if name)
        why = f"{files} has changed since" if found is None else f"{found[0]}, now {found[1]}"
        raise UserError(
            f"The checkpoint {path} was made on another graph ({saved['graph']}, now {now['graph']}): {why}; start "
            "anew with another --out."
        )
    if found is None:
        found = difference(
            {"recipe": saved["recipe"], "seed": saved["seed"]}, {"recipe": now["recipe"], "seed": now["seed"]}
        )
    if found is None and saved["split"] != now["split"]:
        found = f"the split {saved['split']}", f"the split {now['split']}"
    if found is None and saved["config"] != now["config"]:
        found = saved["config"], now["config"]
    if found is not None:
        raise UserError(
            f"The checkpoint {path} was made with {found[0]}, and cannot go on with {found[1]}; go back to what it was "
            "made with, or start anew with another --out."
        )
    epoch, epochs = saved["state"]["epoch"], now["settings"]["epochs"]
    if epoch > epochs:
        raise UserError(
            f"The checkpoint {path} was made after epoch {epoch}; expected at least as many --epochs, not {epochs}."
        )
    return saved


def difference(
    before: Mapping[str, Any], now: Mapping[str, Any], ignored: frozenset[str] = frozenset()
) -> tuple[str, str] | None:
    """The first setting that differs, as it would be typed before and now; what one side does not know has its default.

    Args:
        before: Flat settings.
        now: Likewise.
        ignored: Names that may differ.
    """
    default = Settings().flat()
    for name in (*now, *(name for name in before if name not in now)):
        if name not in ignored:
            old, new = (side.get(name, default.get(name)) for side in (before, now))
            if old != new:
                return _typed(name, old), _typed(name, new)
    return None


def _typed(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"no {flag}"
    return f"no {flag}" if value is None else f"{flag} {value}"


def _digest(pieces: Iterable[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest().encode()


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(
        f"The checkpoint {path} cannot be read: {why}; start anew with --overwrite, or with another --out."
    )
