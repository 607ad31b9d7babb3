"""A gather that is not made is in no way to be told from one that is: whatever a model does with it."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dibit
from dibit.edges import functions
from dibit.edges.deferred import Deferred
from tests.marks import nothing_compressed

pytestmark = nothing_compressed  # where a sum is not computed by edges, nothing is

N, E, D = 60, 500, 16
GENERATOR = torch.Generator().manual_seed(0)
SOURCE, TARGET = torch.randint(0, N, (2, E), generator=GENERATOR)
SCALE = torch.rand(E, 1, generator=GENERATOR)
EXACT = {"lin": None, "*": "default"}


def total(messages: Tensor, out: Tensor | None = None) -> Tensor:
    out = messages.new_zeros(N, *messages.shape[1:]) if out is None else out
    return out.scatter_add_(0, TARGET[:, None].expand_as(messages), messages)


def most(messages: Tensor, out: Tensor | None = None, **more: Any) -> Tensor:
    """The maximum, or what was there."""
    out = messages.new_zeros(N, *messages.shape[1:]) if out is None else out
    return out.scatter_reduce_(0, TARGET[:, None].expand_as(messages), messages, "amax", include_self=False, **more)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * -5


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * -3


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def _hooked(x_j: Tensor, hook: Callable[[Tensor], Any]) -> Tensor:
    x_j.register_hook(hook)
    return x_j


def _retained(x_j: Tensor) -> Tensor:
    x_j.retain_grad()
    y = total(x_j)
    return y + y.detach()


def _changed(x_j: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    change(x_j)
    return total(x_j)


def _changed_after_use(x_j: Tensor) -> Tensor:
    y = x_j * SCALE
    x_j.mul_(3)
    return total(y) + total(x_j)


def _view_of(x_j: Tensor) -> Tensor:
    part = x_j[:, :4]
    x_j.add_(1)
    return F.pad(total(part), (0, D - 4))


def _dropped(x_j: Tensor) -> Tensor:
    out = torch.zeros(N, D)
    total(x_j, out)
    return out


def _view_of_the_sum(x_j: Tensor) -> Tensor:
    out = torch.zeros(N, D)
    seen = out.view(-1)
    total(x_j, out)
    return seen.view(N, D)


def _into_a_view(x_j: Tensor) -> Tensor:
    out = torch.zeros(2, N, D)
    total(x_j, out[1])
    return out.sum(0)


def _no_grad(x_j: Tensor) -> Tensor:
    with torch.no_grad():
        constant = total(x_j)
        scaled = x_j * 2
    return total(x_j) + constant + total(scaled)


def _constant(program: Callable[[Tensor], Tensor], x_j: Tensor) -> Tensor:
    with torch.no_grad():
        return program(x_j)


def _inner(x_j: Tensor) -> Tensor:
    return total(x_j) + torch.autograd.grad((x_j[:5] * 2).sum(), x_j, retain_graph=True)[0].sum().detach()


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * 2 + 1


PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": total,
    "scaled": lambda j: total(j * SCALE),
    "scaled from the left": lambda j: total(SCALE * j),
    "scaled twice": lambda j: total(SCALE * (j * SCALE)),
    "scaled by itself": lambda j: total(j * j),
    "two sums": lambda j: total(j) + total(j * SCALE) * 2,
    "index_add": lambda j: torch.zeros(N, D).index_add_(0, TARGET, j),
    "index_add of another factor": lambda j: torch.zeros(N, D).index_add_(0, TARGET, j, alpha=2),
    "functional": lambda j: torch.zeros(N, D).scatter_add(0, TARGET[:, None].expand(E, D), j),
    "into numbers": lambda j: total(j, torch.linspace(-1, 1, N * D).view(N, D).clone()),
    "into a gradient": lambda j: total(j, j.new_ones(N, D) * j.mean()),
    "result dropped": _dropped,
    "view of the sum": _view_of_the_sum,
    "into a view": _into_a_view,
    "other index": lambda j: torch.zeros(N, D).scatter_add_(0, (TARGET[:, None] + torch.arange(D)) % N, j),
    "along features": lambda j: torch.zeros(E, 4).scatter_add_(1, torch.arange(D).expand(E, D) % 4, j),
    "maximum": most,
    "maximum and sum": lambda j: most(j) + total(j),
    "maximum of equals": lambda j: most(j.detach() * 0 + j.sign()) + most(j.sign()),
    "maximum into numbers": lambda j: most(j, torch.linspace(-1, 1, N * D).view(N, D).clone()),
    "maximum that counts those": lambda j: torch.zeros(N, D).scatter_reduce_(
        0, TARGET[:, None].expand(E, D), j, "amax"
    ),
    "maximum into a gradient": lambda j: total(j * SCALE).scatter_reduce_(
        0, (TARGET // 2)[:, None].expand(E, D), j, "amax", include_self=False
    ),
    "minimum, functional": lambda j: torch.scatter_reduce(
        torch.ones(N, D), 0, TARGET[:, None].expand(E, D), j, "amin", include_self=False
    ),
    "minimum by a method": lambda j: torch.ones(N, D).scatter_reduce(
        dim=0, index=TARGET[:, None].expand(E, D), src=j, reduce="amin", include_self=False
    ),
    "maximum into a result": lambda j: (
        torch.scatter_reduce(
            torch.ones(N, D),
            0,
            TARGET[:, None].expand(E, D),
            j.detach(),
            "amax",
            include_self=False,
            out=torch.empty(0),
        )
        + total(j)
    ),
    "maximum dropped": lambda j: (lambda out: (most(j, out), out)[1])(torch.zeros(N, D)),
    "maximum of a product": lambda j: most(j * SCALE),
    "maximum, hooked": lambda j: most(_hooked(j, lambda grad: grad * 3)),
    "maximum, then its own gather": lambda j: most(most(j)[TARGET]),
    "maximum under no_grad": lambda j: _constant(most, j) + total(j),
    "function": lambda j: total(Reversed.apply(j)),
    "function that gives it back": lambda j: total(Same.apply(j)),
    "function that saves it": Saving.apply,
    "function beside torch": lambda j: total(Reversed.apply(j)) + total(j + 1) + total(j * SCALE),
    "function of a product": lambda j: total(Reversed.apply(j * SCALE)),
    "checkpoint": lambda j: checkpoint(lambda a: total(a * 2), j, use_reentrant=False),
    "reentrant checkpoint": lambda j: checkpoint(lambda a: total(a * 2), j, use_reentrant=True),
    "hook": lambda j: total(_hooked(j, lambda grad: grad * 3)),
    "hook on a product": lambda j: total(_hooked(j * SCALE, lambda grad: grad * 3)),
    "hook, then a product": lambda j: total(_hooked(j, lambda grad: grad * 3) * SCALE),
    "retained": _retained,
    "changed": lambda j: _changed(j, lambda x: x.mul_(2)),
    "changed by an operator": lambda j: _changed(j, lambda x: x.__iadd__(1)),
    "changed by relu": lambda j: _changed(j, lambda x: F.relu(x, inplace=True)),
    "changed in part": lambda j: _changed(j, lambda x: x.__setitem__(slice(0, 9), 1.0)),
    "changed after use": _changed_after_use,
    "changed under a view": _view_of,
    "no_grad": _no_grad,
    "detached": lambda j: total(j.detach() * 2) + total(j),
    "indexed": lambda j: total(j[:, :8].repeat(1, 2)),
    "masked": lambda j: torch.zeros(N, D).index_add_(0, TARGET[SCALE[:, 0] > 0.5], j[SCALE[:, 0] > 0.5]),
    "list": lambda j: total(torch.cat([j, j * 2], -1)[:, 4 : D + 4]),
    "stacked": lambda j: total(torch.stack((j, j)).sum(0)),
    "einsum": lambda j: total(torch.einsum("ij,jk->ik", j, torch.eye(D))),
    "double": lambda j: total(j.double()).float(),
    "numpy": lambda j: total(j) + float(j.detach().numpy().sum()),
    "tolist": lambda j: total(j) + j.tolist()[0][0],
    "printed": lambda j: total(j) + len(repr(j)[:3]),
    "copied": lambda j: total(copy.deepcopy(j.detach())) + total(j),
    "saved": lambda j: total(j) + torch.load(_file(j)).sum(),
    "script": lambda j: total(scripted(j)),
    "script, then torch": lambda j: total(scripted(j)) + total(j * SCALE),
    "script, then a sum": lambda j: total(scripted(j)) + total(j),
    "script of a product, then a sum": lambda j: (lambda m: total(scripted(m)) + total(m))(j * SCALE),
    "hook, then a change": lambda j: _changed(_hooked(j, lambda grad: grad * 3), lambda x: x.mul_(2)),
    "vmap": lambda j: total(torch.vmap(lambda row: row * 2)(j)),
    "aten": lambda j: total(torch.ops.aten.mul.Tensor(j, j)),
    "gradient inside": _inner,
    "shapes": lambda j: total(j) * (j.size(0) + j.dim() + len(j) + j.shape[1] + j.numel() + j.stride(0)),
    "iterated": lambda j: total(j) + sum(row.sum() for row in list(j)[:3]),
    "compared": lambda j: total(j * (j > 0)),
    "softmax": lambda j: total(j.softmax(0)),
    "pickled type": lambda j: total(j) * isinstance(j, Tensor),
}


def _file(x: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(x.detach(), file)
    file.seek(0)
    return file


class Model(nn.Module):
    def __init__(self, program: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lin, self.program, self.gather = nn.Linear(D, D), program, gather

    def forward(self, x: Tensor) -> Tensor:
        return self.program(self.gather(self.lin(x)))


def outcome(model: nn.Module) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    y = model(torch.linspace(-1, 1, N * D).view(N, D))
    y.square().sum().backward()
    return y.detach(), model.lin.weight.grad  # type: ignore[union-attr,return-value]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROGRAMS)
def test_outcome_is_the_plain_one(name: str) -> None:
    model = Model(PROGRAMS[name], lambda x: x.index_select(0, SOURCE))
    y, grad = outcome(model)
    seen: list[type] = []
    model.gather = lambda x: seen.append(type(found := x.index_select(0, SOURCE))) or found  # type: ignore[func-returns-value]
    own_y, own_grad = outcome(
        dibit.compress(model, None if name in ("scaled by itself", "aten", "compared") else EXACT)
    )
    assert torch.equal(own_y, y)
    assert torch.allclose(own_grad, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
    assert seen == [Deferred] or model is None or name in ("scaled by itself", "aten", "compared")


class TestSourceChanges:
    """What was gathered is a copy in plain torch."""

    def run(self, program: Callable[[Tensor], Tensor]) -> None:
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(D, D)

            def forward(self, x: Tensor) -> Tensor:
                return program(self.lin(x) * 1.0)

        model = Own()
        y, grad = outcome(model)
        own_y, own_grad = outcome(dibit.compress(model, EXACT))
        assert torch.equal(own_y, y)
        assert torch.allclose(own_grad, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))

    def test_the_source(self) -> None:
        def program(x: Tensor) -> Tensor:
            x_j = x.index_select(0, SOURCE)
            x.mul_(2)
            return total(x_j) + x

        self.run(program)

    def test_the_source_of_a_product(self) -> None:
        def program(x: Tensor) -> Tensor:
            messages = x.index_select(0, SOURCE) * SCALE
            x.mul_(2)
            return total(messages) + x

        self.run(program)

    def test_the_factor(self) -> None:
        def program(x: Tensor) -> Tensor:
            scale = SCALE.clone()
            messages = x.detach().index_select(0, SOURCE) * scale  # with a gradient plain torch refuses
            scale.zero_()
            return total(messages) + x

        self.run(program)

    def test_the_index(self) -> None:
        def program(x: Tensor) -> Tensor:
            source = SOURCE.clone()
            x_j = x.detach().index_select(0, source)
            source.zero_()
            return total(x_j) + x

        self.run(program)

    def test_through_numpy(self) -> None:
        def program(x: Tensor) -> Tensor:
            x_j = x.index_select(0, SOURCE)
            x.detach().numpy()[:] = 0
            return total(x_j)

        self.run(program)


def test_what_is_returned_is_a_plain_tensor() -> None:
    model = Model(lambda j: j, lambda x: x.index_select(0, SOURCE))
    y, grad = outcome(model)
    dibit.compress(model, EXACT)
    found = model(torch.linspace(-1, 1, N * D).view(N, D))
    assert type(found) is Tensor
    assert torch.equal(found, y)
    own_y, own_grad = outcome(model)
    assert torch.equal(own_y, y)
    assert torch.allclose(own_grad, grad, rtol=1e-5)


def test_what_outlives_the_pass_has_the_content_of_the_pass() -> None:
    kept: list[Tensor] = []

    def program(x_j: Tensor) -> Tensor:
        kept.append(x_j)
        return total(x_j)

    model = Model(program, lambda x: x.index_select(0, SOURCE))
    dibit.compress(model, EXACT)
    x = torch.randn(N, D)
    model(x).sum()
    expected = F.linear(x, model.lin.weight, model.lin.bias)[SOURCE]
    with torch.no_grad():
        model.lin.weight.zero_()
    assert torch.equal(kept[0] + 0, expected)
    assert "Deferred" not in repr(kept[0])


def test_a_hook_on_what_was_summed_up_already_says_so() -> None:
    def program(x_j: Tensor) -> Tensor:
        y = total(x_j)
        x_j.register_hook(lambda grad: grad)
        return y

    model = Model(program, lambda x: x.index_select(0, SOURCE))
    with pytest.raises(RuntimeError, match="ask right after the gather"):
        dibit.compress(model, EXACT)(torch.randn(N, D))


def test_retained_gradients() -> None:
    kept: list[Tensor] = []

    def program(x_j: Tensor) -> Tensor:
        x_j.retain_grad()
        kept.append(x_j)
        return total(x_j)

    model = Model(program, lambda x: x.index_select(0, SOURCE))
    outcome(model)
    outcome(dibit.compress(model, EXACT))
    assert torch.allclose(kept[0].grad, kept[1].grad)  # type: ignore[arg-type]


def test_nothing_of_a_gather_stays() -> None:
    """Neither node features nor what was made: the graph of autograd holds the plan alone."""
    sources: list[weakref.ref[Tensor]] = []

    def gather(x: Tensor) -> Tensor:
        sources.append(weakref.ref(x))
        return x.index_select(0, SOURCE)

    model = Model(lambda j: total(j), gather)
    dibit.compress(model, EXACT)
    y = model(torch.randn(N, D))
    gc.collect()
    assert sources[0]() is None
    y.sum().backward()


@pytest.mark.parametrize(
    ("gather", "deferred"),
    {
        "index_select": (lambda x: x.index_select(0, SOURCE), True),
        "dim from the end": (lambda x: x.index_select(-2, SOURCE), True),
        "brackets": (lambda x: x[SOURCE], True),
        "gather": (lambda x: torch.gather(x, 0, SOURCE[:, None].expand(E, D)), True),
        "negative": (lambda x: x[SOURCE - N], False),
        "mask": (lambda x: x.repeat(9, 1)[: E + 1][torch.arange(E + 1) > 0], False),
        "two": (lambda x: x[SOURCE, :], False),
        "table": (lambda x: x[SOURCE.view(-1, 1)].squeeze(1), False),
        "each its own": (lambda x: x.gather(0, SOURCE[:, None].expand(E, D).contiguous()), False),
        "columns": (lambda x: x.gather(1, SOURCE[:N, None].remainder(D).expand(N, D)).repeat(9, 1)[:E], False),
    }.values(),
)
def test_ways_to_gather(gather: Callable[[Tensor], Tensor], deferred: bool) -> None:
    model, seen = Model(total, gather), []
    y, grad = outcome(model)
    model.gather = lambda x: seen.append(type(found := gather(x))) or found  # type: ignore[func-returns-value]
    own_y, own_grad = outcome(dibit.compress(model, EXACT))
    assert seen == [Deferred if deferred else Tensor]
    assert torch.equal(own_y, y)
    assert torch.allclose(own_grad, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


@nothing_compressed
def test_small_gathers_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "MIN_DEFERRED_ELEMENTS", E * D + 1)
    seen: list[type] = []
    model = Model(lambda j: seen.append(type(j)) or total(j), lambda x: x.index_select(0, SOURCE))  # type: ignore[func-returns-value]
    dibit.compress(model, EXACT)(torch.randn(N, D))
    assert seen == [Tensor]


def test_a_rule_of_the_users_own_is_called() -> None:
    """For what would be deferred, and for what would be done with a deferred tensor."""
    called: list[str] = []
    plain_gather, plain_scatter = torch.Tensor.index_select, torch.Tensor.scatter_add_

    def gather(forward: Any, *args: Any) -> Any:
        called.append("gather")
        return plain_gather(*args)

    def scatter(forward: Any, *args: Any) -> Any:
        called.append("scatter")
        return plain_scatter(*args)

    for function, rule in ((plain_gather, gather), (plain_scatter, scatter)):
        model = Model(total, lambda x: x.index_select(0, SOURCE))
        y, grad = outcome(model)
        own_y, own_grad = outcome(dibit.compress(model, EXACT, rules={function: rule}))
        assert torch.equal(own_y, y)
        assert torch.allclose(own_grad, grad, rtol=1e-5)
    assert called == ["gather", "scatter"]


def test_second_derivatives_through_a_hooked_gather_are_refused() -> None:
    model = Model(lambda j: total(_hooked(j, lambda grad: grad * 3) ** 2), lambda x: x.index_select(0, SOURCE))
    x = torch.randn(N, D, requires_grad=True)
    dibit.compress(model, EXACT)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


@torch.jit.script
def _grown(x: Tensor) -> Tensor:
    return x.add_(1.0)


def _in_a_thread(x: Tensor) -> None:
    thread = threading.Thread(target=lambda: x.detach().add_(1))
    thread.start()
    thread.join()


@pytest.mark.parametrize("write", [_grown, _in_a_thread], ids=["TorchScript", "thread"])
def test_a_write_that_nobody_sees_is_a_sentence(write: Callable[[Tensor], Any]) -> None:
    def program(h: Tensor) -> Tensor:
        x_j = h[SOURCE]
        write(h)
        return total(x_j)

    model = dibit.compress(Model(program, lambda x: x * 1), EXACT)
    with pytest.raises(RuntimeError, match="changed after a gather had read them and before it was used"):
        model(torch.randn(N, D))


@pytest.mark.parametrize("what", ["x", "index", "factor"])
def test_what_numpy_holds_is_gathered_at_once(what: str) -> None:
    def program(h: Tensor) -> Tensor:
        held = {"x": h.detach().clone(), "index": SOURCE.clone(), "factor": SCALE.clone()}
        array = held[what].numpy()
        messages = (held["x"] if what == "x" else h)[held["index"]] * held["factor"]
        array[:] = 0
        return total(messages) + h

    model = Model(program, lambda x: x * 1)
    y, grad = outcome(model)
    own_y, own_grad = outcome(dibit.compress(model, EXACT))
    assert torch.equal(own_y, y)
    if what != "index":  # plain torch's gradient then goes to node 0
        assert torch.allclose(own_grad, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_detached_in_place() -> None:
    def program(h: Tensor) -> Tensor:
        x_j = h[SOURCE]
        return total(x_j.detach_()) + h

    model = Model(program, lambda x: x * 1)
    y, grad = outcome(model)
    own_y, own_grad = outcome(dibit.compress(model, EXACT))
    assert torch.equal(own_y, y)
    assert torch.allclose(own_grad, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
