"""The models of PyG's own examples, read from a copy of its repository, on random graphs instead of downloaded data.

Of an example's file the imports, classes and functions are run, and nothing that loads data or trains. How its model is
built and called stands in the table below in the example's own words; `data` and `dataset` are random.
"""

from __future__ import annotations

import ast
import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.utils import to_undirected

from tests.peers.compare import Program

NODES, FEATURES, CLASSES, RELATIONS, GRAPHS = 96, 16, 4, 3, 6


@dataclass
class Example:
    """One model of one file: two expressions in the file's names, and names of its top level that they need."""

    file: str
    build: str
    call: str = "model(data.x, data.edge_index)"
    names: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}: {self.build}"[:60]


def _graph() -> Data:
    """A graph of small graphs one after the other, with everything that some example asks for."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    size = NODES // GRAPHS
    edges = torch.cat([torch.randint(size, (2, 40), generator=generator) + i * size for i in range(GRAPHS)], 1)
    edge_index = to_undirected(edges)
    count = edge_index.shape[1]
    data = Data(x=draw(NODES, FEATURES), edge_index=edge_index, num_nodes=NODES)
    data.edge_attr, data.edge_features = draw(count), draw(count, 5)
    data.edge_type = torch.randint(RELATIONS, (count,), generator=generator)
    data.batch, data.num_graphs = torch.arange(NODES) // size, GRAPHS
    data.ptr = torch.arange(GRAPHS + 1) * size
    data.pos, data.pe = draw(NODES, 3), draw(NODES, 20)
    data.y = torch.randint(CLASSES, (NODES,), generator=generator)
    data.labels = torch.randint(CLASSES, (NODES, 1), generator=generator)
    data.attn = draw(NODES)
    data.train_mask = draw(NODES) < 0.5
    data.pairs = torch.randint(NODES, (2, 80), generator=generator)
    data.dense, data.adj = draw(GRAPHS, size, FEATURES), (draw(GRAPHS, size, size) < 0.3).float()
    data.mask = torch.arange(size) < torch.tensor([[size], [size - 3]] * (GRAPHS // 2))
    return data


def _heterogeneous() -> HeteroData:
    generator = torch.Generator().manual_seed(6)
    data = HeteroData()
    sizes = {"user": 40, "movie": 50, "author": 30, "paper": 60, "item": 45, "director": 20}
    for kind, size in sizes.items():
        data[kind].x = torch.rand(size, FEATURES, generator=generator)
        data[kind].num_nodes = size
    kinds = [
        ("user", "rates", "movie"),
        ("movie", "rev_rates", "user"),
        ("movie", "metapath_0", "movie"),
        ("author", "writes", "paper"),
        ("paper", "rev_writes", "author"),
        ("item", "to", "item"),
        ("item", "rev_to", "user"),
        ("user", "to", "item"),
        ("director", "to", "movie"),
        ("movie", "to", "director"),
    ]
    for a, relation, b in kinds:
        pair = [torch.randint(sizes[end], (160,), generator=generator) for end in (a, b)]
        data[a, relation, b].edge_index = torch.stack(pair)
    return data


_NODE = "model(data.x, data.edge_index)"
_GRAPH = "model(data.x, data.edge_index, data.batch)"
_HETERO = "model(dict(data.x_dict), data.edge_index_dict)"
_LINKS = "model(dict(data.x_dict), data.edge_index_dict, torch.randint(40, (2, 60)))"
_USERS = _LINKS.replace("dict(data.x_dict)", "{**data.x_dict, 'user': torch.arange(40), 'item': torch.arange(45)}")
_MOLECULES = "model(torch.randint(1, 9, (NODES,)), data.pos * 4, data.batch)"

EXAMPLES = [
    Example("agnn", "Net()", "model()"),
    Example(
        "ar_link_pred",
        "torch.nn.ModuleList([GCNEncoder(16, 32, 16), LinkPredictor(16, 32), ARLinkPredictor(16)])",
        "[model[1](*(z := model[0](data.x, data.edge_index))[data.pairs]), model[2](*z[data.pairs])]",
    ),
    Example(
        "argva_node_clustering",
        "ARGVA(Encoder(16, 32, 32), Discriminator(32, 64, 32))",
        "[model.discriminator_loss(z := model.encode(data.x, data.edge_index)),"
        " model.recon_loss(z, data.edge_index) + model.reg_loss(z) + model.kl_loss() / NODES]",
    ),
    Example("arma", "Net(16, 16, 4)"),
    Example(
        "attentive_fp",
        "AttentiveFP(16, 64, 1, edge_dim=5, num_layers=2, num_timesteps=2, dropout=0.2)",
        "model(data.x, data.edge_index, data.edge_features, data.batch)",
    ),
    Example(
        "autoencoder",
        "GAE(GCNEncoder(16, 16))",
        "model.recon_loss(model.encode(data.x, data.edge_index), data.edge_index)",
    ),
    Example(
        "autoencoder",
        "VGAE(VariationalGCNEncoder(16, 16))",
        "model.recon_loss(model.encode(data.x, data.edge_index), data.edge_index) + model.kl_loss() / NODES",
    ),
    Example(
        "autoencoder",
        "GAE(LinearEncoder(16, 16))",
        "model.recon_loss(model.encode(data.x, data.edge_index), data.edge_index)",
    ),
    Example(
        "autoencoder",
        "VGAE(VariationalLinearEncoder(16, 16))",
        "model.recon_loss(model.encode(data.x, data.edge_index), data.edge_index) + model.kl_loss() / NODES",
    ),
    Example("cluster_gcn_ppi", "Net(16, 128, 4, 4)"),
    Example("cluster_gcn_reddit", "Net(16, 4)"),
    Example("colors_topk_pool", "Net(16)", "model(data)[:2]"),
    Example("cora", "Net()", "model()", "data.edge_attr = torch.rand(data.num_edges, 1)"),
    Example(
        "correct_and_smooth", "MLP([16, 64, 64, 4], dropout=0.5, norm='batch_norm', act_first=True)", "model(data.x)"
    ),
    Example("dir_gnn", "DirGNN(16, 32, 4, 0.5)", _NODE, "Conv = SAGEConv"),
    Example("dir_gnn", "DirGNN(16, 32, 4, 0.3)", _NODE, "Conv = GCNConv"),
    Example("dna", "Net(16, 64, 4, num_layers=3, heads=4, groups=8)"),
    Example(
        "equilibrium_median",
        "EquilibriumAggregation(1, 10, [64, 64], 1)",
        "(model(x := torch.rand(100, 1)) - x.median()).norm(2)",
    ),
    Example(
        "faust",
        "Net()",
        "model(data)",
        "d = data; data.x = torch.ones(NODES, 1); data.edge_attr = torch.rand(data.num_edges, 3)",
    ),
    Example("film", "Net(16, 64, 4, 3, dropout=0.1)"),
    Example("gat", "GAT(16, 8, 4, 8)"),
    Example(
        "gcn", "GCN(16, 16, 4)", "model(data.x, data.edge_index, data.edge_attr)", "args = Namespace(use_gdc=False)"
    ),
    Example(
        "gcn", "GCN(16, 16, 4)", "model(data.x, data.edge_index, data.edge_attr)", "args = Namespace(use_gdc=True)"
    ),
    Example("gcn2_cora", "Net(64, 16, 0.1, 0.5, True, dropout=0.6)", "model(data.x, data.edge_index)"),
    Example("gcn2_ppi", "Net(96, 5, 0.5, 1.0, False, dropout=0.2)", "model(data.x, data.edge_index)"),
    Example("geniepath", "GeniePath(16, 4)", _NODE, "dim = 32; lstm_hidden = 32; layer_num = 3"),
    Example("geniepath", "GeniePathLazy(16, 4)", _NODE, "dim = 32; lstm_hidden = 32; layer_num = 3"),
    Example(
        "graph_gps",
        "GPS(64, 8, 2, 'multihead', {'dropout': 0.5})",
        "model(data.y[:, None], data.pe, data.edge_index, data.edge_type, data.batch)",
    ),
    Example(
        "graph_gps",
        "GPS(64, 8, 2, 'performer', {})",
        "model(data.y[:, None], data.pe, data.edge_index, data.edge_type, data.batch)",
    ),
    Example(
        "graph_sage_unsup",
        "GraphSAGE(16, 64, num_layers=2)",
        "F.binary_cross_entropy_with_logits((h := model(data.x, data.edge_index))[data.pairs].prod(0).sum(-1),"
        " torch.arange(80) % 2.0)",
    ),
    Example("graph_saint", "Net(64)", "model(data.x, data.edge_index, data.edge_attr)"),
    Example("graph_unet", "Net()", "model()"),
    Example("graphland", "Model(16, 64, 4)"),
    Example(
        "infomax_inductive",
        "DeepGraphInfomax(64, Encoder(16, 64), summary=_mean, corruption=corruption)",
        "model.loss(*model(data.x, data.edge_index, 50))",
    ),
    Example(
        "infomax_transductive",
        "DeepGraphInfomax(64, Encoder(16, 64), summary=_mean, corruption=corruption)",
        "model.loss(*model(data.x, data.edge_index))",
    ),
    *[
        Example(
            "kge_fb15k_237",
            f"{kind}(NODES, RELATIONS, hidden_channels=32)",
            "model.loss(data.edge_index[0], data.edge_type, data.edge_index[1])",
        )
        for kind in ("TransE", "DistMult", "ComplEx", "RotatE")
    ],
    Example(
        "lcm_aggr_2nd_min", "LCM(64)", "model(torch.randint(2, (NODES, 8)), data.batch)", "args = Namespace(num_bits=8)"
    ),
    Example(
        "lightgcn",
        "LightGCN(NODES, 32, num_layers=2)",
        "model.recommendation_loss(*model(data.edge_index, data.pairs).chunk(2), node_id=data.pairs.unique())",
    ),
    Example("link_pred", "Net(16, 64, 32)", "model.decode(model.encode(data.x, data.edge_index), data.pairs)"),
    Example("linkx", "LINKX(NODES, 16, 32, 4, num_layers=1, num_edge_layers=1, num_node_layers=1, dropout=0.5)"),
    Example(
        "lpformer",
        "LPFormer(16, 32, num_gnn_layers=2, gnn_dropout=0.1, transformer_dropout=0.1)",
        "model(data.pairs, data.x, data.edge_index, torch.rand(NODES, NODES).to_sparse())",
    ),
    Example("mem_pool", "Net(16, 32, 4, 0.1)", _GRAPH),
    Example("mixhop", "MixHop()"),
    Example("mutag_gin", "GIN(16, 32, 4, 5)", _GRAPH),
    Example(
        "ogbn_proteins_deepgcn",
        "DeeperGCN(32, 7)",
        "model(data.x, data.edge_index, data.edge_attr)",
        "data.edge_attr = data.edge_features; data.y = torch.rand(NODES, 6)",
    ),
    Example("ogbn_train", "GAT(16, 32, 3, 4, heads=2, dropout=0.5, v2=True)"),
    Example(
        "ogbn_train",
        "SGFormer(16, 32, 4, trans_num_layers=2, trans_dropout=0.5, gnn_num_layers=2, gnn_dropout=0.5)",
        "model(data.x, data.edge_index, data.batch)",
    ),
    Example("ogbn_train", "Polynormer(16, 32, 4, local_layers=2)", "model(data.x, data.edge_index, data.batch)"),
    Example("ogc", "LinearNeuralNetwork(16, 4)", "model(data.x)"),
    Example("pmlp", "PMLP(16, 32, 4, num_layers=2, dropout=0.5, norm=False)", "model(data.x)"),
    Example(
        "pna",
        "Net()",
        "model(data.y[:, None], data.edge_index, data.edge_type, data.batch)",
        "deg = torch.bincount(torch.bincount(data.edge_index[1], minlength=NODES))",
    ),
    Example("ppi", "Net()"),
    Example("proteins_diff_pool", "Net()", "model(data.dense, data.adj, data.mask)", "max_nodes = 16"),
    Example("proteins_dmon_pool", "Net(16, 4)", _GRAPH, "avg_num_nodes = 16"),
    Example("proteins_gmt", "Net()", _GRAPH),
    Example("proteins_mincut_pool", "Net(16, 4)", _GRAPH, "avg_num_nodes = 16"),
    Example("proteins_topk_pool", "Net()", "model(data)"),
    Example("qm9_nn_conv", "Net()", "model(data)", "dim = 32; data.edge_attr = data.edge_features"),
    Example("qm9_pretrained_dimenet", "DimeNet(32, 1, 2, 4, 7, 6, cutoff=2.0)", _MOLECULES),
    Example("qm9_pretrained_dimenet", "DimeNetPlusPlus(32, 1, 2, 16, 16, 32, 7, 6, cutoff=2.0)", _MOLECULES),
    Example("qm9_pretrained_schnet", "SchNet(32, 32, 2, 20, interaction_graph=_near)", _MOLECULES),
    Example("rect", "RECT_L(16, 64, normalize=False, dropout=0.2)", "model(data.x, data.edge_index, data.edge_attr)"),
    Example("reddit", "SAGE(16, 64, 4)"),
    Example("relbench_example", "to_hetero(GNN(32), data.metadata(), aggr='sum')", _HETERO),
    Example("rev_gnn", "RevGNN(16, 32, 4, num_layers=4, dropout=0.5, num_groups=2)"),
    Example("rgat", "RGAT(16, 16, 4, 3)", "model(data.x, data.edge_index, data.edge_type)"),
    Example("rgcn", "Net()", "model(data.edge_index, data.edge_type)", "Conv = RGCNConv"),
    Example("rgcn", "Net()", "model(data.edge_index, data.edge_type)", "Conv = FastRGCNConv"),
    Example(
        "rgcn_link_pred",
        "GAE(RGCNEncoder(NODES, 30, RELATIONS), DistMultDecoder(RELATIONS // 2 + 2, 30))",
        "model.decode(model.encode(data.edge_index, data.edge_type), data.edge_index, data.edge_type)",
    ),
    Example("seal_link_pred", "DGCNN(32, 3, k=12)", _GRAPH),
    Example("sgc", "Net()", "model()"),
    Example("shadow", "GNN(16, 64, 4)", "model(data.x, data.edge_index, data.batch, data.ptr[:-1])"),
    Example("sign", "Net()", "model([data.x, data.x.square(), data.x.sqrt()])", "K = 2"),
    Example(
        "signed_gcn",
        "SignedGCN(16, 32, num_layers=2, lamb=5)",
        "model.loss(model(data.x, data.edge_index[:, ::2], data.edge_index[:, 1::2]), data.edge_index[:, ::2],"
        " data.edge_index[:, 1::2])",
    ),
    Example("super_gat", "Net()"),
    Example("tagcn", "Net()", "model()"),
    Example("tensorboard_logging", "Net()"),
    Example(
        "tgn",
        "_tgn(TGNMemory, IdentityMessage, LastAggregator, GraphAttentionEmbedding, LinkPredictor)",
        "_tgn_step(model, data)",
    ),
    Example("triangles_sag_pool", "Net(16)", "model(data)[:2]"),
    Example("unimp_arxiv", "UniMP(16, 4, 64, 3, 2)", "model(data.x, data.y, data.edge_index, data.train_mask)"),
    *[Example("upfd", f"Net({kind!r}, 16, 64, 4, concat=True)", _GRAPH) for kind in ("GCN", "SAGE", "GAT")],
    Example("hetero/bipartite_sage", "Model(40, 32, 32)", _USERS),
    Example("hetero/bipartite_sage_unsup", "Model(40, 45, 32, 32)", _USERS, "device = None"),
    Example(
        "hetero/dmgi_unsup",
        "DMGI(50, 16, 32, 2)",
        "model.loss(*model(data['movie'].x, [data['movie', 'metapath_0', 'movie'].edge_index] * 2))",
    ),
    Example("hetero/han_imdb", "HAN(-1, 3, 32, 4)", _HETERO),
    Example("hetero/hetero_conv_dblp", "HeteroGNN(data.metadata(), 32, 4, 2)", _HETERO),
    Example("hetero/hetero_link_pred", "Model(32)", _LINKS),
    Example("hetero/hgt_dblp", "HGT(32, 4, 2, 2)", _HETERO),
    Example(
        "hetero/hierarchical_sage",
        "HierarchicalHeteroGraphSage(data.edge_types, 32, 4, 2)",
        "model(dict(data.x_dict), data.edge_index_dict, {k: [80, 80] for k in data.edge_types},"
        " {k: [data[k].num_nodes, 0, 0] for k in data.node_types})",
    ),
    Example("hetero/recommender_system", "Model(32)", _LINKS),
    Example("hetero/temporal_link_pred", "Model(32)", _LINKS),
]


def load(path: Path) -> dict[str, Any]:
    """What an example's file imports and defines; what cannot be imported here is left out."""
    names: dict[str, Any] = {"__name__": "example", "__file__": str(path)}
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, kept):
            try:
                exec(compile(ast.Module([statement], []), str(path), "exec"), names)
            except (ImportError, NameError, OSError):
                continue  # a package that only loads data; what needs it fails by name below
    return names


def program(folder: Path, example: Example) -> Callable[[], Program]:
    def build() -> Program:
        import torch.nn.functional as F
        from torch_geometric.nn import models

        names = load(folder / f"{example.file}.py")  # the globals of the example's classes
        for name, value in {**vars(models), "F": F, "torch": torch, "Namespace": Namespace}.items():
            names.setdefault(name, value)
        names |= {
            "_tgn": _tgn,
            "_tgn_step": _tgn_step,
            "_near": _near,
            "_mean": _mean,
            "NODES": NODES,
            "RELATIONS": RELATIONS,
        }
        data = _heterogeneous() if example.file.startswith("hetero/") or "to_hetero" in example.build else _graph()
        dataset = Namespace(
            num_features=FEATURES, num_node_features=FEATURES, num_classes=CLASSES, num_relations=RELATIONS
        )
        names |= {"data": data, "dataset": dataset, "train_dataset": dataset}
        exec(example.names, names)
        model = eval(example.build, names)
        code = compile(example.call, example.file, "eval")

        def call(model: nn.Module) -> Any:
            names.update(data=copy.copy(data), model=model)
            return eval(code, names)

        return Program(model, call, lambda model: _forget(model, data))

    return build


def _near(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    distance = (pos[:, None] - pos).norm(dim=-1)
    near = (batch[:, None] == batch) & (distance < 2) & ~torch.eye(len(pos), dtype=torch.bool)
    edge_index = near.nonzero().T
    return edge_index, distance[edge_index[0], edge_index[1]]


def _mean(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return z.mean(0).sigmoid()


def _tgn(memory: Any, message: Any, aggregator: Any, embedding: Any, predictor: Any) -> nn.Module:
    """The three parts of the example in one module, since `compress` takes one."""
    first = memory(NODES, 5, 32, 32, message_module=message(5, 32, 32), aggregator_module=aggregator())
    parts = {"memory": first, "gnn": embedding(32, 32, 5, first.time_enc), "link_pred": predictor(32)}
    return nn.ModuleDict(parts)


def _tgn_step(model: Any, data: Data) -> Tensor:
    """The example's training step on the second batch: the memory is updated between the passes."""
    import torch.nn.functional as F

    src, dst = data.pairs
    t, msg = torch.arange(80), data.edge_features[:80]
    memory = model["memory"]
    memory.update_state(src[:40], dst[:40], t[:40], msg[:40])
    z, last_update = memory(torch.arange(NODES))
    z = model["gnn"](z, last_update, data.pairs[:, :40], t[:40], msg[:40])
    positive = model["link_pred"](z[src[40:]], z[dst[40:]])
    negative = model["link_pred"](z[src[40:]], z[dst[40:].flip(0)])
    loss = F.binary_cross_entropy_with_logits(positive, torch.ones_like(positive))
    loss = loss + F.binary_cross_entropy_with_logits(negative, torch.zeros_like(negative))
    memory.update_state(src[40:], dst[40:], t[40:], msg[40:])
    return loss


def _forget(model: nn.Module, data: Any) -> None:
    for part in model.modules():
        if type(part).__name__ == "TGNMemory":
            part.reset_state()  # type: ignore[operator]
            part.detach()  # type: ignore[operator]


def run(folder: Path, only: str = "") -> int:
    """How many of the examples whose name has this in it fail."""
    from tests.peers.compare import compare

    failed = 0
    for example in EXAMPLES:
        if only in example.name:
            try:
                verdict = compare(example.name, program(folder, example))
            except Exception as error:  # the plain program does not run here
                print(f"skip {example.name}: {type(error).__name__}: {str(error)[:150]}", flush=True)
                continue
            failed += bool(verdict.faults)
            print(verdict, flush=True)
    return failed


if __name__ == "__main__":
    import sys

    sys.exit(bool(run(Path(sys.argv[1]), *sys.argv[2:3])))
