"""Triton 3.6's interpreter, mended where it differs from the hardware. Imported before a kernel runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z rounded once: the product of two float32 is exact in float64."""
    wide = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(wide.astype(x.data.dtype), z.dtype.scalar)


interpreter.InterpreterBuilder.create_fma = _fused
_convert, _patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor


def _converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Between float32 and bfloat16: the interpreter neither carries nor breaks ties, and subnormal numbers go wrong."""
    if (source, target) == (tl.float32, tl.bfloat16):
        x = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return x.view(torch.int16).numpy().view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)
    return _convert(data, source, target, rounding)


def _patched(tensor: Any, scope: Any) -> None:
    """A scalar as the bound of a loop: NumPy 2.4 makes no number of an array with one element."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._convert_float, interpreter._patch_lang_tensor = _converted, _patched
