"""What is trained on which graph: the settings of cases, and how their graphs are prepared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dibit.experiments.cases import COMMON, MODELS, case
from dibit.experiments.data import RANK, WIDE, load_prepared
from tests.train.conftest import small, small_arrays

__all__ = ["small"]  # a fixture


@pytest.mark.parametrize("model", MODELS)
def test_a_case_has_the_common_settings_but_for_its_models(small: Path, model: str) -> None:
    graph = load_prepared(str(small), "data")
    found = case(graph, model, epochs=7)
    assert found.name == f"{graph.name} {model}"
    settings = vars(found.settings.model) | vars(found.settings.optimisation)
    expected = {**COMMON, **MODELS[model], "model": model, "epochs": 7}
    assert {name: settings[name] for name in expected} == expected


def test_in_full_gcnii_alone_has_the_papers_width(small: Path) -> None:
    graph = load_prepared(str(small), "data")
    widths = {model: case(graph, model, 1, full=True).settings.model.hidden for model in MODELS}
    assert widths == dict.fromkeys(MODELS, 128) | {"gcn2": 256}
    assert case(graph, "gcn2", 1).settings.model.hidden == 128


def test_features_are_standardised(small: Path) -> None:
    x = load_prepared(str(small), "data").x
    assert x.shape == (60, 8)
    torch.testing.assert_close(x.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("width", [WIDE, WIDE + 1])
def test_wide_features_are_reduced(width: int, tmp_path: Path) -> None:
    arrays = small_arrays(nodes=150)
    arrays["x"] = np.random.default_rng(0).standard_normal((150, width)).astype(np.float32)
    np.savez(tmp_path / "wide.npz", **arrays)
    kept = load_prepared(str(tmp_path / "wide.npz"), "data").x.shape[1]
    assert kept == (RANK if width > WIDE else width)
