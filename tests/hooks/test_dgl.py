"""The seam to DGL: calls are seen where a pass runs, and nothing else changes; strangers are left alone."""

from __future__ import annotations

import os
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dibit

os.environ.setdefault("DGLBACKEND", "pytorch")
MODULE = "dgl.backend.pytorch.sparse"


class Doubles(nn.Module):
    """Something to compress."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).relu()


def _function(parameters: str) -> Any:
    """An autograd function whose forward takes these."""
    space: dict[str, Any] = {}
    exec(f"def forward({parameters}):\n    return None", space)
    return type("F", (torch.autograd.Function,), {"forward": staticmethod(space["forward"])})


@pytest.mark.parametrize(
    "gspmm", ["ctx, graph, op, reduce_op, X, Y", "ctx, gidx, op, reduce_op, X, Y"], ids=["other arguments", "no DGL"]
)
def test_another_dgl_is_left_alone(monkeypatch: pytest.MonkeyPatch, gspmm: str) -> None:
    module: Any = types.ModuleType(MODULE)
    module.GSpMM = _function(gspmm)
    module.GSDDMM = _function("ctx, gidx, op, X, Y, lhs_target, rhs_target")
    module.EdgeSoftmax = _function("ctx, gidx, score, eids, norm_by")
    module.SegmentReduce = _function("ctx, op, x, offsets")
    monkeypatch.setitem(sys.modules, MODULE, module)
    with pytest.warns(UserWarning, match=r"this version of DGL .* tested with DGL 1\.1\.3"):
        dibit.compress(Doubles().train())(torch.randn(20, 16)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        dibit.compress(Doubles().train())(torch.randn(20, 16)).sum().backward()
    assert all("apply" not in vars(kind) for kind in (module.GSpMM, module.GSDDMM, module.EdgeSoftmax))


def test_dibit_does_not_import_dgl() -> None:
    import subprocess

    code = (
        f"import sys, dibit; dibit.compress(__import__('torch').nn.Linear(2, 2)); assert {MODULE!r} not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import dgl
    except ImportError:
        dgl = None
needs_dgl = pytest.mark.skipif(dgl is None, reason="DGL is not installed")
lenient = pytest.mark.filterwarnings("default")


class Weighted(nn.Module):
    """A weighted sum over neighbours; calls `before` ahead of it."""

    def __init__(self, before: Any = None) -> None:
        super().__init__()
        self.first, self.gate, self.before = nn.Linear(16, 16), nn.Linear(16, 1), before

    def forward(self, g: Any, x: Tensor) -> Tensor:
        h = self.first(x)
        weight = dgl.ops.u_add_v(g, self.gate(h), self.gate(x)).sigmoid()
        if self.before is not None:
            return self.before(lambda: dgl.ops.u_mul_e_sum(g, h, weight))  # type: ignore[no-any-return]
        y: Tensor = dgl.ops.u_mul_e_sum(g, h, weight)
        return y


def graph() -> Any:
    return dgl.graph(tuple(torch.randint(0, 100, (2, 900), generator=torch.Generator().manual_seed(0))), num_nodes=100)


def compressed(model: nn.Module, g: Any, x: Tensor) -> set[str]:
    """The operations in the ledger of a pass."""
    with dibit.track(model) as ledger:
        model(g, x).sum().backward()
    return {row.operation for row in ledger.rows}


@needs_dgl
@lenient
class TestSeam:
    def test_calls_are_seen(self) -> None:
        assert "gspmm" in compressed(dibit.compress(Weighted().train()), graph(), torch.randn(100, 16))

    def test_plain_models_have_second_derivatives(self) -> None:
        """DGL's own functions, outside of a pass, after one has run."""
        x, g = torch.randn(100, 16, requires_grad=True), graph()
        compressed(dibit.compress(Weighted().train()), g, torch.randn(100, 16))
        (first,) = torch.autograd.grad(Weighted()(g, x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        assert x.grad is not None

    def test_a_mode_of_the_models_own(self) -> None:
        """It sees what it saw without Dibit, and no function that it does not know."""

        class Notes(TorchFunctionMode):
            def __init__(self) -> None:
                super().__init__()
                self.names: list[str] = []

            def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.names.append(getattr(func, "__name__", ""))
                return func(*args, **(kwargs or {}))

        def run(call: Any) -> Tensor:
            notes = Notes()
            with notes:
                y = call()
            seen.append(notes.names)
            return y  # type: ignore[no-any-return]

        seen: list[list[str]] = []
        model, g, x = Weighted(run).train(), graph(), torch.randn(100, 16)
        plain = model(g, x)
        dibit.compress(model)
        assert torch.equal(model(g, x), plain)
        assert {*seen[0]} <= {*seen[1]}
        assert "gspmm" not in seen[1]

    def test_an_error_leaves_nothing_behind(self) -> None:
        model, g = dibit.compress(Weighted().train()), graph()
        with pytest.raises(RuntimeError):
            model(g, torch.randn(100, 15))
        with pytest.raises(dgl.DGLError):
            dibit.compress(Calls(lambda g, x: dgl.ops.u_mul_e_sum(g, x, x[:, :3])).train())(g, torch.randn(100, 16))
        assert "gspmm" in compressed(model, g, torch.randn(100, 16))
        y = dgl.ops.copy_u_sum(g, torch.randn(100, 4, requires_grad=True))
        assert type(y.grad_fn).__name__ == "GSpMMBackward"

    def test_a_class_derived_from_dgls(self) -> None:
        kind = sys.modules[MODULE].GSpMM

        class Own(kind):  # type: ignore[misc, valid-type]
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Tensor:
                return kind.forward(ctx, *args) * 0

        x, g = torch.randn(100, 4, requires_grad=True), graph()
        compressed(dibit.compress(Weighted().train()), g, torch.randn(100, 16))
        assert not Own.apply(g._graph, "copy_lhs", "sum", x, None).any()

    def test_attention_is_computed_again(self) -> None:
        """From scores of nodes, which DGL's kernels only read."""
        model = dibit.compress(Attends().train())
        g, x = graph(), torch.randn(100, 16)
        model(g, x).sum().backward()
        with dibit.track(model) as ledger:
            model(g, x).sum().backward()
        assert [row.how for row in ledger.rows if row.operation == "edge_softmax"] == ["computed again"]

    def test_two_backward_passes(self) -> None:
        model, g, x = dibit.compress(Weighted().train()), graph(), torch.randn(100, 16)
        y = model(g, x).sum()
        y.backward(retain_graph=True)
        first = model.first.weight.grad.clone()  # type: ignore[union-attr]
        y.backward()
        torch.testing.assert_close(model.first.weight.grad, 2 * first)
        with pytest.raises(RuntimeError):
            y.backward()

    def test_threads(self) -> None:
        """A pass in one thread, plain DGL in another at the same time."""
        import threading

        found: list[str] = []

        def other(call: Any) -> Tensor:
            thread = threading.Thread(
                target=lambda: found.append(
                    type(dgl.ops.copy_u_sum(graph(), torch.randn(100, 4, requires_grad=True)).grad_fn).__name__
                )
            )
            thread.start()
            thread.join()
            return call()  # type: ignore[no-any-return]

        model = dibit.compress(Weighted(other).train())
        assert "gspmm" in compressed(model, graph(), torch.randn(100, 16))
        assert found == ["GSpMMBackward"]

    def test_double_precision(self) -> None:
        model, g, x = Weighted().double().train(), graph(), torch.randn(100, 16, dtype=torch.float64)
        plain = model(g, x)
        assert torch.equal(dibit.compress(model)(g, x), plain)
        model(g, x).sum().backward()


class Calls(nn.Module):
    """What a function gives, as a model."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.function = nn.Linear(16, 16), function

    def forward(self, g: Any, x: Tensor) -> Any:
        return self.function(g, self.first(x))


class Attends(nn.Module):
    """Attention over neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, g: Any, x: Tensor) -> Tensor:
        h = self.first(x)
        left, right = self.gate(h), self.gate(x)  # held, as DGL's layers hold them in a frame
        score = dgl.ops.u_add_v(g, left, right)
        y: Tensor = dgl.ops.u_mul_e_sum(g, h, dgl.nn.functional.edge_softmax(g, score))
        return y
