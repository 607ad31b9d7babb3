"""The rows of one pass's residuals that its loss reaches; the others are left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from dibit.codec import norm_scores
from dibit.codec.row_sampling import LEFT_OUT
from dibit.config import Config, Project, Sample
from dibit.engine.loss_reach import LossReach


class RowsInReach:
    """What one pass leaves out, by what earlier ones have shown.

    Args:
        reach: of the model.
        loss_rows: rows of the output that enter the loss; `None`: all.
        matrix: the graph among the model's arguments, a sparse CSR tensor; `None`: there is none, or there are several.
    """

    def __init__(self, reach: LossReach, loss_rows: Tensor | None, matrix: Tensor | None) -> None:
        self.reach, self.loss_rows, self.matrix = reach, loss_rows, matrix
        self._assumed: dict[str, int] = {}  # by residual that left out rows: aggregations between it and the output

    @property
    def limited(self) -> bool:
        """Whether only some rows of the output enter the loss."""
        return self.loss_rows is not None

    def leave_out(
        self, key: str, config: Config, rows: Tensor, scores: Tensor | None
    ) -> tuple[Config, Tensor | None, int | None]:
        """Leave out the rows (N, D) of a residual that the loss does not reach.

        Returns:
            Its config, the scores (N,) of its rows, and how many rows may be kept; `None`: all.
        """
        reduce = config.reduce
        if self.loss_rows is None or self.matrix is None or isinstance(reduce, Project):
            return config, scores, None
        found = self.reach.rows_within(key, self.matrix, self.loss_rows, rows.shape[0])
        if found is None or not 0 < found[1] < rows.shape[0]:
            return config, scores, None
        self._assumed[key] = self.reach.steps[key]
        if scores is None:
            by_norm = reduce is not None and reduce.by == "norm"
            scores = norm_scores(rows) if by_norm else rows.new_zeros(rows.shape[0], dtype=torch.uint8)
        scores = torch.where(found[0], scores, LEFT_OUT)
        return config if reduce is not None else replace(config, reduce=Sample(1)), scores, found[1]

    def observe(self, outputs: Iterable[Tensor]) -> None:
        """The pass has ended with these outputs: check what was left out, and learn for the next one.

        Raises:
            RuntimeError: a residual has left out rows that the loss reaches in this pass.
        """
        if self.loss_rows is not None:
            self.reach.observe(outputs, self.matrix, self._assumed)
