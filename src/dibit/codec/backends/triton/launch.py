"""How a Triton kernel is launched: on the device of its tensors, without contraction, asynchronously."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from dibit._torch.autocast import HALF
from dibit.codec.seed_stream import capturing

SINGLE = (torch.float32, *HALF)  # the dtypes that kernels take; they compute in float32


def launch(
    kernel: Any,
    programs: tuple[int, ...],
    device: torch.device,
    *args: Any,
    warps: int = 4,
    registers: int | None = None,
    **meta: Any,
) -> None:
    """Run a kernel.

    Args:
        kernel: a `triton.jit` function.
        programs: the grid; nothing runs where it is empty.
        device: of the tensors.
        args: tensors, and numbers that do not choose the code.
        warps: a program's.
        registers: a thread's at most, where NVIDIA's assembler would rather spill one than use more.
        meta: the constants it is compiled for.
    """
    if 0 in programs:
        return
    with _current(device):
        run(kernel, programs, args, meta, options(warps, registers, hip=torch.version.hip is not None))


def run(kernel: Any, programs: tuple[int, ...], args: Any, meta: dict[str, Any], chosen: dict[str, Any]) -> None:
    kernel[programs](*args, **meta, **chosen)


def options(warps: int, registers: int | None, hip: bool) -> dict[str, Any]:
    """How a kernel is compiled."""
    # no contraction: a * b + c rounds twice, as it does in the definition
    chosen: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if registers is not None and not hip:
        chosen["maxnreg"] = registers
    return chosen


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its tensors lie on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def power(count: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two that holds `count`, within bounds."""
    return max(least, min(most, triton.next_power_of_2(max(1, count))))


def parts(count: int, size: int) -> int:
    """How many parts of a size make up a count."""
    return -(-count // size)


def constant(block: int) -> int:
    """A block that the code is compiled for; 0 for others: blocks of whole tensors would be compiled size by size."""
    return block if block & (block - 1) == 0 else 0


def on_device(levels: list[float], device: torch.device, unread: Tensor) -> Tensor:
    """Levels as a float32 tensor; without any, what stands for a pointer that is not read."""
    if not levels:
        return unread
    if capturing(device):  # made by each replay, so nobody else may read it
        return _filled(tuple(levels), device)
    return _table(tuple(levels), device)


def _filled(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Number by number: a copy from the host would be waited for."""
    table = torch.empty(len(levels), dtype=torch.float32, device=device)
    for i, level in enumerate(levels):
        table[i].fill_(level)
    return table


_table = functools.cache(_filled)


def as_bits(ranges: Tensor) -> Tensor:
    """bfloat16 as the int16 that kernels read and write."""
    return ranges.view(torch.int16) if ranges.dtype == torch.bfloat16 else ranges
