"""Rows that the loss cannot reach are not kept, and nobody can tell by the gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import SAGEConv
from torch_geometric.utils import to_torch_csr_tensor

import dibit
from dibit import Config, Sample
from dibit.api import state_of
from dibit.codec.row_sampling import LEFT_OUT
from dibit.rules.elementwise import POINTWISE
from tests.rules.domains import MORE, into_domain
from tests.unbiased import bias_of

N, D = 300, 16
EXACT = Config(bits=8, block="row", stats=torch.float32, reduce=None, rounding="nearest")


def chain() -> Tensor:
    """i hears from i - 1: the loss on row 20 reaches back as many rows as there are aggregations."""
    return to_torch_csr_tensor(torch.stack((torch.arange(N - 1), torch.arange(1, N))), size=(N, N)).t().to_sparse_csr()


class Net(nn.Module):
    """Three SAGE layers; `norm` between them."""

    def __init__(self, norm: Any = nn.Identity) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Linear(D, D)
        self.convs = nn.ModuleList(SAGEConv(D, D) for _ in range(3))
        self.norms = nn.ModuleList(norm(D) if norm is not nn.Identity else norm() for _ in range(2))
        self.way = 0

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = self.start(x)  # the features themselves are kept by reference, exact anyway
        for conv, norm in zip(self.convs, [*self.norms, None], strict=True):
            x = conv(x, adjacency)
            if norm is not None:
                x = F.dropout(norm(x).relu(), 0.5, self.training)
        if self.way == 1:
            x = x + x.mean(0)
        if self.way == 2:
            x = self.convs[2](x, adjacency)
        return x


def kept_rows(net: nn.Module, x: Tensor, a: Tensor, rows: Tensor) -> dict[str, int]:
    """By layer, how many rows its residual has that are not left out."""
    found = {}

    def observe(module: str, operation: str, value: Tensor, packed: Any) -> None:
        if "linear" in operation:
            found[module] = N if packed.scores is None else int((packed.scores != LEFT_OUT).sum())

    state = state_of(net)
    assert state is not None
    state.observer = observe
    with dibit.batch(net, loss_rows=rows):
        F.cross_entropy(net(x, a)[rows], torch.zeros(len(rows), dtype=torch.long)).backward()
    state.observer = None
    return found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, D, requires_grad=True), chain(), torch.tensor([20, 100])


def test_rows_are_left_out_from_the_second_pass_on() -> None:
    x, a, rows = inputs()
    net = dibit.compress(Net(), Config(reduce=Sample(2)))
    first = kept_rows(net, x, a, rows)
    assert set(first.values()) == {N}
    # the last layer's own input enters its row and, aggregated, the next: two rows for each row of the loss
    assert kept_rows(net, x, a, rows) == {"convs.0.lin_l": 8, "convs.1.lin_l": 6, "convs.2.lin_l": 4}


@pytest.mark.parametrize(
    ("norm", "expected"), [(nn.BatchNorm1d, {N, 4}), (nn.LayerNorm, {8, 6, 4}), (nn.Identity, {8, 6, 4})]
)
def test_what_mixes_rows_lets_all_be_reached(norm: Any, expected: set[int]) -> None:
    x, a, rows = inputs()
    net = dibit.compress(Net(norm), Config(reduce=Sample(2)))
    kept_rows(net, x, a, rows)
    assert set(kept_rows(net, x, a, rows).values()) == expected


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.Identity])
@pytest.mark.parametrize("by", ["uniform", "norm", "gradient"])
@pytest.mark.statistics
def test_gradient_is_unbiased(norm: Any, by: str) -> None:
    x, a, rows = inputs()
    plain = Net(norm)
    config = Config(bits=8, block=64, reduce=Sample(2, by=by), dropout="mask")  # type: ignore[arg-type]
    net = dibit.compress(copy.deepcopy(plain), config)
    y = torch.arange(len(rows))

    def gradient(model: nn.Module, seed: int = 0) -> Tensor:
        model.zero_grad()
        state = state_of(model)
        if state is not None:
            state.salt = seed
        torch.manual_seed(0)  # the same dropout
        with dibit.batch(model, loss_rows=rows):
            F.cross_entropy(model(x, a)[rows], y).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    truth = gradient(plain)
    gradient(net)
    bias = bias_of(lambda i: gradient(net, i + 1), truth, 300)
    assert bias.unbiased, bias


def test_without_a_reduction_it_is_exact_and_free() -> None:
    x, a, rows = inputs()
    plain = Net()
    net = dibit.compress(copy.deepcopy(plain), Config(bits=8, block=1, stats=torch.float32, dropout="mask"))
    totals = []
    for _ in range(2):
        with dibit.track(net) as saved:
            kept_rows(net, x, a, rows)
        totals.append(saved.total)
    assert totals[1] < totals[0] / 5
    grads = []
    for model in (plain, net):
        model.zero_grad()
        torch.manual_seed(0)
        with dibit.batch(model, loss_rows=rows):
            F.cross_entropy(model(x, a)[rows], torch.zeros(len(rows), dtype=torch.long)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-7), "a block of one element is exact: no row is missing"


@pytest.mark.parametrize("way", [1, 2])
def test_a_model_that_takes_another_way_is_told(way: int) -> None:
    x, a, rows = inputs()
    net = dibit.compress(Net(), Config(reduce=Sample(2)))
    kept_rows(net, x, a, rows)
    net.way = way
    with pytest.raises(RuntimeError, match="differ from those of the pass before"):
        kept_rows(net, x, a, rows)
    kept_rows(dibit.compress(net, Config(reduce=Sample(2))), x, a, rows)  # from the start on it is its way
    found = kept_rows(net, x, a, rows)
    assert found["convs.1.lin_l"] == (N if way == 1 else 8)
    assert found["convs.2.lin_l"] == (N if way == 1 else 4)


class Headed(nn.Module):
    """Two SAGE layers, an element-wise function and a Linear."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.start, self.a, self.b = nn.Linear(D, D), SAGEConv(D, D), SAGEConv(D, D)
        self.act, self.c = Called(name), nn.Linear(D, D)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.a(self.start(x), adjacency), adjacency)))


class Called(nn.Module):
    """A function of torch by its name, on what it is defined for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.slope = name, nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        function = getattr(torch, self.name, getattr(F, self.name, None))
        more = (self.slope,) if self.name == "prelu" else MORE.get(self.name, ())
        return function(into_domain(self.name, x), *more)  # type: ignore[misc]


@pytest.mark.parametrize("act", [None, "*"], ids=["without its rule", "with it"])
@pytest.mark.parametrize("name", [*POINTWISE, "relu", "leaky_relu", "prelu"])
def test_an_element_wise_function_stays_in_its_row(name: str, act: str | None) -> None:
    x, a, rows = inputs()
    config = Config(reduce=Sample(2))
    net = dibit.compress(Headed(name), {"act": config if act else None, "*": config})
    kept_rows(net, x, a, rows)
    found = kept_rows(net, x, a, rows)
    assert (found["a.lin_l"], found["b.lin_l"]) == (6, 4)


def test_the_weight_of_a_prelu_has_its_gradient_from_the_rows_that_are_reached() -> None:
    """PReLU keeps its own input for it; a block of one element is exact, so that no row may be missing."""
    x, a, rows = inputs()
    net = Headed("prelu")
    grads = []
    for model in (net, dibit.compress(copy.deepcopy(net), Config(bits=8, block=1, stats=torch.float32))):
        for _ in range(2):
            model.zero_grad()
            with dibit.batch(model, loss_rows=rows):
                F.cross_entropy(model(x, a)[rows], torch.zeros(len(rows), dtype=torch.long)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)


def test_masks_and_other_rows() -> None:
    x, a, rows = inputs()
    net = dibit.compress(Net(), Config(reduce=Sample(2)))
    mask = torch.zeros(N, dtype=torch.bool)
    mask[rows] = True
    kept_rows(net, x, a, rows)
    with dibit.batch(net, loss_rows=mask):
        net(x, a)
    assert kept_rows(net, x, a, rows)["convs.2.lin_l"] == 4
    assert kept_rows(net, x, a, torch.tensor([5]))["convs.2.lin_l"] == 2
    assert kept_rows(net, x, a.clone(), torch.tensor([5]))["convs.0.lin_l"] == 4
    for bad, error, message in (
        ([3], TypeError, "loss_rows of type list; expected an int64 tensor, the rows of the output"),
        (torch.tensor([-3]), ValueError, "negative numbers"),
    ):
        with pytest.raises(error, match=message), dibit.batch(net, loss_rows=bad):  # type: ignore[arg-type]
            pass


def test_copies_and_the_papers_recipes() -> None:
    x, a, rows = inputs()
    net = dibit.compress(Net(), Config(reduce=Sample(2)))
    kept_rows(net, x, a, rows)
    assert kept_rows(copy.deepcopy(net), x, a, rows)["convs.2.lin_l"] == 4
    dibit.compress(net, "iexact")
    for _ in range(2):
        assert set(kept_rows(net, x, a, rows).values()) == {N}, "what the papers keep is kept"


def test_a_part_of_the_model_is_not_its_output() -> None:
    """Layers called one by one: rows of the loss are not rows of what a layer returns."""
    x, a, rows = inputs()
    net = dibit.compress(Net(), Config(bits=8, block=1, stats=torch.float32))
    plain = Net()
    grads = []
    for model in (net, net, plain):
        model.zero_grad()
        with dibit.batch(model, loss_rows=rows):
            h = model.start(x)
            for _ in range(3):
                h = model.convs[0](h, a)
        F.cross_entropy(h[rows], torch.zeros(len(rows), dtype=torch.long)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(grads[1], grads[2], rtol=1e-5, atol=1e-7)


def test_another_matrix_on_the_same_row_pointers() -> None:
    """Both of its tensors identify the pattern."""
    x, a, rows = inputs()

    class Two(Net):
        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            other = torch.sparse_csr_tensor(
                adjacency.crow_indices(), self.col, adjacency.values(), adjacency.shape, check_invariants=False
            )
            return self.convs[1](self.convs[0](self.start(x), other), other)

    net = Two()
    net.register_buffer("col", a.col_indices().flip(0).contiguous())
    dibit.compress(net, Config(reduce=Sample(2)))
    for _ in range(3):
        assert set(kept_rows(net, x, a, rows).values()) == {N}


class Signed(torch.autograd.Function):
    """A user's own row-by-row operation, which says how far its gradient goes."""

    hops: int | None = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.hops = Signed.hops
        ctx.save_for_backward(x.sign())
        return x.abs()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]


class SignedNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.erfc(x)


@pytest.mark.parametrize(("hops", "expected"), [(0, {8, 6, 4}), (None, {N, 4}), (1, {N, 4})])
def test_a_rule_of_the_users_own_says_how_far_its_gradient_goes(
    hops: int | None, expected: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Signed, "hops", hops)  # 1 without a matrix: along edges that nobody knows
    x, a, rows = inputs()
    net = Net(SignedNorm)
    dibit.compress(net, Config(reduce=Sample(2)), rules={torch.erfc: lambda forward, x: Signed.apply(x)})
    kept_rows(net, x, a, rows)
    assert set(kept_rows(net, x, a, rows).values()) == expected
