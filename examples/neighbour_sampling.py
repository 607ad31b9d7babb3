"""Mini-batches by PyTorch Geometric's NeighborLoader: scores of rows go by node.

python examples/neighbour_sampling.py
"""

import torch
import torch.nn.functional as F
import torch_geometric.typing
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn import GraphSAGE

import dibit
from dibit.train import DataSettings
from dibit.train.data import load_graph
from dibit.train.neighbor_sampler import NumbaSampler

torch.manual_seed(0)
graph = load_graph(DataSettings("planted:4000"), seed=0)
split = graph.split(0)
data = Data(x=graph.x, edge_index=graph.edge_index, y=graph.y)

# NeighborLoader samples with pyg-lib or torch-sparse; where neither is installed, Dibit brings a sampler in Numba.
compiled = torch_geometric.typing.WITH_PYG_LIB or torch_geometric.typing.WITH_TORCH_SPARSE
neighbours = [10, 10, 5]
loader = NeighborLoader(
    data,
    neighbours,
    input_nodes=split.train,
    batch_size=256,
    shuffle=True,
    neighbor_sampler=None if compiled else NumbaSampler(data, neighbours),
)

model = GraphSAGE(graph.x.shape[1], 64, num_layers=3, out_channels=graph.num_classes, norm="batch_norm", dropout=0.5)
model = dibit.compress(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

for _epoch in range(1, 9):
    model.train()
    for batch in loader:
        optimizer.zero_grad()
        # Which rows count most is known by node, from the batches before: `node_ids` says which nodes these rows are.
        with dibit.batch(model, node_ids=batch.n_id), dibit.track(model) as saved:
            logits = model(batch.x, batch.edge_index)
        own = batch.batch_size  # the loss is made of the nodes that were asked for, which come first
        F.cross_entropy(logits[:own], batch.y[:own]).backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    predicted = model(graph.x, graph.edge_index).argmax(dim=1)
accuracy = (predicted == graph.y)[split.test].float().mean()
print(
    f"saved MB: plain {saved.plain / 2**20:.2f}, kept {saved.total / 2**20:.2f}; test accuracy {100 * accuracy:.1f} %"
)
