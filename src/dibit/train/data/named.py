"""Data sets that PyTorch Geometric and OGB load by name."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.sparse

from dibit.tools.errors import UserError, require, shown
from dibit.train.data import guard
from dibit.train.data.graph import Features, Raw
from dibit.train.data.splits import Masks, oriented


@dataclass(frozen=True)
class DatasetSource:
    """How a data set is constructed.

    Attributes:
        loader: Class in torch_geometric.datasets, or "ogb".
        arguments: Of the constructor, beside the folder.
        undirected: Add the reverse of every edge.
        metric: "accuracy", "f1" or "rocauc", see `Raw`.
    """

    loader: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    undirected: bool = False
    metric: str = "accuracy"


def _table() -> dict[str, DatasetSource]:
    table: dict[str, DatasetSource] = {}
    for name in ("Cora", "CiteSeer", "PubMed"):
        table[name.lower()] = DatasetSource("Planetoid", {"name": name})
    for name in ("Computers", "Photo"):
        table[f"amazon-{name.lower()}"] = DatasetSource("Amazon", {"name": name})
    for name in ("CS", "Physics"):
        table[f"coauthor-{name.lower()}"] = DatasetSource("Coauthor", {"name": name})
    for name in ("Cora", "Cora_ML", "CiteSeer", "DBLP", "PubMed"):
        table[f"citationfull-{canonical(name)}"] = DatasetSource("CitationFull", {"name": name})
    for name in ("Cornell", "Texas", "Wisconsin"):
        table[name.lower()] = DatasetSource("WebKB", {"name": name}, undirected=True)
    for name in ("chameleon", "squirrel"):
        table[name] = DatasetSource("WikipediaNetwork", {"name": name}, undirected=True)
    for name in ("Roman-empire", "Amazon-ratings", "Minesweeper", "Tolokers", "Questions"):
        table[name.lower()] = DatasetSource("HeterophilousGraphDataset", {"name": name})
    for name in ("USA", "Brazil", "Europe"):
        table[f"airports-{name.lower()}"] = DatasetSource("Airports", {"name": name})
    for name in ("DE", "EN", "ES", "FR", "PT", "RU"):
        table[f"twitch-{name.lower()}"] = DatasetSource("Twitch", {"name": name})
    for name in (
        "Flickr",
        "Reddit",
        "Reddit2",
        "WikiCS",
        "FacebookPagePage",
        "GitHub",
        "LastFMAsia",
        "DeezerEurope",
    ):
        table[name.lower()] = DatasetSource(name)
    table["actor"] = DatasetSource("Actor", undirected=True)
    table["nell"] = DatasetSource("NELL")
    table["karate"] = DatasetSource("KarateClub")
    table["yelp"] = DatasetSource("Yelp", metric="f1")
    table["amazonproducts"] = DatasetSource("AmazonProducts", metric="f1")
    table["ogbn-arxiv"] = DatasetSource("ogb", {"name": "ogbn-arxiv"}, undirected=True)
    table["ogbn-products"] = DatasetSource("ogb", {"name": "ogbn-products"})
    table["ogbn-proteins"] = DatasetSource("ogb", {"name": "ogbn-proteins"}, metric="rocauc")
    return table


def canonical(name: str) -> str:
    """Return a name in lower case, with dashes for underscores and spaces."""
    return re.sub(r"[_\s]+", "-", name.strip().lower())


NAMES: Mapping[str, DatasetSource] = MappingProxyType(_table())


def load_named(name: str, root: Path, trust: bool = False) -> Raw:
    """Load a data set from its folder in `root`, or download it there.

    A download goes to a temporary folder beside it, which takes the final name only when everything is there.

    Args:
        name: A key of `NAMES`.
        root: Folder of all data sets; each has a folder of its name.
        trust: Let its files run code when they are read; else files that are more than arrays are refused.

    Raises:
        UserError: The download failed, a file is damaged or asks to run code, or a package is missing.
    """
    source = NAMES[name]
    if source.loader == "KarateClub":  # comes with PyTorch Geometric
        return _to_raw(name, source, _constructor(source)())
    construct = partial(_constructor(source), **source.arguments)  # imports, which are no files of the data set
    reading = guard.anything() if trust else guard.arrays_only(graphs=True)
    with _explained(name, root), _folder(name, root) as folder, reading:
        return _to_raw(name, source, construct(root=str(folder)))


@contextlib.contextmanager
def _folder(name: str, root: Path) -> Iterator[Path]:
    """The data set's folder; a temporary one while it does not exist, renamed at the end."""
    final = root / name
    if os.path.isdir(final):
        yield final
        return
    made = [p for p in (root, *root.parents) if not p.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    except OSError as error:
        raise UserError(f"The folder --root {root} cannot be written: {error.strerror}.") from error
    try:
        yield partial
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:  # innermost first
            with contextlib.suppress(OSError):  # someone else has put something there
                parent.rmdir()
        raise


@contextlib.contextmanager
def _explained(name: str, root: Path) -> Iterator[None]:
    """Turn a failed download, a damaged file and one that asks to run code into a sentence that says what to do."""
    client_error = require("aiohttp").ClientError
    folder = root / name
    there = os.path.isdir(folder)
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # what damaged files make the packages raise is of any type
        refused = _refused(error)
        reason = shown(" ".join(str(error).split()) or type(error).__name__, 200)
        if refused is not None:
            raise UserError(
                f"The data set {name} in {shown(folder)} has a file that is damaged, or would run code when it is read "
                f"({refused}); only arrays are read. Remove the folder to load the data set anew, or pass --trust to "
                "dibit train if you trust what lies there."
            ) from error
        if isinstance(error, (OSError, client_error)) or not there:
            raise UserError(
                f"The data set {name} is not in {shown(folder)} and could not be downloaded, which needs a network "
                f"({reason}). Run the same command on a machine with a network and copy the folder {shown(folder)} "
                "here, or give a graph of your own as an .npz file (docs/data.md)."
            ) from error
        raise UserError(
            f"The data set {name} in {shown(folder)} cannot be read ({type(error).__name__}: {reason}). Remove the "
            "folder to load the data set anew."
        ) from error


def _refused(error: BaseException) -> str | None:
    """What an unpickler refused, if that is what an error comes from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, guard.CodeInFile):
            return shown(str(cause))
        if isinstance(cause, pickle.UnpicklingError) and cause.__cause__ is None:
            text = " ".join(str(cause).split()) or "it is no whole pickle"
            named = re.search(r"GLOBAL (\S+)", text)
            return named[1] if named else shown(text.rpartition("WeightsUnpickler error: ")[2], 160)
        cause = cause.__cause__ or cause.__context__
    return None


def _constructor(source: DatasetSource) -> Callable[..., Any]:
    """The data set's class: called with a folder, it downloads what that lacks."""
    if source.loader == "ogb":
        return require("ogb.nodeproppred", extra="ogb").PygNodePropPredDataset
    import torch_geometric.datasets as datasets

    return getattr(datasets, source.loader)


def _to_raw(name: str, source: DatasetSource, dataset: Any) -> Raw:
    data = dataset[0]
    edge_index = data.edge_index.numpy()
    if source.undirected:
        edge_index = np.concatenate([edge_index, edge_index[::-1]], axis=1)
    y = data.y
    if y.dim() == 2 and y.size(1) == 1:
        y = y.squeeze(1)
    if y.dim() == 1:
        labels = y.nan_to_num(-1).long().numpy()
        classes = int(labels.max()) + 1
    else:
        labels, classes = y.float().numpy(), y.size(1)
    x = _features(data)
    nodes = x.shape[0]
    if labels.shape[0] != nodes or edge_index.shape[0] != 2 or classes < 1:
        raise ValueError(f"x of shape {x.shape}, y of {labels.shape} and edge_index of {edge_index.shape} do not fit")
    if edge_index.size and not 0 <= edge_index.min() <= edge_index.max() < nodes:
        raise ValueError(f"edge_index names the nodes {edge_index.min()} to {edge_index.max()} of {nodes}")
    masks = _masks(dataset, data)
    if masks is not None:
        masks = oriented(masks, nodes, f"In the data set {name}")
    return Raw(name, x, edge_index, labels, classes, masks, source.metric)


def _features(data: Any) -> Features:
    """Return the node features; without any, the mean of the edge features (ogbn-proteins)."""
    x = data.x
    if x is None:
        from torch_geometric.utils import scatter

        return scatter(data.edge_attr, data.edge_index[1], dim_size=data.num_nodes, reduce="mean").numpy()
    if hasattr(x, "to_torch_sparse_csr_tensor"):  # torch_sparse.SparseTensor
        x = x.to_torch_sparse_csr_tensor()
    if x.is_sparse:
        x = x.to_sparse_csr()
    if str(x.layout) == "torch.sparse_csr":
        parts = (x.values().numpy(), x.col_indices().numpy(), x.crow_indices().numpy())
        return scipy.sparse.csr_matrix(parts, shape=tuple(x.shape))
    return x.float().numpy()


def _masks(dataset: Any, data: Any) -> Masks | None:
    if hasattr(dataset, "get_idx_split"):  # OGB
        parts = dataset.get_idx_split()
        masks = []
        for part in ("train", "valid", "test"):
            mask = np.zeros(data.num_nodes, dtype=bool)
            mask[parts[part].numpy()] = True
            masks.append(mask)
        return masks[0], masks[1], masks[2]
    given = [getattr(data, f"{part}_mask", None) for part in ("train", "val", "test")]
    if any(mask is None for mask in given):
        return None
    train, val, test = (mask.bool().numpy() for mask in given if mask is not None)
    return train, val, test
