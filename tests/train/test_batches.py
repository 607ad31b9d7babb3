"""Mini-batches: what a sampler may give, what a loader's batches hold, and that training on them works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.typing
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.sampler import NodeSamplerInput
from torch_geometric.utils import k_hop_subgraph

import dibit
from dibit.train import Settings, UserError
from dibit.train.batches import check_installed, sampled
from dibit.train.distributed import World
from dibit.train.layerwise import layerwise
from dibit.train.loop import train_one
from dibit.train.neighbor_sampler import NumbaSampler
from dibit.train.task import Task
from tests.train.test_loop import _same, _task, _weights

pytest.importorskip("pymetis")
HAVE_SPARSE = torch_geometric.typing.WITH_TORCH_SPARSE
NEEDS_SPARSE = ("saint-rw", "saint-node", "shadow")
LOADERS = (
    "neighbor",
    "cluster",
    *(pytest.param(name, marks=pytest.mark.skipif(not HAVE_SPARSE, reason="torch-sparse")) for name in NEEDS_SPARSE),
)
SIZES = {"batch_size": 10, "neighbors": "3", "parts": 6, "clusters": 2, "walk_length": 2, "steps": 4}


def graph(nodes: int = 300, degree: int = 8) -> Data:
    torch.manual_seed(0)
    edges = torch.randint(nodes, (2, nodes * degree)).unique(dim=1)
    edges = edges[:, edges[0] != edges[1]]
    return Data(x=torch.arange(nodes).float().unsqueeze(1), edge_index=edges[:, torch.randperm(edges.shape[1])])


def sample(sampler: NumbaSampler, nodes: Tensor) -> Any:
    return sampler.sample_from_nodes(NodeSamplerInput(input_id=None, node=nodes))


class TestNumbaSampler:
    def test_edges_exist_and_are_as_many_as_asked_for(self) -> None:
        data = graph()
        known = {tuple(edge) for edge in data.edge_index.T.tolist()}
        in_degree = torch.bincount(data.edge_index[1], minlength=300)
        seeds = torch.randperm(300)[:20]
        out = sample(NumbaSampler(data, [4, 3]), seeds)
        assert torch.equal(out.node[:20], seeds)
        assert out.node.unique().numel() == out.node.numel()
        edges = list(zip(out.node[out.row].tolist(), out.node[out.col].tolist(), strict=True))
        assert len(set(edges)) == len(edges), "without replacement"
        assert set(edges) <= known
        # each node of the first two rings was expanded once, the last ring not at all
        expanded = sum(out.num_sampled_nodes[:2])
        got = torch.bincount(out.col, minlength=out.node.numel())
        most = torch.tensor([4] * out.num_sampled_nodes[0] + [3] * out.num_sampled_nodes[1])
        assert torch.equal(got[:expanded], torch.minimum(most, in_degree[out.node[:expanded]]))
        assert not got[expanded:].any()
        assert sum(out.num_sampled_nodes) == out.node.numel()
        assert sum(out.num_sampled_edges) == out.row.numel()

    def test_all_neighbours_are_the_whole_subgraph(self) -> None:
        data, seeds = graph(), torch.tensor([5, 17])
        out = sample(NumbaSampler(data, [-1, -1]), seeds)
        nodes, *_ = k_hop_subgraph(seeds, 2, data.edge_index, num_nodes=300)
        assert torch.equal(out.node.sort().values, nodes)

    @pytest.mark.slow
    def test_each_neighbour_is_as_likely_as_another(self) -> None:
        """A star of 7 rays, 3 taken: each pair of rays together with probability 1/7, within standard errors."""
        data = Data(edge_index=torch.stack((torch.arange(1, 8), torch.zeros(7, dtype=torch.int64))), num_nodes=8)
        sampler, draws = NumbaSampler(data, [3]), 4000
        together = torch.zeros(8, 8)
        for i in range(draws):
            torch.manual_seed(i)
            rays = sample(sampler, torch.tensor([0])).node[1:]
            together[rays[:, None], rays] += 1
        pairs = together[1:, 1:][~torch.eye(7, dtype=torch.bool)] / draws
        singles = together[1:, 1:].diagonal() / draws
        assert ((pairs - 1 / 7).abs() < 5 * (1 / 7 * 6 / 7 / draws) ** 0.5).all()
        assert ((singles - 3 / 7).abs() < 5 * (3 / 7 * 4 / 7 / draws) ** 0.5).all()

    def test_draws_come_from_torchs_generator(self) -> None:
        sampler, seeds = NumbaSampler(graph(), [3, 3]), torch.arange(10)
        torch.manual_seed(1)
        first = sample(sampler, seeds)
        second = sample(sampler, seeds)
        torch.manual_seed(1)
        again = sample(sampler, seeds)
        assert torch.equal(first.node, again.node)
        assert torch.equal(first.row, again.row)
        assert not torch.equal(first.node, second.node)

    def test_in_neighbor_loader_with_edge_attributes(self) -> None:
        data = graph()
        data.edge_attr = data.edge_index[0] * 1000.0 + data.edge_index[1]
        sampler = NumbaSampler(data, [3, 2])
        for batch in NeighborLoader(data, [3, 2], batch_size=32, neighbor_sampler=sampler, shuffle=True):
            source, target = batch.n_id[batch.edge_index]
            assert torch.equal(batch.edge_attr, source * 1000.0 + target)
            assert torch.equal(batch.x.squeeze(1).long(), batch.n_id)

    def test_in_workers(self) -> None:
        data = graph()
        loader = NeighborLoader(data, [3], batch_size=100, neighbor_sampler=NumbaSampler(data, [3]), num_workers=1)
        assert sum(batch.batch_size for batch in loader) == 300

    def test_bad_numbers(self) -> None:
        with pytest.raises(ValueError, match="-1 \\(all\\)"):
            NumbaSampler(graph(), [3, 0])


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_parts_of_the_graph(small: Path, loader: str) -> None:
    task = _task(small, loader=loader, **SIZES)
    train = set(task.split(0).train.tolist())
    seen: list[int] = []
    for batch in task.batches(0):
        assert batch.nodes is not None
        assert torch.equal(batch.x, task.x[batch.nodes])
        assert torch.equal(batch.y, task.graph.y[batch.nodes[batch.rows]])
        (adjacency,) = batch.adjacency
        assert adjacency.shape == (len(batch.x), len(batch.x))
        target, source = adjacency.to_sparse_coo().indices()
        whole = {tuple(edge) for edge in task.graph.edge_index.T.tolist()}
        edges = zip(batch.nodes[source].tolist(), batch.nodes[target].tolist(), strict=True)
        assert set(edges) <= whole
        seen += batch.nodes[batch.rows].tolist()
    assert set(seen) <= train
    if not loader.startswith("saint"):
        assert sorted(seen) == sorted(train), "each once an epoch"


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("recipe", ["none", "default"])
def test_learns(small: Path, tmp_path: Path, loader: str, recipe: str) -> None:
    task = _task(small, epochs=12, eval_every=3, loader=loader, recipe=recipe, **SIZES)
    config = None if recipe == "none" else dibit.recipe(recipe)
    result = train_one(task, recipe, config, 0, tmp_path / "run")
    assert result.test > 0.5  # three classes
    assert (result.saved_bytes < result.plain_bytes) == (recipe == "default")


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["neighbor", "cluster"])
def test_going_on_gives_the_same_as_never_stopping(small: Path, tmp_path: Path, loader: str) -> None:
    config, settings = dibit.recipe("default"), {"loader": loader, **SIZES}
    whole = train_one(_task(small, epochs=4, **settings), "default", config, 3, tmp_path / "whole")
    train_one(_task(small, epochs=2, **settings), "default", config, 3, tmp_path / "parts", resume=True)
    torch.manual_seed(999)  # what this process drew in between must not matter
    parts = train_one(_task(small, epochs=4, **settings), "default", config, 3, tmp_path / "parts", resume=True)
    assert parts.loss == whole.loss
    assert _same(_weights(tmp_path / "parts"), _weights(tmp_path / "whole"))


def test_scores_belong_to_nodes_of_the_whole_graph(small: Path, tmp_path: Path) -> None:
    task = _task(small, epochs=2, loader="neighbor", **{**SIZES, "layers": 2})
    config = dibit.Config(reduce=dibit.Sample(4, by="gradient"))
    train_one(task, "default", config, 0, tmp_path / "run")
    (own,) = dibit.train.checkpoint.load(tmp_path / "run" / "checkpoint.pt")["processes"]
    assert own["scores"]
    nodes = max(len(table) for table in own["scores"].values() if table.dim())
    assert 50 < nodes <= task.graph.num_nodes


@pytest.mark.parametrize("model", ["sage", "gcn", "gin", "gat", "gcn2"])
@pytest.mark.parametrize("part", [7, 1000])
def test_layerwise_inference_is_inference(small: Path, model: str, part: int) -> None:
    task = _task(small, model=model, layers=3, loader="cluster", **SIZES)
    net = task.model(0).eval()
    with torch.no_grad():
        whole = net(task.x, task.adjacency)
    parts: list[tuple[int, int]] = []
    found = layerwise(net, task.x, task.adjacency, task.device, lambda done, of: parts.append((done, of)), part=part)
    torch.testing.assert_close(found, whole)
    assert parts[-1][0] == parts[-1][1] == net.num_layers * -(-task.graph.num_nodes // part)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("loader", "model"), [("full", "sage"), ("full", "gat"), ("full", "gcn2"), ("neighbor", "gcn")]
)
@pytest.mark.slow
def test_precision(small: Path, tmp_path: Path, precision: str, model: str, loader: str) -> None:
    sizes = {**SIZES, "neighbors": "5", "batch_size": 36}
    settings = {"precision": precision, "model": model, "loader": loader, "epochs": 8, "eval_every": 8, **sizes}
    result = train_one(_task(small, **settings), "default", dibit.recipe("default"), 0, tmp_path / "run")
    assert result.loss[-1] < 0.95 * result.loss[0]
    plain = train_one(_task(small, recipe="none", **{**settings, "epochs": 1}), "none", None, 0, tmp_path / "plain")
    fp32 = _task(small, recipe="none", **{**settings, "epochs": 1, "precision": "fp32"})
    assert plain.saved_bytes != train_one(fp32, "none", None, 0, tmp_path / "fp32").saved_bytes


def test_the_processes_share_the_nodes(small: Path) -> None:
    """As torch's `DistributedSampler` does: shares of one size, which together are all training nodes."""
    task = _task(small, loader="neighbor", **{**SIZES, "batch_size": 5})
    split, seen = task.split(0), []
    for rank in range(2):
        batches = sampled(task.settings, task.graph, split, 0, task.device, World(rank, 2, rank))
        batches.begin(0)
        seen.append([n for batch in batches for n in batch.nodes[batch.rows].tolist()])  # type: ignore[index]
    assert len(seen[0]) == len(seen[1]) == len(split.train) / 2
    assert sorted(seen[0] + seen[1]) == split.train.tolist()


@pytest.mark.skipif(HAVE_SPARSE, reason="it is installed")
@pytest.mark.parametrize("loader", NEEDS_SPARSE)
def test_what_is_missing_and_how_to_get_it(loader: str) -> None:
    with pytest.raises(UserError, match=r"needs torch-sparse.*pip install.*--no-build-isolation"):
        check_installed(Settings.from_flat({"loader": loader}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loader": "neighbour"}, "--loader is 'neighbour', expected one of"),
        ({"loader": "neighbor", "neighbors": "5,5"}, "names 2 hops, but the model has 3 layers"),
        ({"neighbors": "0"}, "-1 for all"),
        ({"neighbors": "five"}, "-1 for all"),
        ({"loader": "shadow", "neighbors": "5,5,5"}, "one number"),
        ({"loader": "cluster", "parts": 4, "clusters": 5}, "at most the number of --parts"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"precision": "fp8"}, "--precision is 'fp8'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings.from_flat(settings).check()


def test_more_clusters_than_nodes(small: Path) -> None:
    with pytest.raises(UserError, match="at most the 60 nodes"):
        _task(small, loader="cluster", parts=61).batches(0)


def test_a_batch_without_a_training_node_is_passed_over(small: Path) -> None:
    task: Task = _task(small, recipe="none", loader="cluster", **SIZES)
    model, (batch, *_) = task.model(0), task.batches(0)
    from dataclasses import replace

    none = replace(batch, rows=batch.rows[:0], y=batch.y[:0])
    optimizer = torch.optim.Adam(model.parameters())
    loss, count = task.step(model, optimizer, none)
    assert (float(loss), count) == (0, 0)
    assert all(p.grad is None for p in model.parameters())
