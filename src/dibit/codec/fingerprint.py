"""64 bits of a tensor's content, to tell whether it has changed. In goes a tensor, out comes a number."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.codec.numpy_views import array

MIN_BYTES_FOR_KERNEL = 1 << 13  # for a CPU's tensor of up to this many bytes, Python's hash is faster


def fingerprint(x: Tensor) -> int | Tensor:
    """The fingerprint of a strided tensor of any shape and dtype; comparable within this process.

    Returns:
        A number for a CPU's tensor; elsewhere an int64 0-d tensor, so that the device is not waited for.
    """
    x = x.detach()
    flat = (x if x.is_contiguous() else x.contiguous()).resolve_conj().resolve_neg().view(-1).view(torch.uint8)
    if flat.device.type != "cpu":
        return ops.fingerprint(flat)
    if flat.numel() <= MIN_BYTES_FOR_KERNEL:
        return hash(array(flat).tobytes())
    return int(ops.fingerprint(flat))
