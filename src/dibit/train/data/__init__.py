"""Graphs to train on: generated ones, ``.npz`` files, and the data sets of PyTorch Geometric and OGB."""

from dibit.train.data.graph import NodeDataset, Raw, Split
from dibit.train.data.load import load_graph

Graph = NodeDataset  # its former name, for one release

__all__ = ["Graph", "NodeDataset", "Raw", "Split", "load_graph"]
