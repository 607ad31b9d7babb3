"""`torch.compile(dibit.compress(model))`: one graph, the plain forward, unbiased gradients, codes alone kept."""

import copy
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import _get_current_function_mode_stack, get_overridable_functions
from torch.utils.checkpoint import checkpoint
from torch_geometric import EdgeIndex
from torch_geometric.nn.models import GAT, GCN, GIN, GraphSAGE

import dibit
from dibit._torch.private.autograd import top_hooks
from dibit.codec.seed_stream import restart
from dibit.compile.config_text import config_of, text_of
from dibit.compile.rules import COMPILED, RULES
from dibit.recipes import RECIPES
from dibit.rules.registry import OPERATIONS, spellings
from tests.autograd_graph import nodes
from tests.unbiased import bias_of, gradient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(  # of Dynamo and Inductor
        "ignore:The .grad attribute", "ignore:Skipping serialization", "ignore:Guards may run slower"
    ),
]

N, D = 2000, 64
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    default = dibit.recipe("default")
    assert default.norm is not None
    parts = [replace(c, reduce=replace(c.reduce, least=1)) for c in (default, default.norm)]  # type: ignore[type-var]
    monkeypatch.setitem(RECIPES, "default", replace(parts[0], norm=parts[1]))  # the tests have few rows
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):  # plain and compressed models of one class
        yield
    assert not _get_current_function_mode_stack()
    assert top_hooks() is None
    torch._dynamo.reset()


class Dense(nn.Module):
    """Every operation that is compressed under compile, and residual additions."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, D), nn.Linear(D, D), nn.Linear(D, 4)
        self.weight = nn.Parameter(torch.randn(D, D) / 8)
        self.batch_norm, self.layer_norm, self.drop = nn.BatchNorm1d(D), nn.LayerNorm(D), nn.Dropout(p)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(F.relu(self.batch_norm(self.first(self.drop(x)))))
        h = h + F.gelu(self.layer_norm(self.second(h)))
        h = h + torch.sigmoid(h @ self.weight) + torch.tanh(h) + F.silu(h) + F.elu(h).sigmoid()
        h = F.leaky_relu(self.second(h), 0.1) + self.relu(self.second(h))
        return self.last(h)


def mlp(p: float = 0.0) -> nn.Sequential:
    norm = nn.BatchNorm1d(32)
    return nn.Sequential(
        nn.Linear(16, 32), norm, nn.ReLU(), nn.Dropout(p), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)
    )


def compiled(model: nn.Module, backend: str = "aot_eager", fullgraph: bool = True) -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=fullgraph)


def storages_of(*tensors: Tensor) -> set[int]:
    return {x.untyped_storage()._cdata for x in tensors}


def kept(y: Tensor, *others: Tensor) -> dict[int, Tensor]:
    """All that the graph of y keeps, by storage, but for `others`."""
    found: dict[int, Tensor] = {}
    for node in nodes(y):
        saved = list(getattr(node, "saved_tensors", ()))
        saved += [value for name in dir(node) if name.startswith("_saved_") for value in [getattr(node, name)]]
        for x in saved:
            if isinstance(x, Tensor) and x.layout == torch.strided:
                found[x.untyped_storage()._cdata] = x
    skip = storages_of(*others)
    return {key: x for key, x in found.items() if key not in skip}


def nbytes(tensors: dict[int, Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors.values())


def held(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *inputs]


@pytest.mark.parametrize("recipe", ["default", "exact"])
def test_a_dense_model_is_one_graph_with_the_plain_forward_and_keeps_codes_alone(recipe: str) -> None:
    x = torch.randn(N, 16)
    plain = Dense()
    model = dibit.compress(copy.deepcopy(plain), recipe)
    expected, y = compiled(plain)(x), compiled(model)(x)
    assert torch.equal(y, expected)
    own = kept(y, *held(model, x))
    dense = [t for t in own.values() if t.is_floating_point() and t.numel() >= N * 8]
    assert not dense, [t.shape for t in dense]
    assert nbytes(own) < (0.1 if recipe == "default" else 0.17) * nbytes(kept(expected, *held(plain, x)))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):  # running statistics
        assert torch.equal(mine, theirs)


def _rows_of_one(h: Tensor) -> Tensor:
    return h.t().unsqueeze(0)


# How the functions that have a rule in compiled code are called, by its name, on h (N, D); by default f(h).
CALLS: dict[str, Callable[[Any, Tensor, nn.Module], Tensor]] = {
    "linear": lambda f, h, net: f(h, net.weight, net.bias),
    "matmul": lambda f, h, net: f(net.weight, h) if f is Tensor.__rmatmul__ else f(h, net.weight),
    "addmm": lambda f, h, net: f(h, h, net.weight, beta=0.3, alpha=0.7),
    "prelu": lambda f, h, net: f(h, net.slopes),
    "dropout": lambda f, h, net: f(h, 0.5, True),
    "batch_norm": lambda f, h, net: (
        f(h, None, None, None, None, True, 0.1, 1e-5, False)
        if f is torch.batch_norm
        else f(h, net.mean, net.var, net.gain, net.bias, training=True)
    ),
    "instance_norm": lambda f, h, net: (
        f(_rows_of_one(h), None, None, None, None, True, 0.1, 1e-5, False)
        if f is torch.instance_norm
        else f(_rows_of_one(h), net.mean, net.var, net.gain, net.bias)
    )[0].t(),
    "layer_norm": lambda f, h, net: f(h, (D,), net.gain, net.bias),
}


class One(nn.Module):
    """One function between two layers."""

    def __init__(self, name: str, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = function, CALLS.get(name, lambda f, h, net: f(h))  # torch 2.6 takes functions for methods
        self.first, self.last = nn.Linear(16, D, bias=False), nn.Linear(D, 4)
        self.weight, self.bias = nn.Parameter(torch.randn(D, D) / 8), nn.Parameter(torch.rand(D))
        self.slopes, self.gain = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(D))
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("var", torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        function, call = self.parts
        return self.last(call(function, self.first(x) * 2, self) * 1)


SEEN = {function for functions in get_overridable_functions().values() for function in functions}


def by_name(name: str) -> list[Any]:
    """The spellings that Dynamo shows to a mode: no `torch.relu_`, no `F.sigmoid`, no `F.hardswish`."""
    return [function for function in spellings(name) if function in RULES and function in SEEN]


COVERED = sorted(name for name in COMPILED if by_name(name) and name != "new_zeros")


@pytest.mark.parametrize("name", COVERED)
def test_every_spelling_is_compressed(name: str) -> None:
    x = torch.randn(N, 16)
    for function in by_name(name):
        plain = One(name, function)
        model = dibit.compress(copy.deepcopy(plain), dibit.Config(bits=2, dropout="mask"))
        torch._dynamo.reset()
        torch.manual_seed(1)
        expected = compiled(plain)(x)
        torch.manual_seed(1)
        y = compiled(model)(x)
        assert torch.equal(y, expected), function
        own = kept(y, *held(model, x))
        dense = [t.shape for t in own.values() if t.is_floating_point() and t.numel() >= N * 8]
        assert not dense, (function, dense)
        assert nbytes(own) < 0.4 * nbytes(kept(expected, *held(plain, x))), function
        for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):
            assert torch.equal(mine, theirs), function


@pytest.mark.parametrize("name", [name for name in COVERED if name != "dropout"])
@pytest.mark.statistics
def test_the_gradient_of_every_function_is_unbiased(name: str) -> None:
    x, readout = torch.randn(48, 16), torch.randn(48, 4)
    plain = One(name, by_name(name)[0])
    truth = gradient(plain, x, readout)
    model = compiled(dibit.compress(copy.deepcopy(plain), dibit.Config(bits=2, block=64)))
    bias = bias_of(lambda _: gradient(model, x, readout), truth, 100)
    assert bias.unbiased, bias
    assert not bias.exact
    torch._dynamo.reset()
    near = dibit.compress(copy.deepcopy(plain), dibit.Config(bits=8, block=64))
    gradient(compiled(near), x, readout)
    for mine, theirs in zip(near.parameters(), plain.parameters(), strict=True):  # no factor is wrong
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or (mine.grad - theirs.grad).norm() < 0.1 * theirs.grad.norm()


def test_functions_without_a_rule_in_compiled_code_are_those_of_the_documentation() -> None:
    missing = {*OPERATIONS} - {*COVERED}
    print("eager code alone has rules for", *sorted(missing))
    page = (Path(__file__).parents[2] / "docs" / "compile.md").read_text()
    (section,) = re.findall(r"\| only without `torch.compile` \| why \|\n(.*?)\n\n", page, re.S)
    documented = {name for row in section.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert missing == documented, (
        f"a table of docs/compile.md says which functions have no rule in compiled code: add {missing - documented}, "
        f"strike {documented - missing}"
    )


def test_masks_are_one_bit_and_dropout_is_nothing() -> None:
    x = torch.randn(N, 16, requires_grad=True)
    model = dibit.compress(nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.LeakyReLU(0.1)))
    y = compiled(model)(x)
    assert nbytes(kept(y, x)) <= 2 * (N * 16 // 8) + 16  # two masks, and the key
    y.sum().backward()
    where = y != 0
    slopes = torch.where(x > 0, 2.0, 0.0) * where
    assert torch.equal(x.grad, slopes)  # the gradient of all three is exact


def test_dropout_by_mask_is_torchs_own_draw() -> None:
    x = torch.randn(N, 16)
    plain = mlp(0.5)
    model = dibit.compress(copy.deepcopy(plain), "iexact")
    results = []
    for each in (compiled(plain), compiled(model)):
        torch.manual_seed(3)
        results.append((each(x), torch.rand(1)))  # the codec's draws do not move torch's
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    "config",
    [
        "default",
        "iexact",
        dibit.Config(bits=2, block=dibit.Rows(2), levels="normal", reduce=dibit.Sample(3, by="norm")),
        dibit.Config(bits=2, block=64, reduce=dibit.Sample(8, by="norm", least=20)),
        dibit.Config(bits=2, block=64, reduce=dibit.Sample(8, by="gradient", least=100)),
    ],
    ids=["default", "iexact", "normal-norm", "a half of few rows", "all of few rows"],
)
@pytest.mark.statistics
def test_gradients_are_unbiased(config: str | dibit.Config) -> None:
    x, readout = torch.randn(48, 16), torch.randn(48, 4)
    plain = mlp()
    plain.insert(5, nn.LayerNorm(32))
    truth = gradient(plain, x, readout)
    model = compiled(dibit.compress(copy.deepcopy(plain), config))
    bias = bias_of(lambda _: gradient(model, x, readout), truth, 300)
    assert bias.unbiased, bias
    assert not bias.exact


def test_each_step_draws_fresh_seeds_which_follow_manual_seed_and_nothing_compiles_again() -> None:
    x = torch.randn(N, 16)
    model = dibit.compress(mlp(0.5))
    step = compiled(model)

    def codes() -> list[Tensor]:
        y = step(x)
        y.sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters()), model.zero_grad()][:-1]

    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    first = codes()
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = codes()
        torch.manual_seed(1)
        model.load_state_dict(state)
        again, more = codes(), codes()
        codes()
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, more, strict=True))
    assert counters["stats"]["unique_graphs"] == 1


def test_few_rows_are_all_kept() -> None:
    """As many codes as without a reduction, and no scores: ranges a row aside, 2 bits an element."""
    kept_bytes = []
    for reduce in (None, dibit.Sample(8, by="gradient", least=N)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = dibit.compress(mlp(), dibit.Config(bits=2, block=64, reduce=reduce))
        x = torch.randn(N, 16)
        kept_bytes.append(nbytes(kept(compiled(model)(x), *held(model, x))))
    assert kept_bytes[0] == kept_bytes[1]


def test_two_passes_in_one_graph_are_two_draws() -> None:
    model = dibit.compress(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)))
    a, b = torch.compile(lambda x: (model(x), model(x)), backend="aot_eager", fullgraph=True)(torch.randn(N, 16))
    assert not torch.equal(a == 0, b == 0)


def test_two_dropouts_of_one_pass_are_two_draws() -> None:
    model = dibit.compress(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)))
    y = compiled(model)(torch.ones(N, 16, requires_grad=True))
    assert 0.73 < (y == 0).float().mean() < 0.77


def test_the_hooks_of_an_uncompiled_pass_step_aside_for_a_compiled_part() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            look()
            return F.relu(x)

    @torch.compiler.disable
    def look() -> None:
        seen.append(top_hooks())

    model = dibit.compress(nn.Sequential(nn.Linear(16, 32), compiled(Probe(), fullgraph=False), nn.Linear(32, 4)))
    y = model(torch.randn(N, 16))
    y.sum().backward()
    assert seen == [None]
    assert type(y.grad_fn).__name__ == "LinearBackward"  # after it the uncompiled pass goes on


def test_nothing_is_compressed_in_eval_mode_and_without_gradients() -> None:
    x = torch.randn(N, 16)
    plain = Dense(0.5)
    model = dibit.compress(copy.deepcopy(plain))
    before = torch.get_rng_state()
    model.eval(), plain.eval()
    expected, y = compiled(plain)(x), compiled(model)(x)
    assert torch.equal(y, expected)
    assert nbytes(kept(y, *held(model, x))) == nbytes(kept(expected, *held(plain, x)))
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        assert compiled(model.train())(x).grad_fn is None


def test_modules_left_exact_and_functions_with_a_rule_of_the_users_stay_with_torch() -> None:
    x = torch.randn(N, 16)
    plain = mlp()
    model = dibit.compress(copy.deepcopy(plain), {"4": None, "*": "default"}, rules={F.gelu: lambda *args, **_: None})
    y = compiled(model)(x)
    assert torch.equal(y, compiled(plain)(x))
    dense = [t.shape for t in kept(y, *held(model, x)).values() if t.is_floating_point() and t.numel() == N * 32]
    assert len(dense) == 2  # the inputs of the linear layer and of GELU


def test_a_feature_matrix_and_its_dropout_are_not_kept_again() -> None:
    x = torch.randn(N, 16)
    for model in (nn.Sequential(nn.Linear(16, 4)), nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 4))):
        reference = copy.deepcopy(model)
        y = compiled(dibit.compress(model))(x)
        assert nbytes(kept(y, *held(model, x))) <= 8  # the key
        y.sum().backward()
        if len(model) == 1:
            reference(x).sum().backward()
            torch.testing.assert_close(model[0].weight.grad, reference[0].weight.grad)


def test_a_break_in_the_middle_of_a_module_loses_nothing() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            torch._dynamo.graph_break()
            return self.head(F.relu(h))

    x = torch.randn(N, 16)
    plain = Broken()
    model = dibit.compress(copy.deepcopy(plain))
    call = lambda x: model(x)  # noqa: E731
    for way in (compiled(model, fullgraph=False), torch.compile(call, backend="aot_eager")):
        model.load_state_dict(plain.state_dict())
        y = way(x)
        assert torch.equal(y, copy.deepcopy(plain)(x))
        assert nbytes(kept(y, *held(model, x))) < 0.1 * nbytes(kept(copy.deepcopy(plain)(x), *held(plain, x)))
        y.sum().backward()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("way", ["model", "function"])
def test_an_interrupted_pass_leaves_nothing_behind(error: type[BaseException], way: str) -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.raises = mlp(), True

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            torch._dynamo.graph_break()
            if self.raises:
                raise error
            return h

    x = torch.randn(N, 16)
    model = dibit.compress(Raises())
    step = torch.compile(model if way == "model" else lambda x: model(x), backend="aot_eager")
    with pytest.raises(error):
        step(x)
    model.raises = False
    for each in (step, model):
        small = nbytes(kept(each(x), *held(model, x)))
        assert 0 < small < N * 32 * 4 / 4
    assert not _get_current_function_mode_stack()


def test_a_compiled_part_of_a_compressed_model_is_compressed() -> None:
    x = torch.randn(N, 16)
    plain = mlp()
    model = dibit.compress(copy.deepcopy(plain))
    model[4] = compiled(model[4])
    wrapped = dibit.compress(nn.Sequential(compiled(copy.deepcopy(plain))))
    for each in (model, wrapped):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="dibit")
            for _ in range(2):
                each.load_state_dict(dict(zip(each.state_dict(), plain.state_dict().values(), strict=True)))
                y = each(x)
                assert torch.equal(y, copy.deepcopy(plain)(x))
                assert nbytes(kept(y, *held(each, x))) < N * 32 * 4 / 4
                y.sum().backward()


def test_a_compiled_function_within_an_uncompiled_pass_is_exact() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
            self.act = torch.compile(lambda x: F.gelu(x) * 2, backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.first(x)))

    x = torch.randn(N, 16)
    model = dibit.compress(Mixed())
    y = model(x)
    assert torch.equal(y, model.eval()(x))
    shapes = [
        tuple(t.shape) for t in kept(y, *held(model, x)).values() if t.is_floating_point() and t.numel() >= N * 16
    ]
    assert shapes == [(N, 32)]  # the input of the compiled function, and not that of the last layer


def test_inside_a_checkpoint_everything_stays_exact() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(checkpoint(self.body, x, use_reentrant=False)))

    x = torch.randn(N, 16)
    plain = Checkpointed()
    model = dibit.compress(copy.deepcopy(plain))
    y, expected = compiled(model, fullgraph=False)(x), plain(x)
    assert torch.equal(y, expected)
    y.sum().backward(), expected.sum().backward()
    torch.testing.assert_close(model.body[0].weight.grad, plain.body[0].weight.grad)


def test_batches_of_other_sizes_compile_once_more() -> None:
    model = dibit.compress(mlp(0.5))
    step = compiled(model)
    for rows in (900, 800, 1000, 700, 1200):
        step(torch.randn(rows, 16)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2


def test_tracking_a_compiled_model_changes_nothing() -> None:
    x = torch.randn(N, 16)
    model, plain = dibit.compress(mlp()), mlp()
    step = compiled(model)
    with dibit.track(model):
        small = nbytes(kept(step(x), *held(model, x)))
    assert small < N * 32 * 4 / 4
    with dibit.track(plain):
        compiled(plain)(x).sum().backward()
    dibit.decompress(model)
    assert nbytes(kept(step(x), *held(model, x))) > 4 * small


def test_threads_do_not_share_a_pass() -> None:
    x = torch.randn(N, 16)
    model = dibit.compress(mlp(0.5))
    step = compiled(model)
    step(x)
    sizes, failed = set(), []

    def run() -> None:
        try:
            for _ in range(5):
                sizes.add(nbytes(kept(step(x), *held(model, x))))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(sizes) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(N, 16)
    plain = mlp().insert(4, nn.LayerNorm(32))
    model = dibit.compress(copy.deepcopy(plain))
    if dtype == torch.float64:
        x, plain, model = x.double(), plain.double(), model.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, expected = compiled(model)(x), compiled(plain)(x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    y.sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


def test_nan_stays_nan() -> None:
    x = torch.randn(N, 16)
    x[7, 3] = float("nan")
    model = dibit.compress(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    compiled(model)(x).sum().backward()
    assert model[2].weight.grad.isnan().any()


def graph(nodes: int = 500, edges: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """Features, `edge_index`, and the same as a CSR matrix."""
    index = torch.randint(0, nodes, (2, edges))
    matrix = torch.sparse_coo_tensor(index.flip(0), torch.ones(edges), (nodes, nodes)).coalesce().to_sparse_csr()
    return torch.randn(nodes, 16), index, matrix


@pytest.mark.parametrize("kind", [GraphSAGE, GIN])
def test_models_on_edge_index_are_one_graph(kind: type) -> None:
    x, index, _ = graph()
    plain = kind(16, 32, 2, 4, norm="batch_norm")
    model = dibit.compress(copy.deepcopy(plain))
    expected = compiled(plain)(x, index)
    torch._dynamo.reset()
    y = compiled(model)(x, index)
    assert torch.equal(y, expected)
    small, large = (nbytes(kept(z, *held(m, x, index))) for z, m in ((y, model), (expected, plain)))
    assert small < (0.1 if kind is GraphSAGE else 0.3) * large
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", [GCN, GAT])
def test_layers_that_make_numbers_for_edges_take_the_uncompiled_pass(kind: type) -> None:
    """Plain torch breaks the graph there (self-loops are added), and would keep all of them."""
    x, index, _ = graph(edges=9000)
    plain = kind(16, 32, 2, 4, norm="batch_norm")
    expected = compiled(copy.deepcopy(plain), fullgraph=False)(x, index)
    assert sum(counters["graph_break"].values()) > 0
    torch._dynamo.reset()
    twins = [dibit.compress(copy.deepcopy(plain)) for _ in range(2)]
    torch.manual_seed(1)
    restart()  # what earlier tests drew from this seed does not count
    eager = twins[0](x, index)
    size = nbytes(kept(eager, *held(twins[0], x, index)))
    eager.sum().backward()
    torch.manual_seed(1)
    restart()
    y = compiled(twins[1], fullgraph=False)(x, index)
    assert torch.equal(y, expected)
    assert nbytes(kept(y, *held(twins[1], x, index))) == size
    y.sum().backward()
    for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("kind", [GCN, GAT])
def test_with_few_edges_they_are_compiled_like_all_others(kind: type) -> None:
    x, index, _ = graph(edges=2000)
    plain = kind(16, 32, 2, 4, norm="batch_norm", add_self_loops=False)
    expected = compiled(copy.deepcopy(plain))(x, index)
    readout = torch.randn(expected.shape)
    truth = gradient(plain, x, readout, index)
    torch._dynamo.reset()
    assert torch._dynamo.explain(dibit.compress(copy.deepcopy(plain)))(x, index).graph_break_count == 0
    torch._dynamo.reset()
    counters.clear()
    model = dibit.compress(plain)
    step = compiled(model)
    assert torch.equal(step(x, index), expected)
    assert counters["stats"]["unique_graphs"]
    bias = bias_of(lambda _: gradient(step, x, readout, index), truth, 64)
    assert bias.unbiased, bias
    assert not bias.exact


def test_a_sparse_matrix_takes_the_uncompiled_pass() -> None:
    x, _, matrix = graph()
    plain = GraphSAGE(16, 32, 2, 4, norm="batch_norm")
    twins = [dibit.compress(copy.deepcopy(plain)) for _ in range(2)]
    torch.manual_seed(1)
    eager = twins[0](x, matrix)
    size = nbytes(kept(eager, *held(twins[0], x)))
    eager.sum().backward()
    torch.manual_seed(1)
    y = compiled(twins[1], fullgraph=False)(x, matrix)
    assert torch.equal(y, copy.deepcopy(plain)(x, matrix))
    assert nbytes(kept(y, *held(twins[1], x))) == size
    y.sum().backward()
    for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_an_edge_index_of_pygs_own_class_takes_the_uncompiled_pass() -> None:
    x, index, _ = graph()
    edges = EdgeIndex(index, sparse_size=(len(x), len(x)))
    plain = GraphSAGE(16, 32, 2, 4)
    model = dibit.compress(copy.deepcopy(plain))
    y = compiled(model, fullgraph=False)(x, edges)
    assert torch.equal(y, plain(x, edges))
    assert nbytes(kept(y, *held(model, x, index))) < 0.3 * nbytes(kept(plain(x, edges), *held(plain, x, index)))
    assert not counters["stats"]["unique_graphs"]


@needs_compiler
def test_inductor_keeps_the_codes_alone() -> None:
    x = torch.randn(N, 16)
    plain = mlp()
    plain.insert(4, nn.LayerNorm(32))
    model = dibit.compress(copy.deepcopy(plain))
    expected = compiled(plain, "inductor")(x)
    step = compiled(model, "inductor")
    y = step(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert nbytes(kept(y, *held(model, x))) < 0.1 * nbytes(kept(expected, *held(plain, x)))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(x).sum().backward()


@needs_compiler
def test_inductor_keeps_no_dense_tensor_of_a_model_on_edge_index() -> None:
    x, index, _ = graph()
    model = dibit.compress(GraphSAGE(16, 32, 2, 4, norm="batch_norm", dropout=0.5))
    y = compiled(model, "inductor")(x, index)
    own = kept(y, *held(model, x, index))
    assert not [t.shape for t in own.values() if t.is_floating_point() and t.numel() > 2 * len(x)]
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_config_survives_as_text() -> None:
    for config in (
        *RECIPES.values(),
        dibit.Config(bits=1, levels=(0.0, 1.0), block=dibit.Rows(3, most=64), reduce=dibit.Sample(2, by="norm")),
    ):
        assert config_of(text_of(config)) == config


def test_importing_dibit_does_not_import_the_compiler() -> None:
    code = "import dibit, sys; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
