"""Graphs to train on: generated ones, ``.npz`` files, and the data sets of PyTorch Geometric and OGB."""

from dibit.train.data.graph import Graph, Raw, Split
from dibit.train.data.load import load_graph

__all__ = ["Graph", "Raw", "Split", "load_graph"]
