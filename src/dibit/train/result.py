"""What one training reached."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Result:
    """What one training reached.

    Attributes:
        recipe: Name of how it was compressed.
        seed: Of weights, dropout and split.
        test: Metric on the test nodes at the best validation epoch, 0 to 1.
        val: Best metric on the validation nodes, 0 to 1.
        best_epoch: Where that was, from 1.
        epochs: Epochs trained.
        saved_bytes: See `Measured`.
        plain_bytes: See `Measured`.
        peak_bytes: See `Measured`.
        seconds_per_epoch: Median over the epochs, of the training step alone.
        loss: Training loss of every epoch.
        noise: Squared error of the gradient over its square, at evaluations: (epoch, noise); none without compression.
        curve: Metric on the validation nodes at evaluations: (epoch, metric).
    """

    recipe: str
    seed: int
    test: float
    val: float
    best_epoch: int
    epochs: int
    saved_bytes: int
    plain_bytes: int
    peak_bytes: int
    seconds_per_epoch: float
    loss: list[float] = field(repr=False)
    noise: list[tuple[int, float]] = field(default_factory=list, repr=False)
    curve: list[tuple[int, float]] = field(default_factory=list, repr=False)
