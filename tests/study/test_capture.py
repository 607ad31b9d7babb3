"""`capture` sees exactly what the codec quantises."""

import pytest
import torch
from torch import nn
from torch_geometric.nn import GraphSAGE

import dibit
from dibit import Config, Project
from dibit.codec import encode
from dibit.study import capture

N = 200


@pytest.fixture
def setting() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = GraphSAGE(24, 32, 3, 5, dropout=0.5, norm="batch_norm").train()
    return model, torch.randn(N, 24), torch.randint(N, (2, 1000))


def test_iexact(setting) -> None:  # type: ignore[no-untyped-def]
    model, x, edge_index = setting
    dibit.compress(model, "iexact")
    found = capture(model, lambda: model(x, edge_index).sum().backward())
    names = [(a.module, a.operation) for a in found]
    # two linear inputs a layer, two norm inputs
    assert [operation for _, operation in names].count("batch_norm") == 2
    assert len(found) == 8
    assert {a.module for a in found if a.operation == "linear"} == {
        f"convs.{i}.{lin}" for i in range(3) for lin in ("lin_l", "lin_r")
    }
    for a in found:
        assert a.width == (32 if a.operation == "batch_norm" else a.shape[1] // 8)
        assert a.values.shape == (N, a.width)
        h = a.normalised()
        assert (h.min(), h.max()) == (pytest.approx(0, abs=0.05), pytest.approx(3, abs=0.05))
    assert dibit.compress(model).training  # the model's own hooks go on working


def test_values_and_ranges_are_the_codecs_own() -> None:
    lin = nn.Linear(32, 4)
    x = torch.randn(50, 32)
    kept = []
    config = Config(reduce=Project(4), block=64, inputs="compress")
    dibit.compress(lin, config)

    def step() -> None:
        y = lin(x)
        kept.append(y.grad_fn.saved_tensors)
        y.sum().backward()

    (a,) = capture(lin, step)
    codes, ranges, seed = kept[0][:3]
    assert torch.equal(a.ranges, ranges)
    again = encode(a.values, Config(block=64), seed)  # the reduced matrix, quantised by the same numbers
    assert torch.equal(again.codes, codes)


def test_one_step_of_a_plain_model_is_left_plain(setting) -> None:  # type: ignore[no-untyped-def]
    model, x, edge_index = setting
    found = capture(model, lambda: model(x, edge_index).sum(), config=Config(block="row", inputs="compress"))
    assert len(found) == 8
    assert not model._forward_hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_changes_in_place_after_the_capture_do_not_reach_it() -> None:
    lin = nn.Linear(8, 8)
    x = torch.randn(20, 8)
    before = x.clone()

    def step() -> None:
        lin(x)
        x.zero_()

    (a,) = capture(lin, step, config=Config(inputs="compress"))
    assert torch.equal(a.values, before)


def test_errors(setting) -> None:  # type: ignore[no-untyped-def]
    model, x, edge_index = setting
    with pytest.raises(ValueError, match=r"not compressed; call dibit\.compress"):
        capture(model, lambda: model(x, edge_index))
    dibit.compress(model)
    with pytest.raises(ValueError, match="leave the config out"):
        capture(model, lambda: model(x, edge_index), config="exact")
    with pytest.raises(ValueError, match="no compressed layer"):
        capture(model.eval(), lambda: model(x, edge_index))
    dibit.compress(model.train(), None)
    with pytest.raises(ValueError, match="no compressed layer"):
        capture(model, lambda: model(x, edge_index))


def test_the_observer_is_removed_when_the_step_fails(setting) -> None:  # type: ignore[no-untyped-def]
    model, _, _ = setting
    dibit.compress(model)

    def step() -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        capture(model, step)
    from dibit.api import state_of

    assert state_of(model).observer is None
