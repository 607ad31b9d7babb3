"""Several processes with torch's DistributedDataParallel.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn import GraphSAGE

import dibit
from dibit.train import DataSettings
from dibit.train.data import load_graph
from dibit.train.neighbor_sampler import NumbaSampler

if "RANK" not in os.environ:
    sys.exit("Start this under torchrun: torchrun --nproc-per-node 2 examples/ddp.py")
cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

graph = load_graph(DataSettings("planted:4000"), seed=0)
split = graph.split(0)
data = Data(x=graph.x, edge_index=graph.edge_index, y=graph.y)
own = split.train[rank::size][: len(split.train) // size]  # as many steps in each process
loader = NeighborLoader(
    data, [10, 10], input_nodes=own, batch_size=128, shuffle=True, neighbor_sampler=NumbaSampler(data, [10, 10])
)

torch.manual_seed(0)  # the same weights everywhere
model = GraphSAGE(graph.x.shape[1], 64, num_layers=2, out_channels=graph.num_classes, norm="batch_norm", dropout=0.5)
model = dibit.compress(model.to(device))
trained = DistributedDataParallel(model)  # around it, as around any model
torch.manual_seed(1 + rank)  # dropout, samples and codes are each process's own
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

for _epoch in range(8):
    trained.train()
    for batch in loader:
        batch = batch.to(device)
        optimizer.zero_grad()
        with dibit.batch(model, node_ids=batch.n_id), dibit.track(model) as saved:  # the model that `compress` got
            logits = trained(batch.x, batch.edge_index)
        F.cross_entropy(logits[: batch.batch_size], batch.y[: batch.batch_size]).backward()
        optimizer.step()

if rank == 0:
    model.eval()
    with torch.no_grad():
        predicted = model(graph.x.to(device), graph.edge_index.to(device)).argmax(dim=1).cpu()
    accuracy = (predicted == graph.y)[split.test].float().mean()
    mb = f"plain {saved.plain / 2**20:.2f}, kept {saved.total / 2**20:.2f}"
    print(f"{size} processes; saved MB: {mb}; test accuracy {100 * accuracy:.1f} %")
del trained  # the group's threads end with the last who holds it, not while Python shuts down
dist.destroy_process_group()
