"""The activations that are really quantised: caught where the codec takes them, normalised as the codec does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dibit.api import Setting, compress, decompress, state_of
from dibit.codec import Packed, reduced
from dibit.codec.normal_levels import normal_levels
from dibit.config import Config
from dibit.study.levels import uniform_levels


@dataclass(frozen=True)
class Activation:
    """One tensor that was quantised during a step.

    Attributes:
        module: name of the module that was running; empty for the model itself.
        operation: such as "linear" or "batch_norm".
        config: what was done to it.
        shape: before the reduction.
        values: (rows, width), after the reduction (projection, sampled rows).
        ranges: (blocks, 2), low and high of each block as stored.
        block: elements that share a range (G; the last block may be shorter).
    """

    module: str
    operation: str
    config: Config
    shape: torch.Size
    values: Tensor = field(repr=False)
    ranges: Tensor = field(repr=False)
    block: int

    @property
    def bits(self) -> int:
        return self.config.bits

    @property
    def width(self) -> int:
        """Columns of the reduced matrix (R)."""
        return self.values.shape[1]

    @property
    def count(self) -> int:
        """Elements that share a range, no more than there are (G)."""
        return min(self.block, self.values.numel())

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels it was rounded to."""
        if isinstance(self.config.levels, tuple):
            return self.config.levels
        return normal_levels(self.bits, self.block) if self.config.levels == "normal" else uniform_levels(self.bits)

    def normalised(self) -> np.ndarray:
        """(h - Z) / r * B of every element whose block has spread: float64 (n,), in [0, B].

        Raises:
            ValueError: the activation is empty, constant in every block, or not finite.
        """
        name = f"the activation of {self.operation} in {self.module or 'the model'}, {tuple(self.shape)},"
        if self.values.numel() == 0:
            raise ValueError(f"{name} is empty; expected at least one element.")
        if not self.ranges.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite elements; expected finite ones.")
        varied = self.varied()
        if not varied.any():
            raise ValueError(f"{name} is constant in every block, so it has no distribution; look at another one.")
        low = self._of_block(self.ranges[:, 0].double())[varied]
        h = (self.values.reshape(-1)[varied].double() - low) / self.steps().double()
        return h.clamp_(0, 2**self.bits - 1).numpy()

    def varied(self) -> Tensor:
        """Whether an element's block has spread: bool (rows * width,)."""
        varied: Tensor = self._of_block(self._widths() > 0)
        return varied

    def steps(self) -> Tensor:
        """Bin width of the uniform grid, r / B, of every element whose block has spread: float64 (n,)."""
        steps: Tensor = self._of_block(self._widths())[self.varied()] / (2**self.bits - 1)
        return steps

    def _widths(self) -> Tensor:
        return self.ranges[:, 1].double() - self.ranges[:, 0].double()

    def _of_block(self, each: Tensor) -> Tensor:
        return (
            each.repeat_interleave(self.block)[: self.values.numel()]
            if self.block < self.values.numel()
            else (each.expand(self.values.numel()))
        )


def capture(
    model: nn.Module, step: Callable[[], Any], *, config: Setting | dict[str, Setting] = None
) -> list[Activation]:
    """Run one training step and return every activation that was quantised, in order.

    Args:
        model: compressed, or plain with `config`.
        step: runs the forward pass of `model` in training mode, and the backward pass or not; its result is dropped.
        config: compress the plain model so for this step alone, as `dibit.compress` takes it.

    Returns:
        One `Activation` a draw, on the CPU: a tensor that serves several operations by one draw is there once, a
        norm's two independent draws twice.

    Raises:
        ValueError: the model is not compressed (or is, and `config` was given), or nothing was quantised.
    """
    state = state_of(model)
    if config is not None:
        if state is not None:
            raise ValueError(
                "capture got a compressed model and a config; leave the config out, or call dibit.decompress(model)."
            )
        compress(model, config)
        try:
            return capture(model, step)
        finally:
            decompress(model)
    if state is None:
        raise ValueError("capture got a model that is not compressed; call dibit.compress(model), or give a config.")
    found: list[Activation] = []

    def observe(module: str, operation: str, x: Tensor, packed: Packed) -> None:
        rows = x.detach().reshape(packed.rows, packed.width)
        sample = packed.sample(torch.float32)
        values = reduced(rows, packed.config, packed.seed) if sample is None else rows.index_select(0, sample[0])
        if values.data_ptr() == x.data_ptr():
            values = values.clone()  # the model may go on to change it in place
        found.append(
            Activation(
                module, operation, packed.config, x.shape, values.cpu(), packed.ranges.detach().cpu(), packed.block
            )
        )

    before, state.observer = state.observer, observe
    try:
        step()
    finally:
        state.observer = before
    if not found:
        raise ValueError(
            "capture saw no compressed layer: the step quantised nothing. Call the model in training mode with "
            "gradients on inside the step; dibit.track(model) lists what is kept."
        )
    return found
