"""README's figure: where the saved MB lie on the arxiv shape, plain and compressed.

python benchmarks/saved_figure.py [--out docs/figures/saved.svg]
"""

import argparse
import warnings
from collections import defaultdict
from pathlib import Path

warnings.filterwarnings("ignore", ".*[Ss]parse.*")
N, E, MB = 169_343, 2_315_598, 2**20
KINDS = {"linear": "linear inputs", "batch_norm": "BatchNorm input", "relu": "ReLU", "dropout": "dropout mask"}
COLORS = ("#3b6ea5", "#e0a030", "#5b9e5b", "#b0546a", "#999999")


def measure(recipe: str) -> dict[str, float]:
    """Kept MB by kind of operation, from the ledger."""
    import torch
    from torch_geometric.nn import GraphSAGE
    from torch_geometric.utils import to_torch_csr_tensor

    import dibit

    torch.manual_seed(0)
    adj = to_torch_csr_tensor(torch.randint(N, (2, E)), size=(N, N))
    model = GraphSAGE(128, 128, 3, 40, dropout=0.5, norm="batch_norm").train()
    dibit.compress(model, recipe)
    with dibit.track(model) as saved:
        model(torch.randn(N, 128), adj)
    kept: dict[str, float] = defaultdict(float)
    for row in saved.rows:
        # the plain mean keeps the layer's input, which is the linear layer's input too
        kept[KINDS.get(row.operation, KINDS["linear"])] += row.kept / MB
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/saved.svg"))
    args = parser.parse_args()
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "dibit"
    import matplotlib.pyplot as plt

    recipes = ["none", "exact", "iexact", "default"]
    kept = {recipe: measure(recipe) for recipe in recipes}
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), width_ratios=(1, 1.25), layout="constrained")
    for axis, shown in zip(axes, (recipes, recipes[1:]), strict=True):
        left = [0.0] * len(shown)
        for kind, color in zip(KINDS.values(), COLORS, strict=False):
            sizes = [kept[recipe][kind] for recipe in shown]
            axis.barh(shown, sizes, left=left, color=color, label=kind)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for i, total in enumerate(left):
            axis.text(total, i, f" {total:.1f}", va="center")
        axis.set_xlim(0, max(left) * 1.14)
        axis.invert_yaxis()
        axis.set_xlabel("saved MB")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("all", loc="left")
    axes[1].set_title("compressed alone", loc="left")
    axes[0].legend(frameon=False, loc="lower right", fontsize="small")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None})
    print(f"{args.out}: " + ", ".join(f"{recipe} {sum(kept[recipe].values()):.1f} MB" for recipe in recipes))


if __name__ == "__main__":
    main()
