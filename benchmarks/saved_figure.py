"""README's figure: where the saved MB lie on the arxiv shape, plain and compressed.

python benchmarks/saved_figure.py [--out docs/figures/saved.svg]
"""

import argparse
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", ".*[Ss]parse.*")
COLORS = ("#3b6ea5", "#e0a030", "#5b9e5b", "#b0546a", "#999999")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/saved.svg"))
    args = parser.parse_args()
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "dibit"
    import matplotlib.pyplot as plt

    import dibit
    from dibit.experiments.shapes import ARXIV
    from dibit.reproduce.memory import KINDS, measure

    recipes = {"none": None, **{name: dibit.recipe(name) for name in ("exact", "iexact", "default")}}
    kept = {name: measure(ARXIV, config)["by_kind"] for name, config in recipes.items()}
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), width_ratios=(1, 1.25), layout="constrained")
    for axis, shown in zip(axes, (list(recipes), list(recipes)[1:]), strict=True):
        left = [0.0] * len(shown)
        for kind, color in zip([*KINDS.values(), "targets"], COLORS, strict=True):
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
    print(f"{args.out}: " + ", ".join(f"{name} {sum(kept[name].values()):.1f} MB" for name in recipes))


if __name__ == "__main__":
    main()
