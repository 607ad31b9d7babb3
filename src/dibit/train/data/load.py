"""From the setting ``dataset`` to a `NodeDataset`."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from dibit.tools.errors import UserError, nearest, shown
from dibit.train.data.generated import planted
from dibit.train.data.graph import NodeDataset, Raw, memory_bytes, prepare
from dibit.train.data.named import NAMES, canonical, load_named
from dibit.train.data.npz import load_npz
from dibit.train.data.split_file import load_split
from dibit.train.settings import DataSettings

_PLANTED_BYTES = 2_000  # a node: its 128 features twice, and 28 ends of edges in 64 bits several times


def load_graph(settings: DataSettings, seed: int) -> NodeDataset:
    """Load the graph named by the settings, with its features as the model will see them.

    Args:
        settings: Which graph, and what to do with its features.
        seed: Draws the generated graph, and starts the truncated SVD.

    Raises:
        UserError: The data set is unknown, cannot be loaded, or does not fit the format.
    """
    return prepare(load_raw(settings, seed), settings, seed)


def load_raw(settings: DataSettings, seed: int) -> Raw:
    """The graph named by the settings as its source gives it, but for the split; `seed` draws the generated one."""
    raw = _from_source(settings, seed)
    if settings.split_file is None:
        return raw
    return replace(raw, masks=load_split(settings.split_file, raw.x.shape[0]))


def _from_source(settings: DataSettings, seed: int) -> Raw:
    dataset = settings.dataset
    if dataset.lower().split(":")[0] == "planted":
        return planted(_size_of_planted(dataset), seed)
    if dataset.lower().endswith(".npz") or "/" in dataset or os.path.isfile(dataset):
        return load_npz(dataset)
    name, root = canonical(dataset), Path(settings.root)
    file = _file_of(name, root)
    if file is not None:
        return _as_named(load_npz(file), name)
    if name not in NAMES:
        files = [canonical(path.stem) for path in _files(root)]
        hint = nearest(name, ("planted", *NAMES, *files))
        raise UserError(
            f"There is no data set {shown(dataset)!r}.{hint} Give 'planted', a name listed in docs/data.md, or the "
            "path of an .npz file."
        )
    return load_named(name, root, settings.trust)


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*.npz") if os.path.isfile(path)) if os.path.isdir(root) else []


def _file_of(name: str, root: Path) -> Path | None:
    """Return the .npz file in `root` that bears a data set's name, however it writes dashes, underscores and case."""

    def key(text: str) -> str:
        return re.sub(r"[-_\s]+", "", text.lower())

    found = [path for path in _files(root) if key(path.stem) == key(name)]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(
            f"In --root {root}, {names} both bear the name {name!r}; expected one. Give --dataset the path of the one "
            "that is meant, or rename the other."
        )
    return found[0] if found else None


def _as_named(raw: Raw, name: str) -> Raw:
    """Give a file what loading the data set by its name would give it: both directions of edges, the metric."""
    if name not in NAMES:
        return raw
    source = NAMES[name]
    if source.undirected:
        raw = replace(raw, edge_index=np.concatenate([raw.edge_index, raw.edge_index[::-1]], axis=1))
    return replace(raw, metric=source.metric) if raw.y.ndim == 2 and source.metric != "accuracy" else raw


def _size_of_planted(dataset: str) -> int:
    _, colon, size = dataset.partition(":")
    if not colon:
        return 20_000
    if not re.fullmatch(r"\d{3,18}", size, re.ASCII) or int(size) < 100:
        raise UserError(
            f"--dataset is {shown(dataset)!r}; after 'planted:' expected a number of nodes, at least 100, "
            "such as planted:100000."
        )
    need = int(size) * _PLANTED_BYTES
    if need > memory_bytes():
        raise UserError(
            f"--dataset is {dataset!r}, a graph that takes {need / 2**30:,.0f} GB while it is made, more than this "
            f"machine's memory ({memory_bytes() / 2**30:,.1f} GB); expected fewer nodes."
        )
    return int(size)
