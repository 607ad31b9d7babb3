"""Data sets that PyTorch Geometric and OGB load by name."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.sparse

from dibit.train.data.graph import Features, Raw
from dibit.train.errors import UserError, require


@dataclass(frozen=True)
class Source:
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


def _table() -> dict[str, Source]:
    table: dict[str, Source] = {}
    for name in ("Cora", "CiteSeer", "PubMed"):
        table[name.lower()] = Source("Planetoid", {"name": name})
    for name in ("Computers", "Photo"):
        table[f"amazon-{name.lower()}"] = Source("Amazon", {"name": name})
    for name in ("CS", "Physics"):
        table[f"coauthor-{name.lower()}"] = Source("Coauthor", {"name": name})
    for name in ("Cora", "Cora_ML", "CiteSeer", "DBLP", "PubMed"):
        table[f"citationfull-{canonical(name)}"] = Source("CitationFull", {"name": name})
    for name in ("Cornell", "Texas", "Wisconsin"):
        table[name.lower()] = Source("WebKB", {"name": name}, undirected=True)
    for name in ("chameleon", "squirrel"):
        table[name] = Source("WikipediaNetwork", {"name": name}, undirected=True)
    for name in ("Roman-empire", "Amazon-ratings", "Minesweeper", "Tolokers", "Questions"):
        table[name.lower()] = Source("HeterophilousGraphDataset", {"name": name})
    for name in ("USA", "Brazil", "Europe"):
        table[f"airports-{name.lower()}"] = Source("Airports", {"name": name})
    for name in ("DE", "EN", "ES", "FR", "PT", "RU"):
        table[f"twitch-{name.lower()}"] = Source("Twitch", {"name": name})
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
        table[name.lower()] = Source(name)
    table["actor"] = Source("Actor", undirected=True)
    table["nell"] = Source("NELL")
    table["karate"] = Source("KarateClub")
    table["yelp"] = Source("Yelp", metric="f1")
    table["amazonproducts"] = Source("AmazonProducts", metric="f1")
    table["ogbn-arxiv"] = Source("ogb", {"name": "ogbn-arxiv"}, undirected=True)
    table["ogbn-products"] = Source("ogb", {"name": "ogbn-products"})
    table["ogbn-proteins"] = Source("ogb", {"name": "ogbn-proteins"}, metric="rocauc")
    return table


def canonical(name: str) -> str:
    """Return a name in lower case, with dashes for underscores and spaces."""
    return re.sub(r"[_\s]+", "-", name.strip().lower())


NAMES: Mapping[str, Source] = MappingProxyType(_table())


def load_named(name: str, root: Path) -> Raw:
    """Load a data set from its folder in `root`, or download it there.

    A download goes to a temporary folder beside it, which takes the final name only when everything is there.

    Args:
        name: A key of `NAMES`.
        root: Folder of all data sets; each has a folder of its name.

    Raises:
        UserError: The download failed, or a package is missing.
    """
    source = NAMES[name]
    if source.loader == "KarateClub":  # comes with PyTorch Geometric
        return _to_raw(name, source, _construct(source, None))
    with _folder(name, root) as folder, _explained(name, root):
        return _to_raw(name, source, _construct(source, folder))


@contextlib.contextmanager
def _folder(name: str, root: Path) -> Iterator[Path]:
    """The data set's folder; a temporary one while it does not exist, renamed at the end."""
    final = root / name
    if final.is_dir():
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
    """Turn a failed download into a sentence that says what to do."""
    client_error = require("aiohttp").ClientError
    try:
        yield
    except (OSError, EOFError, zipfile.BadZipFile, client_error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"The data set {name} is not in {root / name} and could not be downloaded, which needs a network "
            f"({reason}). Run the same command on a machine with a network and copy the folder {root / name} "
            "here, or give a graph of your own as an .npz file (docs/data.md)."
        ) from error


def _construct(source: Source, folder: Path | None) -> Any:
    """Call the constructor, which downloads what the folder lacks."""
    if source.loader == "ogb":
        ogb = require("ogb.nodeproppred", extra="ogb")
        with _trusting_own_files():
            return ogb.PygNodePropPredDataset(root=str(folder), **source.arguments)
    import torch_geometric.datasets as datasets

    place = {} if folder is None else {"root": str(folder)}
    return getattr(datasets, source.loader)(**place, **source.arguments)


@contextlib.contextmanager
def _trusting_own_files() -> Iterator[None]:
    """OGB reads the cache it has just written with torch.load, which since torch 2.6 refuses its classes."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _to_raw(name: str, source: Source, dataset: Any) -> Raw:
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
    return Raw(name, _features(data), edge_index, labels, classes, _masks(dataset, data), source.metric)


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


def _masks(dataset: Any, data: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
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
