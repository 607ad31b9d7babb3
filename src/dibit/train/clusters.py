"""Cluster-GCN's partition by pymetis: METIS as a wheel, where PyTorch Geometric asks for a library to be compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.loader import ClusterData

from dibit.train.errors import require


class Clusters(ClusterData):
    """PyTorch Geometric's `ClusterData`, partitioned by METIS through pymetis; edges count in both directions."""

    def _metis(self, edge_index: Tensor, num_nodes: int) -> Tensor:
        pymetis = require("pymetis", "cluster")
        pointers, neighbours = _both_ways(edge_index.numpy(), num_nodes)
        adjacency: Any = pymetis.CSRAdjacency(pointers, neighbours)
        _, cluster = pymetis.part_graph(self.num_parts, adjacency=adjacency, recursive=self.recursive)
        return torch.as_tensor(np.asarray(cluster), dtype=torch.int64)


def _both_ways(edge_index: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Row pointers and neighbours of the undirected graph, without self-loops."""
    source, target = np.concatenate((edge_index, edge_index[::-1]), axis=1)
    kept = source != target
    key = np.unique(source[kept] * nodes + target[kept])
    pointers = np.concatenate(([0], np.bincount(key // nodes, minlength=nodes).cumsum()))
    return pointers.astype(np.int32), (key % nodes).astype(np.int32)
