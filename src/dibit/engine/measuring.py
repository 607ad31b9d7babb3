"""What is measured of the gradient's noise in a pass, and under which names."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec.seed_stream import capturing
from dibit.config import Config
from dibit.engine.model_state import ModelState
from dibit.engine.module_stack import ModuleStack
from dibit.engine.noise.meter import Meter, rounding_of
from dibit.engine.noise.row_plan import RowPlan


class Measuring:
    """Names and meters for the residuals of a pass, and the codecs that follow from what was measured.

    Args:
        stack: the running modules of the pass.
        state: of the model.

    Attributes:
        plan: which rows are kept, by what was measured.
        metered: something of this pass is measured.
    """

    def __init__(self, stack: ModuleStack, state: ModelState) -> None:
        self.plan: RowPlan = state.scores.plan
        self.metered = False
        self._stack, self._state = stack, state
        self._residuals: dict[str, int] = {}  # residuals with a name so far, by module and function
        self._operations: dict[str, int] = {}  # measured operations with a name so far, likewise

    def residual(self) -> str:
        """A name for the residual that the running function keeps, the same in every pass."""
        return _numbered(self._residuals, self._stack.operation)

    def operation(self, kind: str) -> str:
        """A name for the operation that is running among those of its kind, the same in every measured pass."""
        return f"{_numbered(self._operations, self._stack.operation)}/{kind}"

    @property
    def active(self) -> bool:
        """Whether the error of what is running is measured in this pass."""
        config = self._stack.config
        if config is None or config.noise is None:
            return False
        self.plan.expect(config)  # an unpickled part has not announced its bound yet
        # a captured graph waits for nothing, and keeps the rows it was captured with
        return self.plan.measures and not (torch.cuda.is_available() and capturing(torch.device("cuda")))

    def meter(self, name: str) -> Meter | None:
        """A meter for the residual or norm of this name, where it is to be measured."""
        if not self.active:
            return None
        self.metered = True
        return Meter(self.plan, name)

    def factor(self, name: str, x: Tensor, config: Config) -> None:
        """Measure, where that is due, how much noise the codes of a factor x (..., D) add."""
        if self.active:
            self.metered = True
            self.plan.measured(name, rounding_of(x.detach(), config))

    def leaf_config(self, name: str, config: Config, shape: torch.Size, served: bool) -> Config:
        """The codec of a linear layer's input of this shape; `served`: a norm keeps it, too."""
        return self.plan.leaf_config(name, config, shape, served, self._state.root)

    def norm_config(self, name: str, config: Config, shape: torch.Size, columns: bool) -> Config:
        """The codec of a norm's input of this shape; `columns`: its statistics are those of columns."""
        return self.plan.norm_config(name, config, shape, columns, self._state.root)


def _numbered(counts: dict[str, int], name: str) -> str:
    counts[name] = number = counts.get(name, 0) + 1
    return f"{name}:{number}"
