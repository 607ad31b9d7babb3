"""Which modules are running, and what the innermost one's config is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import resolve_name

from dibit.config import Config


class ModuleStack:
    """The modules that are running, outermost first.

    Attributes:
        names: as `compress` knows them; the model itself is "".
        configs: of each; `None` leaves what it computes exact.
        exact_within: everything is exact until fewer modules than this are running; `None`: nothing is.
        asked: whether the model has called `autograd.grad` or `backward` since `exact_within` was set.
        function: the function of torch that is running now; the ledger names it.
        compresses: some module of this pass has a config.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.configs: list[Config | None] = []
        self.exact_within: int | None = None
        self.asked = False
        self.function: Any = None
        self.compresses = False

    @property
    def config(self) -> Config | None:
        """The config of the innermost module that is running; `None` leaves everything exact."""
        return self.configs[-1] if self.configs and self.exact_within is None else None

    @property
    def module(self) -> str:
        """Name of the innermost module that is running; empty for the outermost."""
        return self.names[-1] if self.names else ""

    @property
    def operation(self) -> str:
        """The module and the function that are running, as one name."""
        return f"{self.module}:{function_name(self.function)}"

    def enter(self, name: str, config: Config | None) -> None:
        """A module begins."""
        self.names.append(name)
        self.configs.append(config)
        self.compresses |= config is not None

    def leave(self, depth: int) -> bool:
        """Leave modules until `depth` are running; a module that raised an exception has not left by itself.

        Returns:
            Whether the module that `exact_within` was set for has ended. If it has not asked for a gradient, whoever
            called it may, so everything stays exact.
        """
        del self.names[depth:], self.configs[depth:]
        if self.exact_within is None or depth >= self.exact_within:
            return False
        self.exact_within = None if self.asked else 0
        return True

    @contextmanager
    def resumed(self, config: Config | None) -> Iterator[None]:
        """Use this config in the block, although the module that had it has ended."""
        before, self.exact_within = self.exact_within, None
        self.configs.append(config)
        try:
            yield
        finally:
            self.configs.pop()
            self.exact_within = before

    def stay_exact(self) -> None:
        """Everything is exact until the running module ends: it has made a tensor that it may differentiate by."""
        self.exact_within = len(self.names) if self.exact_within is None else self.exact_within
        self.asked = False


def function_name(function: Any) -> str:
    """A function of torch as the ledger writes it: `linear`, `batch_norm`."""
    name = resolve_name(function) or getattr(function, "__name__", str(function))
    return name.removeprefix("torch.").removeprefix("nn.functional.").removeprefix("Tensor.")
