"""Tensors that are computed again: the same bits, from less, and never from something that has changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GCN, GATConv, GATv2Conv, GraphSAGE, TransformerConv

import dibit
from dibit import Config
from dibit._torch.storage_identity import storage_key
from dibit.engine.forward_pass import ForwardPass
from dibit.recompute.recorder import Tape
from dibit.recompute.repeatable import PURE
from dibit.rules.dropout import dropout
from tests.marks import nothing_compressed

N, DEGREE = 1500, 14
INDEX_SELECT = torch._C._VariableFunctions.index_select  # others may put a wrapper of their own in its place


def graph(n: int = N) -> Tensor:
    return torch.randint(n, (2, DEGREE * n))


def step(model: nn.Module, x: Tensor, edge_index: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    y = model(x, edge_index)
    model.zero_grad()
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    return y.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def tape() -> Tape:
    def key(x: Tensor) -> object:
        return storage_key(x), x._version, x.storage_offset(), x.shape, x.stride(), x.dtype

    return Tape(key, lambda x: False)


def record(tape: Tape, function: object, *args: object, **kwargs: object) -> Tensor:
    call = tape.before(function, args, kwargs)
    result = function(*args, **kwargs)  # type: ignore[operator]
    tape.after(call, result)
    return result


def test_a_chain_is_cut_at_its_smallest_tensors_and_gives_the_same_bits() -> None:
    t, scores, index = tape(), torch.randn(100, 4), torch.randint(100, (5000,))
    gathered = record(t, INDEX_SELECT, scores, 0, index)
    shifted = record(t, F.leaky_relu, gathered, 0.2)
    y = record(t, torch.exp, shifted)
    leaves = t.cut(y, y.nbytes)
    assert leaves is not None
    kept = [leaf.tensor() for leaf in leaves]
    assert {id(x) for x in kept} == {id(scores), id(index)}
    program = t.program(y, leaves)
    wanted = y.clone()
    y.zero_()
    assert torch.equal(program.run(kept, t.shared), wanted)


def test_in_place_steps_are_repeated_on_a_copy() -> None:
    t, index = tape(), torch.randint(50, (5000,))
    start = record(t, torch.zeros, 50)
    ones = record(t, torch.ones, 5000)
    degree = record(t, Tensor.scatter_add_, start, 0, index, ones)
    record(t, Tensor.add_, degree, 1.0)
    inverse = record(t, Tensor.pow_, degree, -0.5)
    weight = record(t, INDEX_SELECT, inverse, 0, index)
    leaves = t.cut(weight, weight.nbytes * 10)
    assert leaves is not None
    program = t.program(weight, leaves)
    for _ in range(2):
        assert torch.equal(program.run([leaf.tensor() for leaf in leaves], t.shared), weight)


@pytest.mark.parametrize(
    "function",
    [lambda e: F.relu(e, True), lambda e: F.relu(e, inplace=True), lambda e: F.leaky_relu(e, 0.1, True), torch.relu_],
)
def test_what_is_written_in_place_is_not_lost_to_others_when_it_is_repeated(
    function: Callable[[Tensor], Tensor],
) -> None:
    """The messages enter `exp` before they are written over, and what is kept needs both."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(16, 64)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            h = self.lin(x)
            messages = h[index] * 2
            before = messages.exp()
            y = function(messages) + before
            return y * y.sigmoid()

    torch.manual_seed(0)
    layer, x, index = Layer(), torch.randn(100, 16), torch.randint(100, (4000,))
    layer(x, index).sum().backward()
    truth = layer.lin.bias.grad.clone()
    dibit.compress(layer, Config(bits=8))
    for _ in range(2):
        layer.zero_grad()
        with dibit.track(layer) as saved:
            y = layer(x, index)
        y.sum().backward()
        assert "computed again" in {row.how for row in saved.rows if row.operation == "mul"}
        torch.testing.assert_close(layer.lin.bias.grad, truth)


def test_a_tensor_that_changed_is_no_leaf() -> None:
    t, scores, index = tape(), torch.randn(2000, 1), torch.arange(2000).repeat(4)
    y = record(t, INDEX_SELECT, scores, 0, index)
    scores.add_(1)
    assert t.cut(y, float("inf")) is None


def test_random_and_unknown_functions_are_not_repeated() -> None:
    assert not {torch.rand_like, torch.bernoulli, F.dropout, torch.empty, Tensor.__setitem__, F.linear} & PURE


@pytest.mark.parametrize(("kind", "layers"), [(GCN, 3), (GraphSAGE, 3)])
def test_indices_and_weights_of_edge_index_models(kind: type, layers: int) -> None:
    """At most 60 bytes a node of indices and weights for the whole model; PyG keeps about 300 a layer."""
    model = kind(64, 64, layers, 16).train()
    x, edge_index = torch.randn(N, 64), graph()
    plain, gradients = step(model, x, edge_index)
    dibit.compress(model, {"convs.*.lin*": None, "*": "default"})
    y, found = step(model, x, edge_index)
    assert torch.equal(y, plain)
    with dibit.track(model) as saved:
        model(x, edge_index)
    graph_bytes = sum(r.kept for r in saved.rows if r.operation in ("index_select", "scatter_add_", "mul", "div"))
    assert graph_bytes <= 60 * N
    for g, wanted in zip(found, gradients, strict=True):  # linear layers are exact here: nothing is lossy
        assert torch.allclose(g, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max())


@pytest.mark.parametrize(
    ("build", "least"),
    [
        (lambda: GATConv(128, 32, heads=4), 50),
        (lambda: GATConv(128, 32, heads=4, dropout=0.5), 20),
        (lambda: GATv2Conv(128, 32, heads=4), 10),
        (lambda: TransformerConv(128, 32, heads=4), 10),
    ],
    ids=["GAT", "GAT with dropout", "GATv2", "Transformer"],
)
def test_attention_keeps_a_tenth_at_the_most(build: object, least: float) -> None:
    torch.manual_seed(0)
    model = build().train()  # type: ignore[operator]
    x, edge_index = torch.randn(N, 128), graph()
    config = Config(**{**dibit.recipe("default").__dict__, "dropout": "mask"})
    plain, _ = step(model, x, edge_index)
    dibit.compress(model, config)
    y, _ = step(model, x, edge_index)
    assert torch.equal(y, plain)
    with dibit.track(model) as saved:
        model(x, edge_index)
    assert saved.plain >= least * saved.total


@pytest.mark.parametrize("degree", [3, 5, 14])
def test_a_softmax_over_few_edges_keeps_the_scores_of_nodes_and_nothing_of_an_edge(degree: int) -> None:
    """Each of its three residuals alone would be smaller as codes; together they are the same two leaves."""
    torch.manual_seed(0)
    edge_index, x = torch.randint(N, (2, degree * N)), torch.randn(N, 16)
    model = dibit.compress(GATConv(16, 8, heads=4, add_self_loops=False))
    step(model, x, edge_index)
    with dibit.track(model) as tracked:
        step(model, x, edge_index)
    kept = {row.operation: row for row in tracked.rows if row.operation in ("exp", "div")}
    assert kept["exp"].kept == 2 * N * 4 * 4
    assert kept["div"].kept == 0


def hidden_dropout(forward: ForwardPass, *args: Any, **options: Any) -> Any:
    """Dibit's dropout, with a result that the tape does not know."""
    y = dropout(forward, *args, **options)
    return y if y is NotImplemented else y * 1


def test_attention_after_dropout_is_drawn_again() -> None:
    """The same gradient, bit for bit, as with the dropped attention kept, for E x H floats less."""
    x, edge_index = torch.randn(N, 16), graph()
    plain = GATConv(16, 8, heads=4, dropout=0.5)
    found = []
    for rules in (None, {F.dropout: hidden_dropout}):
        model = dibit.compress(copy.deepcopy(plain), rules=rules)
        step(model, x, edge_index)  # shows that the graph is the same still in the backward pass
        with dibit.track(model) as saved:
            y, grads = step(model, x, edge_index)
        found.append((saved.total, y, grads))
    (again, y, grads), (kept, kept_y, kept_grads) = found
    assert torch.equal(y, kept_y)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept_grads, strict=True))
    attention = (N * DEGREE + N) * 4 * 4
    assert again < kept - 0.9 * attention


def test_backward_twice_and_nothing_stays() -> None:
    model = GATConv(32, 8, heads=2).train()
    x, edge_index = torch.randn(300, 32), graph(300)
    dibit.compress(model)
    y = model(x, edge_index)
    grads = [torch.autograd.grad(y.sum(), list(model.parameters()), retain_graph=True) for _ in range(2)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    del grads, a, b
    gc.collect()
    gc.disable()
    try:
        ref = weakref.ref(y)
        del y
        assert ref() is None
    finally:
        gc.enable()


def test_a_graph_may_change_after_it_was_copied() -> None:
    """Plain torch keeps what GCN makes of `edge_index`, as the first pass does; later ones rest on it, and say so."""
    x, edge_index = torch.randn(300, 32), graph(300)

    def run(model: nn.Module) -> Tensor:
        model.zero_grad()
        given = edge_index.clone()
        y = model(x, given)
        given.zero_()
        y.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.manual_seed(0)
    model = GCN(32, 32, 2, 8).train()
    plain = run(model)
    dibit.compress(model, {"convs.*.lin": None, "*": "default"})
    for _ in range(3):
        assert torch.allclose(run(model), plain, rtol=1e-4, atol=1e-5 * plain.abs().max())
    dibit.compress(model, {"convs.*.lin": None, "*": "default"})
    step(model, x, edge_index)
    with pytest.raises(RuntimeError, match=r"tensor 1 among the arguments of 'GCN' was changed"):
        run(model)
    assert torch.allclose(run(model), plain, rtol=1e-4, atol=1e-5 * plain.abs().max())


def test_under_autocast_nothing_is_repeated_in_another_dtype() -> None:
    model = GATConv(32, 8, heads=2).train()
    x, edge_index = torch.randn(300, 32), graph(300)

    def run() -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x, edge_index)
        model.zero_grad()
        y.float().sum().backward()
        return y.detach(), [p.grad.clone() for p in model.parameters()]

    plain, _ = run()
    dibit.compress(model)
    y, grads = run()
    assert torch.equal(y, plain)
    assert all(g.isfinite().all() for g in grads)


def test_second_derivatives_are_refused_even_where_they_would_vanish() -> None:
    net = dibit.compress(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)))
    x = torch.randn(5, 8, requires_grad=True)
    energy = net(x).sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(energy, x, create_graph=True)


class Custom(nn.Module):
    """A linear layer and whatever a user does after it."""

    def __init__(self, body: object) -> None:
        super().__init__()
        self.lin, self.body = nn.Linear(16, 16), body

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.body(self.lin(x), index)  # type: ignore[operator]


def compare(body: object, x: Tensor | None = None, tolerance: float = 1e-5) -> None:
    """Forward and gradients of a model whose only lossy layer is made exact."""
    torch.manual_seed(0)
    model = Custom(body).train()
    x, index = torch.randn(200, 16) if x is None else x, torch.randint(200, (6000,))
    plain, wanted = step(model, x, index)
    dibit.compress(model, {"lin": None, "": Config(bits=8, block=16, dropout="mask")})
    step(model, x, index)  # shows that the index is the same still in the backward pass
    y, found = step(model, x, index)
    assert torch.equal(y, plain)
    for g, truth in zip(found, wanted, strict=True):
        assert torch.allclose(g, truth, rtol=tolerance, atol=tolerance * truth[truth.isfinite()].abs().max())


def changed_after_it_was_gathered(h: Tensor, index: Tensor) -> Tensor:
    scores = h.sum(1) * 0.1  # a tensor of its own, from which the exponentials are computed again
    y = scores.index_select(0, index).exp()
    scores.mul_(0)
    return y.sum() + scores.sum()


def changed_through_a_view(h: Tensor, index: Tensor) -> Tensor:
    scores = h.sum(1) * 0.1
    y = scores.index_select(0, index).exp()
    scores[:5] = 0
    return y.sum() + scores.sum()


@nothing_compressed
def test_a_model_may_change_what_a_tensor_was_computed_from() -> None:
    """Plain torch keeps the exponentials themselves: Dibit, which keeps the scores, copies them before they change."""
    compare(changed_after_it_was_gathered)
    compare(changed_through_a_view)


@nothing_compressed
def test_arguments_by_keyword() -> None:
    compare(lambda h, index: (torch.zeros_like(input=h) + h).sum())
    compare(
        lambda h, index: (torch.index_select(dim=0, index=index, input=h).exp() * h.sum(1)[index, None]).sum(),
        tolerance=0.02,
    )


@nothing_compressed
def test_what_was_created_has_its_dtype_whatever_the_default_is_later() -> None:
    model = Custom(lambda h, index: (torch.ones(3000).cumsum(0) * h.sum(1)[index]).sum()).train()
    x, index = torch.randn(200, 16), torch.randint(200, (3000,))
    _, wanted = step(model, x, index)
    dibit.compress(model, {"lin": None, "": "default"})
    loss = model(x, index)
    model.zero_grad()
    torch.set_default_dtype(torch.float64)
    try:
        loss.backward(torch.randn(loss.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(model.lin.weight.grad, wanted[0], rtol=1e-4)


@pytest.mark.parametrize(
    "function",
    [lambda h: h.pow(0), lambda h: h.abs().sqrt(), lambda h: 1 + h.abs().log(), lambda h: torch.ones_like(h) / h],
    ids=["pow 0", "sqrt", "log", "div"],
)
@nothing_compressed
def test_a_pole_spoils_no_other_element(function: object) -> None:
    """Where the derivative is infinite the operation stays exact; its neighbours' gradients are finite as ever."""

    def body(h: Tensor, index: Tensor) -> Tensor:
        h = h * torch.cat([torch.zeros(1, 16), torch.ones(199, 16)])
        y = function(h)  # type: ignore[operator]
        return torch.where(y.isfinite(), y, 0.0)[1:].sum()

    torch.manual_seed(0)
    x = torch.randn(200, 16, requires_grad=True)
    grads = []
    for recipe in (None, Config(bits=8, block=16)):
        model = Custom(body).train()
        model.load_state_dict({"lin.weight": torch.eye(16), "lin.bias": torch.zeros(16)})
        dibit.compress(model, {"lin": None, "": recipe})
        grads.append(torch.autograd.grad(model(x, torch.arange(200)), x)[0])
    assert grads[1][1:].isfinite().all()
    assert torch.equal(grads[0].isnan(), grads[1].isnan())


def test_a_small_view_does_not_keep_a_large_storage() -> None:
    def body(h: Tensor, index: Tensor) -> Tensor:
        wide = h.repeat(1, 64)
        return wide[:, 0].index_select(0, index).exp().sum()

    model = Custom(body).train()
    x, index = torch.randn(200, 16), torch.randint(200, (3000,))
    dibit.compress(model, {"lin": None, "": "default"})
    with dibit.track(model) as saved:
        model(x, index)
    assert saved.total <= saved.plain
