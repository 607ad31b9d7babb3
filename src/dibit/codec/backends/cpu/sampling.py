"""Which rows are kept, on a CPU: their scores, and systematic sampling by them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dibit.codec.backends.cpu.kernels import sampling as kernels
from dibit.codec.dispatch import kernel
from dibit.codec.keep_probabilities import keep_probabilities, sampling_start
from dibit.codec.numpy_views import array


@kernel(x=torch.float32)
def row_scores(x: Tensor) -> Tensor:
    sums, out = torch.empty(x.shape[0]), torch.empty(x.shape[0], dtype=torch.uint8)
    if x.numel():
        kernels.row_scores(x.numel(), array(x), array(sums), array(sums).view(np.int32), array(out))
    else:
        out.zero_()
    return out


def pick_rows(scores: Tensor, seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    index, weight = torch.empty(count, dtype=torch.int64), torch.empty(count)
    probabilities, start = array(keep_probabilities(scores, count)), np.int64(int(sampling_start(seed)))
    # one running sum: never in parallel
    kernels.pick_rows(0, array(scores), probabilities, start, array(index), array(weight))
    return index, weight
