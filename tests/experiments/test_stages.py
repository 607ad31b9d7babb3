"""A training that is stopped to be looked at: looking changes nothing."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import dibit
from dibit.experiments.cases import Case, case
from dibit.experiments.data import load_prepared
from dibit.experiments.stages import stages
from tests.train.conftest import small

__all__ = ["small"]  # a fixture


@pytest.fixture
def sage(small: Path) -> Case:
    return case(load_prepared(str(small), "data"), "sage", epochs=4)


def silent(_: str) -> None:
    pass


def weights(stage: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in stage._model.parameters()]


def test_stages_come_at_their_epochs_and_say_so(sage: Case) -> None:
    notes: list[str] = []
    found = [(stage.epoch, weights(stage)) for stage in stages(sage, (0, 2, 3), None, notes.append)]
    assert [epoch for epoch, _ in found] == [0, 2, 3]
    assert notes == ["epoch 0", "epoch 2", "epoch 3"]
    assert not any(torch.equal(before[0], after[0]) for (_, before), (_, after) in pairwise(found))


def test_looking_leaves_the_training_as_it_is(sage: Case) -> None:
    config = dibit.recipe("default")
    (plain,) = (weights(stage) for stage in stages(sage, (3,), None, silent))
    for stage in stages(sage, (0, 1, 3), None, silent):
        before = weights(stage)
        stage.activations(dibit.recipe("iexact"))
        stage.gradient_error(config, 2)
        stage.saved_bytes(config)
        looked = weights(stage)
        assert all(torch.equal(a, b) for a, b in zip(before, looked, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, looked, strict=True))


def test_what_a_stage_measures(sage: Case) -> None:
    (stage,) = stages(sage, (2,), None, silent)
    coarse, fine = dibit.recipe("iexact"), dibit.Config(bits=8, block=64)
    activations = stage.activations(coarse)
    assert {a.operation for a in activations} == {"linear", "batch_norm"}
    assert all(a.count >= 3 for a in activations)
    assert 0 < stage.gradient_error(fine, 4).mean < stage.gradient_error(coarse, 4).mean
    assert stage.saved_bytes(coarse) < stage.saved_bytes(fine)
