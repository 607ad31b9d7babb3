"""Every layer of `torch_geometric.nn.norm`."""

from __future__ import annotations

from functools import partial

import torch
import torch_geometric.nn as g
from torch import nn

from tests.zoo.case import Case, Catalogue, D, N, batch, floats, types, x

ABSENT: dict[str, str] = {}


def cases() -> list[Case]:
    zoo = Catalogue()
    zoo.add("BatchNorm", lambda: g.BatchNorm(D), x)
    zoo.add("BatchNorm no affine", lambda: g.BatchNorm(D, affine=False, track_running_stats=False), x)
    zoo.add("BatchNorm cumulative", lambda: g.BatchNorm(D, momentum=None), x)
    zoo.add("HeteroBatchNorm", lambda: g.HeteroBatchNorm(D, 3), x, partial(types, N))
    zoo.add("InstanceNorm", lambda: g.InstanceNorm(D, affine=True, track_running_stats=True), x, batch)
    zoo.add("InstanceNorm one graph", lambda: g.InstanceNorm(D), x)
    for mode in ("graph", "node"):
        zoo.add(f"LayerNorm {mode}", lambda m=mode: g.LayerNorm(D, mode=m), x)
        zoo.add(f"LayerNorm {mode} batch", lambda m=mode: g.LayerNorm(D, mode=m), x, batch)
        zoo.add(f"LayerNorm {mode} no affine", lambda m=mode: g.LayerNorm(D, affine=False, mode=m), x, batch)
    zoo.add("HeteroLayerNorm", lambda: g.HeteroLayerNorm(D, 3), x, partial(types, N))
    zoo.add(
        "HeteroLayerNorm ptr",
        lambda: g.HeteroLayerNorm(D, 3),
        x,
        type_ptr=lambda: [0, 10, 30, N],
    )
    zoo.add("GraphNorm", lambda: g.GraphNorm(D), x, batch)
    zoo.add("GraphNorm one graph", lambda: g.GraphNorm(D), x)
    zoo.add("GraphSizeNorm", lambda: g.GraphSizeNorm(), x, batch)
    zoo.add("PairNorm", lambda: g.PairNorm(), x, batch)
    zoo.add("PairNorm individually", lambda: g.PairNorm(scale_individually=True), x)
    zoo.add("MeanSubtractionNorm", lambda: g.MeanSubtractionNorm(), x, batch)
    zoo.add("MessageNorm", lambda: g.MessageNorm(learn_scale=True), x, partial(floats, N, D, seed=1))
    zoo.add("MessageNorm fixed", lambda: g.MessageNorm(), x, partial(floats, N, D, seed=1))
    zoo.add("DiffGroupNorm", lambda: g.DiffGroupNorm(D, groups=3), x)
    # the same behind a linear layer and before an activation, as norms are used
    for norm in (g.BatchNorm, g.LayerNorm, g.InstanceNorm, g.GraphNorm, g.PairNorm):
        zoo.add(f"{norm.__name__} in a block", partial(_Block, norm), x, batch)
    return zoo


class _Block(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.norm = norm() if norm is g.PairNorm else norm(D)
        self.batched = norm is not g.BatchNorm

    def forward(self, x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = self.norm(h, batch) if self.batched else self.norm(h)
        return self.last(h.relu())
