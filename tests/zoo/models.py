"""The models of `torch_geometric.nn.models` that take features and a graph, and models built of layers by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as g
from torch import Tensor, nn

from tests.zoo.case import (
    EDGE,
    FORMS,
    C,
    Case,
    Catalogue,
    D,
    N,
    attributes,
    batch,
    csr,
    edges,
    floats,
    mlp,
    positions,
    rng,
    undirected,
    weights,
    x,
)
from tests.zoo.convs import DEGREES, METADATA, edge_index_dict, x_dict

_WALKS = "random walks over node embeddings, no features"
_RADIUS = "needs radius_graph of pyg-lib"
ABSENT = {
    "Node2Vec": _WALKS,
    "MetaPath2Vec": _WALKS,
    "to_captum_model": "a function for explanations",
    "to_captum_input": "a function for explanations",
    "captum_output_to_dicts": "a function for explanations",
    "LabelPropagation": "no parameters; runs without gradients",
    "CorrectAndSmooth": "no parameters; runs without gradients",
    "RENet": "sequences of events, no node features",
    "TGNMemory": "events in time; its state changes with each call",
    "GPSE": "pre-trained encoder of a whole Batch object, 20 layers of 512",
    "ViSNet": _RADIUS,
    "DimeNet": _RADIUS,
    "DimeNetPlusPlus": _RADIUS,
    "GNNFF": _RADIUS,
}


def cases() -> list[Case]:
    return [*_basic(), *_deep(), *_hetero(), *_links(), *_other()]


def _basic() -> list[Case]:
    zoo = Catalogue(inner=False)
    for norm in (None, "batch_norm", "layer_norm"):
        zoo.add(f"MLP {norm}", partial(g.MLP, [D, C, C, 5], norm=norm, dropout=0.2), x)
    zoo.add("MLP gelu", partial(g.MLP, [D, C, C, 5], act="gelu", act_first=True), x)
    models: dict[str, Any] = {
        "GCN": partial(g.GCN, D, C),
        "GraphSAGE mean": partial(g.GraphSAGE, D, C),
        "GraphSAGE max": partial(g.GraphSAGE, D, C, aggr="max"),
        "GraphSAGE sum": partial(g.GraphSAGE, D, C, aggr="sum"),
        "GIN": partial(g.GIN, D, C),
        "GAT v1": partial(g.GAT, D, C, heads=2),
        "GAT v2": partial(g.GAT, D, C, heads=2, v2=True),
        "PNA": partial(g.PNA, D, C, aggregators=["mean", "max", "std"], scalers=["identity", "linear"], deg=DEGREES),
        "EdgeCNN": partial(g.EdgeCNN, D, C),
    }
    for name, make in models.items():
        zoo.add(name, partial(make, num_layers=2, out_channels=5), x, edges)
        zoo.add(
            f"{name} batch norm",
            partial(make, num_layers=3, out_channels=5, norm="batch_norm", dropout=0.3, jk="cat"),
            x,
            edges,
        )
        zoo.add(
            f"{name} layer norm",
            partial(make, num_layers=2, out_channels=5, norm="layer_norm", dropout=0.3, jk="max", act="elu"),
            x,
            edges,
        )
    zoo.add("GCN graph norm lstm", partial(g.GCN, D, C, 3, 5, norm="graph_norm", jk="lstm"), x, edges, batch=batch)
    zoo.add("GCN weighted", partial(g.GCN, D, C, 2, 5, act="silu"), x, edges, weights)
    zoo.add(
        "GAT edge_dim", partial(g.GAT, D, C, 2, 5, heads=2, edge_dim=EDGE, dropout=0.2), x, edges, edge_attr=attributes
    )
    zoo.add("GraphSAGE features", partial(g.GraphSAGE, D, C, 2, 5, dropout=0.2), partial(floats, N, D, grad=False), csr)
    for form, make in FORMS.items():
        for name in ("GCN", "GraphSAGE mean", "GraphSAGE max", "GIN"):
            zoo.add(f"{name} {form}", partial(models[name], num_layers=2, out_channels=5, norm="batch_norm"), x, make)
    for mode in ("cat", "max", "lstm"):
        zoo.add(
            f"JumpingKnowledge {mode}", partial(g.JumpingKnowledge, mode, D, 3), lambda: [x(seed=i) for i in range(3)]
        )
        zoo.add(
            f"HeteroJumpingKnowledge {mode}",
            partial(g.HeteroJumpingKnowledge, ["a", "b"], mode, D, 2),
            lambda: {"a": [x(), x(seed=1)], "b": [x(40), x(40, seed=1)]},
        )
    return zoo


class _Stack(nn.Module):
    """Layers between two linear ones; `start` hands each layer the first features too."""

    def __init__(self, layers: list[nn.Module], start: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, C), nn.Linear(C, 5)
        self.layers = nn.ModuleList(layers)
        self.start = start

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        h = start = self.first(x).relu()
        for layer in self.layers:
            h = F.dropout(layer(h, start, adj), 0.2, self.training).relu() if self.start else layer(h, adj)
        return self.last(h)


def _deep_gcn(block: str, checkpoint: bool = False) -> nn.Module:
    return _Stack(
        [
            g.DeepGCNLayer(g.GENConv(C, C, learn_t=True), nn.LayerNorm(C), nn.ReLU(), block, 0.1, checkpoint)
            for _ in range(2)
        ]
    )


def _deep() -> list[Case]:
    zoo = Catalogue(inner=False)
    for block in ("res+", "res", "dense", "plain"):
        if block != "dense":
            zoo.add(f"DeepGCNLayer {block}", partial(_deep_gcn, block), x, edges)
    zoo.add(
        "DeepGCNLayer dense",
        lambda: g.DeepGCNLayer(g.GCNConv(D, C), nn.BatchNorm1d(C), nn.ReLU(), "dense", 0.1),
        x,
        edges,
    )
    zoo.add("DeepGCNLayer checkpoint", partial(_deep_gcn, "res+", True), x, edges)
    zoo.add("GroupAddRev", lambda: g.GroupAddRev(g.SAGEConv(D // 2, D // 2), num_groups=2), lambda: x() * 1.0, edges)
    zoo.add("GCN2Conv stack", lambda: _Stack([g.GCN2Conv(C, 0.5, 1.0, i) for i in (1, 2)], start=True), x, edges)
    zoo.add("GraphUNet", lambda: g.GraphUNet(D, C, 5, depth=2, pool_ratios=0.5), x, undirected)
    zoo.add("GraphUNet cat", lambda: g.GraphUNet(D, C, 5, depth=1, sum_res=False, act="elu"), x, undirected, batch)
    zoo.add("Sequential GCN GAT", _sequential, x, edges)
    return zoo


def _sequential() -> nn.Module:
    return g.Sequential(
        "x, edges",
        [
            (g.GCNConv(D, C), "x, edges -> x"),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            (g.GATConv(C, 8, heads=2), "x, edges -> x"),
            nn.ELU(inplace=True),
            nn.Linear(C, 5),
        ],
    )


def _to_hetero(model: nn.Module) -> nn.Module:
    model = g.to_hetero(model, METADATA, aggr="sum")
    with torch.no_grad():
        model(x_dict(), edge_index_dict())  # gives its lazy layers their sizes
    return model


def _hetero() -> list[Case]:
    zoo = Catalogue(inner=False)
    zoo.add("GraphSAGE to_hetero", lambda: _to_hetero(g.GraphSAGE((-1, -1), C, 2, 5)), x_dict, edge_index_dict)
    zoo.add(
        "GAT to_hetero",
        lambda: _to_hetero(g.GAT((-1, -1), C, 2, 5, heads=2, add_self_loops=False, dropout=0.2)),
        x_dict,
        edge_index_dict,
    )
    return zoo


class _VariationalGCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.mu, self.logstd = g.GCNConv(D, C), g.GCNConv(C, 8), g.GCNConv(C, 8)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        h = self.base(x, edges).relu()
        return self.mu(h, edges), self.logstd(h, edges)


class _AutoEncoder(nn.Module):
    """Encoder, decoder and the losses in one forward pass."""

    def __init__(self, model: g.GAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, edges: Tensor) -> list[Tensor]:
        z = self.model.encode(x, edges)
        losses = [self.model.recon_loss(z, edges)]
        losses += [self.model.kl_loss()] if isinstance(self.model, g.VGAE) else []
        losses += [self.model.reg_loss(z)] if isinstance(self.model, g.ARGA | g.ARGVA) else []
        return [z, *losses]


def _corrupt(x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    return x[torch.randperm(len(x))], edges


class _Infomax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = g.DeepGraphInfomax(C, g.GraphSAGE(D, C, 2), lambda z, *_: z.mean(0).sigmoid(), _corrupt)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(x, edges)
        return found[0], self.model.loss(*found)


class _Decode(nn.Module):
    """A layer before a decoder of links."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lin, self.model = nn.Linear(D, C), model

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.model(self.lin(x), edges)


def _walks() -> Tensor:
    """Where one or two random steps lead, as a sparse matrix."""
    step = csr().to_dense() + torch.eye(N)
    step = step / step.sum(1, keepdim=True)
    return (step + step @ step).div(2).to_sparse_coo()


def _links() -> list[Case]:
    zoo = Catalogue(inner=False)
    zoo.add("GAE", lambda: _AutoEncoder(g.GAE(g.GCN(D, C, 2, 8))), x, edges)
    zoo.add("VGAE", lambda: _AutoEncoder(g.VGAE(_VariationalGCN())), x, edges)
    zoo.add("ARGA", lambda: _AutoEncoder(g.ARGA(g.GCN(D, C, 2, 8), mlp(8, 1))), x, edges)
    zoo.add("ARGVA", lambda: _AutoEncoder(g.ARGVA(_VariationalGCN(), mlp(8, 1))), x, edges)
    zoo.add("DeepGraphInfomax", _Infomax, x, edges)
    zoo.add("InnerProductDecoder", lambda: _Decode(g.InnerProductDecoder()), x, edges)
    zoo.add("ARLinkPredictor", lambda: g.ARLinkPredictor(D, C, 8, dropout=0.2), x, edges)
    zoo.add("SignedGCN", lambda: g.SignedGCN(D, C, 2), x, edges, partial(edges, seed=20))
    zoo.add(
        "LPFormer",
        lambda: g.LPFormer(D, C, ppr_thresholds=[0, 1e-4, 1e-2]),
        lambda: edges()[:, :40],
        x,
        undirected,
        _walks,
    )
    zoo.add("LightGCN", lambda: g.LightGCN(N, C, 2), edges)
    return zoo


class _Edge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(2 * D + EDGE + D, EDGE)

    def forward(self, src: Tensor, dst: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        return self.mlp(torch.cat([src, dst, edge_attr, u[batch]], 1))


class _Node(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(D + EDGE, D)

    def forward(self, x: Tensor, edges: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.utils import scatter

        return self.mlp(torch.cat([x, scatter(edge_attr, edges[1], 0, x.size(0), "mean")], 1)) + u[batch]


class _Global(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(2 * D, D)

    def forward(self, x: Tensor, edges: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        return self.mlp(torch.cat([u, g.global_mean_pool(x, batch)], 1))


def _molecule(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Edges by hand, in place of a radius graph."""
    row, col = edges()
    keep = row != col
    ends = torch.stack([row[keep], col[keep]])
    return ends, (pos[ends[0]] - pos[ends[1]]).norm(dim=-1)


def _other() -> list[Case]:
    zoo = Catalogue(inner=False)
    zoo.add("LINKX", lambda: g.LINKX(N, D, C, 5, 2, 2, 2, dropout=0.2), x, edges)
    zoo.add("LINKX weighted", lambda: g.LINKX(N, D, C, 5, 2), x, edges, weights)
    zoo.add("AttentiveFP", lambda: g.AttentiveFP(D, C, 5, EDGE, 2, 2, dropout=0.2), x, edges, attributes, batch)
    zoo.add("RECT_L", lambda: g.RECT_L(D, C, dropout=0.2), x, edges)
    zoo.add("PMLP", lambda: g.PMLP(D, C, 5, 3, dropout=0.2), x)
    zoo.add("SGFormer", lambda: g.SGFormer(D, C, 5, trans_num_heads=2, gnn_num_layers=2), x, edges, batch)
    zoo.add(
        "SGFormer cat",
        lambda: g.SGFormer(D, C, 5, aggregate="cat", trans_dropout=0.1, gnn_dropout=0.1),
        x,
        edges,
        batch,
    )
    zoo.add("Polynormer", lambda: _polynormer(False), x, edges, batch)
    zoo.add("Polynormer global", lambda: _polynormer(True), x, edges, batch)
    zoo.add("NeuralFingerprint", lambda: g.NeuralFingerprint(D, C, 5, 2), x, edges, batch)
    zoo.add(
        "SchNet",
        lambda: g.SchNet(C, C, 2, 8, cutoff=5.0, interaction_graph=_molecule),
        lambda: torch.randint(1, 10, (N,), generator=rng(12)),
        positions,
        batch,
    )
    zoo.add("MetaLayer", lambda: g.MetaLayer(_Edge(), _Node(), _Global()), x, edges, attributes, lambda: x(3), batch)
    for method in ("add", "concat"):
        zoo.add(
            f"MaskLabel {method}",
            lambda m=method: g.MaskLabel(5, D, m),
            x,
            lambda: torch.arange(N) % 5,
            lambda: torch.arange(N) % 2 == 0,
        )
    for norm in ("batchnorm", "none"):
        zoo.add(
            f"GPSENodeEncoder {norm}",
            lambda n=norm: g.GPSENodeEncoder(C, EDGE, 8, D, True, n),
            x,
            partial(floats, N, EDGE, seed=13),
        )
    return zoo


def _polynormer(use_global: bool) -> nn.Module:
    model = g.Polynormer(
        D, C, 5, local_layers=2, global_layers=1, heads=1 if use_global else 2, dropout=0.2, global_dropout=0.2
    )
    model._global = use_global
    return model
