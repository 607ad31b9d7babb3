"""Every layer of `torch_geometric.nn.aggr`: messages sorted by their target, as some of them need it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch_geometric.nn.aggr as g
from torch import Tensor, nn

from tests.zoo.case import C, Case, Catalogue, D, N, floats, mlp, rng

ABSENT = {"Aggregation": "the base class of all others"}

M, GROUPS = 3 * N, 24  # messages, targets
MOST = 16  # messages of one target


def messages() -> Tensor:
    return floats(M, D)


def index() -> Tensor:
    """Between 6 and 9 messages a target, and one target without any."""
    return torch.cat([torch.arange(M) % (GROUPS - 1)]).sort().values


def ptr() -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(index(), minlength=GROUPS).cumsum(0)])


def positive() -> Tensor:
    return (torch.rand(M, D, generator=rng(11)) + 0.5).requires_grad_()


def cases() -> list[Case]:
    zoo = Catalogue()

    def add(name: str, build: Callable[[], nn.Module], data: Callable[[], Tensor] = messages, **kwargs: object) -> None:
        zoo.add(name, build, data, index, dim_size=lambda: GROUPS, **kwargs)

    for name in ("Sum", "Mean", "Max", "Min", "Mul", "Var", "Std", "Median", "VariancePreserving"):
        add(f"{name}Aggregation", getattr(g, f"{name}Aggregation"))
    for name in ("Sum", "Mean", "Max", "Softmax"):
        make = getattr(g, f"{name}Aggregation")
        zoo.add(f"{name}Aggregation ptr", make, messages, ptr=ptr, dim_size=lambda: GROUPS)
    add("VarAggregation semi_grad", partial(g.VarAggregation, semi_grad=True))
    add("StdAggregation semi_grad", partial(g.StdAggregation, semi_grad=True))
    add("SoftmaxAggregation", g.SoftmaxAggregation)
    add("SoftmaxAggregation learn", partial(g.SoftmaxAggregation, learn=True))
    add("SoftmaxAggregation channels", partial(g.SoftmaxAggregation, learn=True, channels=D))
    add("SoftmaxAggregation semi_grad", partial(g.SoftmaxAggregation, t=0.5, semi_grad=True))
    add("PowerMeanAggregation", partial(g.PowerMeanAggregation, p=2.0), positive)
    add("PowerMeanAggregation learn", partial(g.PowerMeanAggregation, learn=True, channels=D), positive)
    for way in ("linear", "lower", "midpoint", "nearest"):
        add(f"QuantileAggregation {way}", partial(g.QuantileAggregation, [0.25, 0.6], interpolation=way))
    add("LSTMAggregation", partial(g.LSTMAggregation, D, C))
    add("GRUAggregation", partial(g.GRUAggregation, D, C))
    add("LCMAggregation", partial(g.LCMAggregation, D, C))
    add("LCMAggregation no projection", partial(g.LCMAggregation, D, D, project=False))
    add("Set2Set", partial(g.Set2Set, D, processing_steps=3))
    degrees = torch.bincount(torch.bincount(index(), minlength=GROUPS))
    scalers = ["identity", "amplification", "attenuation", "linear", "inverse_linear"]
    for train in (False, True):
        add(
            f"DegreeScalerAggregation{' trained' if train else ''}",
            partial(g.DegreeScalerAggregation, ["mean", "max", "std"], scalers[: 4 if train else 5], degrees, train),
        )
    add("SortAggregation", partial(g.SortAggregation, k=4))
    for norm in (False, True):
        add(
            f"GraphMultisetTransformer{' norm' if norm else ''}",
            partial(g.GraphMultisetTransformer, D, k=4, heads=2, layer_norm=norm, dropout=0.1 * norm),
        )
        add(
            f"SetTransformerAggregation{' norm' if norm else ''}",
            partial(g.SetTransformerAggregation, D, 2, heads=2, layer_norm=norm, dropout=0.1 * norm),
        )
    add("AttentionalAggregation", lambda: g.AttentionalAggregation(mlp(D, 1), mlp(D, C)))
    add("AttentionalAggregation features", lambda: g.AttentionalAggregation(mlp(D, D, norm=True)))
    add("EquilibriumAggregation", lambda: g.EquilibriumAggregation(D, C, num_layers=[C], grad_iter=2))
    for norm in (None, "batch_norm"):
        add(
            f"MLPAggregation{' norm' if norm else ''}",
            partial(g.MLPAggregation, D, C, MOST, hidden_channels=C, num_layers=2, norm=norm),
        )
    add("DeepSetsAggregation", lambda: g.DeepSetsAggregation(mlp(D, C), mlp(C, C)))
    add("PatchTransformerAggregation", partial(g.PatchTransformerAggregation, D, C, 4, C, heads=2, dropout=0.2))
    add(
        "PatchTransformerAggregation three",
        partial(g.PatchTransformerAggregation, D, C, 4, C, aggr=["mean", "max", "std"]),
    )
    some = ["mean", "max", "std", "softmax"]
    for mode in ("cat", "sum", "mean", "max", "min", "logsumexp", "std", "var"):
        add(f"MultiAggregation {mode}", partial(g.MultiAggregation, some, mode=mode))
    add("MultiAggregation proj", partial(_multi, some, "proj", {"in_channels": D, "out_channels": C}))
    add("MultiAggregation attn", partial(_multi, some, "attn", {"in_channels": D, "out_channels": C, "num_heads": 2}))
    return zoo


def _multi(aggrs: list[str], mode: str, kwargs: dict[str, int]) -> nn.Module:
    return g.MultiAggregation(aggrs, mode=mode, mode_kwargs=kwargs)
