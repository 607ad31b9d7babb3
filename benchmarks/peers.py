"""Seconds of a training step in PyTorch Geometric (CSR and edge_index) and in DGL, each plain and with Dibit.

    python benchmarks/peers.py [--rounds 5] [--scale 1.0] [--folder .peers]

GraphSAGE of three layers of 128, BatchNorm, dropout 0.5, on the arxiv shape. All settings run in one process,
interleaved; a table in Markdown is printed. DGL 1.1.3 is the last version that installs by pip. If it is not here, the
script makes an environment in `--folder` that sees the packages of this one, installs DGL there, and runs in it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DGL = "dgl==1.1.3"
SETTINGS = (
    ("PyG, CSR", ("plain", "default")),
    ("PyG, edge_index", ("plain", "default", "lossless")),
    ("DGL", ("plain", "default")),
)
os.environ.setdefault("DGLBACKEND", "pytorch")


def run_with_dgl(folder: Path) -> None:
    """Run this script in an environment of its own that has DGL. Does not return."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making an environment in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        paths = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
        own = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True,
            text=True,
            check=True,
        )
        (Path(own.stdout.strip()) / "beside.pth").write_text(
            "".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(paths))
        )
        subprocess.run([python, "-m", "pip", "install", "--quiet", DGL], check=True)
    os.execv(python, [str(python), *sys.argv])


def dgl_model(shape: Any) -> Any:
    """The same network of DGL's layers."""
    import torch
    from dgl.nn import SAGEConv  # type: ignore[import-not-found]

    class Sage(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [shape.features, *[shape.hidden] * (shape.layers - 1), shape.classes]
            pairs = list(itertools.pairwise(widths))
            self.convs = torch.nn.ModuleList(SAGEConv(a, b, "mean") for a, b in pairs)
            self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(b) for _, b in pairs[:-1])
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x: torch.Tensor, graph: Any) -> torch.Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=False):
                x = self.dropout(norm(conv(graph, x)).relu())
            return self.convs[-1](graph, x)  # type: ignore[no-any-return]

    return Sage()


def steps(scale: float) -> dict[tuple[str, str], Any]:
    """A training step for each framework and setting."""
    import dgl
    import torch

    from dibit.bench.workload import BenchmarkBatch, TrainingStep, Workload

    found: dict[tuple[str, str], Any] = {}
    batches: dict[str, Any] = {}
    for name, form in (("PyG, CSR", "csr"), ("PyG, edge_index", "edge_index")):
        batches[name] = Workload(form=form, scale=scale).batches()[0]
    edges = batches["PyG, edge_index"].graph
    first = batches["PyG, CSR"]
    graph = dgl.graph((edges[0], edges[1]), num_nodes=first.x.shape[0])
    batches["DGL"] = BenchmarkBatch(first.x, graph, first.train, first.y)
    for name, settings in SETTINGS:
        for setting in settings:
            workload = Workload(form="csr" if name == "PyG, CSR" else "edge_index", scale=scale)
            torch.manual_seed(0)
            model = dgl_model(workload.sizes()).train() if name == "DGL" else workload.network()
            found[name, setting] = TrainingStep(model, batches[name], setting)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path(".peers"))
    args = parser.parse_args()
    if find_spec("dgl") is None:
        run_with_dgl(args.folder.resolve())
    import torch

    from dibit.engine.noise.row_plan import FIRST_MEASURED

    warnings.simplefilter("ignore")
    own = steps(args.scale)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in own}
    for key, step in own.items():
        print("warming up", *key, file=sys.stderr)
        for _ in range(1 if key[1] == "plain" else FIRST_MEASURED):
            step()
    for done in range(args.rounds + 1):
        for key, step in own.items():
            print(f"round {done} of {args.rounds}:", *key, file=sys.stderr)
            start = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - start)
    counted = {key: each[1:] for key, each in times.items()}  # the first round warms up
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds, scale {args.scale:g}\n")
    print("| | setting | s a step | to its own plain | to DGL's plain |\n|---|---|---:|---:|---:|")
    for name, setting in own:
        seconds = statistics.median(counted[name, setting])
        ratios = [ratio(counted[name, setting], counted[other, "plain"]) for other in (name, "DGL")]
        print(f"| {name} | {setting} | {seconds:.2f} | {ratios[0]} | {ratios[1]} |")


def ratio(own: list[float], other: list[float]) -> str:
    """The median over the rounds of the ratio within a round."""
    return f"{statistics.median(a / b for a, b in zip(own, other, strict=True)):.2f}"


if __name__ == "__main__":
    main()
