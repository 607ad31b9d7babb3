"""Full-batch training of an unmodified PyTorch Geometric model: the one line, and what it saves.

python examples/full_batch.py
"""

import torch
import torch.nn.functional as F
from torch_geometric.nn import GraphSAGE

import dibit
from dibit.train import DataSettings
from dibit.train.data import load_graph

torch.manual_seed(0)
graph = load_graph(DataSettings("planted:4000"), seed=0)  # any x, edge_index, y will do
split = graph.split(0)

model = GraphSAGE(graph.x.shape[1], 64, num_layers=3, out_channels=graph.num_classes, norm="batch_norm", dropout=0.5)
model = dibit.compress(model)  # the one line: the same object, the same weights
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

for _epoch in range(1, 31):
    model.train()
    optimizer.zero_grad()
    with dibit.track(model) as saved:  # what is kept for the backward pass; leave it out if you do not want to know
        logits = model(graph.x, graph.edge_index)
    F.cross_entropy(logits[split.train], graph.y[split.train]).backward()
    optimizer.step()

model.eval()  # in eval mode nothing is compressed and nothing is spent
with torch.no_grad():
    predicted = model(graph.x, graph.edge_index).argmax(dim=1)
accuracy = (predicted == graph.y)[split.test].float().mean()
print(
    f"saved MB: plain {saved.plain / 2**20:.2f}, kept {saved.total / 2**20:.2f}; test accuracy {100 * accuracy:.1f} %"
)
