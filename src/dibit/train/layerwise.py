"""Layer-wise inference: each layer for all nodes before the next, part by part, on every edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dibit.train.distributed import World

PART = 16384  # nodes at a time


@torch.no_grad()
def layerwise(
    model: nn.Module,
    x: Tensor,
    adjacency: Tensor,
    device: torch.device,
    note: Callable[[int, int], None] | None = None,
    world: World | None = None,
    part: int = PART,
) -> Tensor:
    """The model's output for all nodes, in the memory of one layer's input and output and of one part's neighbours.

    Args:
        model: In eval mode, with `num_layers` and `inference_per_layer`, as PyTorch Geometric's models have.
        x: (N, F), on the CPU.
        adjacency: On the CPU, sparse CSR (N, N) with a row for each target; or int64 (2, E), sorted by row 1.
        device: Where to compute; parts are moved there and back.
        note: Called after each part with the number of parts done and of all.
        world: Its processes share the parts.
        part: Nodes of a part.

    Returns:
        (N, C), on the CPU.
    """
    world = world or World()
    nodes = x.shape[0]
    crow, col, values = _rows(adjacency, nodes)
    place = torch.full((nodes,), -1, dtype=torch.int64)
    starts = list(range(0, nodes, part))
    layers: int = model.num_layers  # type: ignore[assignment]
    for layer in range(layers):
        result: Tensor | None = None
        for number, start in enumerate(starts):
            if number % world.size != world.rank:
                continue
            own = torch.arange(start, min(start + part, nodes))
            low, high = int(crow[start]), int(crow[own[-1] + 1])
            sources = col[low:high].long()
            place[own] = torch.arange(own.numel())
            others = sources[place[sources] < 0].unique()
            place[others] = torch.arange(own.numel(), own.numel() + others.numel())
            ids = torch.cat((own, others))
            offsets = crow[start : start + own.numel() + 1].long() - low
            local = _local(offsets, place[sources], None if values is None else values[low:high], ids.numel(), device)
            place[ids] = -1
            y = model.inference_per_layer(layer, x[ids].to(device), local, own.numel()).cpu()  # type: ignore[operator]
            if result is None:
                result = y.new_zeros(nodes, y.shape[1])
            result[own] = y
            if note is not None:
                note(layer * len(starts) + number + 1, layers * len(starts))
        x = _joined(result, nodes, world)
    return x


def _rows(adjacency: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Row pointers, columns and values of either form; edges without values stay edges."""
    if adjacency.layout == torch.sparse_csr:
        return adjacency.crow_indices(), adjacency.col_indices(), adjacency.values()
    source, target = adjacency
    counts = torch.bincount(target, minlength=nodes)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))), source, None


def _local(offsets: Tensor, col: Tensor, values: Tensor | None, nodes: int, device: torch.device) -> Any:
    """The rows of a part in the part's own numbers; its neighbours' rows are empty."""
    if values is None:
        target = torch.arange(offsets.numel() - 1).repeat_interleave(offsets.diff())
        return torch.stack((col, target)).to(device)
    crow = torch.cat((offsets, offsets[-1:].expand(nodes - offsets.numel() + 1)))
    matrix = torch.sparse_csr_tensor(crow, col, values, (nodes, nodes), check_invariants=False)
    return matrix.to(device)


def _joined(own: Tensor | None, nodes: int, world: World) -> Tensor:
    """The parts of all processes; each has computed other rows, and zeros elsewhere."""
    if world.size == 1:
        assert own is not None
        return own
    width = int(max(world.gathered(0 if own is None else own.shape[1])))
    own = torch.zeros(nodes, width) if own is None else own
    if dist.get_backend() == "nccl":
        moved = own.cuda()
        dist.all_reduce(moved)
        return moved.cpu()
    dist.all_reduce(own)
    return own
