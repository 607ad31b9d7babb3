"""A neighbour sampler in Numba for PyTorch Geometric's loaders, where neither pyg-lib nor torch-sparse is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.sampler import BaseSampler, NodeSamplerInput, SamplerOutput


class NumbaSampler(BaseSampler):
    """Neighbours of a batch of nodes, hop by hop, without replacement, as PyTorch Geometric's own sampler takes them.

    Pass it as `NeighborLoader(data, num_neighbors, neighbor_sampler=NumbaSampler(data, num_neighbors), ...)`. The
    nodes of the batch come first, then those of the first hop and so on; an edge leads from a sampled node to the one
    it was sampled for. Random numbers come from torch's default generator, one a batch.

    Args:
        data: with `edge_index` int64 (2, E); edge attributes are sliced along.
        num_neighbors: sampled for a node in each hop; -1 takes all.

    Raises:
        ValueError: a number is neither -1 nor positive.
    """

    def __init__(self, data: Data, num_neighbors: Sequence[int]) -> None:
        if not num_neighbors or any(k != -1 and k < 1 for k in num_neighbors):
            raise ValueError(f"num_neighbors = {list(num_neighbors)} was given; expected -1 (all) or 1 and more a hop.")
        self.num_neighbors = list(num_neighbors)
        source, target = data.edge_index.cpu()
        nodes = int(data.num_nodes)
        order = torch.argsort(target, stable=True)
        self._row = source[order].numpy()
        self._colptr = np.concatenate(([0], np.bincount(target.numpy(), minlength=nodes).cumsum()))
        self._local = np.full(nodes, -1, dtype=np.int64)  # number in the batch, -1 outside of it; restored each time
        has_attributes = any(data.is_edge_attr(key) for key in data.to_dict() if key != "edge_index")
        self._order = order if has_attributes else None

    @property
    def edge_permutation(self) -> Tensor | None:
        """From positions in the sampler's order to those in `edge_index`, where edges have attributes."""
        return self._order

    def sample_from_edges(self, index: Any, neg_sampling: Any = None) -> Any:
        """Not what this sampler is for."""
        raise NotImplementedError(
            "NumbaSampler samples around nodes; for links install pyg-lib or torch-sparse and leave it out."
        )

    def sample_from_nodes(self, index: NodeSamplerInput, **_: Any) -> SamplerOutput:
        """The subgraph around a batch of nodes."""
        seed = int(torch.randint(2**62, ()))
        hops = np.asarray(self.num_neighbors, dtype=np.int64)
        seeds = index.node.cpu().numpy()
        node, row, col, edge, nodes, edges = _sample(seeds, self._colptr, self._row, hops, self._local, np.uint64(seed))
        return SamplerOutput(
            node=torch.from_numpy(node),
            row=torch.from_numpy(row),
            col=torch.from_numpy(col),
            edge=None if self._order is None else torch.from_numpy(edge),
            num_sampled_nodes=nodes.tolist(),
            num_sampled_edges=edges.tolist(),
            metadata=(index.input_id, index.time),
        )


@numba.njit(cache=True, nogil=True)
def _mixed(state: Any) -> Any:
    """SplitMix64's finaliser."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _sample(seeds: Any, colptr: Any, row: Any, hops: Any, local: Any, key: Any) -> Any:
    """Nodes, edges (from, to, position) in the batch's own numbers; how many of them each hop brought."""
    room = max(2 * seeds.size, 16)
    node = np.empty(room, np.int64)
    capacity = 4 * room
    edges_from, edges_to = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    positions = np.empty(capacity, np.int64)
    count, edges = 0, 0
    for v in seeds:
        if local[v] < 0:
            local[v] = count
            node[count] = v
            count += 1
    new_nodes, new_edges = np.zeros(hops.size + 1, np.int64), np.zeros(hops.size, np.int64)
    new_nodes[0] = count
    start, counter = 0, np.uint64(0)
    for hop in range(hops.size):
        stop = count
        for target in range(start, stop):
            first, last = colptr[node[target]], colptr[node[target] + 1]
            degree = last - first
            taken = degree if hops[hop] < 0 else min(degree, hops[hop])
            while edges + taken > capacity:
                capacity *= 2
                edges_from, edges_to = _grown(edges_from, capacity), _grown(edges_to, capacity)
                positions = _grown(positions, capacity)
            while count + taken > room:
                room *= 2
                node = _grown(node, room)
            own = edges
            for i in range(taken):
                at = first + i
                if taken < degree:  # Floyd: one of the first n - taken + i + 1, or the last of them if it was taken
                    most = degree - taken + i
                    counter += np.uint64(1)
                    number = _mixed(key + counter * np.uint64(0x9E3779B97F4A7C15))
                    at = first + np.int64(number % np.uint64(most + 1))
                    for j in range(own, own + i):
                        if positions[j] == at:
                            at = first + most
                            break
                source = row[at]
                if local[source] < 0:
                    local[source] = count
                    node[count] = source
                    count += 1
                edges_from[edges], edges_to[edges], positions[edges] = local[source], target, at
                edges += 1
        new_nodes[hop + 1], new_edges[hop] = count - stop, edges
        start = stop
    for hop in range(hops.size - 1, 0, -1):
        new_edges[hop] -= new_edges[hop - 1]
    for i in range(count):
        local[node[i]] = -1
    return (
        node[:count].copy(),
        edges_from[:edges].copy(),
        edges_to[:edges].copy(),
        positions[:edges].copy(),
        new_nodes,
        new_edges,
    )


@numba.njit(cache=True, nogil=True)
def _grown(x: Any, size: Any) -> Any:
    longer = np.empty(size, x.dtype)
    longer[: x.size] = x
    return longer
