"""Training with Lightning: one callback.

python examples/with_lightning.py
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch_geometric.nn import GraphSAGE

from dibit.lightning import DibitCallback
from dibit.train import DataSettings
from dibit.train.data import load_graph

pl.seed_everything(0, verbose=False)
graph = load_graph(DataSettings("planted:4000"), seed=0)
split = graph.split(0)


class Classifier(pl.LightningModule):
    """Full batch: each batch of the loader is one pass over the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GraphSAGE(
            graph.x.shape[1], 64, num_layers=3, out_channels=graph.num_classes, norm="batch_norm", dropout=0.5
        )

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        logits = self.model(graph.x, graph.edge_index)
        return F.cross_entropy(logits[split.train], graph.y[split.train])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


compression = DibitCallback("default", module="model")  # without `module` all of the LightningModule
trainer = pl.Trainer(
    max_epochs=30,
    accelerator="cpu",
    callbacks=[compression],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
classifier = Classifier()
trainer.fit(classifier, DataLoader([0]))

with torch.no_grad():
    predicted = classifier.model.eval()(graph.x, graph.edge_index).argmax(dim=1)
accuracy = (predicted == graph.y)[split.test].float().mean()
saved = compression.saved
assert saved is not None
print(
    f"saved MB: plain {saved.plain / 2**20:.2f}, kept {saved.total / 2**20:.2f}; test accuracy {100 * accuracy:.1f} %"
)
