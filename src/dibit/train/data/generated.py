"""Generated graphs: no download, any size, the same for the same seed."""

from __future__ import annotations

import numpy as np

from dibit.train.data.graph import Raw


def planted(
    nodes: int = 20_000,
    seed: int = 0,
    *,
    classes: int = 10,
    degree: float = 14.0,
    features: int = 128,
    homophily: float = 0.5,
    signal: float = 0.12,
) -> Raw:
    """Draw a degree-corrected planted partition with power-law degrees and noisy features.

    Nodes have weights from a Pareto law (exponent 2.5, so that the degrees follow a power law, cut at
    sqrt(N)). Each edge starts at a node drawn by weight; its other end is drawn by weight from the same class
    with probability `homophily`, else from all nodes. Features are a class's random direction times `signal`
    plus standard normal noise: too weak to tell the class from one node alone, enough from a neighbourhood.

    Args:
        nodes: N.
        seed: Of everything drawn.
        classes: C.
        degree: Average degree aimed at; duplicates are dropped, so the graph has a little less.
        features: F.
        homophily: Share of edges drawn inside the class.
        signal: Length of an entry of a class's direction, in units of the noise.

    Returns:
        A graph with both directions of every edge and no published split.
    """
    rng = np.random.default_rng(seed)
    y = np.sort(rng.integers(classes, size=nodes))  # sorted: a class is a range, so drawing inside it is a search
    weight = np.minimum((1 - rng.random(nodes)) ** (-1 / 1.5), np.sqrt(nodes))
    ends = np.concatenate([[0.0], np.cumsum(weight)])

    def draw(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Draw a node by weight between two positions of the cumulated weights, one for each edge."""
        position = low + rng.random(len(low)) * (high - low)
        return np.clip(np.searchsorted(ends, position, side="right") - 1, 0, nodes - 1)

    edges = round(nodes * degree / 2)
    everything = np.zeros(edges), np.full(edges, ends[-1])
    source = draw(*everything)
    first = np.searchsorted(y, np.arange(classes + 1))
    inside = rng.random(edges) < homophily
    low = np.where(inside, ends[first[y[source]]], 0.0)
    high = np.where(inside, ends[first[y[source] + 1]], ends[-1])
    target = draw(low, high)

    directions = rng.standard_normal((classes, features), dtype=np.float32)
    x = np.float32(signal) * directions[y] + rng.standard_normal((nodes, features), dtype=np.float32)
    shuffle = rng.permutation(nodes)  # a node's number tells nothing
    x_shuffled, y_shuffled = np.empty_like(x), np.empty_like(y)
    x_shuffled[shuffle], y_shuffled[shuffle] = x, y
    source, target = shuffle[source], shuffle[target]
    edge_index = np.stack([np.concatenate([source, target]), np.concatenate([target, source])])
    return Raw(f"planted:{nodes}", x_shuffled, edge_index, y_shuffled, classes)
