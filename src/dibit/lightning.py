"""A Lightning callback: `Trainer(callbacks=[DibitCallback()])` trains with compressed activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dibit.api import compress, decompress, scores, track
from dibit.config import Config
from dibit.engine.ledger import Ledger
from dibit.tools.errors import install
from dibit.tools.units import MB

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError(f"dibit.lightning needs lightning, which is not installed: {install('lightning')}") from error

_KEY = "dibit_scores"


class DibitCallback(Callback):
    """Compresses a LightningModule for the time of `fit`, logs what it keeps, and keeps the scores in checkpoints.

    Args:
        recipe: as in `dibit.compress`.
        module: name of the module to compress within the LightningModule, such as "model"; default: all of it.

    Attributes:
        saved: the ledger of the second training step (in the first there are no scores of rows yet); logged as
            `dibit/saved_mb` and `dibit/plain_mb`, in 2^20 bytes.

    Raises:
        AttributeError: there is no module of that name.
    """

    def __init__(
        self, recipe: str | Config | Mapping[str, str | Config | None] = "default", module: str | None = None
    ) -> None:
        self.recipe, self.module = recipe, module
        self.saved: Ledger | None = None
        self._steps = 0
        self._tracking: Any = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Compress before the optimisers are made and a checkpoint is restored."""
        if stage == "fit":
            compress(self._target(pl_module), self.recipe)
            self._steps, self.saved = 0, None

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Begin to track the second step."""
        self._steps += 1
        if self._steps == 2:
            self._tracking = track(self._target(pl_module))
            self.saved = self._tracking.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the second step kept."""
        if self._tracked():
            assert self.saved is not None
            pl_module.log("dibit/saved_mb", self.saved.total / MB)
            pl_module.log("dibit/plain_mb", self.saved.plain / MB)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Nothing is tracked any more."""
        self._tracked()

    def _tracked(self) -> bool:
        """End the tracking, if it has begun."""
        tracking, self._tracking = self._tracking, None
        if tracking is not None:
            tracking.__exit__(None, None, None)
        return tracking is not None

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Scores go beside the weights: the `state_dict` is the plain model's."""
        checkpoint[_KEY] = scores(self._target(pl_module)).state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """A checkpoint of a training without this callback has no scores, and none are set."""
        if _KEY in checkpoint:
            scores(self._target(pl_module)).load_state_dict(checkpoint[_KEY])

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Leave the module as it was."""
        if stage == "fit":
            decompress(self._target(pl_module))

    def _target(self, pl_module: nn.Module) -> nn.Module:
        if self.module is None:
            return pl_module
        found: nn.Module | None = dict(pl_module.named_modules()).get(self.module)
        if found is None:
            names = ", ".join(repr(name) for name, _ in pl_module.named_children())
            raise AttributeError(
                f"DibitCallback got module={self.module!r}, but {type(pl_module).__name__} has no module of that name; "
                f"it has {names}."
            )
        return found
