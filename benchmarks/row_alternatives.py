"""The weight gradient of linear layers by other reductions than sampled rows, at the same bytes.

    python benchmarks/row_alternatives.py [--root ../shared/data] [--graph amazon_computers]

A GraphSAGE (3 x 128) is trained plainly on a real graph. At each epoch the inputs x and the gradients dY of its linear
layers are taken from one step, the squared row norms of dY from the step before, and dW = dY^T x is estimated by:

rows             the default's: rows by their last gradients, 1 in 6, 2 bits, a range a row
exact rows       a fifth of the bytes on the largest |x| |dY| as they are, rows for the rest
control variate  half of the bytes on x V (V: the leading directions of x, all rows, 2 bits), the rest of the bytes
                 on rows of what is left, x - x V V^T
centred          rows of x less its mean row, which is kept in float32
EDEN             rows, rotated at random, rounded to the nearest of 4 levels, scaled so that the estimate is unbiased
nothing rounded  the same rows as they are: what any rounding could gain

The table of docs/gradient-error.md: squared error over squared norm of all dW, mean over draws.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_geometric.nn import GraphSAGE
from torch_geometric.utils import to_torch_csr_tensor

from dibit import Config, encode
from dibit.codec import mix, ops, seed_tensor
from dibit.codec.row_sampling import row_scores

warnings.filterwarnings("ignore")
Estimate = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # x (N, D), dY (N, O), scores, draw -> dW (O, D)
RATIO, BLOCK = 6, 128
BITS_PER_ELEMENT = 2 + 32 / BLOCK  # of a kept element: code and its share of a range


def sampled(scores: Tensor, count: int, draw: int) -> tuple[Tensor, Tensor]:
    return ops.pick_rows(scores, seed_tensor(mix(draw, "rows")), max(1, count))


def coded(x: Tensor, draw: int) -> Tensor:
    """x as it comes back from 2 bits and a range in every 128 elements."""
    return encode(x, Config(bits=2, block=BLOCK), mix(draw, "codes")).reduced()


def by_rows(x: Tensor, dy: Tensor, scores: Tensor, draw: int, count: int | None = None) -> Tensor:
    index, weight = sampled(scores, len(x) // RATIO if count is None else count, draw)
    return (dy[index] * weight[:, None]).T @ coded(x[index], draw)


def unrounded(x: Tensor, dy: Tensor, scores: Tensor, draw: int) -> Tensor:
    index, weight = sampled(scores, len(x) // RATIO, draw)
    return (dy[index] * weight[:, None]).T @ x[index]


def exact_rows(x: Tensor, dy: Tensor, scores: Tensor, draw: int) -> Tensor:
    count = len(x) // RATIO
    exact = max(1, round(0.2 * count * BITS_PER_ELEMENT / 32))
    top = (x.norm(dim=1) * torch.exp2(scores.float() / 2)).topk(exact).indices
    others = torch.ones(len(x), dtype=torch.bool)
    others[top] = False
    rest = by_rows(x[others], dy[others], scores[others], draw, count - round(0.2 * count))
    return dy[top].T @ x[top] + rest


def control_variate(x: Tensor, dy: Tensor, scores: Tensor, draw: int) -> Tensor:
    width = max(1, x.shape[1] // (2 * RATIO))
    v = torch.linalg.svd(x.T @ x)[0][:, :width]
    rest = x - x @ v @ v.T
    return dy.T @ coded(x @ v, draw) @ v.T + by_rows(rest, dy, scores, draw + 1, len(x) // (2 * RATIO))


def centred(x: Tensor, dy: Tensor, scores: Tensor, draw: int) -> Tensor:
    mean = x.mean(0)
    return by_rows(x - mean, dy, scores, draw) + dy.sum(0)[:, None] * mean


def eden(x: Tensor, dy: Tensor, scores: Tensor, draw: int) -> Tensor:
    index, weight = sampled(scores, len(x) // RATIO, draw)
    own = x[index]
    generator = torch.Generator().manual_seed(mix(draw, "rotation") % 2**63)
    q = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator))[0]
    turned = own @ q
    size = turned.norm(dim=1, keepdim=True).clamp(min=1e-30)
    levels = torch.tensor([-1.51, -0.4528, 0.4528, 1.51])  # Lloyd and Max for a normal
    h = turned / size * x.shape[1] ** 0.5
    near = levels[torch.bucketize(h, (levels[1:] + levels[:-1]) / 2)]
    scale = size.square() / (turned * near).sum(1, keepdim=True).clamp(min=1e-30)  # rows of zeros stay zeros
    return (dy[index] * weight[:, None]).T @ ((near * scale) @ q.T)


WAYS: dict[str, Estimate] = {
    "rows": by_rows,
    "exact rows": exact_rows,
    "control variate": control_variate,
    "centred": centred,
    "EDEN": eden,
    "nothing rounded": unrounded,
}


class Taken:
    """Inputs and gradients of every linear layer whose input is an activation, of the last step."""

    def __init__(self, model: nn.Module) -> None:
        self.x: dict[str, Tensor] = {}
        self.dy: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name.split(".")[-1] in ("lin_l", "lin_r") and not name.startswith("convs.0"):
                module.register_forward_hook(lambda m, args, y, name=name: self._forward(name, args[0], y))

    def _forward(self, name: str, x: Tensor, y: Tensor) -> None:
        self.x[name] = x.detach()
        if y.requires_grad:
            y.register_hook(lambda dy: self.dy.__setitem__(name, dy.detach()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="../shared/data")
    parser.add_argument("--graph", default="amazon_computers")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 10, 60])
    parser.add_argument("--draws", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    x, graph, y, train = load(Path(args.root) / f"{args.graph}.npz")
    model = GraphSAGE(x.shape[1], 128, 3, int(y.max()) + 1, dropout=0.5, norm="batch_norm")
    taken, optimizer = Taken(model), torch.optim.Adam(model.parameters(), 0.01)
    errors: dict[str, list[float]] = {name: [] for name in WAYS}
    for epoch in range(max(args.epochs) + 1):
        before = {name: dy.clone() for name, dy in taken.dy.items()}
        optimizer.zero_grad()
        cross_entropy(model(x, graph)[train], y[train]).backward()
        if epoch in args.epochs:
            truth = {name: taken.dy[name].T @ own for name, own in taken.x.items()}
            whole = sum(float(w.square().sum()) for w in truth.values())
            for way, estimate in WAYS.items():
                print(f"{args.graph}, epoch {epoch}, {way}", flush=True)
                miss = 0.0
                for name, own in taken.x.items():
                    scores = row_scores(before[name])
                    for draw in range(args.draws):
                        found = estimate(own, taken.dy[name], scores, 7 * draw)
                        miss += float((found - truth[name]).square().sum()) / args.draws
                errors[way].append(miss / whole)
        optimizer.step()
    print(f"\n{'':18}" + "".join(f"{'epoch ' + str(epoch):>12}" for epoch in args.epochs))
    for way, found in errors.items():
        print(f"{way:18}" + "".join(f"{error:12.4f}" for error in found))


def load(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised features, adjacency, classes, training rows of a graph in Dibit's format."""
    from dibit.experiments.data import load_prepared

    graph = load_prepared(path.stem, str(path.parent))
    n = graph.num_nodes
    adjacency = to_torch_csr_tensor(graph.edge_index.flip(0), size=(n, n))
    train = torch.from_numpy(np.random.default_rng(0).permutation(n)[: int(0.6 * n)])
    return graph.x, adjacency, graph.y, train


if __name__ == "__main__":
    main()
