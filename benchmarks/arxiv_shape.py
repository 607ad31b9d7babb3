"""Saved MB and seconds a step on the arxiv shape, plain and compressed, the ledger beside the C allocator.

    python benchmarks/arxiv_shape.py [--recipes none exact iexact default] [--steps 3] [--json FILE]

N = 169,343, E = 2,315,598 random edges, GraphSAGE(128, 128, 3 layers, 40, dropout .5, BatchNorm) of PyG, unmodified, on
a `torch.sparse` adjacency. Saved bytes depend on shapes alone. Each recipe runs in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", ".*[Ss]parse.*")
MB = 2**20


def measure(recipe: str, steps: int) -> dict[str, float]:
    import torch

    import dibit
    from dibit.bench.memory import allocated_bytes
    from dibit.bench.shapes import ARXIV, random_graph, sage

    x, adj = random_graph(ARXIV)
    y, train = torch.randint(ARXIV.classes, (ARXIV.nodes,)), torch.randperm(ARXIV.nodes)[: ARXIV.train]
    model = sage(ARXIV)
    if recipe != "none":
        dibit.compress(model, recipe)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x, adj)[train], y[train]).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
        print(f"{recipe}: {times[-1]:.2f} s a step", file=sys.stderr)

    with dibit.track(model) as saved:
        out = model(x, adj)
    del out
    before = allocated_bytes() or 0
    out = model(x, adj)
    held = (allocated_bytes() or 0) - before - out.nbytes
    targets = y[train].nbytes
    return {
        "saved_mb": (saved.total + targets) / MB,
        "plain_mb": (saved.plain + targets) / MB,
        "allocator_mb": (held + targets) / MB,
        "bytes_per_node": saved.total / ARXIV.nodes,
        "seconds": statistics.median(times[1:]) if steps else float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["none", "exact", "iexact", "default"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.steps)))
        return
    results = {}
    print(f"{'recipe':10}{'saved MB':>10}{'allocator':>11}{'B / node':>10}{'s / step':>10}")
    for recipe in args.recipes:
        command = [sys.executable, __file__, "--one", recipe, "--steps", str(args.steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        r = results[recipe] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{recipe:10}{r['saved_mb']:10.2f}{r['allocator_mb']:11.2f}{r['bytes_per_node']:10.1f}{r['seconds']:10.2f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
