"""What a pass has made and somebody else holds, may write to, or reads by another way: plain torch kept a copy."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.dlpack import to_dlpack
from torch_geometric.nn import SAGEConv

import dibit
from dibit import Config
from dibit._torch.private.tensors import natively
from dibit.hooks import passes
from tests.engine.test_owners import by_data, by_numpy, in_place

N, D = 2000, 64
CAUGHT: list[Any] = []
EIGHT = Config(bits=8)


class Source(nn.Module):
    """Makes one number a node, from which N x D are computed again rather than kept."""

    reads = False

    def __init__(self, keep: Callable[[Source, Tensor], None] = lambda model, q: None) -> None:
        super().__init__()
        self.first, self.score, self.last = nn.Linear(16, D), nn.Linear(D, 1), nn.Linear(D, 8)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q = self.score(h)
        self.keep(self, q)
        return self.last(torch.cos(q.repeat(1, D)) * h)


KEEP: dict[str, Callable[[Any, Tensor], None]] = {
    "a list": lambda model, q: CAUGHT.append(q),
    "detached": lambda model, q: CAUGHT.append(q.detach()),
    "a view": lambda model, q: CAUGHT.append(q[10:]),
    "an attribute": lambda model, q: CAUGHT.append(setattr(model, "seen", q) or q),
    "an object": lambda model, q: CAUGHT.append(types.SimpleNamespace(q=q).q),
    "numpy": lambda model, q: CAUGHT.append(torch.from_numpy(q.detach().numpy())),
    "dlpack": lambda model, q: CAUGHT.append(torch.from_dlpack(q.detach())),
}


def gradient(model: nn.Module, x: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    CAUGHT.clear()
    model.zero_grad()
    y = model(x)
    change(CAUGHT[0])
    y.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 0.05 * b.norm())


@pytest.mark.parametrize("keep", list(KEEP))
@pytest.mark.parametrize("change", [by_data, by_numpy, in_place])
def test_whoever_holds_it_may_change_it_after_the_pass(keep: str, change: Callable[[Tensor], None]) -> None:
    torch.manual_seed(0)
    plain, x = Source(KEEP[keep]), torch.randn(N, 16)
    model = dibit.compress(copy.deepcopy(plain), EIGHT)
    wanted = gradient(plain, x, change)
    for _ in range(2):
        assert near(gradient(model, x, change), wanted)


def test_what_nobody_holds_is_not_copied() -> None:
    model, x = dibit.compress(Source(), EIGHT), torch.randn(N, 16)
    with dibit.track(model) as free:
        model(x)
    CAUGHT.clear()
    model = dibit.compress(Source(KEEP["a list"]), EIGHT)
    with dibit.track(model) as caught:
        model(x)
    assert free.total <= caught.total < free.total + N * 4 + 1024


class Heads(nn.Module):
    """Features by reference in one head, by copies in the other."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.aux = kind, nn.Linear(16, 4)
        self.conv = SAGEConv(16, 32, root_weight=False) if kind == "aggregated" else nn.Linear(16, 32)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "aggregated":
            return self.conv(x, edges), self.aux(x)
        return self.conv(x[edges[0]] if self.kind == "gathered" else x * 2), self.aux(x)


@pytest.mark.parametrize("kind", ["aggregated", "gathered", "computed"])
@pytest.mark.parametrize("order", ["not in the loss", "its backward pass first"])
@pytest.mark.parametrize("change", [by_data, in_place])
def test_a_reference_that_the_backward_pass_does_not_come_to(
    kind: str, order: str, change: Callable[[Tensor], None]
) -> None:
    """Plain torch does not rest on the features then: its other branch has copies."""
    torch.manual_seed(0)
    plain, features, edges = Heads(kind), torch.randn(400, 16), torch.randint(400, (2, 5000))
    model = dibit.compress(copy.deepcopy(plain), EIGHT)

    def run(of: nn.Module) -> Tensor:
        x = features.clone()
        of.zero_grad()
        y, aux = of(x, edges)
        if order.startswith("its"):
            aux.sum().backward()
        change(x)
        y.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in of.conv.parameters()])  # type: ignore[operator, union-attr]

    wanted = run(plain)
    for _ in range(4):
        assert near(run(model), wanted)


def _by_capsule(q: Tensor) -> None:
    torch.from_dlpack(to_dlpack(q)).fill_(1.0)  # the function was imported before anything was compressed


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "capsule": _by_capsule,
    "fill_, by keyword": lambda q: torch.fill_(input=q, value=1.0),
    "clamp_, by keyword": lambda q: torch.clamp_(input=q, max=0.1),
    "threshold_": lambda q: F.threshold_(input=q, threshold=0.0, value=0.0),
    "max_norm": lambda q: F.embedding(torch.arange(N), q, max_norm=0.1),
    "batch_norm_update_stats": lambda q: torch.batch_norm_update_stats(torch.randn(8, N), q[:, 0], torch.ones(N), 0.5),
    "native_batch_norm": lambda q: torch.ops.aten.native_batch_norm(
        torch.randn(8, N), None, None, q[:, 0], torch.ones(N), True, 0.5, 1e-5
    ),
    "instance_norm, by keyword": lambda q: F.instance_norm(
        torch.randn(2, N, 5), running_mean=q[:, 0], running_var=torch.ones(N), use_input_stats=True
    ),
    **{
        f"{name}, in place": lambda q, name=name: getattr(F, name)(q, inplace=True)
        for name in ("relu", "elu", "silu", "hardtanh", "hardswish", "mish", "selu", "relu6", "leaky_relu", "dropout")
    },
}


class Written(nn.Module):
    """Reads a tensor into N x D numbers, and then writes to it."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.score, self.last, self.write = nn.Linear(16, D), nn.Linear(D, 1), nn.Linear(D, 8), write

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q = self.score(h)
        y = torch.cos(q.repeat(1, D)) * h
        self.write(q.detach())
        return self.last(y)


@pytest.mark.parametrize("write", list(WRITES))
def test_written_to_after_it_was_read(write: str) -> None:
    torch.manual_seed(0)
    plain, x = Written(WRITES[write]), torch.randn(N, 16)
    model = dibit.compress(copy.deepcopy(plain), Config(bits=8, dropout="mask"))
    grads = []
    for of in (plain, model, model):
        torch.manual_seed(1)
        of.zero_grad()
        of(x).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in of.parameters() if p.grad is not None]))
    assert near(grads[1], grads[0])
    assert near(grads[2], grads[0])


def test_a_kernel_that_only_reads_exposes_nothing() -> None:
    """Memory that goes to a kernel which writes elsewhere can still be computed from; memory handed out cannot."""
    exposed: dict[bool, bool] = {}

    def hand_out(model: Source, q: Tensor) -> None:
        active = passes.running()
        assert active is not None
        forward = active.forward_pass
        with forward.writes.reading() if model.reads else contextlib.nullcontext():
            q.detach().numpy()
        exposed[model.reads] = natively(forward.holdings.is_exposed, (q,), {})  # the mode would see it look

    for reads in (True, False):
        model = Source(hand_out)
        model.reads = reads
        dibit.compress(model, EIGHT)(torch.randn(N, 16))
    assert exposed == {True: False, False: True}
