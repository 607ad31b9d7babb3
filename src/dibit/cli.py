"""The command ``dibit``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from dibit.train.errors import Interrupted, TrainingError, UserError, nearest
from dibit.train.files import reason

_USAGE = """\
usage: dibit [--help] [--version] COMMAND ...

Train graph neural networks on a fraction of the memory.

commands:
  train       train a model on a graph, with compressed activations (dibit train --help)
  reproduce   repeat what the papers measured, with their numbers beside ours (dibit reproduce --help)
  bench       time, memory and gradient error on this machine, beside the alternatives (dibit bench --help)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The words after ``dibit``; those of the process by default.

    Returns:
        Exit status: 0 done, 1 training failed or there is no room for a file, 2 bad input, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()  # a full disk is met here, not when Python ends
        return status
    except UserError as error:
        return _say(f"dibit: error: {error}", 2, once=True)
    except TrainingError as error:
        return _say(f"dibit: {error}", 1)
    except Interrupted as stop:
        return _say(f"dibit: {stop}", 130, once=True)
    except OSError as error:
        return _say(f"dibit: {error.filename or 'what is printed'} cannot be read or written: {reason(error)}.", 1)
    except KeyboardInterrupt:
        return _say("dibit: interrupted.", 130)


def _dispatch(words: list[str]) -> int:
    if not words:
        print(_USAGE, end="")
        return 2
    command, rest = words[0], words[1:]
    if command in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    if command in ("-V", "--version"):
        print(f"dibit {version('dibit')}")
        return 0
    # late: `dibit --version` needs none of it
    if command == "train":
        from dibit.train.command import train

        return train(rest)
    if command == "reproduce":
        from dibit.reproduce.command import reproduce

        return reproduce(rest)
    if command == "bench":
        from dibit.bench.command import bench

        return bench(rest)
    known = ("train", "reproduce", "bench", "--help", "--version")
    raise UserError(f"There is no command {command!r}.{nearest(command, known)} See dibit --help.")


def _say(sentence: str, status: int, once: bool = False) -> int:
    if not once or os.environ.get("RANK", "0") == "0":  # of several processes all meet the same error
        print(sentence, file=sys.stderr)
    return status
