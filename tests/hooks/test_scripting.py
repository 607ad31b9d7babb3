"""Models of which TorchScript runs a part, or all: that part stays exact, under a name of its own in the ledger."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import MLP, GraphSAGE

import dibit

N, D = 3000, 16
pytestmark = pytest.mark.filterwarnings("ignore")


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).relu()


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


class Old(torch.jit.ScriptModule):
    @torch.jit.script_method
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() * x


class Calls(nn.Module):
    """Reads what a scripted part then changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.part = nn.Linear(D, D), nn.Linear(D, D), torch.jit.script(InPlace())

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        wide = h[:, None].expand(N, 4, D) * 2
        return self.last(wide.sigmoid().sum(1) + self.part(h))


def scripted() -> nn.Module:
    return torch.jit.script(Part())  # type: ignore[no-any-return]


def traced() -> nn.Module:
    return torch.jit.trace(Part(), torch.randn(3, D))  # type: ignore[no-any-return]


def between(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(D, D), make(), nn.Linear(D, D))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "scripted part": between(scripted),
    "traced part": between(traced),
    "part in place": between(lambda: torch.jit.script(InPlace())),
    "old part": between(Old),
    "scripted whole": scripted,
    "traced whole": traced,
    "activation": lambda: MLP([D, D, D], norm=None, act=torch.jit.script(nn.ReLU())),
    "deep": lambda: nn.Sequential(nn.Sequential(nn.Linear(D, D), nn.ModuleDict({"a": scripted()})["a"]), traced()),
    "beside": Calls,
}
FINE = dibit.Config(bits=8)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def whole(name: str) -> bool:
    return name.endswith("whole")


@pytest.mark.parametrize("recipe", ["default", "exact", FINE, None], ids=["default", "exact", "fine", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_and_what_is_exact_are_the_plain_models(name: str, recipe: str | dibit.Config | None) -> None:
    torch.manual_seed(0)
    plain, x = MODELS[name]().train(), torch.randn(N, D)
    for _ in range(4):  # TorchScript compiles anew in the first ones
        expected = gradients(plain, x)
    keys = list(plain.state_dict())
    for _ in range(2):
        model = dibit.compress(plain, recipe)
        assert model is plain
    assert list(model.state_dict()) == keys
    for _ in range(3):
        found = gradients(model, x)
        assert torch.equal(found[0], expected[0])
        for a, b in zip(found, expected, strict=True):
            if recipe in (FINE, None) or whole(name):
                assert (a - b).norm() <= (0.05 if recipe is FINE else 1e-5) * b.norm()
            assert a.isfinite().all()
    dibit.decompress(model)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert torch.equal(gradients(model, x)[0], expected[0])


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("make", [scripted, traced])
def test_the_ledger_names_it(make: Callable[[], nn.Module], compressed: bool, copied: bool) -> None:
    model, x = nn.Sequential(nn.Linear(D, D), make(), nn.Linear(D, D)).train(), torch.randn(N, D)
    if compressed:
        dibit.compress(model)
    model = copy.deepcopy(model) if copied else model
    for _ in range(3):
        with dibit.track(model) as saved:
            gradients(model, x)
    rows = [row for row in saved.rows if row.operation == "TorchScript"]
    assert [(row.module, row.how) for row in rows if row.kept] in ([("1", "exact")], [("1", "exact")] * 2)
    assert sum(row.kept for row in rows) >= N * D * 4
    assert (saved.total < saved.plain + N * D * 4) if compressed else saved.total == saved.plain


def test_scores_go_with_a_model_that_has_a_scripted_part() -> None:
    model, x = dibit.compress(nn.Sequential(nn.Linear(D, D), scripted(), nn.Linear(D, D))).train(), torch.randn(N, D)
    gradients(model, x)
    torch.optim.SGD(model.parameters(), 0.01).step()
    saved, state = dibit.scores(model).state_dict(), model.state_dict()
    other = dibit.compress(nn.Sequential(nn.Linear(D, D), scripted(), nn.Linear(D, D))).train()
    other.load_state_dict(state)
    dibit.scores(other).load_state_dict(saved)
    results = []
    for each in (model, other):
        torch.manual_seed(3)
        results.append(gradients(each, x))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_is_scripted_saved_and_compiled_as_the_plain_model_is() -> None:
    model, x = nn.Sequential(nn.Linear(D, D), scripted(), nn.Linear(D, D)), torch.randn(N, D)
    expected = model(x)
    dibit.compress(model).train()
    assert torch.equal(torch.jit.script(model)(x), expected)
    assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), expected)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(dibit.compress(loaded)(x), expected)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
    gradients(model, x)


def test_a_scripted_layer_among_those_of_pyg() -> None:
    model = GraphSAGE(D, D, 2, 4, act=torch.jit.script(nn.GELU())).train()
    x, edges = torch.randn(N, D), torch.randint(N, (2, 4 * N))
    expected = model(x, edges)
    dibit.compress(model)
    with dibit.track(model) as saved:
        y = model(x, edges)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert any(row.operation == "TorchScript" for row in saved.rows)
    assert any("bit" in row.how for row in saved.rows)
