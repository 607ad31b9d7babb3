"""Bytes a node that layers of DGL keep for the backward pass, plain and compressed. The table of docs/dgl.md.

    pip install dgl==1.1.3
    python benchmarks/dgl_memory.py [--nodes 20000] [--ledger]

A random graph of 14 edges a node, 128 features; each layer follows a linear layer, so that its input is not held by the
caller. Bytes are those that the C allocator hands out across a forward pass, without the result; `--ledger` prints what
`dibit.track` lists for each recipe.
"""

import argparse
import gc
import os
import warnings

os.environ.setdefault("DGLBACKEND", "pytorch")

import torch
from torch import Tensor, nn

import dibit
from dibit.tools.memory import allocated_bytes

warnings.filterwarnings("ignore")
EDGES = 14  # a node
RECIPES = ("lossless", "default", "exact")


def layers() -> dict[str, nn.Module]:
    """The layers, by the text that makes them."""
    import dgl.nn as own

    names = {
        **{name: getattr(own, name) for name in own.__dict__ if name.endswith("Conv")},
        "Linear": nn.Linear,
    }
    texts = (
        "GraphConv(128, 128)",
        *(f"SAGEConv(128, 128, {kind!r})" for kind in ("mean", "gcn", "pool")),
        *(f"GINConv(Linear(128, 128), {kind!r})" for kind in ("sum", "max")),
        *(f"{kind}(128, 32, 4)" for kind in ("GATConv", "GATv2Conv", "DotGatConv")),
        "EdgeConv(128, 128)",
    )
    return {text: eval(text, names) for text in texts}


class Behind(nn.Module):
    """A linear layer, and a layer of DGL on what it gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(128, 128), layer

    def forward(self, graph: object, x: Tensor) -> Tensor:
        return self.layer(graph, self.first(x))  # type: ignore[no-any-return]


def kept(model: nn.Module, graph: object, x: Tensor) -> int:
    """Bytes that the third of three passes keeps; the first two make what stays."""
    for _ in range(2):
        model(graph, x).sum().backward()
    gc.collect()
    before = allocated_bytes()
    y = model(graph, x)
    after = allocated_bytes()
    if before is None or after is None:
        raise SystemExit("the C library has no mallinfo2, by which bytes are counted here.")
    return after - before - y.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--only", default="", help="layers with this in their name")
    parser.add_argument("--ledger", action="store_true")
    args = parser.parse_args()
    import dgl

    n = args.nodes
    torch.manual_seed(0)
    graph, x = (
        dgl.add_self_loop(dgl.graph(tuple(torch.randint(n, (2, (EDGES - 1) * n))), num_nodes=n)),
        torch.randn(n, 128),
    )
    graph.create_formats_()
    print(f"| {EDGES} edges a node, bytes a node | plain | {' | '.join(RECIPES)} |")
    print(f"|---|---:|{'---:|' * len(RECIPES)}")
    for text in layers():
        if args.only not in text:
            continue
        cells = [kept(Behind(layers()[text]).train(), graph, x) / n]
        ledgers = []
        for recipe in RECIPES:
            model = dibit.compress(Behind(layers()[text]).train(), recipe)
            cells.append(kept(model, graph, x) / n)
            if args.ledger:
                with dibit.track(model) as ledger:
                    model(graph, x)
                ledgers.append(f"{recipe}: plain {ledger.plain / n:.0f}, kept {ledger.total / n:.0f}\n{ledger}")
        print(f"| `{text}` | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |", flush=True)
        print("\n".join(ledgers), end="")


if __name__ == "__main__":
    main()
