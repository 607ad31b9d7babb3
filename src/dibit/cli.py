"""The command ``dibit``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from dibit.tools.errors import Interrupted, TrainingError, UserError, nearest, printable, shown
from dibit.tools.files import reason
from dibit.tools.parser import usage

_DESCRIPTION = "Train graph neural networks on a fraction of the memory."
COMMANDS = {  # module, function, what it does
    "train": ("dibit.train.command", "train", "train a model on a graph, with compressed activations"),
    "reproduce": ("dibit.reproduce.command", "reproduce", "repeat what the papers measured, their numbers beside ours"),
    "bench": ("dibit.bench.command", "bench", "time, memory and gradient error on this machine, beside alternatives"),
    "doctor": ("dibit.doctor", "doctor", "what Dibit finds on this machine, and what is lost where a part is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The words after ``dibit``; those of the process by default.

    Returns:
        Exit status: 0 done, 1 training failed or there is no room for a file, 2 bad input, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks ends no training
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
    except KeyboardInterrupt:
        return _say("dibit: interrupted.", 130)
    except BrokenPipeError:  # `dibit train | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python's last flush goes
        return 1
    except OSError as error:
        place = "what is printed" if error.filename is None else shown(error.filename, 200)
        return _say(f"dibit: error: {place} cannot be read or written: {reason(error)}.", 1, once=True)
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):  # torch's BatchNorm
            raise
        return _say(
            "dibit: a batch has a single node, which BatchNorm cannot normalise; give larger batches (--batch-size, "
            "--clusters) or another --norm.",
            1,
        )
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _say(
            "dibit: there is not enough memory for this graph and these settings; give a smaller --hidden or --layers, "
            "mini-batches (--loader), or fewer features (--svd).",
            1,
        )


def _dispatch(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else (None, [])
    if command in (None, "-h", "--help", "help"):
        about = {name: text for name, (_, _, text) in COMMANDS.items()}
        print(usage("dibit", "[--help] [--version] COMMAND", _DESCRIPTION, about))
        return 0 if words else 2
    if command in ("-V", "--version"):
        from dibit import __version__

        print(f"dibit {__version__}")
        return 0
    if command not in COMMANDS:
        hint = nearest(command, (*COMMANDS, "--help", "--version"))
        raise UserError(f"There is no command {shown(command)!r}.{hint} See dibit --help.")
    module, function, _ = COMMANDS[command]
    status: int = getattr(import_module(module), function)(rest)  # imported late: --version needs none of it
    return status


def _out_of_memory(error: BaseException) -> bool:
    """Whether NumPy or torch, on any device, had no memory left; on the CPU torch's error has no type of its own."""
    if isinstance(error, MemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return any(word in str(error) for word in words)


def _say(sentence: str, status: int, once: bool = False) -> int:
    if not once or os.environ.get("RANK", "0") == "0":  # of several processes all meet the same error
        print(printable(sentence), file=sys.stderr)
    return status
