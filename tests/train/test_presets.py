"""The papers' settings: what they say, that they train, and how ``--config`` finds them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric.typing

from dibit.train import UserError, presets
from dibit.train.arguments import parse, read_yaml
from dibit.train.data import Raw
from dibit.train.data.graph import prepare
from dibit.train.presets import preset_files, settings_file
from dibit.train.task import Task, adam, compressed, compression_config, measure

# By hand, what the papers state: the lines of a file that are marked neither "code" nor "ours".
ARXIV = {"dataset": "ogbn-arxiv", "layers": 3}
SAGE = {"model": "sage", "aggr": "mean", "norm": "batch", "lr": 0.01, "clip": 0.5, "recipe": "iexact"}
CLUSTER, SAINT = ({"model": "sage", "loader": name, "recipe": "exact"} for name in ("cluster", "saint-rw"))
PAPERS: dict[str, dict[str, Any]] = {
    "arxiv-gat": {**ARXIV, "model": "gat", "heads": 3, "hidden": 3 * 128},
    "arxiv-gcn": {**ARXIV, "model": "gcn", "hidden": 128, "dropout": 0.5},
    "arxiv-gcn2": {
        "dataset": "ogbn-arxiv",
        "model": "gcn2",
        "layers": 16,
        "hidden": 256,
        "alpha": 0.5,
        "dropout": 0.1,
        "lr": 0.001,
        "residual": True,
    },
    "arxiv-sage": {**ARXIV, **SAGE, "hidden": 128, "dropout": 0.5, "epochs": 500},
    "arxiv-saint": {"dataset": "ogbn-arxiv", **SAINT},
    "flickr-cluster": {"dataset": "flickr", **CLUSTER},
    "flickr-gcn": {"dataset": "flickr", "model": "gcn"},
    "flickr-gcn2": {"dataset": "flickr", "model": "gcn2"},
    "flickr-sage": {"dataset": "flickr", **SAGE, "layers": 2, "hidden": 256, "dropout": 0.3, "epochs": 400},
    "flickr-saint": {"dataset": "flickr", **SAINT},
    "products-cluster": {"dataset": "ogbn-products", "layers": 3, "hidden": 256, **CLUSTER},
    "products-sage": {"dataset": "ogbn-products", "model": "sage", "layers": 3, "hidden": 256},
    "products-saint": {"dataset": "ogbn-products", "layers": 3, "hidden": 256, **SAINT},
    "reddit2-cluster": {"dataset": "reddit2", "standardize": True, **CLUSTER},
    "reddit2-sage": {"dataset": "reddit2", "model": "sage", "standardize": True},
    "reddit2-saint": {"dataset": "reddit2", "standardize": True, **SAINT},
    "yelp-cluster": {"dataset": "yelp", "standardize": True, **CLUSTER},
    "yelp-sage": {"dataset": "yelp", "model": "sage", "standardize": True},
    "yelp-saint": {"dataset": "yelp", "standardize": True, **SAINT},
}
# Features and classes of the data sets; Yelp has several labels a node.
SHAPES = {"ogbn-arxiv": (128, 40), "flickr": (500, 7), "reddit2": (602, 41), "yelp": (300, 100)}
SHAPES["ogbn-products"] = (100, 47)


def test_the_files_are_there() -> None:
    assert list(preset_files()) == list(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_unmarked_lines_are_the_papers(name: str) -> None:
    path = preset_files()[name]
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "EXACT" in lines[0]
    marked = re.compile(r"^(\w+): \S+  # (code|ours)\b")
    values = read_yaml(path)
    stated = [line.partition(":")[0] for line in lines if re.match(r"\w", line) and not marked.match(line)]
    assert {key: values[key] for key in stated} == PAPERS[name]


def _stand_in(dataset: str, nodes: int = 160) -> Raw:
    """A graph with the data set's features and labels, and few nodes."""
    features, classes = SHAPES[dataset]
    rng = np.random.default_rng(0)
    y = np.arange(nodes) % classes
    source, target = rng.integers(nodes, size=(2, 4 * nodes))
    edges = np.stack([np.concatenate([source, target]), np.concatenate([target, source])])
    several = (rng.random((nodes, classes)) < 0.1).astype(np.float32)
    masks = tuple(np.arange(nodes) % 3 == part for part in range(3))
    x = rng.standard_normal((nodes, features), dtype=np.float32)
    return Raw(dataset, x, edges, several if dataset == "yelp" else y, classes, masks, "accuracy")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.slow
def test_each_file_trains_a_step_plain_and_compressed(name: str) -> None:
    settings = parse(["--config", name, "--device", "cpu"])
    settings.check()
    if settings.loader.loader == "cluster":
        pytest.importorskip("pymetis")
        settings = settings.updated(parts=6, clusters=2)  # the stand-in has few nodes
    elif settings.loader.loader != "full" and not torch_geometric.typing.WITH_TORCH_SPARSE:
        pytest.skip("torch-sparse is not installed")
    task = Task.build(settings, prepare(_stand_in(settings.data.dataset), settings.data, 0))
    batches = task.batches(0)
    batch = next(iter(batches))
    config = compression_config(settings.compression)
    assert config is not None
    for chosen in (None, config):
        model = compressed(task.model(0), chosen).train()
        before = [p.detach().clone() for p in model.parameters()]
        loss, _ = task.step(model, adam(model, settings.optimisation), batch)
        assert torch.isfinite(loss)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    measured = measure(task, task.model(0), config, batches)
    # Attention's products with the messages (edges x channels) are kept exactly.
    assert 0 < measured.saved < measured.plain * (0.8 if settings.model.model == "gat" else 0.5)


def test_a_name_is_a_file_and_flags_win() -> None:
    settings = parse(["--config", "arxiv-gcn2", "--layers", "4"])
    assert (settings.data.dataset, settings.model.layers, settings.model.residual) == ("ogbn-arxiv", 4, True)
    assert settings == parse(["--config", str(preset_files()["arxiv-gcn2"]), "--layers", "4"])


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yelp-sage").write_text("layers: 7\n")
    assert parse(["--config", "yelp-sage"]).model.layers == 7


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("arxiv-saeg", "--config is 'arxiv-saeg', expected the path of a YAML file, or one of arxiv-gat, "),
        ("arxiv-saeg", "Did you mean 'arxiv-sage'"),
        ("zzz", "yelp-saint."),
        ("missing.yaml", "Cannot read the settings file missing.yaml: No such file"),
        ("missing/arxiv-sage", "Cannot read the settings file missing/arxiv-sage: No such file"),
        ("", "--config is '', expected the path of a YAML file"),
    ],
)
def test_names_that_are_not_known(given: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse(["--config", given])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("layers: 3\n")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    assert preset_files() == {"mine": tmp_path / "mine.yaml"}
    assert settings_file("mine") == tmp_path / "mine.yaml"


def test_without_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    assert preset_files() == {}
    with pytest.raises(UserError, match=r"--config is 'soup', expected the path of a YAML file\.$"):
        settings_file("soup")
