"""Squared error of the gradient against bytes kept, at several stages of a real training.

    python benchmarks/gradient_error.py GRAPH.npz [--epochs 0 10 60] [--draws 8]

Trains PyG's GraphSAGE (3 x 128, BatchNorm, dropout .5; 100 SVD features) plainly; at each stage the same step is
repeated with every setting: same weights, same dropout masks, other draws of the codec. The figures are the mean of
|g - g_plain|^2 over |g_plain|^2 for all parameters together. Bytes are those of `dibit.track`, a node, dropout masks
not counted.
"""

import argparse
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GraphSAGE
from torch_geometric.utils import to_torch_csr_tensor

import dibit
from dibit import Config, Project, Sample
from dibit.study import gradient_error
from dibit.train.data.load import load_graph
from dibit.train.settings import DataSettings

warnings.filterwarnings("ignore", ".*[Ss]parse.*")

DITHER = Config(block=1024, reduce=Sample(10), rounding="dither")


def setting(linear: Project | Sample | None, norm: Config, bits: int = 2, block: int = 1024) -> Config:
    return Config(bits=bits, block=block, reduce=linear, norm=norm, dropout="mask")


SETTINGS = {
    "iexact": dibit.recipe("iexact"),
    "exact": dibit.recipe("exact"),
    "rows/8, norm rows/8": setting(Sample(8), Config(reduce=Sample(8))),
    "rows/8 4 bit, norm rows/8": setting(Sample(8), Config(reduce=Sample(8)), bits=4),
    "rows/4, norm rows/8": setting(Sample(4), Config(reduce=Sample(8))),
    "rows/4, norm rows/8 dither": setting(Sample(4), Config(reduce=Sample(8), rounding="dither")),
    "rows/3, norm rows/10 dither": setting(Sample(3), DITHER),
    "rows/3 block 256, norm rows/10 dither": setting(Sample(3), DITHER, block=256),
    "linear 8 bit, norm rows/10 dither": setting(None, DITHER, bits=8),
    "linear 8 bit, norm projected/8": setting(None, Config(reduce=Project(8)), bits=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph")
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 10, 60])
    parser.add_argument("--draws", type=int, default=8)
    args = parser.parse_args()

    graph = load_graph(DataSettings(dataset=args.graph, svd=100, standardize=True), 0)
    n, x, y, train = graph.num_nodes, graph.x, graph.y, graph.split(0).train
    adj = to_torch_csr_tensor(graph.edge_index, size=(n, n))
    torch.manual_seed(0)
    model = GraphSAGE(x.shape[1], 128, 3, graph.num_classes, dropout=0.5, norm="batch_norm").train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    table: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for epoch in range(max(args.epochs) + 1):
        if epoch in args.epochs:
            for name, config in SETTINGS.items():
                if not table[name]:
                    dibit.compress(model, config)
                    with dibit.track(model) as saved:
                        step(model, x, adj, train, y)
                    dibit.decompress(model)
                    masks = sum(row.kept for row in saved.rows if row.operation == "dropout")
                    table[name].append((saved.total - masks) / n)
                error = gradient_error(model, lambda: step(model, x, adj, train, y), config, args.draws)
                table[name].append(error.mean)
            print(f"epoch {epoch} measured", flush=True)
        step(model, x, adj, train, y)
        optimizer.step()

    print(f"{'setting':40}{'B / node':>9}" + "".join(f"{f'epoch {e}':>10}" for e in args.epochs))
    for name, (size, *errors) in table.items():
        print(f"{name:40}{size:9.1f}" + "".join(f"{error:10.3f}" for error in errors))


def step(model: nn.Module, x: Tensor, adj: Tensor, train: Tensor, y: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x, adj)[train], y[train]).backward()


if __name__ == "__main__":
    main()
