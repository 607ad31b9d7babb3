"""What users wrote and saved with names that have changed since still works."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import dibit
from dibit.engine.model_state import state_of

SAVED = Path(__file__).parent / "data" / "compressed-model-before-0.1.0.pt"


@pytest.mark.parametrize(
    ("module", "name", "now"),
    [
        ("dibit.functions", "RULES", "dibit.rules"),
        ("dibit.functions.activation", "smooth", "dibit.rules.activation"),
        ("dibit.functions.norm", "batch_norm", "dibit.rules.norm"),
        ("dibit.functions.common", "first_order", "dibit.rules.common"),
        ("dibit.train.neighbours", "NumbaSampler", "dibit.train.neighbor_sampler"),
        ("dibit.train.inference", "layerwise", "dibit.train.layerwise"),
    ],
)
def test_modules(module: str, name: str, now: str) -> None:
    assert getattr(importlib.import_module(module), name) is getattr(importlib.import_module(now), name)


def test_a_rule_by_its_former_module() -> None:
    assert dibit.functions.activation.smooth is dibit.rules.activation.smooth


def test_the_data_set_by_its_former_name() -> None:
    from dibit.train import data

    assert data.Graph is data.NodeDataset


def test_a_model_that_was_saved_before() -> None:
    model = torch.load(SAVED, weights_only=False)
    state = state_of(model)
    assert state is not None
    assert state.root is model
    x = torch.randn(64, 4)
    with dibit.track(model) as saved:
        y = model(x)
    y.sum().backward()
    assert saved.total < saved.plain
    assert torch.equal(y, dibit.decompress(model)(x))
