"""GB/s of each kernel, all bytes read and written counted, beside a plain copy of the same tensor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dibit.codec import ops, seed_tensor

ELEMENTS = 1 << 24


def measure(elements: int, block: int, rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Rounds run every kernel once, a copy among them; medians, the first round dropped.

    Args:
        elements: float32 elements of the tensor.
        block: elements that share one range.
        rounds: counted rounds.
        note: called with a line that says how far the measurement is.

    Returns:
        {"elements", "block", "rounds", "copy": GB/s, "rows"}: kernel, bytes, seconds, GB/s, and the share of the copy.
    """
    kernels = _kernels(elements, block)
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for done in range(rounds + 1):
        for name, (run, _) in kernels.items():
            note(f"round {done} of {rounds}, {name}")
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    rows: list[dict[str, Any]] = []
    for name, (_, size) in kernels.items():
        seconds = statistics.median(times[name][1:])
        rows.append({"kernel": name, "bytes": size, "seconds": seconds, "gb_s": size / seconds / 1e9})
    copy = rows[0]["gb_s"]
    for row in rows:
        row["share"] = row["gb_s"] / copy
    return {"elements": elements, "block": block, "rounds": rounds, "copy": copy, "rows": rows}


def _kernels(n: int, block: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """By name: the call, and the bytes that it has to read and to write."""
    x, seed = torch.randn(n), seed_tensor(7)
    out = torch.empty_like(x)
    size = x.nbytes
    found: dict[str, tuple[Callable[[], Any], int]] = {"copy": (lambda: out.copy_(x), 2 * size)}
    found["copy to a new tensor"] = (lambda: x.clone(), 2 * size)
    for bits in (1, 2, 4, 8):
        codes, ranges, _ = ops.quantize(x, seed, bits, block, [], torch.bfloat16, 0)
        moved = size + codes.nbytes + ranges.nbytes
        pack = partial(ops.quantize, x, seed, bits, block, [], torch.bfloat16, 0)
        unpack = partial(ops.dequantize, codes, ranges, seed, n, bits, block, [], 0.0, torch.float32)
        found[f"quantise + pack, {bits} bit"] = pack, moved
        found[f"unpack, {bits} bit"] = unpack, moved
    mask = ops.pack_mask(x)
    found["pack a mask"] = (lambda: ops.pack_mask(x), size + mask.nbytes)
    found["apply a mask"] = (lambda: ops.apply_mask(x, mask, 0.0), 2 * size + mask.nbytes)
    found["dropout from a seed"] = (lambda: ops.dropout(x, seed, 0.5), 2 * size)
    found["look for NaN and inf"] = (lambda: ops.finite(x), size)
    return found
