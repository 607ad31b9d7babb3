"""Programs on edges that are computed in chunks: plain torch's bits and gradients, and nothing of one row an edge."""

from __future__ import annotations

import copy
import gc
import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as g
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dibit
from dibit._torch.spellings import torch_functions
from dibit.codec import dispatch
from dibit.codec.backends import reference
from dibit.edges import programs
from dibit.edges.chunks import Gradient, RowSelection, Whole, cut, size_of
from dibit.edges.deferred import defer
from dibit.edges.plan import plan_of
from dibit.engine.keeper import inputs_kept_exactly
from dibit.rules import RULES
from dibit.rules.elementwise import POINTWISE
from tests.autograd_graph import nodes
from tests.edges.test_programs import Doubled, scripted
from tests.edges.test_sums import ORDERS, graph
from tests.marks import nothing_compressed
from tests.rules.domains import MORE, into_domain
from tests.unbiased import bias_of, gradient

N, E, D, CHUNK = 300, 4000, 32, 256


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "CHUNK", CHUNK)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No codes, and no rules that need some: every gradient is plain torch's to the order of its sums."""
    for function in torch_functions("silu sigmoid gelu tanh layer_norm mul div square"):
        if function in RULES:
            monkeypatch.delitem(RULES, function)
    with inputs_kept_exactly():
        yield


def mlp(inputs: int, act: Callable[[], nn.Module] = nn.SiLU, norm: bool = True) -> nn.Sequential:
    parts = nn.Linear(inputs, D), act(), nn.Linear(D, D)
    return nn.Sequential(*parts, nn.LayerNorm(D)) if norm else nn.Sequential(*parts)


def alive(kind: type) -> list[Any]:
    """Objects of this class that are in use."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is kind]


class Mesh(nn.Module):
    """Two blocks of a mesh network: the messages of the first are the edges of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.edges = nn.ModuleList([mlp(3 * D), mlp(3 * D)]), nn.Linear(3, D)
        self.nodes = nn.ModuleList([mlp(2 * D), mlp(2 * D)])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        e = self.edges(torch.linspace(-1, 1, 3 * edge_index.shape[1]).view(-1, 3))
        for message, node in zip(self.first, self.nodes, strict=True):
            e = e + message(torch.cat([x[edge_index[1]], x[edge_index[0]], e], -1))
            total = x.new_zeros(x.shape).index_add_(0, edge_index[1], e)
            x = x + node(torch.cat([x, total], -1))
        return x


class Twice(nn.Module):
    """Messages that serve twice; distances are edge tensors of one column."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.gate = mlp(2 * D + 1, norm=False), nn.Linear(D, D)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        apart = (x[:, :3][source] - x[:, :3][target]).square().sum(-1, keepdim=True)
        m = self.edge(torch.cat([x[target], x[source], apart], -1))
        gated = torch.zeros(N, D).index_add(0, target, m * torch.sigmoid(self.gate(m)))
        return torch.zeros(N, D).index_add_(0, target, m) + gated


class WithEdges(nn.Module):
    """Edge features that need a gradient, a weight an edge, numbers and weights of features."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.features, self.weight = nn.Parameter(torch.randn(E, D)), nn.Parameter(torch.rand(E, 1))
        self.lin, self.gain, self.reduce = nn.Linear(D, D), nn.Parameter(torch.rand(D)), reduce

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x_j, count = x.index_select(0, edge_index[0]), len(self.weight)
        m = 0.5 * self.lin((x_j + self.features).relu() / 2) - self.gain * torch.sigmoid(self.features * x_j)
        m = F.gelu(F.leaky_relu(-m * self.weight, 0.3).tanh())
        index = edge_index[1].view(count, 1).expand(count, D)
        if self.reduce == "sum":
            return torch.zeros(N, D).scatter_add_(0, index, m)
        return torch.ones(N, D).scatter_reduce_(0, index, m, self.reduce, include_self=False)


class Both(nn.Module):
    """Between two sets of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, 16)
        self.conv = g.EdgeConv(nn.Sequential(nn.Linear(2 * D, D), nn.ReLU(), nn.Linear(D, D)), aggr="mean")

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv((x, x[:290].relu()), edge_index)


class Lambda(nn.Module):
    """A Linear and a function."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lin, self.call = nn.Linear(2 * D, D), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.lin(x))


class Net(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.lin, self.conv = nn.Linear(D, D), conv

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv(self.lin(x), edge_index)


def edge_conv(aggr: Any, act: Callable[[], nn.Module] = nn.ReLU, norm: bool = False) -> Callable[[], nn.Module]:
    return lambda: g.EdgeConv(mlp(2 * D, act, norm), aggr=aggr)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "EdgeConv": edge_conv("max"),
    "EdgeConv min": edge_conv("min"),
    "EdgeConv sum": edge_conv("sum"),
    "EdgeConv mean": edge_conv("mean", nn.SiLU, norm=True),
    "EdgeConv with two": edge_conv(["sum", "max"]),
    "EdgeConv of one layer": lambda: g.EdgeConv(nn.Linear(2 * D, D)),
    "from target": lambda: g.EdgeConv(mlp(2 * D), flow="target_to_source"),
    "mesh": Mesh,
    "twice": Twice,
    "edge features": lambda: WithEdges("sum"),
    "edge features, max": lambda: WithEdges("amax"),
    "two sets": Both,
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_the_plain_one(name: str, order: str, made: list[Any]) -> None:
    model, x, edge_index = Net(MODELS[name]()), torch.randn(N, D), graph(order)
    plain = model(x, edge_index)
    dibit.compress(model.train())
    for _ in range(4):
        made.clear()
        assert torch.equal(model(x, edge_index), plain)
    assert not any(made), "in the first pass alone"


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_plain_one(name: str, order: str) -> None:
    """In each pass: what earlier ones have shown changes how the program is computed."""
    model, x, edge_index = Net(MODELS[name]()).train(), torch.randn(N, D), graph(order)
    own = dibit.compress(copy.deepcopy(model))
    readout = torch.randn_like(model(x, edge_index))
    (model(x, edge_index) * readout).sum().backward()
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for _ in range(3):
        own.zero_grad()
        (own(x, edge_index) * readout).sum().backward()
        found = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
        assert found.keys() == truth.keys()
        for each, grad in truth.items():
            assert torch.allclose(found[each], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-6), each


@pytest.mark.statistics
@pytest.mark.parametrize("name", ["EdgeConv", "mesh"])
def test_the_gradient_is_unbiased(name: str) -> None:
    model, x, edge_index = Net(MODELS[name]()).train(), torch.randn(N, D), graph()
    readout = torch.randn_like(model(x, edge_index))
    truth = gradient(model, x, readout, edge_index)
    dibit.compress(model)
    for _ in range(3):
        gradient(model, x, readout, edge_index)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return gradient(model, x, readout, edge_index)

    bias = bias_of(draw, truth, 100)
    assert bias.unbiased, bias


class Largest(TorchDispatchMode):
    """How many elements the largest result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if type(result) in (tuple, list) else (result,):
            if isinstance(x, Tensor) and x.is_floating_point():
                self.elements = max(self.elements, x.numel())
        return result


def test_nothing_of_one_row_an_edge_is_made() -> None:
    """In neither pass."""
    x, edge_index = torch.randn(N, D), graph()
    model = dibit.compress(Net(edge_conv("max")()).train())
    with Largest() as largest:
        model(x, edge_index).sum().backward()
    assert largest.elements < E * D / 4
    with dibit.track(model) as saved:
        model(x, edge_index)
    assert [(row.operation, row.shape) for row in saved.rows if row.module.startswith("conv.")] == [
        ("linear", (E, 2 * D)),
        ("relu", (E, D)),
        ("linear", (E, D)),
        ("scatter_reduce_", (N, D)),
    ]


@pytest.mark.parametrize(("name", "wholes"), [("EdgeConv", 0), ("mesh", 1), ("twice", 1)])
def test_only_what_is_used_again_is_made_whole(name: str, wholes: int) -> None:
    """The messages of the first block of a mesh network, not what they were made from."""
    model, x, edge_index = dibit.compress(Net(MODELS[name]()).train()), torch.randn(N, D), graph()
    for _ in range(3):
        y = model(x, edge_index)
    assert len(alive(Whole)) == wholes
    assert y.requires_grad


def test_saved_bytes_are_those_of_the_whole() -> None:
    """Chunks have the same codecs; the ledger has one row an operation, and the same bytes that plain torch keeps."""
    x, edge_index, totals = torch.randn(N, D), graph(), []
    for chunk in (CHUNK, E):
        programs.CHUNK = chunk
        model = dibit.compress(Net(MODELS["EdgeConv"]()).train(), "exact")
        with dibit.track(model) as saved:
            model(x, edge_index).sum().backward()
        totals.append({row.operation: row for row in saved.rows if row.module.startswith("conv.nn")})
    assert totals[0].keys() == totals[1].keys()
    for operation, row in totals[0].items():
        assert row.kept <= 1.05 * totals[1][operation].kept
        assert row.plain == totals[1][operation].plain


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("widths", [set(), {33}, {32, 48}])
def test_chunks_are_all_edges_of_some_nodes(order: str, widths: set[int]) -> None:
    """One node has more edges than a chunk, the last ones have none."""
    source, target = graph(order)
    target = torch.where(torch.arange(E) % 5 == 0, 100, target)
    plan = plan_of(source, target, N, N)
    seen, nodes = [], 0
    for chunk in cut(plan, widths):
        own = chunk.select(None).long()
        assert own.numel() == chunk.size >= CHUNK // 2
        assert chunk.nodes.start == nodes
        assert torch.equal(target[own], chunk.targets + chunk.nodes.start)
        assert torch.equal(chunk.select(source), source[own])
        assert all(programs.in_whole_vectors((chunk.size + chunk.padding) * width) for width in widths)
        seen.append(own)
        nodes = chunk.nodes.stop
    assert nodes == N
    assert torch.equal(torch.cat(seen), target.argsort(stable=True))
    assert len(seen) > 5


@pytest.mark.parametrize("threads", [1, 3, 12, 16, 64])
@pytest.mark.parametrize("function", [F.silu, F.softplus], ids=["silu", "softplus"])
def test_where_torchs_threads_share_whole_vectors(function: Callable[[Tensor], Tensor], threads: int) -> None:
    """Each element then has the bits that it has in a vector on one thread."""
    before, sizes = torch.get_num_threads(), random.Random(0)
    x = torch.randn(1 << 20)
    torch.set_num_threads(1)
    expected = function(x)
    torch.set_num_threads(threads)
    try:
        found = [n for n in (32 * sizes.randrange(1, 1 << 15) for _ in range(300)) if programs.in_whole_vectors(n)]
        assert found
        assert all(torch.equal(function(x[:n]), expected[:n]) for n in found)
        for rows, width in itertools.product((1, 8192, 12_345, 32_768), (1, 3, 32, 33, 128)):
            more = programs.padding(rows, {width, 8})
            assert more < 128 * threads
            assert programs.in_whole_vectors((rows + more) * width)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("act", [nn.SiLU, nn.Softplus])
def test_many_threads_have_torchs_bits(act: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of their usual size, on more threads than torch uses for a chunk."""
    monkeypatch.setattr(programs, "CHUNK", 1 << 13)
    before, nodes, edges = torch.get_num_threads(), 4000, 200_192
    model = Net(g.EdgeConv(nn.Sequential(nn.Linear(2 * D, D), act(), nn.Linear(D, D)), aggr="sum")).train()
    x, edge_index = torch.randn(nodes, D), torch.randint(nodes, (2, edges))
    torch.set_num_threads(16)
    try:
        plain = model(x, edge_index)
        y = dibit.compress(model)(x, edge_index)
        assert torch.equal(y, plain)
        assert alive(Gradient), "it was computed in chunks"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", [32, 33, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_smooth_activations_have_torchs_bits(threads: int, width: int) -> None:
    """Their vectors begin elsewhere in a chunk."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = (
            nn.Linear(2 * D, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.Sigmoid(),
            nn.Linear(width, D),
            nn.GELU(),
        )
        model, x = Net(g.EdgeConv(nn.Sequential(*parts))).train(), torch.randn(N, D)
        for edges in (E, E - 1):
            plain = model(x, edge_index := graph(edges=edges))
            assert torch.equal(dibit.compress(copy.deepcopy(model))(x, edge_index), plain)
    finally:
        torch.set_num_threads(before)


class Called(nn.Module):
    """A function of torch by its name, or PReLU, on what it is defined for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.slope = name, nn.Parameter(torch.rand(33))

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "prelu":
            return F.prelu(x, self.slope)
        if self.name == "pow":
            return into_domain("log", x).pow(1.7)  # not a product, which a whole number would give
        return getattr(torch, self.name, getattr(F, self.name, None))(into_domain(self.name, x))  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*POINTWISE, "relu", "leaky_relu", "prelu"])
def test_every_element_wise_function_is_part_of_a_program(name: str, made: list[Any]) -> None:
    """With the plain bits. A chunk has neither the alignment nor the end of the whole tensor."""
    parts = nn.Linear(2 * D, 33), Called(name), nn.Linear(33, D)
    model, x, edge_index = Net(g.EdgeConv(nn.Sequential(*parts))).train(), torch.randn(N, D), graph()
    plain = model(x, edge_index)
    dibit.compress(model)
    assert torch.equal(model(x, edge_index), plain)
    assert not made
    if name not in POINTWISE or not POINTWISE[name].in_vectors:
        edge_index = graph(edges=E - 1)
        plain = dibit.decompress(copy.deepcopy(model))(x, edge_index)
        assert torch.equal(model(x, edge_index), plain)
        assert not made


@pytest.mark.parametrize("name", [name for name, f in POINTWISE.items() if not f.in_vectors])
def test_bits_do_not_depend_on_the_place_in_a_tensor(name: str) -> None:
    """As the rule says: the vectorised loop, the loop for the last elements and that for strided tensors agree."""
    f, x = POINTWISE[name].plain, into_domain(name, torch.cat([torch.randn(1 << 16) * size for size in (1, 10)]))
    y = f(x, *MORE.get(name, ()))
    assert torch.equal(f(torch.stack((x, x), 1)[:, 0]), y)
    for first, count in ((1, 4097), (3, 1001), (5, 33), (17, 31), (0, 7)):
        for start in range(first, 40 * (first + count), first + count):
            part = slice(start, start + count)
            assert torch.equal(f(x[part]), y[part])
            assert torch.equal(f(x[part].clone()), y[part])


@nothing_compressed
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x + F.silu(x, True),
        lambda x: x + F.elu(x, 0.7, inplace=True),
        lambda x: torch.pow(x.abs() + 1, x.abs()),
        lambda x: torch.pow(2.0, x),
    ],
    ids=["by name", "in place by position", "in place", "tensor", "number first"],
)
def test_calls_that_end_a_program(call: Callable[[Tensor], Tensor], frozen: bool) -> None:
    """Without a gradient, torch's own function runs instead of the rule."""
    model, x, edge_index = Net(g.EdgeConv(Lambda(call))).train(), torch.randn(N, D), graph()
    model.requires_grad_(not frozen)
    plain = model(x, edge_index)
    assert torch.equal(dibit.compress(model)(x, edge_index), plain)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.elu(x, 0.7),
        lambda x: F.elu(x, alpha=0.7, inplace=False),
        lambda x: F.softplus(x, 2.0, 1.0),
        lambda x: F.softplus(x, 1, 0.5),
        lambda x: (x.abs() + 1) ** 1.5,
    ],
    ids=["position", "name", "two", "the second", "operator"],
)
def test_options_are_part_of_a_program(call: Callable[[Tensor], Tensor], made: list[Any]) -> None:
    model, x, edge_index = Net(g.EdgeConv(Lambda(call))).train(), torch.randn(N, D), graph()
    plain = model(x, edge_index)
    truth = torch.autograd.grad(plain.sum(), [*model.parameters()])
    y = dibit.compress(model, dibit.Config(bits=8))(x, edge_index)
    assert torch.equal(y, plain)
    assert not made
    for a, b in zip(torch.autograd.grad(y.sum(), [*model.parameters()]), truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-2 * float(b.abs().max()))


def test_where_linear_layers_have_other_bits_by_rows_all_is_as_before(
    monkeypatch: pytest.MonkeyPatch, made: list[Any]
) -> None:
    monkeypatch.setattr(programs, "linear_by_rows", lambda *args: False)
    model, x, edge_index = Net(MODELS["EdgeConv"]()).train(), torch.randn(N, D), graph()
    plain = model(x, edge_index)
    assert torch.equal(dibit.compress(model)(x, edge_index), plain)
    assert any(made)


def test_backward_runs_twice() -> None:
    model, x, edge_index = Net(MODELS["mesh"]()).train(), torch.randn(N, D), graph()
    dibit.compress(model)
    for _ in range(2):
        y = model(x, edge_index).sum()
    first, second = (torch.autograd.grad(y, [*model.parameters()], retain_graph=keep) for keep in (True, False))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EdgeConv", "mesh"])
def test_a_backward_pass_that_failed_leaves_nothing_behind(name: str) -> None:
    """Wherever it fails: the next one through the same graph gives the same gradient."""
    model, x, edge_index = Net(MODELS[name]()).train(), torch.randn(N, D, requires_grad=True), graph()
    dibit.compress(model)
    for _ in range(2):
        y = model(x, edge_index).square().sum()
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(y, leaves, retain_graph=True)
    found = [node for node in nodes(y) if node is not y.grad_fn and not hasattr(node, "variable")]
    for node in random.Random(0).sample(found, 25):

        def fail(_: Any) -> None:
            raise InterruptedError

        handle = node.register_prehook(fail)
        with pytest.raises(InterruptedError):
            torch.autograd.grad(y, leaves, retain_graph=True)
        handle.remove()
        again = torch.autograd.grad(y, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)), node


def test_the_plan_has_the_indices() -> None:
    """Nothing of one number an edge is kept, however often the model reads its `edge_index`."""
    model, x, edge_index = Net(MODELS["mesh"]()).train(), torch.randn(N, D), graph()
    y = dibit.compress(model)(x, edge_index)
    kept = alive(RowSelection)
    assert len(kept) > 4 * E / (2 * CHUNK)
    assert not any(isinstance(rows.index, Tensor) for rows in kept)
    assert y.requires_grad


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("order", ORDERS)
def test_indices_may_change_before_the_backward_pass(order: str) -> None:
    """The gradient is that of the edges that were read; plain torch would refuse. A third index is not in the plan."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.lin = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor, indices: Tensor) -> Tensor:
            h = self.start(x)
            m = self.lin(h[indices[0]] + h[indices[1]] - h[indices[2]])
            return torch.zeros(N, D).index_add_(0, indices[1], m)

    model, x, readout = Three().train(), torch.randn(N, D), torch.randn(N, D)
    indices = torch.cat((graph(order), torch.randint(0, N, (1, E))))
    truth = torch.autograd.grad((model(x, indices) * readout).sum(), [*model.parameters()])
    y = dibit.compress(model)(x, indices)
    indices.zero_()
    found = torch.autograd.grad((y * readout).sum(), [*model.parameters()])
    for a, b in zip(found, truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("order", ORDERS)
def test_nodes_without_edges_may_have_no_features(order: str) -> None:
    """The last targets are there in the result alone."""

    class Fewer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.lin = nn.Linear(D, D), nn.Linear(2 * D, D)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            source, target = edge_index
            ends = [self.start(x).index_select(0, source), self.start(x[:290]).index_select(0, target)]
            return torch.zeros(N, D).index_add_(0, target, self.lin(torch.cat(ends, -1)))

    model, x, edge_index, readout = Fewer().train(), torch.randn(N, D), graph(order), torch.randn(N, D)
    assert int(edge_index[1].max()) < 290
    truth = torch.autograd.grad((model(x, edge_index) * readout).sum(), [*model.parameters()])
    found = torch.autograd.grad((dibit.compress(model)(x, edge_index) * readout).sum(), [*model.parameters()])
    for a, b in zip(found, truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


class TestOnAGpu:
    """What is decided there before anything is computed. `tests/gpu` runs programs on the kernels themselves."""

    device = torch.device("cuda")

    def test_programs_are_computed_in_chunks_where_there_are_kernels(self) -> None:
        for kernels, expected in ((reference, False), (SimpleNamespace(edge_winners=None), True)):
            for kind in ("cuda", "xpu"):
                with dispatch.using_backend(kind, kernels):
                    assert programs.run_on(torch.device(kind)) == (expected and kind == "cuda")
        assert programs.run_on(torch.device("cpu"))

    def test_chunks_are_larger(self) -> None:
        sizes = [size_of(edges, self.device) for edges in (1 << 17, 1 << 20, 1 << 21, 1 << 30)]
        assert sizes == [1 << 16, 1 << 16, 1 << 17, 1 << 17]
        assert size_of(1 << 30, torch.device("cpu")) == programs.LARGEST

    def test_where_vectors_begin_does_not_matter(self) -> None:
        """For a function whose bits depend on that on a CPU."""
        for device, expected in (("cpu", False), ("cuda", True)):
            with FakeTensorMode():
                x, index = torch.empty(9, 33, device=device), torch.empty(E - 1, dtype=torch.int64, device=device)
            call = programs.PendingCall(Tensor.index_select, (x, 0, index), (), lambda *args: None)
            rows = defer(call, torch.Size((E - 1, 33)), x)
            assert (programs.extend(F.silu, (rows,), {}) is not None) == expected
            own = programs.PendingCall(F.silu, (rows,), (), lambda *args: None)
            assert programs.in_vectors(own) != expected

    def test_linear_layers_are_tried_for_each_setting(self) -> None:
        before, found = torch.get_float32_matmul_precision(), set()
        try:
            for precision in ("highest", "high"):
                torch.set_float32_matmul_precision(precision)
                found.add(programs.product_settings(self.device))
                assert programs.product_settings(torch.device("cpu")) == (torch.get_num_threads(),)
        finally:
            torch.set_float32_matmul_precision(before)
        assert len(found) == 2


def test_second_derivatives_are_refused() -> None:
    model, x, edge_index = Net(MODELS["EdgeConv"]()).train(), torch.randn(N, D, requires_grad=True), graph()
    y = dibit.compress(model)(x, edge_index)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_nothing_lives_on() -> None:
    """Of a pass whose gradient nobody asks for."""
    model, x, edge_index = dibit.compress(Net(MODELS["mesh"]()).train()), torch.randn(N, D), graph()
    y = model(x, edge_index)
    assert len(alive(Gradient)) == 4
    del y
    assert not alive(Gradient)


# -- programs drawn at random ------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """A chain of operations on both ends of an edge, with Linears among them, of which some cannot be deferred."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.linears = nn.ModuleList([nn.Linear(D, D), nn.Linear(2 * D, D, bias=False), nn.Linear(D, D)])
        self.norm, self.edge, self.weight = nn.LayerNorm(D), nn.Parameter(torch.randn(E, D)), torch.rand(E, 1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        number, (source, target) = random.Random(self.seed), edge_index
        values = [x.index_select(0, source), x[target]]
        first, double, last = self.linears
        steps: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda a, b: a + b,
            lambda a, b: a - b,
            lambda a, b: a * self.weight,
            lambda a, b: a + self.edge,
            lambda a, b: 1 - a,
            lambda a, b: a / 3,
            lambda a, b: first(a),
            lambda a, b: last(a.relu()),
            lambda a, b: double(torch.cat([a, b], -1)),
            lambda a, b: double(torch.cat((b, self.edge), dim=1)),
            lambda a, b: self.norm(a),
            lambda a, b: F.silu(a),
            lambda a, b: F.leaky_relu(a, 0.1),
            lambda a, b: F.leaky_relu(a, negative_slope=0.1, inplace=False),
            lambda a, b: F.relu(a.clone(), inplace=True),
            lambda a, b: a * b,
            lambda a, b: a.clamp(max=1),
            lambda a, b: scripted(a),
            lambda a, b: Doubled.apply(a),
            lambda a, b: checkpoint(lambda c: first(c) * 2, a, use_reentrant=False),
            lambda a, b: a * a.sum(-1, keepdim=True),
            lambda a, b: a.detach() + b,
        ]
        for _ in range(number.randint(2, 8)):
            step, a, b = number.choice(steps), number.choice(values[-3:]), number.choice(values)
            values.append(step(a, b))
        y = x
        for _ in range(number.randint(1, 2)):
            messages, index = number.choice(values[-2:]), target if number.random() < 0.8 else source
            how = number.choice(("index_add", "into", "scatter", "max", "min"))
            if number.random() < 0.2:
                messages = first(messages)
            out, wide = messages.new_zeros(N, D), index[:, None].expand(E, D)
            if how == "index_add":
                y = y + out.index_add_(0, index, messages)
            elif how == "into":
                y = y.clone().index_add_(0, index, messages)
            elif how == "scatter":
                y = y + torch.scatter_add(out + 1, 0, wide, messages)
            else:
                y = y + out.scatter_reduce_(0, wide, messages, "a" + how, include_self=False)
        if number.random() < 0.3:
            y = y + double(torch.cat([values[-1], values[0]], -1)).mean()
        if number.random() < 0.2:
            x.mul_(2)
        return y


@nothing_compressed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("seed", range(150))
def test_outcome_of_a_drawn_program(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, edge_index = Net(Drawn(seed)).train(), torch.randn(N, D), graph(ORDERS[seed % 3])
    readout = torch.randn(N, D)

    def outcome() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        y = model(x, edge_index)
        (y * readout).sum().backward()
        return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    try:
        y, grads = outcome()
    except RuntimeError:
        pytest.skip("plain torch refuses it: a tensor that it keeps was changed in place")
    dibit.compress(model)
    for _ in range(3):
        own, found = outcome()
        assert torch.equal(own, y)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            assert torch.allclose(found[name], grad, rtol=1e-3, atol=2e-5 * float(grad.abs().max()) + 1e-6), name
