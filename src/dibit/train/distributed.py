"""One training in several processes, started by torchrun: who this one is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dibit.tools.errors import TrainingError, UserError

# What gloo and nccl say of a process that is gone.
_LOST = ("closed by peer", "reset by peer", "broken pipe", "connection closed", "remote process exited", "was aborted")


@dataclass(frozen=True)
class World:
    """The processes of a training.

    Attributes:
        rank: Of this one, from 0.
        size: How many there are.
        local_rank: Of this one among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and measures."""
        return self.rank == 0

    def sums(self, *numbers: float) -> list[float]:
        """Sums over the processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self._device())
        dist.all_reduce(total)
        return total.tolist()

    def shared(self, value: Any) -> Any:
        """What the first process has here."""
        if self.size == 1:
            return value
        cell = [value]
        dist.broadcast_object_list(cell, device=self._device())
        return cell[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process has here, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def _device(self) -> torch.device:
        cuda = dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def world_of_environment() -> World:
    """What torchrun has written into the environment; one process where it has not.

    Raises:
        UserError: A number is missing or is none.
    """
    if "WORLD_SIZE" not in os.environ:
        return World()
    try:
        numbers = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is set, but RANK or LOCAL_RANK is not a number ({error}); start processes with torchrun."
        ) from error
    return World(*numbers)


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """Connect the processes; one that loses another says so and ends.

    Raises:
        TrainingError: Another process has ended.
    """
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, TrainingError) or not any(word in str(error).lower() for word in _LOST):
            raise
        raise TrainingError(
            "another process of this training has ended, see its message; go on from the last checkpoint with "
            "--resume --out, under the same torchrun."
        ) from error
    finally:
        dist.destroy_process_group()
