"""Sums over edges under `torch.compile`: plain torch's bits, exact gradients, and no tensor of one row an edge."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch_geometric.nn import GCN, GIN, GraphSAGE, MessagePassing
from torch_geometric.nn.models.basic_gnn import BasicGNN

import dibit
from dibit.compile import edge_ops
from dibit.edges import functions
from tests.compile.test_compile import held, kept, nbytes, needs_compiler
from tests.watched import watched

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(  # of Dynamo and Inductor
        "ignore:The .grad attribute", "ignore:Skipping serialization", "ignore:Guards may run slower"
    ),
]

N, E, D = 300, 4000, 16
CONFIG = dibit.Config(bits=8, block=64, reduce=None)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(functions, "MIN_DEFERRED_ELEMENTS", 1)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):  # plain and compressed models of one class
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend that keeps the graphs which it compiles."""

    def __init__(self) -> None:
        self.forward: list[Any] = []
        self.backward: list[Any] = []
        self.backend = aot_autograd(
            fw_compiler=self._into(self.forward),
            bw_compiler=self._into(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    @staticmethod
    def _into(found: list[Any]) -> Callable[[Any, Any], Any]:
        def compiler(graph: Any, inputs: Any) -> Any:
            found.append(graph.graph)
            return make_boxed_func(graph.forward)

        return compiler

    def calls(self, name: str) -> int:
        return sum(name in str(node.target) for graph in self.forward + self.backward for node in graph.nodes)

    def large(self, numbers: int) -> list[str]:
        """What is made of so many floating-point numbers."""
        made = [node for graph in self.forward + self.backward for node in graph.nodes if node.op == "call_function"]
        values = [(str(node.target), node.meta.get("val")) for node in made]
        return [name for name, x in values if isinstance(x, Tensor) and x.is_floating_point() and x.numel() >= numbers]


class Conv(MessagePassing):
    """Weighted messages: the caller's weights, or those of a network."""

    def __init__(self, aggr: str, learned: bool) -> None:
        super().__init__(aggr=aggr)
        self.weigh = nn.Linear(1, 1) if learned else nn.Identity()

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x, edge_weight=self.weigh(edge_weight[:, None]))

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        return edge_weight * x_j


class Stack(BasicGNN):
    """Layers of `Conv`."""

    supports_edge_weight, supports_edge_attr = True, False

    def init_conv(self, in_channels: int, out_channels: int, aggr: str, learned: bool = False) -> nn.Module:
        return Conv(aggr, learned)


class Own(nn.Module):
    """A sum by target that is written by hand."""

    def __init__(self, messages: Callable[..., Tensor], add: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.messages, self.add, self.shape = messages, add, shape or (D,)
        self.gain = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        h = (x * self.gain).view(-1, *self.shape)
        return self.add(h, edge_index[1], self.messages(h, edge_index[0], edge_weight)).flatten(1)


def column(index: Tensor, like: Tensor) -> Tensor:
    return index.view(-1, *(1,) * (like.dim() - 1)).expand_as(like)


def plain_gather(h: Tensor, source: Tensor, w: Tensor) -> Tensor:
    return h.index_select(0, source)


def into_zeros(h: Tensor, target: Tensor, messages: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add_(0, target, messages)


SAGE = {"in_channels": D, "hidden_channels": D, "num_layers": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "GraphSAGE, mean": lambda: GraphSAGE(**SAGE),
    "GraphSAGE, sum": lambda: GraphSAGE(**SAGE, aggr="sum"),
    "GraphSAGE, both": lambda: GraphSAGE(**SAGE, aggr=["sum", "mean"]),
    "GIN": lambda: GIN(**SAGE),
    "GCN": lambda: GCN(**SAGE, add_self_loops=False),
    "weights": lambda: Stack(**SAGE, aggr="sum"),
    "mean of weights": lambda: Stack(**SAGE, aggr="mean"),
    "learned weights": lambda: Stack(**SAGE, aggr="sum", learned=True),
    "x[index]": lambda: Own(lambda h, source, w: h[source] * w[:, None], into_zeros),
    "x[-index]": lambda: Own(lambda h, source, w: h[source - N], into_zeros),
    "gather": lambda: Own(lambda h, source, w: torch.gather(h, 0, column(source, w[:, None].expand(E, D))), into_zeros),
    "heads": lambda: Own(
        lambda h, source, w: torch.stack((w, w * 2), 1)[:, :, None] * h[source], into_zeros, 2, D // 2
    ),
    "scatter_add": lambda: Own(
        plain_gather, lambda h, target, rows: torch.zeros_like(h).scatter_add(0, column(target, rows), rows)
    ),
    "index_add": lambda: Own(plain_gather, lambda h, target, rows: torch.index_add(h, 0, target, rows)),
    "in place": lambda: Own(plain_gather, lambda h, target, rows: (h * 2).scatter_add_(-2, column(target, rows), rows)),
}


def inputs(nodes: int = N, edges: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """Features and weights, which have a gradient, and a graph with parallel edges and nodes without any."""
    x = torch.randn(nodes, D, requires_grad=True)
    return x, torch.randint(0, nodes - 10, (2, edges)), torch.rand(edges, requires_grad=True)


def run(model: nn.Module, x: Tensor, edge_index: Tensor, w: Tensor) -> list[Any]:
    """The result, and the gradients of features and weights, of which linear layers and ReLU have exact ones."""
    y = model(x, edge_index, w) if getattr(model, "supports_edge_weight", True) else model(x, edge_index)
    torch.manual_seed(5)
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), (x, w), allow_unused=True)]


def agree(mine: list[Any], theirs: list[Any]) -> None:
    assert torch.equal(mine[0], theirs[0])
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_sums_have_plain_torchs_bits_and_exact_gradients_and_no_row_for_each_edge(name: str) -> None:
    torch.manual_seed(0)
    plain, data, graphs = MODELS[name](), inputs(), Graphs()
    expected = run(plain, *data)
    model = torch.compile(dibit.compress(copy.deepcopy(plain), CONFIG), backend=graphs.backend, fullgraph=True)
    agree(run(model, *data), expected)
    assert graphs.calls("edge_sum") >= 2
    assert graphs.large(E * D) == []
    torch._dynamo.reset()
    graphs = Graphs()
    run(torch.compile(copy.deepcopy(plain), backend=graphs.backend), *data)
    assert graphs.large(E * D), "plain torch makes them, or this test sees nothing"


@pytest.mark.parametrize("name", ["GraphSAGE, mean", "learned weights", "in place"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=needs_compiler)])
def test_other_backends(name: str, backend: str) -> None:
    """`eager` compiles nothing, and has torch's own gathers."""
    torch.manual_seed(0)
    plain, data = MODELS[name](), inputs()
    expected = run(plain, *data)
    model = torch.compile(dibit.compress(copy.deepcopy(plain), CONFIG), backend=backend, fullgraph=True)
    y, *gradients = run(model, *data)
    with watched(edge_ops.sorted_edges) as looked_up:
        run(model, *data)
    assert bool(looked_up) == (backend != "eager")
    torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-5)
    agree([y.detach(), *gradients], [y.detach(), *expected[1:]])


def test_nothing_of_one_row_an_edge_is_kept() -> None:
    """A layer keeps its edges, which the caller holds, and weights that it makes itself."""
    x, edge_index, w = inputs()
    w = w.detach()
    for name, each in (("GraphSAGE, sum", 0), ("weights", 0), ("GCN", 2 * 4 * E), ("learned weights", 2 * 4 * E)):
        model = dibit.compress(MODELS[name](), CONFIG)
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        more = () if name == "GraphSAGE, sum" else (w,)
        y = step(x, edge_index, *more)
        own = kept(y, *held(model, x, edge_index, w))
        assert nbytes({key: t for key, t in own.items() if E in t.shape and t.is_floating_point()}) <= each, name


WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "nothing": lambda h, rows, w: None,
    "messages": lambda h, rows, w: torch.relu_(rows),
    "features": lambda h, rows, w: torch.relu_(h),
    "weights": lambda h, rows, w: w.data.neg_(),
    "a view": lambda h, rows, w: h[3:7].zero_(),
    "a row": lambda h, rows, w: rows.__setitem__(3, 0.0),
    "detached": lambda h, rows, w: rows.detach().add_(1),
    "data of messages": lambda h, rows, w: rows.data.add_(1),
    "data of features": lambda h, rows, w: h.data.add_(1),
}


class Written(nn.Module):
    """Writes to what a sum is of."""

    def __init__(self, write: Callable[..., Any]) -> None:
        super().__init__()
        self.write, self.gain = write, nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor, edge_index: Tensor, w: Tensor) -> Tensor:
        h, w = x * self.gain, (w.detach() * 2)[:, None]
        rows = h[edge_index[0]] * w
        self.write(h, rows, w)
        return torch.zeros(x.shape).index_add_(0, edge_index[1], rows)


@pytest.mark.parametrize("what", WRITES)
def test_a_write_between_the_gather_and_the_sum_is_seen(what: str) -> None:
    x, edge_index, w = inputs()
    plain, graphs = Written(WRITES[what]), Graphs()
    expected = plain(x, edge_index, w)
    y = torch.compile(dibit.compress(copy.deepcopy(plain), CONFIG), backend=graphs.backend)(x, edge_index, w)
    assert torch.equal(y, expected)
    assert bool(graphs.calls("edge_sum")) == (what == "nothing")


@pytest.mark.parametrize("which", ["rows", "features"])
def test_what_is_cut_off_from_its_gradient_stays_cut_off(which: str) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(D))

        def forward(self, x: Tensor, edge_index: Tensor, w: Tensor) -> Tensor:
            h = x * self.gain
            rows = h[edge_index[0]]
            (rows if which == "rows" else h).detach_()
            return self.gain + torch.zeros(x.shape).index_add_(0, edge_index[1], rows)

    data = inputs()
    plain = Cut()
    expected = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    model = torch.compile(dibit.compress(copy.deepcopy(plain), CONFIG), backend="aot_eager")
    agree(run(model, *data), run(expected, *data))


def test_small_gathers_stay_with_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "MIN_DEFERRED_ELEMENTS", E * D + 1)
    graphs = Graphs()
    run(torch.compile(dibit.compress(MODELS["GIN"](), CONFIG), backend=graphs.backend), *inputs())
    assert not graphs.calls("edge_sum")
    assert graphs.calls("index_select")


def test_batches_of_other_sizes_compile_once_more() -> None:
    plain = MODELS["GraphSAGE, mean"]()
    model = torch.compile(dibit.compress(copy.deepcopy(plain), CONFIG), backend="aot_eager", fullgraph=True)
    for nodes, edges in ((300, 4000), (350, 4100), (280, 3500), (500, 9000), (900, 30_000)):
        data = inputs(nodes, edges)
        agree(run(model, *data), run(plain, *data))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_graph_that_is_changed_in_place_is_seen(backend: str) -> None:
    """Also where no counter of torch's tells of it; and a plan that was made before serves again."""
    x, edge_index, w = inputs()
    plain = MODELS["weights"]()
    model = torch.compile(dibit.compress(copy.deepcopy(plain), CONFIG), backend=backend, fullgraph=True)
    for _ in range(2):
        agree(run(model, x, edge_index, w), run(plain, x, edge_index, w))
        edge_index.numpy()[:] = edge_index.numpy()[::-1].copy()
        agree(run(model, x, edge_index, w), run(plain, x, edge_index, w))


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("bad", [-1, N])
def test_an_edge_without_a_node(end: int, bad: int) -> None:
    x, edge_index, _ = inputs()
    edge_index[end, 7] = bad
    model = torch.compile(dibit.compress(MODELS["index_add"](), CONFIG), backend="aot_eager")
    with pytest.raises(IndexError, match=f"node {bad}, .* from 0 to {N - 1}"):
        model(x, edge_index, None)


def test_a_large_model_with_weights_of_the_callers_is_compiled_and_one_that_makes_weights_is_not() -> None:
    x, edge_index, w = torch.randn(2000, D), torch.randint(0, 2000, (2, 20_000)), torch.rand(20_000)
    own_weights = GCN(**SAGE, normalize=False)
    for model, graphs in ((MODELS["weights"](), 1), (own_weights, 1), (MODELS["GCN"](), 0), (GCN(**SAGE), 0)):
        torch._dynamo.reset()
        counters.clear()
        torch.compile(dibit.compress(model, CONFIG), backend="aot_eager")(x, edge_index, w)
        assert counters["stats"]["unique_graphs"] == graphs


# -- the operators -------------------------------------------------------------------------------------------------


def edge_tensors(heads: int, edges: int = 200, nodes: int = 30) -> tuple[Tensor, ...]:
    """x (M, H, C), weights (E, H), a base (N, H, C), sources and targets."""
    source, target = torch.randint(0, nodes, (edges,)), torch.randint(0, nodes + 5, (edges,))
    return torch.randn(nodes, heads, 8), torch.rand(edges, heads), torch.randn(nodes + 5, heads, 8), source, target


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("edges", [0, 1, 200])
def test_edge_sum(weighted: bool, based: bool, heads: int, edges: int) -> None:
    x, weight, base, source, target = edge_tensors(heads, edges)
    messages = x[source] * weight[:, :, None] if weighted else x[source]
    start = base if based else torch.zeros_like(base)
    arguments = weight if weighted else None, base if based else None
    y = edge_ops.edge_sum(x, *arguments, source, target, len(base), False, False)
    assert torch.equal(y, start.index_add(0, target, messages))
    assert torch.equal(y, edge_ops.edge_sum(x, *arguments, source - len(x), target, len(base), True, False))
    back = edge_ops.edge_sum(y, arguments[0], None, source - len(x), target, len(x), True, True)
    rows = y[target] * weight[:, :, None] if weighted else y[target]
    assert torch.equal(back, torch.zeros_like(x).index_add(0, source, rows))
    scores = edge_ops.edge_weight_gradient(y, x, source, target, False)
    torch.testing.assert_close(scores, (y[target] * x[source]).sum(-1))


def test_sorted_edges_are_kept_by_their_content_and_few_of_them() -> None:
    edges = [torch.randint(0, 30, (2, 100 + i)) for i in range(edge_ops.MOST_KEPT + 1)]
    first = edge_ops.sorted_edges(edges[0][0], 30, edges[0][1], 30, (False, False))
    for source, target in edges[1:-1]:
        edge_ops.sorted_edges(source, 30, target, 30, (False, False))
    copied = edges[0].clone()
    assert edge_ops.sorted_edges(copied[0], 30, copied[1], 30, (False, False)) is first
    other = edge_ops.sorted_edges(edges[1][0], 30, edges[1][1], 30, (False, False))
    edge_ops.sorted_edges(*edges[-1][:1], 30, edges[-1][1], 30, (False, False))
    assert edge_ops.sorted_edges(edges[1][0], 30, edges[1][1], 30, (False, False)) is other
    assert edge_ops.sorted_edges(edges[0][0], 30, edges[0][1], 30, (False, False)) is first
    assert edge_ops.sorted_edges(edges[0][0], 31, edges[0][1], 30, (False, False)) is not first


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool) -> None:
    x, weight, base, source, target = edge_tensors(2)
    torch.library.opcheck(
        edge_ops.edge_sum, (x, weight if weighted else None, base, source, target, len(base), False, False)
    )
    torch.library.opcheck(edge_ops.edge_sum, (base, None, None, source, target, len(x), True, True))
    torch.library.opcheck(edge_ops.edge_weight_gradient, (base, x, source, target, False))
