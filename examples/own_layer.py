"""A layer of your own, with an operation that Dibit does not know: what happens to it, and how to teach it.

python examples/own_layer.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

import dibit
from dibit.rules.activation import smooth
from dibit.train import DataSettings
from dibit.train.data import load_graph


class Gated(MessagePassing):
    """A mean over the neighbours, through arsinh, times a gate."""

    def __init__(self, channels: int) -> None:
        super().__init__(aggr="mean")
        self.lin, self.gate = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = torch.asinh(self.lin(self.propagate(edge_index, x=x)))
        return x + h * torch.sigmoid(self.gate(x))


class Net(nn.Module):
    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(features, 64), nn.ModuleList(Gated(64) for _ in range(2))
        self.last = nn.Linear(64, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = layer(h, edge_index)
        return self.last(h)


def asinh_slope(x: Tensor) -> Tensor:
    """The derivative of arsinh. It is encoded instead of x: computed from a code of x, it would have a bias."""
    return torch.rsqrt(1 + x * x)


# A rule for torch.asinh: compute it as torch does, and keep its derivative at the recipe's bits.
asinh = smooth(lambda x, inplace: torch.asinh(x), asinh_slope)

torch.manual_seed(0)
graph = load_graph(DataSettings("planted:4000"), seed=0)
split = graph.split(0)
model = Net(graph.x.shape[1], graph.num_classes)
for rules in ({}, {torch.asinh: asinh}):  # without a rule arsinh stays exact, and `track` says so
    dibit.compress(model, rules=rules)
    with dibit.track(model) as saved:
        model(graph.x, graph.edge_index)
    print(
        f"{'with' if rules else 'without'} a rule: plain {saved.plain / 2**20:.2f}, kept {saved.total / 2**20:.2f} MB"
    )
print(saved)

optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _epoch in range(1, 31):
    optimizer.zero_grad()
    logits = model(graph.x, graph.edge_index)
    F.cross_entropy(logits[split.train], graph.y[split.train]).backward()
    optimizer.step()
with torch.no_grad():
    predicted = model.eval()(graph.x, graph.edge_index).argmax(dim=1)
print(f"test accuracy {100 * (predicted == graph.y)[split.test].float().mean():.1f} %")
