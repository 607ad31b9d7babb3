"""Graphs as all experiments have them."""

from __future__ import annotations

from dataclasses import asdict

from dibit.train.data import NodeDataset
from dibit.train.data.graph import prepare
from dibit.train.data.load import load_raw
from dibit.train.settings import DataSettings

WIDE = 500  # features; wider ones are reduced by truncated SVD
RANK = 100


def load_prepared(dataset: str, root: str) -> NodeDataset:
    """A graph by its name or file: standardised, features wider than 500 reduced to 100 singular directions.

    Args:
        dataset: as in `dibit train`.
        root: folder of data sets.
    """
    settings = DataSettings(dataset=dataset, root=root, standardize=True)
    raw = load_raw(settings, 0)
    settings = DataSettings(**{**asdict(settings), "svd": RANK if raw.x.shape[1] > WIDE else None})
    return prepare(raw, settings, 0)
