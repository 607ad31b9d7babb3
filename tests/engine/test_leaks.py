"""Two hundred steps with the garbage collector off: live tensors and the process's memory stay where they were."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GAT, GCN, GraphSAGE

import dibit
from dibit.rules.relative import relative

pytestmark = pytest.mark.slow

N, D, STEPS, WARM = 500, 64, 200, 40
MODELS: dict[str, Callable[[], nn.Module]] = {
    "GraphSAGE": lambda: GraphSAGE(D, 64, 3, 8, dropout=0.5, norm="batch_norm"),
    "GCN": lambda: GCN(D, 64, 3, 8, dropout=0.5, norm="layer_norm"),
    "GAT": lambda: GAT(D, 64, 2, 8, heads=4),
}


@pytest.fixture
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def live() -> tuple[int, int]:
    """Tensors that Python knows, and all objects."""
    objects = gc.get_objects()
    return sum(issubclass(type(o), Tensor) for o in objects), len(objects)


@pytest.mark.parametrize("recipe", ["default", "iexact"])
@pytest.mark.parametrize("name", MODELS)
def test_two_hundred_steps_leave_nothing(name: str, recipe: str, collector_off: None) -> None:
    model = dibit.compress(MODELS[name]().train(), recipe)
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(N, D), torch.randint(8, (N,))
    edges = torch.randint(N, (2, 5 * N))
    process = psutil.Process()
    counts, resident, made = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x, edges), y).backward()
        optimizer.step()
        if step >= WARM and step % 20 == 19:
            counts.append(live())
            resident.append(process.memory_info().rss)
            made.append(relative.cache_info().currsize)  # settings of the codec, one for so many octaves, made once
    tensors, objects = zip(*counts, strict=True)
    assert len(set(tensors)) == 1, tensors
    assert max(objects) - min(objects) < 20 + 4 * (made[-1] - made[0]), objects  # the lists above are among them
    # a single activation (500 x 64 floats) kept at each of 160 steps would be 20 MB
    assert max(resident) - min(resident) < 10e6, resident


@pytest.mark.parametrize("how", ["a forward pass without a backward pass", "an exception", "batches of many sizes"])
def test_nothing_stays_of(how: str, collector_off: None) -> None:
    model = dibit.compress(GraphSAGE(D, 64, 2, 8).train())
    fail = how == "an exception"
    if fail:
        model.convs[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError))
    before = None
    for step in range(60):
        n = N - 5 * step if how == "batches of many sizes" else N
        x, edges = torch.randn(n, D), torch.randint(n, (2, 5 * n))
        try:
            out = model(x, edges)
            if how == "batches of many sizes":
                out.sum().backward()
        except ValueError:
            assert fail
        out = None
        if step == 20:
            before = live()
    assert before is not None
    after = live()
    assert after[0] == before[0]
    assert after[1] - before[1] < 20
