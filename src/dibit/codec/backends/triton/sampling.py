"""Which rows are kept, on a GPU: their scores, and systematic sampling by them."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec.backends.triton.kernels import sampling as kernels
from dibit.codec.backends.triton.launch import SINGLE, launch, parts, power
from dibit.codec.dispatch import kernel
from dibit.codec.keep_probabilities import FLOOR, SAMPLING_SALT

_TILE = 2048  # elements that a program adds up at once
_RUN = 1024  # rows that a program takes


@kernel(x=SINGLE)
def row_scores(x: Tensor) -> Tensor:
    rows, width = x.shape
    out = x.new_empty(rows, dtype=torch.uint8)
    c = power(width, 16, 256)
    launch(
        kernels.row_scores,
        (parts(rows, _TILE // c),),
        x.device,
        x.contiguous(),
        out,
        rows,
        width,
        R=_TILE // c,
        C=c,
    )
    return out


@kernel()
def pick_rows(scores: Tensor, seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows = scores.numel()
    if not rows:
        return NotImplemented
    device, tiles = scores.device, parts(rows, _RUN)
    scores = scores.contiguous()
    counts = scores.new_zeros(256, dtype=torch.int32)
    probabilities, start = scores.new_empty(256, dtype=torch.int64), scores.new_empty(1, dtype=torch.int64)
    sums = scores.new_empty(tiles, dtype=torch.int64)
    index = scores.new_empty(count, dtype=torch.int64)
    weight = scores.new_empty(count, dtype=torch.float32)
    launch(kernels.count_scores, (tiles,), device, scores, counts, rows, T=_RUN)
    launch(
        kernels.keep_probabilities,
        (1,),
        device,
        counts,
        seed,
        probabilities,
        start,
        count,
        SALT=SAMPLING_SALT,
        FLOOR=FLOOR,
    )
    launch(kernels.sum_probabilities, (tiles,), device, scores, probabilities, sums, rows, T=_RUN)
    launch(
        kernels.pick_rows,
        (tiles,),
        device,
        scores,
        probabilities,
        start,
        sums,
        sums.cumsum(0),
        index,
        weight,
        rows,
        count,
        T=_RUN,
    )
    return index, weight
