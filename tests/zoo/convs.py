"""Every layer of `torch_geometric.nn.conv`."""

from __future__ import annotations

from functools import partial

import torch
import torch_geometric.nn as g
from torch import nn

from tests.zoo.case import (
    E_BIPARTITE,
    EDGE,
    FORMS,
    C,
    Case,
    Catalogue,
    D,
    E,
    N,
    attributes,
    batch,
    bipartite,
    edge_index,
    edges,
    floats,
    mlp,
    pair,
    positions,
    pseudo,
    types,
    undirected,
    weights,
    x,
)

ABSENT = {
    "MessagePassing": "the base class of all others",
    "CuGraphSAGEConv": "needs cuGraph",
    "CuGraphGATConv": "needs cuGraph",
    "CuGraphRGCNConv": "needs cuGraph",
    "FusedGATConv": "needs dgNN",
    "GravNetConv": "needs pyg-lib",
    "SplineConv": "needs pyg-lib",
    "DynamicEdgeConv": "needs pyg-lib",
    "XConv": "needs pyg-lib",
    "PANConv": "needs torch-sparse",
    "WLConv": "integer colours in and out, no gradient",
}

PAIR = (D, 24)
DEGREES = torch.bincount(torch.bincount(edges()[1], minlength=N))


def cases() -> list[Case]:
    return [*_convolutional(), *_attentional(), *_isomorphic(), *_spectral(), *_geometric(), *_relational(), *_mixed()]


def _convolutional() -> list[Case]:
    zoo = Catalogue()
    for aggr in ("sum", "mean", "max"):
        zoo.add(f"SimpleConv {aggr}", lambda a=aggr: g.SimpleConv(a), x, edges)
    zoo.add("SimpleConv weighted", lambda: g.SimpleConv("sum"), x, edges, weights)
    for root in ("sum", "cat", "self_loop"):
        zoo.add(f"SimpleConv root {root}", lambda r=root: g.SimpleConv("mean", combine_root=r), x, edges)
    zoo.add("GCNConv", lambda: g.GCNConv(D, C), x, edges)
    zoo.add("GCNConv weighted", lambda: g.GCNConv(D, C), x, edges, weights)
    zoo.add("GCNConv cached", lambda: g.GCNConv(D, C, cached=True), x, edges)
    zoo.add("GCNConv improved", lambda: g.GCNConv(D, C, improved=True, bias=False), x, edges)
    zoo.add("GCNConv not normalised", lambda: g.GCNConv(D, C, normalize=False), x, edges, weights)
    for aggr in ("mean", "max", "add", "min", "softmax", "std", "median"):
        zoo.add(f"SAGEConv {aggr}", lambda a=aggr: g.SAGEConv(D, C, aggr=a), x, edges)
    zoo.add("SAGEConv three", lambda: g.SAGEConv(D, C, aggr=["mean", "max", "std"]), x, edges)
    zoo.add("SAGEConv lstm", lambda: g.SAGEConv(D, C, aggr="lstm"), x, lambda: edge_index().as_tensor())
    zoo.add("SAGEConv normalize", lambda: g.SAGEConv(D, C, normalize=True), x, edges)
    zoo.add("SAGEConv project", lambda: g.SAGEConv(D, C, project=True), x, edges)
    zoo.add("SAGEConv no root", lambda: g.SAGEConv(D, C, root_weight=False), x, edges)
    zoo.add("SAGEConv bipartite", lambda: g.SAGEConv(PAIR, C), pair, bipartite)
    zoo.add("SAGEConv bipartite max", lambda: g.SAGEConv(PAIR, C, aggr="max"), pair, bipartite)
    for aggr in ("add", "mean", "max"):
        zoo.add(f"GraphConv {aggr}", lambda a=aggr: g.GraphConv(D, C, aggr=a), x, edges)
        zoo.add(f"GraphConv {aggr} weighted", lambda a=aggr: g.GraphConv(D, C, aggr=a), x, edges, weights)
    zoo.add("GraphConv bipartite", lambda: g.GraphConv(PAIR, C), pair, bipartite, lambda: weights(E_BIPARTITE))
    zoo.add("GatedGraphConv", lambda: g.GatedGraphConv(C, 3), x, edges)
    zoo.add("GatedGraphConv weighted", lambda: g.GatedGraphConv(C, 2), x, edges, weights)
    zoo.add("LEConv", lambda: g.LEConv(D, C), x, edges)
    zoo.add("LEConv weighted", lambda: g.LEConv(D, C), x, edges, weights)
    zoo.add("LEConv bipartite", lambda: g.LEConv(PAIR, C), pair, bipartite)
    zoo.add("ClusterGCNConv", lambda: g.ClusterGCNConv(D, C, diag_lambda=0.5), x, edges)
    zoo.add("MFConv", lambda: g.MFConv(D, C, max_degree=10), x, edges)
    zoo.add("MFConv bipartite", lambda: g.MFConv(PAIR, C), pair, bipartite)
    zoo.add("LGConv", lambda: g.LGConv(), x, edges)
    zoo.add("LGConv weighted", lambda: g.LGConv(), x, edges, weights)
    zoo.add("WLConvContinuous", lambda: g.WLConvContinuous(), x, edges)
    zoo.add("WLConvContinuous weighted", lambda: g.WLConvContinuous(), x, edges, weights)
    for form, make in FORMS.items():
        zoo.add(f"GCNConv {form}", lambda: g.GCNConv(D, C), x, make)
        zoo.add(f"SAGEConv {form}", lambda: g.SAGEConv(D, C), x, make)
        zoo.add(f"SAGEConv max {form}", lambda: g.SAGEConv(D, C, aggr="max"), x, make)
        zoo.add(f"GraphConv {form}", lambda: g.GraphConv(D, C), x, make)
        zoo.add(f"GINConv {form}", lambda: g.GINConv(mlp(D, C)), x, make)
        zoo.add(f"TAGConv {form}", lambda: g.TAGConv(D, C, K=2), x, make)
        zoo.add(f"SGConv {form}", lambda: g.SGConv(D, C, K=2), x, make)
        zoo.add(f"APPNP {form}", lambda: g.APPNP(2, 0.1), x, make)
        zoo.add(f"LGConv {form}", lambda: g.LGConv(), x, make)
    for form in ("csr", "EdgeIndex"):
        zoo.add(f"GATConv {form}", lambda: g.GATConv(D, 8, heads=2), x, FORMS[form])
        zoo.add(f"GATv2Conv {form}", lambda: g.GATv2Conv(D, 8, heads=2), x, FORMS[form])
    return zoo


def _attentional() -> list[Case]:
    zoo = Catalogue()
    for name, layer in (("GATConv", g.GATConv), ("GATv2Conv", g.GATv2Conv), ("TransformerConv", g.TransformerConv)):
        zoo.add(name, lambda c=layer: c(D, C), x, edges)
        zoo.add(f"{name} heads", lambda c=layer: c(D, 8, heads=4), x, edges)
        zoo.add(f"{name} heads mean", lambda c=layer: c(D, C, heads=2, concat=False), x, edges)
        zoo.add(f"{name} edge_dim", lambda c=layer: c(D, 8, heads=2, edge_dim=EDGE), x, edges, attributes)
        zoo.add(f"{name} dropout", lambda c=layer: c(D, 8, heads=2, dropout=0.3), x, edges)
        loops = {} if layer is g.TransformerConv else {"add_self_loops": False}
        zoo.add(f"{name} bipartite", lambda c=layer, k=loops: c(PAIR, 8, heads=2, **k), pair, bipartite)
        zoo.add(
            f"{name} attention weights",
            lambda c=layer: c(D, 8, heads=2),
            x,
            edges,
            return_attention_weights=lambda: True,
        )
    zoo.add("GATConv residual", lambda: g.GATConv(D, 8, heads=2, residual=True), x, edges)
    zoo.add("GATConv no loops", lambda: g.GATConv(D, C, add_self_loops=False, bias=False), x, edges)
    zoo.add("GATv2Conv shared", lambda: g.GATv2Conv(D, 8, heads=2, share_weights=True, residual=True), x, edges)
    zoo.add("TransformerConv beta", lambda: g.TransformerConv(D, 8, heads=2, beta=True), x, edges)
    zoo.add("TransformerConv no root", lambda: g.TransformerConv(D, C, root_weight=False), x, edges)
    zoo.add("AGNNConv", lambda: g.AGNNConv(), x, edges)
    for kind in ("MX", "SD"):
        zoo.add(
            f"SuperGATConv {kind}",
            lambda k=kind: _WithAttentionLoss(g.SuperGATConv(D, 8, heads=2, attention_type=k, dropout=0.2)),
            x,
            edges,
        )
    zoo.add("FAConv", lambda: g.FAConv(D), x, lambda: floats(N, D, seed=8), edges)
    zoo.add("FAConv dropout", lambda: g.FAConv(D, dropout=0.3), x, lambda: floats(N, D, seed=8), edges)
    zoo.add("FeaStConv", lambda: g.FeaStConv(D, C, heads=3), x, edges)
    zoo.add("HypergraphConv", lambda: g.HypergraphConv(D, C), x, lambda: edges(N, 20))
    zoo.add("HypergraphConv weighted", lambda: g.HypergraphConv(D, C), x, lambda: edges(N, 20), lambda: weights(20))
    for mode in ("node", "edge"):
        zoo.add(
            f"HypergraphConv attention by {mode}",
            lambda m=mode: g.HypergraphConv(D, 8, use_attention=True, attention_mode=m, heads=2, dropout=0.2),
            x,
            lambda: edges(N, 20),
            hyperedge_attr=lambda: x(20, seed=9),
        )
    zoo.add("GeneralConv", lambda: g.GeneralConv(D, C), x, edges)
    zoo.add(
        "GeneralConv edges", lambda: g.GeneralConv(D, C, EDGE, aggr="mean", l2_normalize=True), x, edges, attributes
    )
    for kind in ("additive", "dot_product"):
        zoo.add(
            f"GeneralConv {kind}",
            lambda k=kind: g.GeneralConv(D, C, attention=True, heads=2, attention_type=k),
            x,
            edges,
        )
    return zoo


class _WithAttentionLoss(nn.Module):
    """SuperGATConv and its second output, the self-supervised loss."""

    def __init__(self, conv: g.SuperGATConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(x, edges), self.conv.get_attention_loss()


def _isomorphic() -> list[Case]:
    zoo = Catalogue()
    zoo.add("GINConv", lambda: g.GINConv(mlp(D, C, norm=True)), x, edges)
    zoo.add("GINConv eps", lambda: g.GINConv(mlp(D, C), train_eps=True), x, edges)
    zoo.add("GINConv max", lambda: g.GINConv(mlp(D, C), aggr="max"), x, edges)
    zoo.add("GINEConv", lambda: g.GINEConv(mlp(D, C), train_eps=True), x, edges, lambda: attributes(E, D))
    zoo.add("GINEConv edge_dim", lambda: g.GINEConv(mlp(D, C, norm=True), edge_dim=EDGE), x, edges, attributes)
    for aggr in ("max", "mean", "add"):
        zoo.add(f"EdgeConv {aggr}", lambda a=aggr: g.EdgeConv(mlp(2 * D, C), aggr=a), x, edges)
    zoo.add("NNConv", lambda: g.NNConv(D, C, mlp(EDGE, D * C)), x, edges, attributes)
    zoo.add("NNConv mean", lambda: g.NNConv(D, C, mlp(EDGE, D * C), aggr="mean"), x, edges, attributes)
    zoo.add("CGConv", lambda: g.CGConv(D), x, edges)
    zoo.add("CGConv edges norm", lambda: g.CGConv(D, EDGE, aggr="mean", batch_norm=True), x, edges, attributes)
    zoo.add("ResGatedGraphConv", lambda: g.ResGatedGraphConv(D, C), x, edges)
    zoo.add("ResGatedGraphConv edge_dim", lambda: g.ResGatedGraphConv(D, C, edge_dim=EDGE), x, edges, attributes)
    zoo.add("ResGatedGraphConv bipartite", lambda: g.ResGatedGraphConv(PAIR, C), pair, bipartite)
    some, scalers = ["mean", "max", "min", "std", "var", "sum"], ["identity", "amplification", "attenuation", "linear"]
    zoo.add("PNAConv", lambda: g.PNAConv(D, C, some, scalers, DEGREES), x, edges)
    zoo.add(
        "PNAConv towers",
        lambda: g.PNAConv(
            D, C, some[:4], scalers[:3], DEGREES, edge_dim=EDGE, towers=2, post_layers=2, train_norm=True
        ),
        x,
        edges,
        attributes,
    )
    zoo.add("GENConv", lambda: g.GENConv(D, C, learn_t=True), x, edges)
    zoo.add("GENConv powermean", lambda: g.GENConv(D, C, aggr="powermean", learn_p=True, norm="layer"), x, edges)
    zoo.add(
        "GENConv edges",
        lambda: g.GENConv(D, C, msg_norm=True, learn_msg_scale=True, edge_dim=EDGE, bias=True),
        x,
        edges,
        attributes,
    )
    zoo.add("GENConv bipartite", lambda: g.GENConv(PAIR, C, aggr="max"), pair, bipartite)
    for aggr in ("sum", "mean", "symnorm", "max", "std"):
        zoo.add(f"EGConv {aggr}", lambda a=aggr: g.EGConv(D, C, aggregators=[a], num_heads=4, num_bases=2), x, edges)
    zoo.add("EGConv three", lambda: g.EGConv(D, C, aggregators=["sum", "max", "var"], num_heads=4), x, edges)
    zoo.add("PDNConv", lambda: g.PDNConv(D, C, EDGE, 8), x, edges, attributes)
    zoo.add("AntiSymmetricConv", lambda: g.AntiSymmetricConv(D, num_iters=2), x, edges)
    zoo.add("DirGNNConv", lambda: g.DirGNNConv(g.SAGEConv(D, C)), x, edges)
    zoo.add("DirGNNConv GCN", lambda: g.DirGNNConv(g.GCNConv(D, C), alpha=0.3), x, edges)
    return zoo


def _spectral() -> list[Case]:
    zoo = Catalogue()
    zoo.add("ChebConv", lambda: g.ChebConv(D, C, K=3), x, undirected)
    zoo.add("ChebConv weighted", lambda: g.ChebConv(D, C, K=3, normalization="rw"), x, edges, weights)
    zoo.add("TAGConv", lambda: g.TAGConv(D, C, K=3), x, edges)
    zoo.add("TAGConv weighted", lambda: g.TAGConv(D, C, K=2), x, edges, weights)
    zoo.add("ARMAConv", lambda: g.ARMAConv(D, C, num_stacks=2, num_layers=2), x, edges)
    zoo.add(
        "ARMAConv shared",
        lambda: g.ARMAConv(D, C, num_stacks=2, num_layers=3, shared_weights=True, act=nn.Tanh(), dropout=0.2),
        x,
        edges,
        weights,
    )
    zoo.add("SGConv", lambda: g.SGConv(D, C, K=2), x, edges)
    zoo.add("SGConv cached", lambda: g.SGConv(D, C, K=2, cached=True), lambda: floats(N, D, grad=False), edges)
    zoo.add("SSGConv", lambda: g.SSGConv(D, C, alpha=0.1, K=3), x, edges)
    zoo.add("APPNP", lambda: g.APPNP(3, 0.1), x, edges)
    zoo.add("APPNP dropout", lambda: g.APPNP(3, 0.1, dropout=0.3), x, edges, weights)
    zoo.add("GCN2Conv", lambda: g.GCN2Conv(D, 0.5, 1.0, 1), x, lambda: floats(N, D, seed=8), edges)
    zoo.add(
        "GCN2Conv two weights",
        lambda: g.GCN2Conv(D, 0.5, 1.0, 2, shared_weights=False),
        x,
        lambda: floats(N, D, seed=8),
        edges,
        weights,
    )
    zoo.add("MixHopConv", lambda: g.MixHopConv(D, 8, powers=[0, 1, 2]), x, edges)
    zoo.add("DNAConv", lambda: g.DNAConv(D, heads=2, groups=2, dropout=0.2), lambda: floats(N, 3, D), edges)
    return zoo


def _geometric() -> list[Case]:
    zoo = Catalogue()
    zoo.add("PointNetConv", lambda: g.PointNetConv(mlp(D + 3, C), mlp(C, C)), x, positions, edges)
    zoo.add("GMMConv", lambda: g.GMMConv(D, C, dim=2, kernel_size=3), x, edges, pseudo)
    zoo.add(
        "GMMConv separate",
        lambda: g.GMMConv(D, C, dim=2, kernel_size=3, separate_gaussians=True, aggr="add"),
        x,
        edges,
        pseudo,
    )
    zoo.add(
        "PPFConv",
        lambda: g.PPFConv(mlp(D + 4, C), mlp(C, C)),
        x,
        positions,
        lambda: nn.functional.normalize(floats(N, 3, seed=10, grad=False), dim=1).requires_grad_(),
        edges,
    )
    zoo.add("PointTransformerConv", lambda: g.PointTransformerConv(D, C), x, positions, edges)
    zoo.add(
        "PointTransformerConv networks",
        lambda: g.PointTransformerConv(D, C, mlp(3, C, norm=True), mlp(C, C)),
        x,
        positions,
        edges,
    )
    zoo.add("PointGNNConv", lambda: g.PointGNNConv(mlp(D, 3), mlp(D + 3, C), mlp(C, D)), x, positions, edges)
    four = torch.stack([torch.arange(N).repeat_interleave(4), torch.randperm(4 * N) % N])
    zoo.add("MeshCNNConv", lambda: g.MeshCNNConv(D, C), x, four.clone)
    return zoo


def _relational() -> list[Case]:
    zoo = Catalogue()
    for name, layer in (("RGCNConv", g.RGCNConv), ("FastRGCNConv", g.FastRGCNConv)):
        zoo.add(name, lambda c=layer: c(D, C, 3), x, edges, types)
        zoo.add(f"{name} bases", lambda c=layer: c(D, C, 3, num_bases=2), x, edges, types)
        zoo.add(f"{name} blocks", lambda c=layer: c(D, C, 3, num_blocks=2, aggr="add"), x, edges, types)
        zoo.add(f"{name} embeddings", lambda c=layer: c(N, C, 3), lambda: None, edges, types)
    zoo.add("RGCNConv bipartite", lambda: g.RGCNConv(PAIR, C, 3), pair, bipartite, lambda: types(E_BIPARTITE))
    for relation in ("across-relation", "within-relation"):
        for mode in ("additive-self-attention", "multiplicative-self-attention"):
            zoo.add(
                f"RGATConv {relation} {mode.split('-')[0]}",
                lambda r=relation, m=mode: g.RGATConv(
                    D, 8, 3, attention_mechanism=r, attention_mode=m, heads=2, edge_dim=EDGE, dropout=0.2
                ),
                x,
                edges,
                types,
                attributes,
            )
    for mod in ("additive", "scaled", "f-additive", "f-scaled"):
        zoo.add(f"RGATConv {mod}", partial(_rgat, mod), x, edges, types)
    zoo.add("SignedConv first", lambda: g.SignedConv(D, 8, first_aggr=True), x, edges, lambda: edges(seed=20))
    zoo.add("SignedConv second", lambda: g.SignedConv(8, 8, first_aggr=False), x, edges, lambda: edges(seed=20))
    zoo.add("FiLMConv", lambda: g.FiLMConv(D, C, num_relations=3), x, edges, types)
    zoo.add("FiLMConv network", lambda: g.FiLMConv(D, C, nn=mlp(D, 2 * C), act=nn.Tanh(), aggr="max"), x, edges)
    for concat in (True, False):
        zoo.add(
            f"HEATConv {'concat' if concat else 'mean'}",
            lambda c=concat: g.HEATConv(D, C, 2, 3, 4, EDGE, 4, heads=2, concat=c, dropout=0.2),
            x,
            edges,
            lambda: types(N, 2),
            types,
            attributes,
        )
    return [*zoo, *_heterogeneous()]


def _rgat(mod: str) -> nn.Module:
    layer = g.RGATConv(D, 8, 3, num_bases=2, mod=mod)
    with torch.no_grad():
        for p in (layer.l1, layer.b1, layer.l2, layer.b2):  # left uninitialised by the layer
            p.fill_(0.5)
    return layer


KINDS = ["paper", "author"]
RELATIONS = [("author", "writes", "paper"), ("paper", "rev", "author"), ("paper", "cites", "paper")]
METADATA = (KINDS, RELATIONS)


def x_dict() -> dict[str, torch.Tensor]:
    return {"paper": x(), "author": x(40, seed=1)}


def edge_index_dict() -> dict[tuple[str, str, str], torch.Tensor]:
    return dict(zip(RELATIONS, (edges(40, N, 21), edges(N, 40, 22), edges(N, N, 23)), strict=True))


def _heterogeneous() -> list[Case]:
    zoo = Catalogue()
    zoo.add("HGTConv", lambda: g.HGTConv(D, C, METADATA, heads=2), x_dict, edge_index_dict)
    zoo.add("HANConv", lambda: g.HANConv(D, C, METADATA, heads=2, dropout=0.2), x_dict, edge_index_dict)
    for aggr in ("sum", "mean", "max", "cat"):
        zoo.add(f"HeteroConv {aggr}", lambda a=aggr: _hetero(a), x_dict, edge_index_dict)
    return zoo


def _hetero(aggr: str) -> nn.Module:
    layers = (g.SAGEConv(D, C), g.GATConv(D, 8, heads=2, add_self_loops=False), g.GCNConv(D, C))
    return g.HeteroConv(dict(zip(RELATIONS, layers, strict=True)), aggr=aggr)


def _mixed() -> list[Case]:
    zoo = Catalogue()
    zoo.add("GPSConv", lambda: g.GPSConv(D, g.GCNConv(D, D), heads=2, dropout=0.2), x, edges, batch)
    zoo.add(
        "GPSConv layer norm", lambda: g.GPSConv(D, g.SAGEConv(D, D), norm="layer_norm", act="gelu"), x, edges, batch
    )
    zoo.add("GPSConv performer", lambda: g.GPSConv(D, g.GCNConv(D, D), attn_type="performer"), x, edges, batch)
    zoo.add("GPSConv no conv", lambda: g.GPSConv(D, None, heads=2), x, edges)
    return zoo
