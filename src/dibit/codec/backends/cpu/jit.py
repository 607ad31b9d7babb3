"""How Numba kernels are compiled and called: once for one thread and once for all threads, cached on the disk."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import numba as nb
import torch

from dibit._torch.private.operations import kernel_cache

# Numba's file cache asks whether a kernel's own file has changed. A kernel inlines what it shares with others, too: so
# the content of that file is a part of its name.
_SHARED = format(zlib.crc32((Path(__file__).parent / "kernels" / "numbers.py").read_bytes()), "08x")
SMALL = 1 << 16  # below this many elements one thread does it all
_running = threading.Lock()  # Numba's simplest pool of threads ends the process when two threads use it at once


class Kernel:
    """A kernel compiled twice, when first used: starting threads costs more than a small array brings.

    Its threads are as many as torch's. With one, as in the workers of a data loader, none are started, so a forked
    process is safe.
    """

    def __init__(self, function: Any) -> None:
        options: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
        twin = FunctionType(function.__code__, function.__globals__, function.__name__)
        # Numba's file cache knows functions by these names
        function.__qualname__ += f"_{_SHARED}"
        twin.__qualname__ = f"{function.__qualname__}_serial"
        self.parallel = nb.njit(parallel=True, **options)(function)
        self.serial = nb.njit(**options)(twin)

    def __call__(self, elements: int, *args: Any) -> Any:
        threads = min(torch.get_num_threads(), nb.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        if elements < SMALL or threads == 1:
            return _called(self.serial, args)
        with _running:
            if nb.get_num_threads() != threads:
                nb.set_num_threads(threads)
            return _called(self.parallel, args)


def _called(kernel: Any, args: tuple[Any, ...]) -> Any:
    if kernel.signatures:
        return kernel(*args)
    _say_if_compiling(kernel)
    with _ctrl_c_afterwards():
        return kernel(*args)


@contextlib.contextmanager
def _ctrl_c_afterwards() -> Iterator[None]:
    """Hold Ctrl-C back while a kernel is compiled or loaded: raised in a callback of LLVM, it would be dropped."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *event: caught.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            before(*caught[0])


def _say_if_compiling(kernel: Any) -> None:
    """A sentence, once a process, before the first kernel that is not on the disk yet."""
    global _said
    if _said:
        return
    name = kernel.py_func.__qualname__
    folder = kernel_cache(kernel)
    if folder is not None and not any(folder.glob(f"*.{name}-*.nbi")):
        _said = True
        logging.getLogger("dibit").warning("dibit: compiling kernels for this processor; later runs find them ready.")


_said = False
inlined = nb.njit(inline="always", error_model="numpy")
