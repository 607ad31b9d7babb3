"""Cluster-GCN's partition by pymetis: METIS as a wheel, where PyTorch Geometric asks for a library to be compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import ClusterData, ClusterLoader

from dibit.tools.errors import require


class Clusters(ClusterData):
    """PyTorch Geometric's `ClusterData`, partitioned by METIS through pymetis; edges count in both directions."""

    def _metis(self, edge_index: Tensor, num_nodes: int) -> Tensor:
        pymetis = require("pymetis", "cluster")
        pointers, neighbours = _both_ways(edge_index.numpy(), num_nodes)
        adjacency: Any = pymetis.CSRAdjacency(pointers, neighbours)
        _, cluster = pymetis.part_graph(self.num_parts, adjacency=adjacency, recursive=self.recursive)
        return torch.as_tensor(np.asarray(cluster), dtype=torch.int64)


class ClusterBatches(ClusterLoader):
    """PyTorch Geometric's `ClusterLoader`, which fails on clusters whose nodes have no edge."""

    def _collate(self, batch: list[int]) -> Data:
        partition, which = self.cluster_data.partition, torch.as_tensor(batch)
        ends = [partition.partptr[which + i] for i in (0, 1)]
        if not partition.indptr[ends[0]].equal(partition.indptr[ends[1]]):
            return super()._collate(batch)
        nodes = torch.cat([torch.arange(*each) for each in torch.stack(ends, dim=1).tolist()])
        data = self.cluster_data.data
        attributes = {key: value[nodes] for key, value in data.items() if data.is_node_attr(key)}
        return Data(**attributes, edge_index=torch.empty(2, 0, dtype=torch.int64), num_nodes=len(nodes))


def _both_ways(edge_index: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Row pointers and neighbours of the undirected graph, without self-loops."""
    source, target = np.concatenate((edge_index, edge_index[::-1]), axis=1)
    kept = source != target
    key = np.unique(source[kept] * nodes + target[kept])
    pointers = np.concatenate(([0], np.bincount(key // nodes, minlength=nodes).cumsum()))
    return pointers.astype(np.int32), (key % nodes).astype(np.int32)
