"""docs/coverage.md: every layer of PyTorch Geometric, what it keeps plain and compressed, and what stays exact.

    python -m benchmarks.layer_table [--out docs/coverage.md]

Run from the repository's root: the layers are those of `tests/zoo`, on its small random graph (60 nodes, about 460
edges, 16 features), with the default recipe. Bytes a node and an edge are those of tensors with a row a node or fewer,
and with more rows than nodes.
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from pathlib import Path

warnings.filterwarnings("ignore")
HEAD = """# Coverage

This page shows what Dibit keeps for every layer of PyTorch Geometric. Each layer runs on a random graph of 60 nodes,
about 460 edges and 16 features, plain and compressed with the default recipe. The columns are:

- **plain B / node**, **kept**: the bytes that autograd keeps for the backward pass, plain and compressed, divided by
  the number of nodes.
- **plain B / edge**, **kept**: the same for tensors with more than two rows a node, divided by the number of edges.
- **times less**: all plain bytes divided by all kept bytes; "all" means that nothing is kept.
- **exact floats**: operations that still keep floating-point tensors exactly (of 1 KiB and more), and how much.

Tests check for each layer that the forward pass is bit-identical, that Dibit keeps no more bytes than the plain model,
and that the gradient of every parameter and input is unbiased (`tests/zoo`). Small tensors weigh more here than in a
real model.

`python -m benchmarks.layer_table` writes this page.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"))
    args = parser.parse_args()
    from tests.zoo import aggrs, convs, models, norms

    lines = [HEAD]
    for title, part in (("Convolutions", convs), ("Norms", norms), ("Aggregations", aggrs), ("Models", models)):
        head = "| layer | plain B / node | kept | plain B / edge | kept | times less | exact floats |"
        lines += ["", f"## {title}", "", head, "|---|---:|---:|---:|---:|---:|---|"]
        lines += [row(case) for case in part.cases()]
        absent = "; ".join(f"{name}: {reason}" for name, reason in part.ABSENT.items())
        lines += ["", f"Not run: {absent}."] if absent else []
        print(f"{title} done", flush=True)
    args.out.write_text("\n".join(lines) + "\n")


def row(case) -> str:  # type: ignore[no-untyped-def]
    """One line of the table."""
    from tests.zoo.case import E, N
    from tests.zoo.harness import compressed

    try:
        ledger = compressed(case, "default").ledger
    except RuntimeError as error:
        return f"| {case.name} | | | | | | refused: {str(error).split(';')[0]} |"
    sums: dict[tuple[str, str], int] = defaultdict(int)
    exact: dict[str, int] = defaultdict(int)
    for r in ledger.rows:
        place = "edge" if r.shape and r.shape[0] > 2 * N else "node"
        sums[place, "plain"] += r.plain
        sums[place, "kept"] += r.kept
        if r.how == "exact" and r.kept >= 1024:
            exact[r.operation.removeprefix("_VF.")] += r.kept
    per = {"node": N, "edge": E}
    cells = [f"{sums[place, side] / per[place]:.0f}" for place in ("node", "edge") for side in ("plain", "kept")]
    names = ", ".join(f"{name} {size / 1024:.0f} K" for name, size in sorted(exact.items(), key=lambda e: -e[1]))
    times = f"{ledger.plain / ledger.total:.1f}" if ledger.total else "all"
    return f"| {case.name} | {' | '.join(cells)} | {times} | {names} |"


if __name__ == "__main__":
    main()
