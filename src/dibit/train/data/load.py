"""From the setting ``dataset`` to a `Graph`."""

from __future__ import annotations

from pathlib import Path

from dibit.train.data.generated import planted
from dibit.train.data.graph import Graph, Raw, prepare
from dibit.train.data.named import NAMES, canonical, load_named
from dibit.train.data.npz import load_npz
from dibit.train.errors import UserError, nearest
from dibit.train.settings import DataSettings


def load_graph(settings: DataSettings, seed: int) -> Graph:
    """Load the graph named by the settings, with its features as the model will see them.

    Args:
        settings: Which graph, and what to do with its features.
        seed: Draws the generated graph, and starts the truncated SVD.

    Raises:
        UserError: The data set is unknown, cannot be loaded, or does not fit the format.
    """
    return prepare(_load_raw(settings, seed), settings, seed)


def _load_raw(settings: DataSettings, seed: int) -> Raw:
    dataset = settings.dataset
    if dataset.lower().split(":")[0] == "planted":
        return planted(_size_of_planted(dataset), seed)
    if dataset.lower().endswith(".npz") or "/" in dataset or Path(dataset).is_file():
        return load_npz(dataset)
    name = canonical(dataset)
    if name not in NAMES:
        hint = nearest(name, ("planted", *NAMES))
        raise UserError(
            f"There is no data set {dataset!r}.{hint} Give 'planted', a name listed in docs/data.md, or the "
            "path of an .npz file."
        )
    return load_named(name, Path(settings.root))


def _size_of_planted(dataset: str) -> int:
    _, colon, size = dataset.partition(":")
    if not colon:
        return 20_000
    if not size.isdecimal() or int(size) < 100:
        raise UserError(
            f"--dataset is {dataset!r}; after 'planted:' expected a number of nodes, at least 100, "
            "such as planted:100000."
        )
    return int(size)
