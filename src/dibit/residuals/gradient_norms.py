"""Norms of the gradients that a residual is multiplied with; the next step samples its rows by them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dibit.codec.row_sampling import LEFT_OUT, add_scores, row_scores


class GradientNormObserver:
    """Measures the norms of the gradients that one residual is multiplied with in the backward pass.

    Args:
        on_first: called at the first gradient.
        captured_table: the table of scores, uint8 (N,), if a CUDA graph must update it in place.

    Attributes:
        scores: uint8 (N,), of the gradients' sum of squares; `None` before the first gradient.
    """

    def __init__(self, on_first: Callable[[GradientNormObserver], None], captured_table: Tensor | None = None) -> None:
        self.scores: Tensor | None = None
        self.captured_table = captured_table
        self._on_first = on_first

    def observe(self, dy: Tensor) -> None:
        """A gradient (N, O) of one user; the users of a residual add up."""
        new = row_scores(dy)
        if self.scores is None:
            self._on_first(self)
        self.scores = new if self.scores is None else add_scores(self.scores, new)
        if self.captured_table is not None and self.captured_table.shape == self.scores.shape:
            self.captured_table.copy_(decayed(self.captured_table, self.scores))


def decayed(old: Tensor, new: Tensor) -> Tensor:
    """The larger of new scores and of old ones after one step of decay; where a row was left out, the old one."""
    return torch.where(new == LEFT_OUT, old, torch.maximum(new, old - (old > 0).to(old.dtype)))
