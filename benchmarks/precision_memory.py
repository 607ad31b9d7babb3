"""Saved MB in each precision, plain and with the default recipe, by the ledger. The table of docs/precision.md.

    python benchmarks/precision_memory.py [--nodes 20000]

Random graph of 14 edges a node, 128 features, 3 layers of 128; the second pass (scores are there).
"""

import argparse
import warnings

import torch
from torch_geometric.nn import GAT, GraphSAGE

import dibit

warnings.filterwarnings("ignore")
MODELS = {
    "GraphSAGE": lambda: GraphSAGE(128, 128, 3, 40, norm="batch_norm", dropout=0.5),
    "GAT": lambda: GAT(128, 128, 3, 40, heads=4, dropout=0.5),
}
WAYS = ("FP32", "autocast bf16", "autocast fp16", "bf16 model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=20_000)
    n = parser.parse_args().nodes
    torch.manual_seed(0)
    x, edge_index = torch.randn(n, 128), torch.randint(n, (2, 14 * n))
    for name, build in MODELS.items():
        for way in WAYS:
            model, own = build().train(), x
            if way == "bf16 model":
                model, own = model.bfloat16(), x.bfloat16()
            dibit.compress(model)
            dtype = torch.float16 if "fp16" in way else torch.bfloat16
            for _ in range(2):
                with dibit.track(model) as saved, torch.autocast("cpu", dtype, enabled="autocast" in way):
                    y = model(own, edge_index)
                y.float().square().mean().backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(0)  # a step of an optimiser: scores count from now on
            print(
                f"{name:10} {way:14} plain {saved.plain / 2**20:6.1f} MB, kept {saved.total / 2**20:5.2f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
