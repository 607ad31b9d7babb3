"""Encodes tensors: chooses the seed, the row scores and the rows that the loss can reach."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec import Affine, encode, norm_scores
from dibit.codec.row_sampling import by_length, unevenness
from dibit.config import Config, Sample
from dibit.engine.draws import Draws
from dibit.engine.measuring import Measuring
from dibit.engine.model_state import ModelState
from dibit.engine.module_stack import ModuleStack, function_name
from dibit.engine.noise.noise_flow import Leaf
from dibit.engine.noise.row_plan import UNEVEN
from dibit.engine.rows_in_reach import RowsInReach
from dibit.residuals.compressed import Compressed
from dibit.residuals.gradient_norms import GradientNormObserver


class Encoder:
    """Encodes the tensors of one pass.

    Args:
        state: the compressed model's state; holds the scores of rows.
        stack: the modules and the function that are running.
        draws: gives the seeds of the pass.
        measuring: gives the residuals their names, and says whether this step measures.
        reach: leaves out rows that the loss cannot reach.
        node_ids: the nodes of the rows of the model's input, int64 (N,); `None`: rows are the same nodes in every pass.
    """

    def __init__(
        self,
        state: ModelState,
        stack: ModuleStack,
        draws: Draws,
        measuring: Measuring,
        reach: RowsInReach,
        node_ids: Tensor | None,
    ) -> None:
        self.state, self.stack, self.draws = state, stack, draws
        self.measuring, self.reach, self.node_ids = measuring, reach, node_ids

    def encode(
        self,
        x: Tensor,
        config: Config,
        purpose: str,
        affine: Affine | None = None,
        watched: bool = False,
        name: str = "",
    ) -> Compressed:
        """A residual of x (..., D) by its codes.

        Args:
            x: floating point.
            config: the settings of the codec.
            purpose: "leaf" or "path"; part of the seed.
            affine: encode (x - shift) * scale.
            watched: the backward pass calls the residual's `observe` with the gradient that it multiplies.
            name: the residual's name, if it has one already.
        """
        salt = (self.state.salt,) if self.state.salt else ()
        scores = watch = candidates = None
        key = name
        if watched and (self.reach.limited or _by_gradient(config)):
            key = name or self.measuring.residual()
            rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
            if _by_gradient(config):
                scores, watch = self._scores(key, rows, x.shape, affine is None)
            config, scores, candidates = self.reach.leave_out(key, config, rows, scores)
        packed = encode(x, config, self.draws.seed(purpose, x.device, *salt), affine, scores, candidates)
        if self.state.observer is not None:
            x = x if affine is None else affine(x)
            self.state.observer(self.stack.module, function_name(self.stack.function), x, packed)
        return Compressed(packed, watch, key, self.stack.module, self.draws.key)

    def _scores(
        self, key: str, rows: Tensor, shape: torch.Size, norms: bool
    ) -> tuple[Tensor | None, GradientNormObserver | None]:
        """Scores of rows by the gradients of earlier steps; by their norms as long as there are none."""
        table, ids = self.state.scores, self.node_ids
        if ids is not None:
            ids = ids.to(rows.device)
            if (each := shape[1:-1].numel()) > 1:  # the heads of a node are rows of their own
                ids = (ids[: shape[0], None] * each + torch.arange(each, device=ids.device)).reshape(-1)
            if ids.numel() < rows.shape[0]:  # the rows are edges, not nodes: they have no ids
                return norm_scores(rows) if norms else None, None
        scores = table.lookup(key, rows, ids)
        if scores is None and norms:
            scores = norm_scores(rows)
        elif scores is not None and norms and (leaf := table.plan.leaves.get(key)) is not None:
            scores = self._by_length(scores, rows, leaf)
        return scores, table.watch(key, ids)

    def _by_length(self, scores: Tensor, rows: Tensor, leaf: Leaf) -> Tensor:
        """Scores of |dY_n| |x_n| where the rows of a leaf are of uneven lengths, of |dY_n| elsewhere."""
        lengths = norm_scores(rows) if self.measuring.active or leaf.uneven else None
        if lengths is not None and self.measuring.active:
            leaf.uneven = unevenness(lengths) > UNEVEN
        return by_length(scores, lengths) if leaf.uneven and lengths is not None else scores


def _by_gradient(config: Config) -> bool:
    return isinstance(config.reduce, Sample) and config.reduce.by == "gradient"
