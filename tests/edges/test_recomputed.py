"""Programs on edges under the recipe "lossless": computed again in the backward pass, nothing of them kept."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as g
from torch import Tensor, nn

import dibit
from dibit.edges import programs
from dibit.edges.extremes import HOW
from tests.edges.test_chunks import CHUNK, MODELS, D, E, Largest, N, Net, edge_conv, mlp
from tests.edges.test_sums import ORDERS, graph


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "CHUNK", CHUNK)


def grads(model: nn.Module, *inputs: Tensor, readout: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(*inputs) * readout).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_gradient_are_the_plain_ones(name: str, order: str) -> None:
    """The result in each bit, the gradient up to the order of summation, in each pass."""
    model, x, edge_index = Net(MODELS[name]()).train(), torch.randn(N, D), graph(order)
    own, plain = dibit.compress(copy.deepcopy(model), "lossless"), model(x, edge_index)
    readout = torch.randn_like(plain)
    truth = grads(model, x, edge_index, readout=readout)
    wide = (
        grads(copy.deepcopy(model).double(), x.double(), edge_index, readout=readout.double()) if name in WIDE else {}
    )
    for _ in range(3):
        assert torch.equal(own(x, edge_index), plain)
        found = grads(own, x, edge_index, readout=readout)
        assert found.keys() == truth.keys()
        for each, grad in truth.items():
            exact = wide.get(each, grad).float()
            own_error, error = (found[each] - exact).norm(), (grad - exact).norm()
            assert own_error <= 3 * error + 1e-5 * exact.norm(), each


WIDE = {"EdgeConv sum", "EdgeConv mean", "from target"}  # no ties, and no tensors of a dtype of their own


def test_nothing_of_one_row_an_edge_is_made_or_kept() -> None:
    """In neither pass; of node tensors only the result of the first Linear is kept."""
    x, edge_index = torch.randn(N, D), graph()
    model = dibit.compress(Net(edge_conv("sum", nn.SiLU, norm=True)()).train(), "lossless")
    model(x, edge_index).sum().backward()
    with Largest() as largest:
        model(x, edge_index).sum().backward()
    assert largest.elements < E * D / 4
    with dibit.track(model) as saved:
        model(x, edge_index).sum().backward()
    assert saved.total == N * D * 4
    plain = copy.deepcopy(dibit.decompress(model))
    assert saved.plain == saved_by_torch(plain, x, edge_index)


def saved_by_torch(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the distinct storages that torch saves, without parameters and the inputs."""
    known = {x.untyped_storage()._cdata for x in (*model.parameters(), *inputs)}
    held: list[Tensor] = []

    def count(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in known:
            known.add(x.untyped_storage()._cdata)
            held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        y = model(*inputs)
    return sum(x.untyped_storage().nbytes() for x in held if x.untyped_storage()._cdata != y.untyped_storage()._cdata)


def test_the_winners_of_a_maximum_are_kept() -> None:
    x, edge_index = torch.randn(N, D), graph()
    model = dibit.compress(Net(edge_conv("max")()).train(), "lossless")
    model(x, edge_index).sum().backward()
    with dibit.track(model) as saved:
        model(x, edge_index).sum().backward()
    assert any(HOW in row.how for row in saved.rows)
    assert saved.total < N * D * 4 + N * D * 2


def test_a_graph_is_freed_and_read_twice() -> None:
    x, edge_index = torch.randn(N, D), graph()
    model = dibit.compress(Net(MODELS["mesh"]()).train(), "lossless")
    loss = model(x, edge_index).sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, p in model.named_parameters():
        if name in once:
            assert p.grad is not None
            assert torch.equal(p.grad, 2 * once[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_part_of_the_gradient_is_asked_for() -> None:
    """Frozen weights, features without a gradient, and a result that no gradient reaches."""
    x, edge_index = torch.randn(N, D), graph()
    model = Net(edge_conv("sum", nn.SiLU)()).train()
    for frozen in (["conv.nn.0.weight"], ["lin.weight", "lin.bias"], ["conv.nn.2.weight", "conv.nn.0.bias"]):
        plain = copy.deepcopy(model)
        for name, p in plain.named_parameters():
            p.requires_grad_(name not in frozen)
        own = dibit.compress(copy.deepcopy(plain), "lossless")
        readout = torch.randn(N, D)
        truth, found = (grads(each, x, edge_index, readout=readout) for each in (plain, own))
        assert truth.keys() == found.keys()
        assert all(torch.allclose(found[name], truth[name], rtol=1e-3, atol=1e-4) for name in truth)


def test_a_weight_that_changes_before_the_backward_pass_is_found() -> None:
    x, edge_index = torch.randn(N, D), graph()
    model = dibit.compress(Net(edge_conv("sum", nn.SiLU)()).train(), "lossless")
    loss = model(x, edge_index).sum()
    with torch.no_grad():
        model.conv.nn[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"inplace|in place"):
        loss.backward()


class Overwritten(nn.Module):
    """Writes to what the program read, after it was reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.mlp = nn.Linear(D, D), mlp(2 * D)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h, (source, target) = self.lin(x), edge_index
        message = self.mlp(torch.cat([h[target], h[source]], -1))
        total = torch.zeros(N, D).index_add_(0, target, message)
        with torch.no_grad():
            h.zero_()
        return total


def test_writes_after_the_sum_do_not_reach_the_backward_pass() -> None:
    x, edge_index = torch.randn(N, D), graph()
    model = Overwritten().train()
    own, readout = dibit.compress(copy.deepcopy(model), "lossless"), torch.randn(N, D)
    truth, found = (grads(each, x, edge_index, readout=readout) for each in (model, own))
    assert all(torch.allclose(found[name], truth[name], rtol=1e-3, atol=1e-4) for name in truth)


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    """The operations are run again in the dtype that they had."""
    x, edge_index = torch.randn(N, D), graph()
    model = dibit.compress(Net(edge_conv("sum", nn.SiLU)()).train(), "lossless")
    truth = grads(model, x, edge_index, readout=(readout := torch.randn(N, D)))
    model.zero_grad(set_to_none=True)
    loss = (model(x, edge_index) * readout).sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    for name, p in model.named_parameters():
        if name.startswith("conv."):  # the first Linear's gradient is torch's own
            assert p.grad is not None
            assert torch.allclose(p.grad, truth[name], rtol=1e-4, atol=1e-4), name


class Unused(nn.Module):
    """The messages are used again, and no gradient reaches their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.mlp = nn.Linear(D, D), mlp(2 * D)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h, (source, target) = self.lin(x), edge_index
        message = self.mlp(torch.cat([h[target], h[source]], -1))
        total = torch.zeros(N, D).index_add_(0, target, message).detach()
        return total + torch.zeros(N, D).index_add_(0, source, message.sin())


def test_no_gradient_may_reach_the_sum() -> None:
    x, edge_index = torch.randn(N, D), graph()
    model, readout = Unused().train(), torch.randn(N, D)
    own = dibit.compress(copy.deepcopy(model), "lossless")
    truth = grads(model, x, edge_index, readout=readout)
    for _ in range(3):
        found = grads(own, x, edge_index, readout=readout)
        assert all(torch.allclose(found[name], truth[name], rtol=1e-3, atol=1e-3) for name in truth)


class Itself(nn.Module):
    """Node features that are gathered and are the weight of the Linear on them, too."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.table = nn.Linear(D, D), nn.Parameter(torch.randn(N, D) / 5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        message = F.linear(self.lin(x)[target].tanh() + self.table[source], self.table)
        return torch.zeros(N, N).index_add_(0, target, message)


def test_a_tensor_may_be_read_in_rows_and_as_a_whole() -> None:
    x, edge_index = torch.randn(N, D), graph()
    model, readout = Itself().train(), torch.randn(N, N)
    own = dibit.compress(copy.deepcopy(model), "lossless")
    truth, found = (grads(each, x, edge_index, readout=readout) for each in (model, own))
    assert all(torch.allclose(found[name], truth[name], rtol=1e-3, atol=1e-3) for name in truth)


class Mixed(nn.Module):
    """Parts of one program in modules of different recipes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.first, self.second = nn.Linear(D, D), nn.Linear(2 * D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h, (source, target) = self.lin(x), edge_index
        message = self.second(F.silu(self.first(torch.cat([h[target], h[source]], -1))))
        return torch.zeros(N, D).index_add_(0, target, message)


@pytest.mark.parametrize("recipes", [{"first": "lossless", "*": "default"}, {"first": "default", "*": "lossless"}])
def test_recipes_of_modules_differ(recipes: dict[str, str]) -> None:
    """Each part keeps what its own recipe keeps; the result has the plain bits."""
    x, edge_index = torch.randn(N, D), graph()
    model = Mixed().train()
    plain = model(x, edge_index)
    own = dibit.compress(model, recipes)
    for _ in range(2):
        y = own(x, edge_index)
        assert torch.equal(y, plain)
        y.sum().backward()


def test_the_graph_holds_no_tensor_of_one_row_an_edge() -> None:
    """Messages and their parts are freed when the forward pass has ended."""
    x, edge_index = torch.randn(N, D), graph()
    model = dibit.compress(Net(MODELS["EdgeConv"]()).train(), "lossless")
    before = {id(y) for y in of_edges()}
    loss = model(x, edge_index).sum()
    gc.collect()
    assert not [y for y in of_edges() if id(y) not in before]
    loss.backward()


def of_edges() -> list[Tensor]:
    return [y for y in gc.get_objects() if type(y) is Tensor and y.dim() == 2 and len(y) == E]


def test_second_derivatives_are_refused() -> None:
    x, edge_index = torch.randn(N, D), graph()
    model = dibit.compress(Net(edge_conv("sum", nn.SiLU)()).train(), "lossless")
    loss = model(x, edge_index).square().sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.slow
def test_dgcnn_trains_as_plain_torch() -> None:
    """Some steps of two layers: the losses stay together."""
    torch.manual_seed(0)
    x, edge_index, y = torch.randn(N, D), graph(), torch.randint(5, (N,))
    model = g.EdgeCNN(D, D, 2, 5).train()
    losses = []
    for recipe in (None, "lossless"):
        own = copy.deepcopy(model)
        if recipe:
            dibit.compress(own, recipe)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(own(x, edge_index), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
