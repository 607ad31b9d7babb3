"""What a case of the zoo is, and the small random graphs and features that cases are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.utils import to_torch_csr_tensor

N, D, C = 60, 16, 16  # nodes, features a node, channels
EDGE = 8  # features an edge

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One layer or model and what to call it with.

    Args:
        name: exported name, then the variant.
        build: makes the module; the harness seeds torch before it.
        inputs: positional and keyword arguments, made anew at each call.
        inner: the inputs come from an earlier layer, so the caller does not hold them; else they are the model's
            features, which the default recipe keeps by reference.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    inner: bool = True

    @property
    def layer(self) -> str:
        return self.name.split()[0]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


class Catalogue(list[Case]):
    """Collects cases; `add` is short because it is written very often."""

    def __init__(self, inner: bool = True) -> None:
        super().__init__()
        self.inner = inner

    def add(self, name: str, build: Callable[[], nn.Module], *args: Callable[[], Any], **kwargs: Any) -> None:
        """`args` and `kwargs` are functions that make the arguments."""

        def inputs() -> Inputs:
            return tuple(make() for make in args), {key: make() for key, make in kwargs.items()}

        self.append(Case(name, build, inputs, self.inner))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(*shape, generator=rng(seed)).requires_grad_(grad)


def x(n: int = N, d: int = D, seed: int = 0) -> Tensor:
    return floats(n, d, seed=seed)


def pair() -> tuple[Tensor, Tensor]:
    """Features of a bipartite graph: 60 sources of 16 features, 40 targets of 24."""
    return x(), x(40, 24, seed=1)


def edges(sources: int = N, targets: int = N, seed: int = 0, degree: int = 8) -> Tensor:
    return _edges(sources, targets, seed, degree).clone()


@functools.cache
def _edges(sources: int, targets: int, seed: int, degree: int) -> Tensor:
    ends = [torch.randint(0, n, (degree * targets,), generator=rng(seed + i)) for i, n in enumerate((sources, targets))]
    return torch.stack(ends).unique(dim=1).contiguous()


def bipartite() -> Tensor:
    return edges(N, 40)


E = edges().shape[1]
E_BIPARTITE = bipartite().shape[1]


def weights(n: int = E) -> Tensor:
    """Positive edge weights."""
    return (torch.rand(n, generator=rng(2)) + 0.5).requires_grad_()


def attributes(n: int = E, d: int = EDGE) -> Tensor:
    return floats(n, d, seed=3)


def pseudo(n: int = E, dim: int = 2) -> Tensor:
    """Edge coordinates in [0, 1]."""
    return torch.rand(n, dim, generator=rng(4)).requires_grad_()


def types(n: int = E, kinds: int = 3) -> Tensor:
    return torch.randint(0, kinds, (n,), generator=rng(5))


def positions(n: int = N) -> Tensor:
    return floats(n, 3, seed=6)


def batch(n: int = N, graphs: int = 3) -> Tensor:
    """Sorted graph numbers of nodes."""
    return torch.arange(n) * graphs // n


def csr() -> Tensor:
    return to_torch_csr_tensor(edges(), size=(N, N))


def weighted_csr() -> Tensor:
    return to_torch_csr_tensor(edges(), weights().detach(), size=(N, N))


def edge_index() -> EdgeIndex:
    return EdgeIndex(edges(), sparse_size=(N, N)).sort_by("col")[0]


def undirected() -> Tensor:
    both = edges(degree=4)
    return torch.cat([both, both.flip(0)], 1).unique(dim=1).contiguous()


def mlp(fan_in: int, fan_out: int, hidden: int = C, norm: bool = False) -> nn.Sequential:
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(fan_in, hidden), *middle, nn.ReLU(), nn.Linear(hidden, fan_out))


FORMS: dict[str, Callable[[], Tensor]] = {"csr": csr, "weighted csr": weighted_csr, "EdgeIndex": edge_index}
