"""Measures, in the backward pass, what `dibit.engine.noise.row_plan` decides by."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import at_least_single
from dibit.codec import decode, encode, seed_tensor
from dibit.config import Config, Project
from dibit.engine.noise.row_plan import RowPlan
from dibit.residuals.base import Residual, outer
from dibit.residuals.norm_results import row_chunks

_COLUMNS = 512  # columns of which `concentration` is computed, at most
_SOME = 1 << 11  # rows from which a codec's rounding error is measured, at most
_ROWS = 1 << 13  # rows whose non-zeros are counted at a time, to avoid a mask of the full size


class Meter:
    """Measures in the backward pass of one operation, in passes that are to be measured."""

    def __init__(self, plan: RowPlan, key: str) -> None:
        self.plan, self.key = plan, key

    def weight_gradient(self, residual: Residual, dy: Tensor) -> Tensor:
        """dY^T X (O, D), measured: dY (N, O) times an input."""
        if residual.aggregated is not None:  # of features: exact; to aggregate their gradients for this costs too much
            dw, source = residual.outer(dy), residual.aggregated[1]
            terms = _squares(dy).sum() * _squares(source.value()).mean()
            s, g = torch.stack((terms, _square(dw))).tolist()
            self.plan.measured(self.key, (0.0, s, 0.0, g, 1.0, 0.0, 0.0, s))
            return dw
        if residual.encoded is not None:
            dw, sums, ratio = self._of_rows(residual, dy)
        else:
            (dw, sums), ratio = self._of_parts(residual, dy), 1
        s, v, r, fourth, second, g, dy2 = torch.stack((*sums, _square(dw), _square(dy))).tolist()
        noise = v / (ratio - 1) if ratio > 1 else s  # at most
        along = math.sqrt(s * max(s, dy2 * fourth / second)) if second > 0 else s
        self.plan.measured(self.key, (noise, s, r / ratio, g - v - r, float(ratio > 1), 0.0, 0.0, along))
        return dw

    def bias_gradient(self, db: Tensor) -> None:
        """Take in a bias's gradient db (O,): a part of the whole gradient, with no noise of its own."""
        self.plan.measured(self.key, (0.0, 0.0, 0.0, float(_square(db)), 0.0, 0.0, 0.0, 0.0))

    def input_gradient(self, dx: Tensor) -> None:
        """Take in dX, the gradient of the input."""
        self.plan.measured(self.key, (0.0, 0.0, 0.0, 0.0, 0.0, float(_square(dx)), 1.0, 0.0))

    def _of_rows(self, residual: Residual, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...], int]:
        """Return dW (O, D) from the kept rows, five float32 0-d tensors, and the ratio.

        The tensors are S, the variance of dW from sampling, that from rounding, sum |x_n|^4 and sum |x_n|^2.
        """
        dw, packed = residual.outer(dy), residual.encoded
        assert packed is not None
        x, gradient = packed.reduced(), _squares(dy)
        sample = packed.sample(torch.float32)
        if sample is None:
            squares, rounding = _squares(x), _rounding(residual, x) * gradient
            terms = squares * gradient
            return dw, (terms.sum(), terms.new_zeros(()), rounding.sum(), *_powers(squares)), 1
        gradient, weight = gradient.index_select(0, sample[0]), sample[1]
        squares, rounding = _squares(x), _rounding(residual, x) * gradient * weight.square()
        terms = squares * gradient * weight
        ratio: int = packed.config.reduce.ratio  # type: ignore[union-attr]
        return dw, (terms.sum(), (terms * (weight - 1)).sum(), rounding.sum(), *_powers(squares, weight)), ratio

    def _of_parts(self, residual: Residual, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same (without the ratio) of a residual that keeps all rows, each unpacked once for all sums."""
        dw, (s, r, fourth, second) = None, dy.new_zeros((4,), dtype=torch.float32)
        for rows, x in row_chunks(residual):
            own = dy[rows]
            gradient = _squares(own)
            dw = outer(x, own) if dw is None else dw.addmm_(own.T, x.to(own.dtype))
            squares = _squares(x)
            s, r = s + (squares * gradient).sum(), r + (_rounding(residual, x, rows.start) * gradient).sum()
            powers = _powers(squares)
            fourth, second = fourth + powers[0], second + powers[1]
        assert dw is not None
        return dw, (s, s.new_zeros(()), r, fourth, second)

    def norm(self, along: Tensor, dx: Tensor, variance: float, normalised: Tensor | None = None) -> None:
        """Take in the measurement of a norm.

        Args:
            along: the square of what it subtracts along x_hat, 0-d.
            dx: the gradient of its input (rows, D).
            variance: of what it keeps of x_hat, over its square; dX contains `variance * along` as noise.
            normalised: the kept rows of x_hat (rows, D), if its statistics are those of columns.
        """
        spread = along.new_zeros(()) if normalised is None else concentration(normalised)
        part, whole, share = torch.stack((along.float(), _square(dx), spread.float())).tolist()
        self.plan.measured(self.key, (part, max(whole - variance * part, 1e-3 * whole), share, 1.0))


def rounding_of(x: Tensor, config: Config) -> tuple[float, float]:
    """The squared error that a codec makes of x (..., D), and the square of x, of some rows."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    rows = rows[:: -(-rows.shape[0] // _SOME)].contiguous()
    kept = decode(encode(rows, config, seed_tensor(rows.shape[0], rows.device)))
    return float((kept - rows).double().square().sum()), float(rows.double().square().sum())


def concentration(x: Tensor) -> Tensor:
    """The sum of the squared eigenvalues of x^T x over their sum's square, 0-d; x (rows, D), of many columns some."""
    x = x[:, :: -(-x.shape[1] // _COLUMNS)]
    gram = outer(x, x)
    return gram.square().sum() / gram.diagonal().sum().square().clamp(min=torch.finfo(gram.dtype).tiny)


def _rounding(residual: Residual, x: Tensor, start: int = 0) -> Tensor:
    """Approximate variance (rows,) that rounding adds to each row of x (rows, D), summed over its elements.

    Args:
        start: the number of the first of these rows in the residual.

    Returns:
        float32; a 0-d zero if the residual has no codes, or keeps a projection.
    """
    packed, gain = residual.rounded()
    if packed is None or isinstance(packed.config.reduce, Project):
        return x.new_zeros(())
    config, ranges = packed.config, packed.ranges
    bins = ((ranges[:, 1].float() - ranges[:, 0].float()) / (2**config.bits - 1)).square()
    share = gain / (12 if config.rounding == "dither" else 6)
    filled = torch.cat([torch.count_nonzero(part, dim=1) for part in x.split(_ROWS)])
    own = _mean_of_blocks(bins, start, x.shape[0], x.shape[1], packed.block)
    return filled * own * share  # zeros stay zeros, nearly


def _mean_of_blocks(blocks: Tensor, start: int, rows: int, width: int, block: int) -> Tensor:
    """The mean over the blocks that a row lies in, of what blocks of elements have; of `rows` rows from `start` on."""
    begin = torch.arange(start, start + rows, device=blocks.device) * width
    first, last = begin // block, (begin + width - 1) // block
    sums = F.pad(blocks.double().cumsum(0), (1, 0))
    return ((sums[last + 1] - sums[first]) / (last + 1 - first)).float()


def _powers(squares: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The sums of squared squares and of squares, of rows with these weights."""
    return (squares.square() * weight).sum(), (squares * weight).sum()


def _squares(x: Tensor) -> Tensor:
    """The squared length of each row of x (N, D), float32 (N,)."""
    return torch.linalg.vector_norm(x, dim=1, dtype=at_least_single(x[:0]).dtype).float().square()


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=at_least_single(x[:0]).dtype).float().square()
