"""Full-batch training of a million nodes in a process that may not have more than 6 GiB: plain, and the default recipe.

    python benchmarks/large_graph.py [--nodes 1000000] [--degree 20] [--limit 6] [--steps 3] [--folder DIR]

A generated graph is written once; its features are read through a memory map, so that they are pages of a file and
not the process's own data. Each setting then trains a GraphSAGE of 3 layers of 128 (mean, BatchNorm, dropout) in a
process of its own under RLIMIT_DATA, and says whether it fits. The figures of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

FEATURES, CLASSES = 128, 10
GIB = 2**30


def generate(folder: Path, nodes: int, degree: float) -> None:
    """Features, CSR structure with a row for each target, and labels, as files."""
    from dibit.train.data.generated import planted

    raw = planted(nodes, 0, classes=CLASSES, degree=degree, features=FEATURES)
    raw.x.astype(np.float32).tofile(folder / "x.bin")
    source, target = raw.edge_index
    order = np.argsort(target, kind="stable")
    crow = np.concatenate(([0], np.bincount(target, minlength=nodes).cumsum()))
    np.savez(folder / "graph.npz", crow=crow, col=source[order], y=raw.y)
    (folder / "size.json").write_text(json.dumps({"nodes": nodes, "degree": degree, "edges": len(source)}))


def train(folder: Path, setting: str, limit: float, steps: int) -> None:
    """Train under the limit, a line a step."""
    import dibit
    from dibit.train.models import build_model
    from dibit.train.settings import ModelSettings

    warnings.filterwarnings("ignore")
    nodes = json.loads((folder / "size.json").read_text())["nodes"]
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * GIB), int(limit * GIB)))
    try:
        x = torch.from_file(str(folder / "x.bin"), shared=True, size=nodes * FEATURES).view(nodes, FEATURES)
        with np.load(folder / "graph.npz") as parts:
            crow, col, y = (torch.from_numpy(parts[name]) for name in ("crow", "col", "y"))
        adjacency = torch.sparse_csr_tensor(crow, col, torch.ones(len(col)), (nodes, nodes), check_invariants=False)
        rows = torch.arange(0, nodes, 2)
        targets = y[rows]
        torch.manual_seed(0)
        model = build_model(ModelSettings(), FEATURES, CLASSES).train()
        if setting != "plain":
            dibit.compress(model, setting)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(1, steps + 1):
            start = time.perf_counter()
            optimizer.zero_grad()
            with dibit.batch(model, loss_rows=rows):
                loss = torch.nn.functional.cross_entropy(model(x, adjacency)[rows], targets)
            loss.backward()
            optimizer.step()
            seconds = time.perf_counter() - start
            print(f"{setting}: step {step}/{steps}, loss {float(loss):.4f}, {seconds:.1f} s", flush=True)
    except (RuntimeError, MemoryError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        print(f"{setting}: does not fit in {limit:g} GiB ({str(error).splitlines()[0][-80:]})", flush=True)
        raise SystemExit(3) from None
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0]) - int(status["RssShmem"].split()[0])
    print(f"{setting}: fits; resident at the most {own / 2**20:.2f} GiB without the mapped file", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--degree", type=float, default=20.0)
    parser.add_argument("--limit", type=float, default=6.0, help="GiB")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the graph here")
    parser.add_argument("--settings", nargs="+", default=["plain", "default"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return train(args.folder, args.child, args.limit, args.steps)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        size, wanted = folder / "size.json", {"nodes": args.nodes, "degree": args.degree}
        if not size.exists() or not wanted.items() <= json.loads(size.read_text()).items():
            print(f"generating {args.nodes:,} nodes", flush=True)
            generate(folder, args.nodes, args.degree)
        edges = json.loads(size.read_text())["edges"]
        print(f"{args.nodes:,} nodes, {edges:,} edges, {args.limit:g} GiB a process", flush=True)
        own = ["--folder", str(folder), "--limit", str(args.limit), "--steps", str(args.steps)]
        for setting in args.settings:
            status = subprocess.run([sys.executable, __file__, *own, "--child", setting]).returncode
            if status not in (0, 3):
                raise SystemExit(f"{setting} ended with status {status}")
    return None


if __name__ == "__main__":
    main()
