"""64 bits of a tensor's content, to tell whether it has changed. In goes a tensor, out comes a number."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.codec.numpy_views import array

MAX_HASHED_BYTES = 1 << 13  # up to this many bytes of a CPU's tensor, Python's hash is faster than a kernel


def fingerprint(x: Tensor) -> int | Tensor:
    """The fingerprint of a strided tensor of any shape and dtype; comparable within this process.

    Returns:
        A number for a CPU's tensor; elsewhere an int64 0-d tensor, so that the device is not waited for.
    """
    x = x.detach()
    flat = (x if x.is_contiguous() else x.contiguous()).resolve_conj().resolve_neg().view(-1).view(torch.uint8)
    if flat.device.type != "cpu":
        return ops.fingerprint(flat)
    if flat.numel() <= MAX_HASHED_BYTES:
        return hash(array(flat).tobytes())
    return int(ops.fingerprint(flat))
