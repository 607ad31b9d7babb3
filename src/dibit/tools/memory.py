"""Live tensor bytes during a step, and what the C allocator has handed out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from typing import Any

import torch

from dibit._torch.private.operations import allocations


def peak_bytes(step: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Measure the largest number of live tensor bytes above what was live before, during one call.

    On the CPU the allocations come from torch's profiler, so that they are exact and do not depend on what
    the allocator of the C library keeps; memory that bypasses torch (NumPy arrays, MKL's workspace) is not
    seen. On CUDA the caching allocator counts.

    Args:
        step: Called once, without arguments. Its return value is freed before the measurement ends.
        device: Where the step's tensors are.

    Returns:
        Bytes; 0 if the step allocates nothing.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces its start and stop on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    live = peak = 0
    for change in allocations(profile):
        live += change
        peak = max(peak, live)
    return peak


def allocated_bytes() -> int | None:
    """Bytes that the C library's allocator has handed out in this process, after a garbage collection.

    A witness beside the ledger: the difference before and after a forward pass is what that pass keeps. `None` where
    the C library has no `mallinfo2` (it is glibc's, from 2.33).
    """
    gc.collect()
    try:
        mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return None
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)  # in the heap, and in blocks mapped on their own


def release() -> None:
    """Give the C library's unused memory back to the system, where it can be told to (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _MallInfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )
