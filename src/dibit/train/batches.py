"""What an epoch is made of: the whole graph, or mini-batches by PyTorch Geometric's loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from dibit.tools.errors import UserError, require
from dibit.train.data import NodeDataset, Split
from dibit.train.distributed import World
from dibit.train.models import adjacency_arguments
from dibit.train.settings import Settings

INSTALL = "pip install --no-build-isolation torch-scatter torch-sparse (compiles for some minutes)"


@dataclass(frozen=True)
class MiniBatch:
    """One step's worth of the graph, on the device.

    Attributes:
        x: float32 (n, F).
        adjacency: What the model takes after x.
        rows: int64 (m,), the rows of the output that enter the loss.
        y: Their targets, (m,) or (m, C).
        nodes: int64 (n,), numbers of the rows' nodes in the whole graph; None where they are all of them in order.
    """

    x: Tensor
    adjacency: tuple[Tensor, ...]
    rows: Tensor
    y: Tensor
    nodes: Tensor | None = None


class Batches(Protocol):
    """The batches of an epoch, in an order that torch's default generator decides."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[MiniBatch]: ...

    def begin(self, epoch: int) -> None:
        """An epoch begins, from 0."""


class FullBatch:
    """The full graph in one step."""

    def __init__(self, batch: MiniBatch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[MiniBatch]:
        yield self.batch

    def begin(self, epoch: int) -> None:
        """Nothing changes."""


class LoaderBatches:
    """Batches of a loader.

    Args:
        loader: Of PyTorch Geometric.
        rows: The rows of a batch that enter the loss, and their targets.
        settings: Model and precision say in which form a batch's edges go to the model.
        device: Where batches go.
        sampler: Shares the loader's work among processes.
    """

    def __init__(
        self,
        loader: Any,
        rows: Callable[[Any], tuple[Tensor, Tensor]],
        settings: Settings,
        device: torch.device,
        sampler: DistributedSampler[Any] | None,
    ) -> None:
        self.loader, self.rows, self.settings, self.device, self.sampler = loader, rows, settings, device, sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[MiniBatch]:
        for data in self.loader:
            rows, y = self.rows(data)
            edges = adjacency_arguments(self.settings, data.edge_index, data.num_nodes, self.device)
            x, rows, y, nodes = (part.to(self.device) for part in (data.x, rows, y, data.node))
            yield MiniBatch(x, edges, rows, y, nodes)

    def begin(self, epoch: int) -> None:
        """Shuffle anew what the processes share."""
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)


def check_installed(settings: Settings) -> None:
    """Say what is missing for a loader, before anything is loaded.

    Raises:
        UserError: With the line that installs it.
    """
    loader = settings.loader.loader
    if loader == "cluster":
        require("pymetis", "cluster")
    if loader in ("saint-rw", "saint-node", "shadow"):
        import torch_geometric.typing

        if not torch_geometric.typing.WITH_TORCH_SPARSE:
            raise UserError(
                f"--loader {loader} needs torch-sparse, which is not installed: {INSTALL}; --loader neighbor and "
                "cluster work without it."
            )


def sampled(
    settings: Settings, graph: NodeDataset, split: Split, seed: int, device: torch.device, world: World
) -> LoaderBatches:
    """The batches of a loader other than "full".

    Args:
        settings: Which loader, and how large its batches are.
        graph: On the CPU.
        split: Its training nodes enter the loss.
        seed: Shuffles what several processes share.
        device: Where batches go.
        world: The processes.
    """
    from torch_geometric import loader as loaders
    from torch_geometric.data import Data

    own = settings.loader
    train = split.train.cpu()
    mask = torch.zeros(graph.num_nodes, dtype=torch.bool)
    mask[train] = True
    data = Data(x=graph.x, edge_index=graph.edge_index, y=graph.y, node=torch.arange(graph.num_nodes), train=mask)
    # Workers begin anew with each epoch, on seeds drawn here: what they draw is in no checkpoint.
    common: dict[str, Any] = {"num_workers": own.workers}

    def shared(count: int) -> dict[str, Any]:
        """Shuffling, over all processes."""
        if world.size == 1:
            return {**common, "shuffle": True}
        numbers: Any = range(count)
        own_part: DistributedSampler[Any] = DistributedSampler(numbers, world.size, world.rank, seed=seed % 2**31)
        return {**common, "sampler": own_part}

    def in_training(batch: Any) -> tuple[Tensor, Tensor]:
        rows = batch.train.nonzero().squeeze(1)
        return rows, batch.y[rows]

    rows = in_training
    match own.loader:
        case "neighbor":
            options = shared(train.numel())
            hops = own.hops(settings.model.layers)
            options |= {"batch_size": own.batch_size, "neighbor_sampler": _sampler(data, hops)}
            loader: Any = loaders.NeighborLoader(data, hops, input_nodes=train, **options)

            def rows(batch: Any) -> tuple[Tensor, Tensor]:
                return torch.arange(batch.batch_size), batch.y[: batch.batch_size]

        case "cluster":
            from dibit.train.clusters import ClusterBatches, Clusters

            if own.parts > graph.num_nodes:
                raise UserError(f"--parts is {own.parts}, expected at most the {graph.num_nodes:,} nodes of the graph.")
            clusters = Clusters(data, own.parts, log=False)
            options = shared(own.parts)
            loader = ClusterBatches(clusters, batch_size=own.clusters, **options)
        case "saint-rw" | "saint-node":
            steps = -(-own.steps // world.size)
            kind = loaders.GraphSAINTRandomWalkSampler if own.loader == "saint-rw" else loaders.GraphSAINTNodeSampler
            walk = (own.walk_length,) if own.loader == "saint-rw" else ()
            options = common
            loader = kind(data, own.batch_size, *walk, num_steps=steps, sample_coverage=0, log=False, **common)
        case _:
            options = shared(train.numel())
            options |= {"batch_size": own.batch_size}
            loader = loaders.ShaDowKHopSampler(data, own.depth, own.hops(1)[0], node_idx=train, **options)

            def rows(batch: Any) -> tuple[Tensor, Tensor]:
                return batch.root_n_id, batch.y  # y is of the roots alone already

    return LoaderBatches(loader, rows, settings, device, options.get("sampler"))


def _sampler(data: Any, hops: list[int]) -> Any:
    """None where PyTorch Geometric has a sampler of its own."""
    import torch_geometric.typing as have

    if have.WITH_PYG_LIB or have.WITH_TORCH_SPARSE:
        return None
    from dibit.train.neighbor_sampler import NumbaSampler

    return NumbaSampler(data, hops)
