"""Bytes a node of layers on an `edge_index` of 14 edges a node, plain and with the default recipe.

    python benchmarks/edge_memory.py [--nodes 20000] [--rows]

Random graph, 128 features; `--rows` prints the ledger. The figures of docs/operations.md ("What is computed again").
"""

import argparse
import warnings

import torch
from torch_geometric.nn import GAT, GCN, GATConv, GATv2Conv, GraphSAGE, TransformerConv

import dibit

warnings.filterwarnings("ignore")
LAYERS = {
    "GATConv(128, 32, heads=4)": lambda: GATConv(128, 32, heads=4),
    "GATv2Conv(128, 32, heads=4)": lambda: GATv2Conv(128, 32, heads=4),
    "TransformerConv(128, 32, heads=4)": lambda: TransformerConv(128, 32, heads=4),
    "GAT, 3 layers of 128": lambda: GAT(128, 128, 3, 40, heads=4),
    "GCN, 3 layers of 128": lambda: GCN(128, 128, 3, 40),
    "GraphSAGE, 3 layers of 128": lambda: GraphSAGE(128, 128, 3, 40),
}
GRAPH = ("index_select", "scatter_add_", "mul", "div")  # what keeps indices, weights and counts in GCN and GraphSAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--rows", action="store_true")
    args = parser.parse_args()
    n = args.nodes
    torch.manual_seed(0)
    x, edge_index = torch.randn(n, 128), torch.randint(n, (2, 14 * n))
    print(f"{'':36}{'plain':>8}{'default':>9}{'times':>8}   of it indices and weights")
    for name, build in LAYERS.items():
        model = dibit.compress(build().train())
        model(x, edge_index).sum().backward()  # the first pass finds that the graph does not change
        with dibit.track(model) as saved:
            model(x, edge_index)
        graph = sum(row.kept for row in saved.rows if row.operation in GRAPH) / n
        shown = f"{graph:.0f}" if name.startswith(("GCN", "Graph")) else ""
        print(f"{name:36}{saved.plain / n:8.0f}{saved.total / n:9.1f}{saved.plain / saved.total:8.1f}   {shown}")
        if args.rows:
            print(saved)


if __name__ == "__main__":
    main()
