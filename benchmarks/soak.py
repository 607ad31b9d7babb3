"""Long runs that must stay flat: optimiser steps, mini-batches of all sizes, models made and dropped.

`python benchmarks/soak.py` prints resident memory, live tensors and Python objects along the way, compressed beside
plain, and exits with 1 where the second half of a run grows by more than its bound.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE

import dibit

KINDS = (GraphSAGE, GCN, GAT, GIN)
BOUND = 8.0  # MB that the second half of a run may add: what the C library's heap does by itself
D = 32


def graph(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, D), torch.randint(n, (2, 5 * n)), torch.randint(8, (n,))


def build(kind: type[nn.Module], number: int, compressed: bool) -> nn.Module:
    norm = (None, "batch_norm", "layer_norm")[number % 3]
    model = kind(D, 32, 3, 8, dropout=0.5, norm=norm).train()
    return dibit.compress(model, ("default", "small", "iexact")[number % 3]) if compressed else model


def steps(count: int, compressed: bool) -> Iterator[None]:
    """Steps of four models on one graph, each with its optimiser."""
    models = [build(kind, number, compressed) for number, kind in enumerate(KINDS)]
    optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    x, edges, y = graph(600)
    for step in range(count):
        model, optimizer = models[step % 4], optimizers[step % 4]
        optimizer.zero_grad()
        F.cross_entropy(model(x, edges), y).backward()
        optimizer.step()
        yield


def batches(count: int, compressed: bool) -> Iterator[None]:
    """A fresh batch a step, of any size, with its nodes' numbers; every fifth has no backward pass."""
    model = build(GraphSAGE, 1, compressed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(count):
        x, edges, y = graph(int(torch.randint(50, 1200, ())))
        with dibit.batch(model, node_ids=torch.randperm(20_000)[: len(x)]):
            loss = F.cross_entropy(model(x, edges), y)
        if step % 5:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield


def models(count: int, compressed: bool) -> Iterator[None]:
    """A model made, trained for two steps and dropped; of every third the last loss is never taken back."""
    x, edges, y = graph(300)
    for number in range(count):
        model = build(KINDS[number % 4], number, compressed)
        for _ in range(2):
            loss = F.cross_entropy(model(x, edges), y)
            if number % 3:
                loss.backward()
        del model, loss
        yield


def watch(name: str, run: Callable[[int, bool], Iterator[None]], count: int, progress: Progress) -> bool:
    flat = True
    for compressed in (False, True):
        torch.manual_seed(0)
        label = f"{name}, {'compressed' if compressed else 'plain'}"
        task = progress.add_task(label, total=count)
        seen = []
        for number, _ in enumerate(run(count, compressed), 1):
            progress.advance(task)
            if number % (count // 8) == 0:
                gc.collect()
                tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
                seen.append((psutil.Process().memory_info().rss / 2**20, tensors, len(gc.get_objects())))
        grown = seen[-1][0] - seen[len(seen) // 2][0]
        tensors = [row[1] for row in seen[len(seen) // 2 :]]
        kept = grown < BOUND and max(tensors) - min(tensors) < 100
        flat &= kept or not compressed
        progress.console.print(
            f"{label}: {count:,}; resident MB {', '.join(f'{row[0]:.0f}' for row in seen)}; tensors "
            f"{', '.join(str(row[1]) for row in seen)}; objects {', '.join(f'{row[2]:,}' for row in seen)}"
            f"{'' if kept else '  GROWS'}"
        )
    return flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batches", type=int, default=5_000)
    parser.add_argument("--models", type=int, default=2_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = {"steps": (steps, given.steps), "batches": (batches, given.batches), "models": (models, given.models)}
    with Progress() as progress:
        flat = [watch(name, run, count, progress) for name, (run, count) in runs.items() if count]
    return 0 if all(flat) else 1


if __name__ == "__main__":
    sys.exit(main())
