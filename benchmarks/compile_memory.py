"""Bytes a node that autograd keeps: plain and compressed, uncompiled and under `torch.compile`.

    python benchmarks/compile_memory.py [--nodes 5000] [--backend inductor] [--models TEXT]

The table of docs/compile.md. Random graph of 14 edges a node, 128 features, the default recipe; the second pass.
--models: only those whose names have this text in them.
Distinct storages of all saved tensors, without parameters, buffers, inputs and the output.
"""

import argparse
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch_geometric.nn import GAT, GCN, GraphSAGE

import dibit

warnings.filterwarnings("ignore")


def mlp() -> nn.Module:
    hidden = (
        layer for _ in range(2) for layer in (nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.5))
    )
    return nn.Sequential(*hidden, nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 40))


def gcn(**options: bool) -> nn.Module:
    return GCN(128, 128, 3, 40, norm="batch_norm", dropout=0.5, **options)


# With the number of their arguments: features, edges, weights of edges.
MODELS = {
    "MLP, 4 layers of 128": (mlp, 1),
    "GraphSAGE, 3 layers of 128": (lambda: GraphSAGE(128, 128, 3, 40, norm="batch_norm", dropout=0.5), 2),
    "GCN, the caller's weights": (lambda: gcn(normalize=False), 3),
    "GCN, 3 layers of 128": (gcn, 2),
    "GAT, 3 layers, 4 heads": (lambda: GAT(128, 128, 3, 40, heads=4), 2),
}


def saved(y: Tensor) -> Iterator[Tensor]:
    """The strided tensors that the graph of y keeps."""
    stack, seen = [y.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
            yield from (x for x in getattr(node, "saved_tensors", ()) if isinstance(x, Tensor))
            values = (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
            yield from (x for x in values if isinstance(x, Tensor))


def kept(model: nn.Module, step: nn.Module, inputs: list[Tensor]) -> int:
    """Bytes that a training pass keeps."""
    for _ in range(2):
        y = step(*inputs)
    others = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers(), *inputs, y)}
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in saved(y)}
    return sum(size for key, size in storages.items() if key not in others)


def tracked(model: nn.Module, step: nn.Module, inputs: list[Tensor]) -> int:
    """The same of an uncompiled compressed pass, by the ledger: autograd's graph holds its indices packed."""
    step(*inputs)
    with dibit.track(model) as ledger:
        step(*inputs)
    return ledger.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=5_000)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--models", default="")
    args = parser.parse_args()
    torch.manual_seed(0)
    x, edge_index = torch.randn(args.nodes, 128), torch.randint(args.nodes, (2, 14 * args.nodes))
    weights = torch.rand(14 * args.nodes)
    print(f"{'bytes a node':30}{'plain':>8}{'compiled':>10}{'Dibit':>8}{'Dibit compiled':>16}   graphs")
    for name, (build, count) in MODELS.items():
        if args.models not in name:
            continue
        inputs = [x, edge_index, weights][:count]
        sizes = []
        for compressed in (False, True):
            model = build().train()
            if compressed:
                dibit.compress(model)
            sizes.append(tracked(model, model, inputs) if compressed else kept(model, model, inputs))
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            step = torch.compile(model, backend=args.backend)
            sizes.append(kept(model, step, inputs))
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            if compressed and not graphs:  # the uncompiled pass is what ran
                sizes[-1] = tracked(model, step, inputs)
        a, b, c, d = (size / args.nodes for size in sizes)
        print(f"{name:30}{a:8.0f}{b:10.0f}{c:8.0f}{d:16.0f}   {graphs}", flush=True)


if __name__ == "__main__":
    main()
