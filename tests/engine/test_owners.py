"""Tensors of somebody else's that change: between the passes, within the forward pass, seen and unseen.

Plain torch keeps the copy that an operation made, and is right. Every case here compares with it, over the readers that
copy, the ways to change a tensor, the places where it may be, and the passes before.
"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn import GCN, GraphSAGE

import dibit
from dibit import Config
from dibit.api import state_of
from tests.marks import nothing_compressed

N, D = 300, 16  # 19 kB: large enough to be computed again rather than kept
READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "t[i]": lambda t, i: t[i],
    "index_select": lambda t, i: t.index_select(0, i),
    "times 2": lambda t, i: t * 2,
    "exp": lambda t, i: (t * 0.1).exp(),
    "relu": lambda t, i: F.relu(t),
    "cat": lambda t, i: torch.cat([t[:100], t[:200]]),
    "rows, then where": lambda t, i: torch.where(t[i] > 0, t[i], t * 0.5),
    "broadcast row": lambda t, i: (t[:1] + 0).expand(N, D) + t[i],
    "view, then sum": lambda t, i: t.view(N, 4, 4).transpose(1, 2).reshape(N, D) + t,
    "scattered": lambda t, i: torch.zeros(N, D).index_add_(0, i, t),
}


def by_data(t: Tensor) -> None:
    t.data.mul_(0.5)


def by_numpy(t: Tensor) -> None:
    t.detach().numpy()[::2] *= 0.5


def by_dlpack(t: Tensor) -> None:
    torch.from_dlpack(t.detach()).add_(1)


def in_place(t: Tensor) -> None:
    with torch.no_grad():
        t[3:200] = 1.0


def out_of(t: Tensor) -> None:
    with torch.no_grad():
        torch.add(t, 1, out=t.detach())


def by_an_optimiser(t: Tensor) -> None:
    given = t if t.requires_grad else t.detach().requires_grad_()
    given.grad = torch.ones_like(t)
    torch.optim.SGD([given], lr=0.3).step()
    given.grad = None


CHANGE = [by_data, by_numpy, by_dlpack, in_place, out_of, by_an_optimiser]
PLACES = ["buffer", "parameter", "attribute", "list", "argument", "closure"]


class Reader(nn.Module):
    """y = out(lin(x) * read(t)), t in one of many places; it may change as soon as it was read."""

    def __init__(self, place: str, read: str, within: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.lin, self.out, self.read, self.within = nn.Linear(D, D), nn.Linear(D, D), READ[read], within
        t = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
        if place == "buffer":
            self.register_buffer("t", t)
        elif place == "parameter":
            self.t = nn.Parameter(t)
        elif place == "attribute":
            self.t = t
        elif place == "list":
            self.kept = [t]
        else:
            self.__dict__["given"] = {"t": t}  # in a dictionary: not seen as the model's
        self.place = place

    def tensor(self) -> Tensor:
        if self.place == "list":
            return self.kept[0]
        return self.given["t"] if self.place in ("argument", "closure") else self.t

    def forward(self, x: Tensor, index: Tensor, t: Tensor | None = None) -> Tensor:
        t = self.tensor() if t is None else t
        seen = self.read(t, index)
        if self.within is not None:
            self.within(t)
        return self.out(self.lin(x) * seen)


def gradient(model: Reader, between: Callable[[Tensor], None] | None) -> Tensor:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(3))
    index = torch.randint(N, (N,), generator=torch.Generator().manual_seed(4))
    weight = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    t = model.tensor()
    before = t.detach().clone()
    try:
        y = model(x, index, t) if model.place == "argument" else model(x, index)
        if between is not None:
            between(t)
        (y * weight).sum().backward()
    finally:
        t.data.copy_(before)
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None])


# 8 bits and small blocks: the factor is the only thing that is lossy here, and hardly so
FINE: Any = {"lin": None, "out": None, "*": Config(bits=8, block=16, norm=Config(bits=8))}


def pair(place: str, read: str, within: Callable[[Tensor], None] | None = None) -> tuple[Reader, Reader]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Reader(place, read, within).train())
    return models[0], dibit.compress(models[1], FINE)


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 0.02 * b.norm())


def of_plain(model: Reader, change: Callable[[Tensor], None]) -> Tensor:
    try:
        return gradient(model, change)
    except RuntimeError:
        reject()  # plain torch has saved the tensor itself, and has noticed


@given(
    place=st.sampled_from(PLACES),
    read=st.sampled_from(list(READ)),
    change=st.sampled_from(CHANGE),
    passes=st.integers(1, 3),
)
@settings(deadline=None, max_examples=120, derandomize=True)
def test_changed_between_the_passes(place: str, read: str, change: Callable[[Tensor], None], passes: int) -> None:
    plain, model = pair(place, read)
    wanted = of_plain(plain, change)
    for _ in range(passes):
        assert near(gradient(model, change), wanted)


@given(
    place=st.sampled_from(PLACES),
    read=st.sampled_from(list(READ)),
    change=st.sampled_from(CHANGE),
    quiet=st.integers(1, 2),
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_changed_for_the_first_time_in_a_later_pass(
    place: str, read: str, change: Callable[[Tensor], None], quiet: int
) -> None:
    plain, model = pair(place, read)
    calm, wanted = gradient(plain, None), of_plain(plain, change)
    for _ in range(quiet):
        assert near(gradient(model, None), calm)
    assert near(gradient(model, change), wanted)
    assert near(gradient(model, None), calm)


@pytest.mark.parametrize("root_weight", [True, False])
def test_a_layer_that_reads_its_features_too(root_weight: bool) -> None:
    """Then the plain gradient rests on the features themselves; else they may change as soon as they were summed."""
    torch.manual_seed(0)
    x, kept = torch.randn(N, D), []
    matrix = torch.rand(N, N).lt(0.05).float().to_sparse_csr()
    plain = GraphSAGE(D, D, 2, D, root_weight=root_weight).train()
    model = dibit.compress(copy.deepcopy(plain), Config(bits=8, block=16))

    def run(of: nn.Module) -> Tensor:
        of.zero_grad()
        y = of(x, matrix)
        if not root_weight:
            before = x.clone()
            x.data.mul_(0.5)
        y.square().sum().backward()
        if not root_weight:
            x.copy_(before)
        return torch.cat([p.grad.flatten() for p in of.parameters()])

    wanted = run(plain)
    for _ in range(3):
        with dibit.track(model) as saved:
            assert near(run(model), wanted)
        kept.append([row.how for row in saved.rows if row.module == "convs.0.lin_l"])
    assert ("aggregate of the source" in kept[-1]) == root_weight


@given(place=st.sampled_from(PLACES), read=st.sampled_from(list(READ)), change=st.sampled_from(CHANGE))
@settings(deadline=None, max_examples=80, derandomize=True)
@nothing_compressed
def test_changed_by_the_model_itself_after_it_was_read(place: str, read: str, change: Callable[[Tensor], None]) -> None:
    plain, model = pair(place, read, change)
    try:
        wanted = gradient(plain, None)
    except RuntimeError:
        reject()
    for _ in range(3):
        assert near(gradient(model, None), wanted)


def test_an_unchanged_graph_costs_nothing_from_the_second_pass_on() -> None:
    model = dibit.compress(GCN(D, D, 2, D).train())
    x, edge_index, kept = torch.randn(N, D), torch.randint(N, (2, 10 * N)), []
    for _ in range(3):
        with dibit.track(model) as saved:
            model(x, edge_index).sum().backward()
        kept.append(sum(row.kept for row in saved.rows if row.operation in ("index_select", "mul", "scatter_add_")))
    assert kept[0] > 2 * edge_index.numel()
    assert kept[1:] == [0, 0]
    steady = state_of(model).history.steady  # type: ignore[union-attr]
    assert steady["tensor 1 among the arguments of 'GCN'"]
    assert torch.save(dibit.scores(model).state_dict(), io.BytesIO()) is None
    assert any(key.startswith("steady/") for key in dibit.scores(model).state_dict())


def test_a_small_part_of_a_large_changing_tensor_is_what_is_kept() -> None:
    """Not a copy of the whole of it."""

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(D, D)
            self.register_buffer("bank", torch.randn(200_000, D))

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            y = self.lin(x) * self.bank[index]
            self.bank[index] = y.detach()
            return y

    model = dibit.compress(Bank().train())
    for _ in range(2):
        with dibit.track(model) as saved:
            model(torch.randn(N, D), torch.randperm(200_000)[:N]).sum().backward()
        assert saved.total <= 2 * N * D * 4


@nothing_compressed
def test_what_the_model_returns_may_change() -> None:
    """Plain torch keeps the exponentials; what they are computed again from is handed out and written to."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(D, D)

        def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.lin(x).sum(1) * 0.1
            self.last = scores.detach()
            return scores.index_select(0, index).exp(), scores.detach()

    x, index = torch.randn(N, D), torch.randint(N, (5000,))
    found = []
    for setting in (None, FINE):
        torch.manual_seed(0)
        model = Scores().train()
        if setting:
            dibit.compress(model, {"lin": None, "*": "default"})
            model(x, index)[0].sum().backward()  # shows that the index is the same still in the backward pass
        for attribute in (False, True):
            model.zero_grad()
            y, scores = model(x, index)
            (model.last if attribute else scores).zero_()
            y.sum().backward()
            found.append(model.lin.weight.grad.clone())  # type: ignore[union-attr]
    assert all(torch.allclose(g, found[0], rtol=1e-4) for g in found[1:])


@pytest.mark.parametrize("make", [torch.zeros, torch.ones, lambda *s: torch.full(s, 2.0), torch.empty])
@pytest.mark.parametrize("through", ["numpy", "data", "dlpack", "out of sight"])
def test_filled_from_outside(make: Callable[..., Tensor], through: str) -> None:
    """A buffer made in the pass and filled by a kernel that torch does not see, in a Function or in the open."""

    def fill(out: Tensor, x: Tensor) -> None:
        if through == "data":
            out.data.copy_(2 * x)
        elif through == "dlpack":
            torch.from_dlpack(out.detach()).copy_(2 * x)
        elif through == "numpy":
            out.numpy()[:] = 2 * x.numpy()
        else:
            with torch._C.DisableTorchFunction():  # as a kernel in C++ does
                out.data.copy_(2 * x)

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            out = make(*x.shape)
            fill(out, x)
            return out

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return 2 * dy

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.out = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            h = Kernel.apply(self.lin(x))
            beside = make(*x.shape)
            fill(beside, x)
            return self.out(h * (beside * 1.5))

    x = torch.randn(1000, D)
    grads = []
    for setting in (None, FINE):
        torch.manual_seed(0)
        model = Model().train()
        if setting:
            dibit.compress(model, setting)
        model(x).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    assert near(grads[1], grads[0])


@given(
    first=st.sampled_from(["ones", "zeros"]),
    writes=st.sampled_from(["data", "numpy", "kernel", "in place"]),
    size=st.sampled_from([16, 600, 2000]),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_equal_constants_stay_apart(first: str, writes: str, size: int) -> None:
    """One of two tensors of the same content is written to; the other, kept for the backward pass, is what it was."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = getattr(torch, first)(size) + 0, getattr(torch, first)(size) + 0
            y = x * a
            z = x.sin() * b
            if writes == "data":
                a.data.add_(3)
            elif writes == "numpy":
                a.numpy()[:] += 3
            elif writes == "kernel":
                F.batch_norm(torch.randn(8, size), a, torch.ones(size), training=True)
            else:
                a.add_(3)
            return z if writes == "in place" else y * 0 + z

    x = torch.randn(20, size, requires_grad=True)
    grads = []
    for setting in (None, FINE):
        model = Model().train()
        if setting:
            dibit.compress(model, "default")
        grads.append(torch.autograd.grad(model(x).sum(), x)[0])
    assert near(grads[1], grads[0])


def test_losses_without_a_backward_pass_are_freed() -> None:
    """What a hook keeps must not hold the graph that it belongs to: a cycle that the collector cannot see."""
    operations: list[Callable[[Tensor], Tensor]] = [
        lambda h: h.softmax(-1),
        F.normalize,
        lambda h: h / h.norm(dim=-1, keepdim=True),
        lambda h: h.sigmoid().cumprod(-1),
        lambda h: h / h.std(),
        lambda h: h - h.logsumexp(-1, keepdim=True),
        lambda h: h.amax(-1),
        lambda h: h.tanh().prod(-1),
        lambda h: h.cummax(0)[0],
        lambda h: h.svd()[1],
        lambda h: nn.LSTM(D, D)(h)[0],
        lambda h: nn.GRU(D, D)(h)[0],
        lambda h: h.log_softmax(-1),
        torch.sigmoid,
        torch.exp,
        torch.tanh,
        F.gelu,
        F.elu,
        lambda h: h.abs().sqrt(),
        lambda h: 1 / h,
        F.dropout,
        F.relu,
    ]

    class Model(nn.Module):
        def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.lin, self.body = nn.Linear(D, D), body

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.lin(x))

    x = torch.randn(60, D)
    gc.freeze()  # what is there already is not looked through again and again
    for body in operations:
        model = dibit.compress(Model(body).train())
        counts = []
        for step in range(8):
            model(x)
            if step in (2, 7):
                gc.collect()
                counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
        assert counts[1] <= counts[0], body
    gc.unfreeze()
