"""A compressed model in the hands of others: TorchScript, tracing, export, quantisation, pickles, lazy sizes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch_geometric.nn import GATConv, SAGEConv

import dibit
from dibit.engine.model_state import state_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.first(x))))


def saves(model: nn.Module, *args: Any) -> bool:
    """Whether a training pass of the model is compressed."""
    with dibit.track(model) as saved:
        model(*args)
    return 0 < saved.total < 0.6 * saved.plain


def trace(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, (x,), check_trace=False)


def export(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,)).module(check_guards=False)


def export_strict(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), strict=True).module(check_guards=False)


def prepare_qat(model: nn.Module, x: Tensor) -> Any:
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return torch.ao.quantization.prepare_qat(model)


def prepare_qat_fx(model: nn.Module, x: Tensor) -> Any:
    from torch.ao.quantization import get_default_qat_qconfig_mapping, quantize_fx

    return quantize_fx.prepare_qat_fx(model, get_default_qat_qconfig_mapping("fbgemm"), (x,))


def dynamic(model: nn.Module, x: Tensor) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def fuse(model: nn.Module, x: Tensor) -> Any:
    train = torch.ao.quantization.fuse_modules_qat if model.training else torch.ao.quantization.fuse_modules
    return train(model, [["first", "norm"]])


USES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "jit.script": lambda model, _: torch.jit.script(model),
    "jit.script of a container": lambda model, _: torch.jit.script(nn.Sequential(model, nn.ReLU())),
    "jit.trace": trace,
    "fx": lambda model, _: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, x: make_fx(model)(x),
    "export": export,
    "strict export": export_strict,
    "prepare_qat": prepare_qat,
    "prepare_qat_fx": prepare_qat_fx,
    "quantize_dynamic": dynamic,
    "fuse_modules": fuse,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use", USES)
def test_what_takes_a_plain_model_takes_a_compressed_one(use: str, training: bool) -> None:
    x, results, errors = torch.randn(300, 16), [], []
    for compressed in (False, True):
        torch.manual_seed(0)
        model = Net().train(training)
        if compressed:
            dibit.compress(model)
        try:
            result = USES[use](model, x)
            y = result(x)
            results.append(y.detach())
            if y.requires_grad:
                y.square().sum().backward()
        except Exception as error:
            errors.append((compressed, error))
        if compressed and use != "fuse_modules":
            assert saves(model.train(), x)
    assert [plain for plain, _ in errors] in ([], [False, True]), errors
    if results:
        assert torch.equal(*results)


def test_a_scripted_model_has_the_plain_models_gradient() -> None:
    x = torch.randn(300, 16)
    plain = Net()
    model = dibit.compress(copy.deepcopy(plain))
    for each in (plain, torch.jit.script(model)):
        each(x).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def mish_rule(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented


class TestPickles:
    def test_rules_that_can_be_pickled_are_and_of_others_a_sentence_is_said(self, tmp_path: Path) -> None:
        rules = {F.mish: lambda forward, x, inplace: NotImplemented, F.softplus: mish_rule}
        model = dibit.compress(Net(), {"first": "iexact", "*": "default"}, rules=rules)
        with pytest.warns(UserWarning, match="the rules for mish cannot be pickled, so the saved Net is without") as w:
            torch.save(model, tmp_path / "model.pt")
        assert len(w) == 1
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        state = state_of(loaded)
        assert state is not None
        assert state.root is loaded
        assert state_of(loaded.first) is state
        assert state.rules == {F.softplus: mish_rule}
        rows = []
        for each in (model, loaded):
            torch.manual_seed(1)
            with dibit.track(each) as saved:
                each(torch.ones(300, 16))
            rows.append([(row.module, row.how, row.kept) for row in saved.rows])
        assert rows[0] == rows[1]
        twin = copy.deepcopy(model)
        assert state_of(twin).rules == rules  # type: ignore[union-attr]

    @pytest.mark.slow
    def test_where_dibit_is_not_installed_a_plain_model_is_loaded(self, tmp_path: Path) -> None:
        model = dibit.compress(nn.Sequential(nn.Linear(16, 4), nn.ReLU()), rules={F.mish: mish_rule})
        torch.save(model, tmp_path / "model.pt")
        code = f"""
import copy, importlib.abc, sys, torch
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "dibit":
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Absent())
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
for each in (model, copy.deepcopy(model), model.eval()):
    y = each(torch.ones(5, 16))
    y.sum().backward()
    assert type(y.grad_fn).__name__ == "ReluBackward0", y.grad_fn
torch.save(model, {str(tmp_path / "again.pt")!r})
print("dibit" in sys.modules, end="")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("False", "")
        torch.load(tmp_path / "again.pt", weights_only=False)(torch.ones(5, 16)).sum().backward()

    def test_in_the_middle_of_tracking(self) -> None:
        model = dibit.compress(Net())
        with dibit.track(model):
            twin = pickle.loads(pickle.dumps(model))
        assert saves(twin, torch.randn(300, 16))


def dense() -> nn.Module:
    return nn.Sequential(
        nn.LazyLinear(32),
        nn.LazyBatchNorm1d(),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.LazyLinear(32),
        nn.GELU(),
        nn.Linear(32, 4),
    )


class Graph(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(self.first(x, edges).relu(), edges)


LAZY: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "dense": (dense, False),
    "SAGE": (lambda: Graph(SAGEConv((-1, -1), 32), SAGEConv((-1, -1), 4)), True),
    "lazy, then not": (lambda: Graph(SAGEConv(-1, 32), SAGEConv(32, 4)), True),
    "GAT": (lambda: Graph(GATConv(-1, 8, 4), GATConv((-1, -1), 4, add_self_loops=False)), True),
}
ORDERS = "before", "after", "eval first", "no_grad first", "pickled", "tracked", "batch", "again", "loaded", "parts"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", LAZY)
def test_lazy_sizes_in_any_order(kind: str, order: str) -> None:
    make, graph = LAZY[kind]
    x = torch.randn(300, 16)
    args = (x, torch.randint(300, (2, 2000))) if graph else (x,)
    model = make()
    if order == "after":
        model(*args)
    dibit.compress(model)
    if order == "eval first":
        model.eval()(*args)
        model.train()
    elif order == "no_grad first":
        with torch.no_grad():
            model(*args)
    elif order == "pickled":
        model = pickle.loads(pickle.dumps(model))
    elif order == "tracked":
        with dibit.track(model) as saved:
            model(*args).sum().backward()
        assert str(saved)
    elif order == "batch":
        with dibit.batch(model, node_ids=torch.arange(300)):
            model(*args).sum().backward()
    elif order == "again":
        dibit.compress(dibit.decompress(model), "exact")
    elif order == "loaded":
        other = make()
        other(*args)
        model.load_state_dict(other.state_dict())
    elif order == "parts":
        h = model.first(*args) if graph else model[0](x)  # type: ignore[index]
        h.sum().backward()
    model(*args).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    expected = copy.deepcopy(model).eval()(*args)
    assert torch.equal(expected, dibit.decompress(copy.deepcopy(model)).eval()(*args))
    model(*args).sum().backward()
    assert saves(model, *args)


def test_a_plain_lazy_model_is_tracked() -> None:
    model = dense()
    with dibit.track(model) as saved:
        model(torch.randn(300, 16)).sum().backward()
    assert saved.total == saved.plain > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(300, 16))


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_a_part_is_taken_without_the_whole(how: str) -> None:
    """And works compressed on its own, with the model it was of long gone."""
    part = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = dibit.compress(nn.Sequential(part, nn.Linear(8, 100_000)))
    if how == "deepcopy":
        memo: dict[int, object] = {}
        taken = copy.deepcopy(part, memo)
        assert not any(x is model for x in memo.values())
    else:
        torch.save(part, buffer := io.BytesIO())
        assert len(buffer.getvalue()) < 100_000
        buffer.seek(0)
        taken = torch.load(buffer, weights_only=False)
    whole = weakref.ref(model)
    del model
    assert whole() is None, "nothing that hangs on a model keeps it alive"
    x = torch.randn(300, 8)
    for each in (taken, part):
        with dibit.track(each) as saved:
            each(x).sum().backward()
        assert 0 < saved.total < saved.plain
        assert state_of(each).root is each  # type: ignore[union-attr]


def test_a_part_of_a_traced_graph_is_copied() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    dibit.compress(model)
    for taken in (copy.deepcopy(model.get_submodule("0")), copy.deepcopy(model)):
        taken(torch.randn(5, 3)).sum().backward()
