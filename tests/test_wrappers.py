"""`track`, `batch`, `scores`, `decompress` of what contains a compressed model, or of a part of one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import dibit
from dibit.engine.model_state import state_of, states_in

N = 300
CONFIG = dibit.Config(bits=2, block=16, reduce=dibit.Sample(4, by="gradient"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU())
        self.decoder = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def lightning(model: nn.Module) -> nn.Module:
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    return Module()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Sequential": nn.Sequential,
    "Module": Holder,
    "twice": lambda model: Holder(nn.ModuleDict({"a": model})["a"]),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compile": compiled,
    "LightningModule": lightning,
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, 16)


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], nn.Module]]:
    torch._dynamo.reset()
    yield WRAPPERS[request.param]
    torch._dynamo.reset()


def inside(wrapper: nn.Module) -> nn.Module:
    (found,) = states_in(wrapper)
    return found.state.root


def names(saved: Any) -> set[str]:
    return {row.module for row in saved.rows if row.kept}


def test_track_shows_the_compressed_model_inside_and_leaves_it_so(
    wrap: Callable[[nn.Module], nn.Module], x: Tensor
) -> None:
    wrapper = wrap(dibit.compress(Net(), CONFIG)).train()
    model = inside(wrapper)
    with dibit.track(model) as alone:
        model(x)
    with dibit.track(wrapper) as saved:
        model(x).sum().backward()
    assert (saved.total, saved.plain, names(saved)) == (alone.total, alone.plain, names(alone))
    assert 0 < 3 * saved.total < saved.plain
    assert state_of(model) is not None
    assert state_of(wrapper) is None or wrapper is model
    dibit.decompress(wrapper)
    assert not states_in(wrapper)


def test_batch_and_scores_reach_the_model_inside(wrap: Callable[[nn.Module], nn.Module], x: Tensor) -> None:
    wrapper = wrap(dibit.compress(Net(), CONFIG)).train()
    model = inside(wrapper)
    ids = torch.arange(N) + 7
    with dibit.batch(wrapper, node_ids=ids):
        model(x).sum().backward()
    tables = {key: x for key, x in dibit.scores(wrapper).state_dict().items() if x.dim()}
    assert dibit.scores(wrapper) is dibit.scores(model)
    assert tables
    assert all(table.numel() == N + 7 for table in tables.values())


def test_rows_of_the_loss_are_those_of_the_compressed_model(x: Tensor) -> None:
    rows = torch.arange(5)
    for transparent in (nn.DataParallel, AveragedModel, compiled, lambda m: compiled(AveragedModel(m))):
        with dibit.batch(transparent(dibit.compress(Net())), loss_rows=rows):
            pass
    model = dibit.compress(Net())
    for given, words in (
        (nn.Sequential(model, nn.Linear(4, 4)), "loss_rows for a Sequential around Net"),
        (model.encoder, "loss_rows for a part of the compressed Net"),
    ):
        with pytest.raises(ValueError, match=words), dibit.batch(given, loss_rows=rows):
            pass


def test_several_compressed_models(x: Tensor) -> None:
    first, second = dibit.compress(Net(), CONFIG), dibit.compress(Net(), CONFIG)
    both = nn.ModuleDict({"student": first, "teacher": second})
    with dibit.track(both) as saved, dibit.track(second) as alone:
        first(x), second(x)
    assert {name.partition(".")[0] for name in names(saved)} == {"student", "teacher"}
    assert {"teacher." + name for name in names(alone)} < names(saved)
    assert saved.total == 2 * alone.total
    with pytest.raises(ValueError, match="contains 2 compressed ones, 'student', 'teacher'; give one of them"):
        dibit.scores(both)
    with dibit.batch(both, node_ids=torch.arange(N) + 1):
        first(x).sum().backward(), second(x).sum().backward()
    assert {t.numel() for m in (first, second) for t in dibit.scores(m).state_dict().values() if t.dim()} == {N + 1}


def test_a_part(x: Tensor) -> None:
    model = dibit.compress(Net(), CONFIG)
    with (
        dibit.track(model) as whole,
        dibit.track(model.encoder) as part,
        dibit.track(nn.Sequential(model.encoder)) as p,
    ):
        model(x)
    assert names(part) == {name for name in names(whole) if name.startswith("encoder")}
    assert part.total == p.total == sum(row.kept for row in whole.rows if row.module.startswith("encoder"))
    assert dibit.scores(model.encoder) is dibit.scores(model)
    with dibit.batch(model.encoder, node_ids=torch.arange(N) + 3):
        model(x).sum().backward()
    assert {t.numel() for t in dibit.scores(model).state_dict().values() if t.dim()} == {N + 3}


@pytest.mark.parametrize("compressed", [True, False])
def test_blocks_within_each_other_get_the_same_rows(compressed: bool, x: Tensor) -> None:
    model = dibit.compress(Net()) if compressed else Net()
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with dibit.track(model) as outer:
        model(x)
        with dibit.track(model) as inner:
            model(x)
        model(x)
    assert 0 < 3 * inner.total == outer.total
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


def test_what_is_compressed_in_the_block_stays_so(x: Tensor) -> None:
    model = Net()
    with dibit.track(model):
        dibit.compress(model)
    with dibit.track(model) as saved:
        model(x)
    assert saved.total < saved.plain


def test_a_copy_made_in_the_block_is_not_tracked(x: Tensor) -> None:
    model = dibit.compress(Net())
    with dibit.track(model) as saved:
        copy.deepcopy(model)(x)
    assert not saved.rows


def test_blocks_of_two_generators_may_cross(x: Tensor) -> None:
    models = [dibit.compress(Net(), CONFIG) for _ in range(2)]

    def steps(model: nn.Module, shift: int) -> Iterator[None]:
        with dibit.batch(model, node_ids=torch.arange(N) + shift), dibit.track(model) as saved:
            model(x)
            yield
            model(x).sum().backward()
            assert len({id(row) for row in saved.rows}) == len(saved.rows) > 0
            yield

    first, second = steps(models[0], 5), steps(models[1], 9)
    next(first), next(second), next(first)
    first.close()
    next(second), second.close()
    for model, size in zip(models, (N + 5, N + 9), strict=True):
        assert {t.numel() for t in dibit.scores(model).state_dict().values() if t.dim()} == {size}
    with dibit.batch(models[0], node_ids=torch.arange(N)):
        models[0](x)


class TestBadInput:
    @pytest.mark.parametrize("function", [dibit.track, dibit.batch, dibit.scores, dibit.decompress, dibit.compress])
    def test_no_module(self, function: Callable[[Any], Any]) -> None:
        with pytest.raises(TypeError, match="got a function; expected"), contextlib.ExitStack() as stack:
            stack.enter_context(function(lambda x: x))

    @pytest.mark.parametrize("length", [0, 7, N - 1, N + 1, 5 * N])
    def test_node_ids_of_another_length(self, length: int, x: Tensor) -> None:
        model = dibit.compress(Net(), CONFIG)
        ids = torch.arange(length)
        words = rf"{length:,} node_ids, but Net was called with .*\(300, 16\)"
        with pytest.raises(ValueError, match=words), dibit.batch(model, node_ids=ids):
            model(x)
        with dibit.batch(model, node_ids=torch.arange(N)):
            model(x).sum().backward()
        assert dibit.scores(model).state_dict()

    def test_a_part_called_on_its_own_may_have_fewer_rows(self, x: Tensor) -> None:
        model = dibit.compress(Net(), CONFIG)
        with dibit.batch(model, node_ids=torch.arange(N)):
            model.decoder(model.encoder(x)[:5]).sum().backward()

    @pytest.mark.parametrize(
        ("rows", "error", "words"),
        [
            (torch.tensor([N]), ValueError, "loss_rows with row 300, but the output of Net has 300 rows"),
            (torch.tensor([10**9]), ValueError, "row 1,000,000,000"),
            (torch.tensor([-1, 3]), ValueError, "negative numbers"),
            (torch.tensor([0.5]), TypeError, "loss_rows of type torch.float32; expected an int64 tensor"),
            (torch.ones(N - 1).bool(), ValueError, "loss_rows with a mask of 299 rows, but the output of Net has 300"),
            (torch.ones(N + 1).bool(), ValueError, "a mask of 301 rows"),
            (torch.ones(N, 1).bool(), ValueError, r"shape \(300, 1\)"),
            ([1, 2], TypeError, "loss_rows of type list"),
        ],
        ids=str,
    )
    def test_loss_rows(self, rows: Any, error: type[Exception], words: str, x: Tensor) -> None:
        model = dibit.compress(Net())
        with pytest.raises(error, match=words), dibit.batch(model, loss_rows=rows):
            model(x)
        for fine in (torch.tensor([0, N - 1, 0]), torch.zeros(N).bool(), torch.tensor([], dtype=torch.int64)):
            with dibit.batch(model, loss_rows=fine):
                model(x)
                model(x).sum().backward()

    def test_loss_rows_that_the_matrix_has_not(self) -> None:
        class Sparse(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x: Tensor, a: Tensor) -> Tensor:
                return a @ self.linear(x)

        model, a, y = dibit.compress(Sparse()), torch.eye(N).to_sparse_csr(), torch.randn(N, 4)
        with dibit.batch(model, loss_rows=torch.tensor([3])):
            model(y, a)
        words = "row 300, but the matrix has 300 rows"
        with pytest.raises(ValueError, match=words), dibit.batch(model, loss_rows=torch.tensor([N])):
            model(y, a)
