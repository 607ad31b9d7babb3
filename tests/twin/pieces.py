"""What the forward pass of a program is made of: each piece takes `h` (N, C) and gives `h` (N, C).

A piece is a few lines of Python. In them `@m` stands for an attribute of the model that is the piece's own, `@t` for a
local name of its own, and `@o` for the value of `h` at an earlier place, which the program chooses.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Lines of `forward`, and of `__init__` before it."""

    body: str
    init: str = ""
    draws: bool = False  # from torch's generator, in training mode


def _module(build: str, call: str = "h = @m(h)", draws: bool = False) -> Piece:
    return Piece(call, f"@m = {build}", draws)


def _conv(build: str, graph: str = "edges", draws: bool = False) -> Piece:
    return _module(build, f"h = @m(h, {graph})", draws)


LAYERS = {
    "linear": _module("nn.Linear(C, C)"),
    "linear without bias": _module("nn.Linear(C, C, bias=False)"),
    "linear in 3d": _module("nn.Linear(C, C)", "h = @m(h.view(2, -1, C)).view(-1, C)"),
    "linear in place in 3d": _module(
        "nn.Linear(C, C)", "@t = @m(h.view(2, -1, C))\n@t += @o.view(2, -1, C)\nh = @t.view(-1, C)"
    ),
    "linear narrow": Piece("h = @mb(@ma(h).relu())", "@ma = nn.Linear(C, 5)\n@mb = nn.Linear(5, C)"),
    "lazy linear": _module("nn.LazyLinear(C)"),
    "tied": Piece("h = F.linear(h, self.tied)"),
    "tied twice": Piece("h = F.linear(F.linear(h, self.tied).relu(), self.tied.t())"),
    "matmul": Piece("h = h @ @m", "@m = nn.Parameter(torch.randn(C, C) * .3)"),
    "bilinear form": Piece("h = (h @ @m) * @o", "@m = nn.Parameter(torch.randn(C, C) * .3)"),
    "attention": Piece("@t = (h @ @o.t() / 4).softmax(-1)\nh = @t @ h"),
    "multihead": _module(
        "nn.MultiheadAttention(C, 2, batch_first=True)", "@t = h.view(-1, 4, C)\nh = @m(@t, @t, @t)[0].reshape(-1, C)"
    ),
    "GRUCell": _module("nn.GRUCell(C, C)", "h = @m(h, @o)"),
    "LSTM": _module("nn.LSTM(C, C, batch_first=True)", "h = @m(h.view(-1, 4, C))[0].reshape(-1, C)"),
    "GRU": _module("nn.GRU(C, C)", "h = @m(h.view(4, -1, C))[0].reshape(-1, C)"),
    "jumping lstm": _module("pyg.JumpingKnowledge('lstm', C, 2)", "h = @m([h, @o])"),
    "SAGE": _conv("pyg.SAGEConv(C, C)"),
    "SAGE sparse": _conv("pyg.SAGEConv(C, C)", "adj"),
    "SAGE max": _conv("pyg.SAGEConv(C, C, aggr='max', normalize=True)"),
    "SAGE lazy": _conv("pyg.SAGEConv((-1, -1), C)"),
    "GCN": _conv("pyg.GCNConv(C, C)"),
    "GCN sparse": _conv("pyg.GCNConv(C, C)", "adj"),
    "GCN cached": _conv("pyg.GCNConv(C, C, cached=True)"),
    "GAT": _conv("pyg.GATConv(C, C // 2, heads=2)"),
    "GAT lazy": _conv("pyg.GATConv((-1, -1), C, add_self_loops=False)"),
    "GAT dropout": _conv("pyg.GATConv(C, C, dropout=.5)", draws=True),
    "GATv2": _conv("pyg.GATv2Conv(C, C)"),
    "GIN": _conv(
        "pyg.GINConv(nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, C)), train_eps=True)"
    ),
    "GraphConv": _conv("pyg.GraphConv(C, C)"),
    "Transformer": _conv("pyg.TransformerConv(C, C, beta=True)"),
    "PNA": _conv("pyg.PNAConv(C, C, ['mean', 'max', 'std'], ['identity'], torch.tensor([1, 2, 3]))"),
    "AGNN": _conv("pyg.AGNNConv()"),
    "FA": _module("pyg.FAConv(C)", "h = @m(h, @o, edges)"),
    "Cheb": _conv("pyg.ChebConv(C, C, 2)"),
    "ResGated": _conv("pyg.ResGatedGraphConv(C, C)"),
    "APPNP": _conv("pyg.APPNP(2, .1)"),
    "gated": _conv("pyg.GatedGraphConv(C, 2)"),
    "embedding": _module("nn.Embedding(40, C)", "h = h * @m(index % 40)"),
    "embedding bag": _module("nn.EmbeddingBag(40, C, mode='sum')", "h = h + @m((index % 40).view(-1, 1))"),
    "conv1d": _module("nn.Conv1d(4, 4, 3, padding=1)", "h = @m(h.view(-1, 4, C)).reshape(-1, C)"),
    "channels_last": _module(
        "nn.Conv2d(4, 4, 1)",
        "h = F.relu(@m(h.view(-1, 2, 2, 4).permute(0, 3, 1, 2))).permute(0, 2, 3, 1).reshape(-1, C)",
    ),
}

NORMS = {
    "BatchNorm1d": _module("nn.BatchNorm1d(C)"),
    "BatchNorm1d without statistics": _module("nn.BatchNorm1d(C, track_running_stats=False)"),
    "BatchNorm1d cumulative": _module("nn.BatchNorm1d(C, momentum=None)"),
    "BatchNorm": _module("pyg.BatchNorm(C)"),
    "InstanceNorm": _module("pyg.InstanceNorm(C, affine=True, track_running_stats=True)"),
    "InstanceNorm by graph": _module("pyg.InstanceNorm(C, affine=True, track_running_stats=True)", "h = @m(h, group)"),
    "InstanceNorm1d": _module(
        "nn.InstanceNorm1d(4, affine=True, track_running_stats=True)", "h = @m(h.view(-1, 4, C)).reshape(-1, C)"
    ),
    "InstanceNorm2d": _module(
        "nn.InstanceNorm2d(4, affine=True, track_running_stats=True)",
        "h = @m(h.view(1, 4, -1, C)).reshape(-1, C)",
    ),
    "LayerNorm": _module("nn.LayerNorm(C)"),
    "LayerNorm of PyG": _module("pyg.LayerNorm(C)"),
    "GraphNorm": _module("pyg.GraphNorm(C)", "h = @m(h, group)"),
    "PairNorm": _module("pyg.PairNorm()"),
    "GroupNorm": _module("nn.GroupNorm(4, C)"),
    "RMSNorm": _module("nn.RMSNorm(C)"),
    "MeanSubtractionNorm": _module("pyg.MeanSubtractionNorm()"),
    "DiffGroupNorm": _module("pyg.DiffGroupNorm(C, 3)"),
    "weight norm": _module("nn.utils.parametrizations.weight_norm(nn.Linear(C, C))"),
    "spectral norm": _module("nn.utils.parametrizations.spectral_norm(nn.Linear(C, C))"),
}

ELEMENTWISE = {
    "relu": Piece("h = h.relu()"),
    "F.relu": Piece("h = F.relu(h)"),
    "relu_": Piece("h = (h + 0.1).relu_()"),
    "nn.ReLU in place": Piece("h = @m(h + 0)", "@m = nn.ReLU(inplace=True)"),
    "leaky_relu": Piece("h = F.leaky_relu(h, .2)"),
    "prelu": _module("nn.PReLU()"),
    "elu": Piece("h = F.elu(h)"),
    "gelu": Piece("h = F.gelu(h)"),
    "silu": Piece("h = F.silu(h)"),
    "mish": Piece("h = F.mish(h)"),
    "sigmoid": Piece("h = h.sigmoid()"),
    "tanh": Piece("h = torch.tanh(h)"),
    "softplus": Piece("h = F.softplus(h)"),
    "exp": Piece("h = h.clamp(max=1).exp()"),
    "exp_": Piece("h = (h * .5).clamp_(max=1).exp_()"),
    "log": Piece("h = (h.abs() + .1).log()"),
    "sqrt": Piece("h = (h.square() + .1).sqrt()"),
    "rsqrt": Piece("h = h * (h.square().sum(-1, keepdim=True) + .1).rsqrt()"),
    "softmax": Piece("h = h.softmax(-1)"),
    "log of softmax": Piece("h = (h.softmax(-1) + 1e-14).log()"),
    "log_softmax": Piece("h = h.log_softmax(-1)"),
    "normalize": Piece("h = F.normalize(h, dim=-1)"),
    "over norm": Piece("h = h / (h.norm(dim=-1, keepdim=True) + .1)"),
    "over sum": Piece("h = h / (h.abs().sum(-1, keepdim=True) + .1)"),
    "zero rows over norm": Piece(
        "@t = h * (index % 4 != 0).view(-1, 1)\nh = @t / (@t.square().sum(-1, keepdim=True) + 1e-12).sqrt()"
    ),
    "logit of sigmoid": Piece("@t = (3 * h).sigmoid()\nh = @t.clamp(1e-4).log() - (1 - @t).clamp(1e-4).log()"),
    "log of sigmoid": Piece("h = (h.sigmoid() + 1e-12).log()"),
    "steep": Piece("h = 20 * h"),
    "distances": Piece("h = h * ((h - h[index]).square().sum(-1, keepdim=True) + 1e-6).sqrt()"),
    "distances of neighbours": Piece(
        "@t = h + 0.\n@tb = (@t - torch.where((index % 3 == 0).view(-1, 1), @t, @t[index]))\n"
        "h = .1 * h + (@tb.square().sum(-1, keepdim=True) + 1e-12).sqrt()"
    ),
    "pow": Piece("h = h.pow(2) - h ** 3 * .1"),
    "reciprocal": Piece("h = (h.square() + .5).reciprocal()"),
    "divide": Piece("h = h / (@o.square() + .5)"),
    "multiply": Piece("h = h * @o"),
    "multiply itself": Piece("h = h * h * .5"),
    "add": Piece("h = h + @o"),
    "subtract": Piece("h = h - .5 * @o"),
    "maximum": Piece("h = torch.maximum(h, @o)"),
    "where": Piece("h = torch.where(h > 0, h, @o)"),
    "masked_fill": Piece("h = h.masked_fill(h < 0, .5)"),
    "standardise": Piece("h = (h - h.mean(0)) / (h.std(0) + .1)"),
    "logsumexp": Piece("h = h - h.logsumexp(-1, keepdim=True)"),
    "cumprod": Piece("h = h.sigmoid().cumprod(-1)"),
    "sin": Piece("h = h.sin() + @o.cos()"),
    "glu": Piece("h = F.glu(torch.cat([h, @o], -1), -1)"),
    "double": Piece("h = (h.double() * @o.double()).sigmoid().float()"),
    "bfloat16": Piece("h = h.bfloat16().relu().float()"),
    "autocast linear": _module(
        "nn.Linear(C, C)", "with torch.autocast('cpu', torch.bfloat16):\n    h = @m(h).relu()\nh = h.float()"
    ),
}

SHAPES = {
    "relu of a transpose": Piece("h = F.relu(h.t()).t()"),
    "relu of a transpose, viewed": Piece("h = F.relu(h.t()).t().view(-1, C)"),
    "sigmoid of a transpose": Piece("h = torch.sigmoid(h.t()).t().view(-1, C)"),
    "leaky_relu of a permutation": Piece(
        "h = F.leaky_relu(h.view(-1, 4, 4).permute(2, 0, 1)).permute(1, 2, 0).view(-1, C)"
    ),
    "dropout of a transpose": Piece("h = F.dropout(h.t(), .3, self.training).t().view(-1, C)", draws=True),
    "dropout of relu of a transpose": Piece("h = F.dropout(F.relu(h.t()), .3, self.training).t()", draws=True),
    "gelu of a slice": Piece("h = torch.cat([F.gelu(h[:, ::2]), h[:, 1::2]], -1)"),
    "expand": Piece("h = h * h[:, :1].expand(-1, C)"),
    "expanded rows": Piece("h = h + F.relu(h.mean(0, keepdim=True).expand(N, C))"),
    "views": Piece("h = h.view(-1, 4, 4).transpose(1, 2).reshape(-1, C)"),
    "chunks": Piece("@t, @tb = h.chunk(2, -1)\nh = torch.cat([@t * @tb, @tb], -1)"),
    "unbind": Piece("h = torch.stack(h.unbind(0))"),
    "cat": Piece("h = torch.cat([h, @o])[index]"),
    "stack": Piece("h = torch.stack([h, @o]).mean(0)"),
    "gather rows": Piece("h = h[index]"),
    "gather rows times": Piece("h = h[index] * @o[index.flip(0)]"),
    "index_select": Piece("h = h.index_select(0, index)"),
    "gather": Piece("h = h.gather(1, (index % C).view(-1, 1).expand(-1, C)) * h"),
    "index_add": Piece("h = torch.zeros_like(h).index_add(0, index, h)"),
    "scatter_add_": Piece("h = h.new_zeros(N, C).scatter_add_(0, index.view(-1, 1).expand(-1, C), h)"),
    "scatter amax": Piece(
        "h = h.new_zeros(N, C).scatter_reduce(0, index.view(-1, 1).expand(-1, C), h, 'amax', include_self=False)"
    ),
    "scatter mean": Piece("h = torch.zeros_like(h).scatter_reduce_(0, index.view(-1, 1).expand(-1, C), h, 'mean')"),
    "softmax over neighbours": Piece(
        "@t = (h[edges[0]] * @o[edges[1]]).sum(-1).tanh()\n"
        "@t = softmax(@t, edges[1], num_nodes=N)\n"
        "h = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]] * @t.view(-1, 1))"
    ),
    "cumsum": Piece("h = h.cumsum(-1) * .3"),
    "einsum": Piece("h = torch.einsum('nij,njk->nik', h.view(-1, 4, 4), @o.view(-1, 4, 4)).reshape(-1, C)"),
    "sort": Piece("h = h.sort(-1).values"),
    "topk": Piece("h = h - h.topk(3, -1).values.mean(-1, keepdim=True)"),
    "max": Piece("h = h - h.max(-1, keepdim=True).values"),
    "amax": Piece("h = h - h.amax(0)"),
    "roll": Piece("h = h.roll(1, 0) + h.flip(1)"),
}

IN_PLACE = {
    "add_": Piece("h = h * 1\nh += @o"),
    "mul_": Piece("h = h + 1\nh.mul_(.5)"),
    "mul_ by a factor": Piece("h = h + 0\nh.mul_(@m)", "@m = nn.Parameter(torch.rand(C))"),
    "slice assigned": Piece("h = h.clone()\nh[:5] = @o[5:10]"),
    "column assigned": Piece("h = h + 0\nh[:, 0] = h[:, 1].detach() * 2"),
    "masked assigned": Piece("h = h.clone()\nh[h < -1] = 0"),
    "out allocated": Piece("@t = torch.zeros(N, C)\n@t[:20] = h[:20]\n@t[20:] = @o[20:]\nh = @t"),
    "after exp": Piece("@t = h.clamp(max=1)\n@tb = @t.exp()\n@t.mul_(2)\nh = @tb"),
    "after relu": Piece("@t = h + 0\n@tb = @t.relu()\n@t.zero_()\nh = @tb"),
    "after gathering": Piece("@t = h.detach() + 0\n@tb = @t[index]\n@t.mul_(3)\nh = h * @tb"),
    "after a product": Piece("@t = h.detach() * 2\n@tb = @t * 2\n@t.add_(1)\nh = @tb * h"),
    "addcmul_": Piece("h = h.clone().addcmul_(@o, @o, value=.5)"),
    "copy_": Piece("@t = torch.empty(N, C)\n@t.copy_(h)\nh = @t * @o"),
    "out=": Piece("@t = torch.empty(N, C)\nwith torch.no_grad():\n    torch.mul(h, 2, out=@t)\nh = h * @t"),
    "out= again": Piece(
        "@t = h.detach() + 1\n@tb = @t * 2\nwith torch.no_grad():\n    torch.mul(@t, 3, out=@t)\nh = h * @tb"
    ),
}

DROPOUTS = {
    "nn.Dropout": _module("nn.Dropout(.4)", "h = @m(h + 1e-3)", draws=True),
    "F.dropout": Piece("h = F.dropout(h, .4, self.training)", draws=True),
    "nn.Dropout in place": _module("nn.Dropout(.4, inplace=True)", "h = @m(h + 1e-3)", draws=True),
    "relu and dropout": Piece("h = F.dropout(h.relu(), .5, training=self.training)", draws=True),
    "dropout of features": Piece("h = h + F.dropout(x, .5, self.training)", draws=True),
    "AlphaDropout": _module("nn.AlphaDropout(.3)", draws=True),
    "noise": Piece("h = h + .1 * torch.randn_like(h)", draws=True),
    "random mask": Piece("h = h * (torch.rand(N, 1) < .8)", draws=True),
}

BUFFERS = {
    "running mean": Piece(
        "with torch.no_grad():\n    @m.mul_(.9).add_(h.mean(0), alpha=.1)\nh = h - @m",
        "self.register_buffer('@n', torch.zeros(C))",
    ),
    "running scale": Piece(
        "h = h * (@m * 1)\nwith torch.no_grad():\n    @m.mul_(.9)", "self.register_buffer('@n', torch.ones(N, C))"
    ),
    "counter": Piece("@m += 1\nh = h / @m", "self.register_buffer('@n', torch.zeros(()))"),
    "constant ones": Piece("h = h * @m", "self.register_buffer('@n', torch.ones(C))"),
    "batch norm by hand": Piece(
        "h = F.batch_norm(h, @mm, @mv, @mw, @mb, training=True)",
        "self.register_buffer('@nm', torch.zeros(C))\nself.register_buffer('@nv', torch.ones(C))\n"
        "@mw = nn.Parameter(torch.ones(C))\n@mb = nn.Parameter(torch.zeros(C))",
    ),
    "instance norm by hand": Piece(
        "h = F.instance_norm(h.t().unsqueeze(0), @mm, @mv, @mw, @mb).squeeze(0).t()",
        "self.register_buffer('@nm', torch.zeros(C))\nself.register_buffer('@nv', torch.ones(C))\n"
        "@mw = nn.Parameter(torch.ones(C))\n@mb = nn.Parameter(torch.zeros(C))",
    ),
    "memory": Piece(
        "@t = @m[index]\nh = h * @t\nwith torch.no_grad():\n    @m[index] = .5 * h",
        "self.register_buffer('@n', torch.randn(N, C))",
    ),
    "memory through data": Piece(
        "h = h * @m[index]\n@m.data[index[:9]] = .5", "self.register_buffer('@n', torch.randn(N, C))"
    ),
    "lists": Piece("@m.append(h.detach()[:3])\nh = h + @m[0].mean()", "@m = []"),
}

PARTS = {
    "sequential": _module("nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.BatchNorm1d(C))"),
    "module called twice": _module("nn.Linear(C, C)", "h = @m(@m(h).relu())"),
    "frozen": _module("nn.Linear(C, C).requires_grad_(False)"),
    "detached branch": Piece("h = h + (h.detach() * @o.detach()).sigmoid()"),
    "two branches, one unused": _module("nn.Linear(C, C)", "@t = @m(h).softmax(-1)\nh = h * 2"),
    "teacher": _module("nn.Linear(C, C)", "with torch.inference_mode():\n    @t = @m(h).sigmoid()\nh = h + @t"),
    "teacher, no_grad": _module("nn.Linear(C, C)", "with torch.no_grad():\n    @t = @m(h).sigmoid()\nh = h * @t"),
    "vmap": Piece("h = torch.vmap(lambda r: r * 2 + 1)(h)"),
    "tensor hook": Piece("h = h * 1\nh.register_hook(lambda g: 2 * g)"),
    "retain_grad": Piece("h = h * 2\nh.retain_grad()"),
    "error caught": Piece("try:\n    @m(h.sigmoid())\nexcept ValueError:\n    h = h + 1", "@m = Boom(ValueError)"),
    "interrupt caught": Piece(
        "try:\n    @m(h)\nexcept KeyboardInterrupt:\n    h = h + 1",
        "@m = nn.Sequential(nn.Linear(C, C), Boom(KeyboardInterrupt))",
    ),
    "decompressed within": Piece("import dibit\ndibit.decompress(self)\nh = h.sigmoid()"),
    "hooks removed within": Piece(
        "for hooks in (self._forward_hooks, self._forward_hooks_with_kwargs, self._forward_hooks_always_called):\n"
        "    hooks.clear()\nh = h.sigmoid()"
    ),
    "own function": Piece("h = Doubled.apply(h, @o)"),
    "own function, in place": Piece("h = Shifted.apply(h + 0)"),
    "local device": Piece("with torch.device('cpu'):\n    h = h * torch.ones(N, C) + torch.zeros(C)"),
    "local saved-tensor hooks": Piece("with torch.autograd.graph.save_on_cpu():\n    h = (h * @o).sigmoid()"),
    "func.grad": Piece("h = h + torch.func.grad(lambda w: (w * w).sum())(h.detach())"),
}

ENDS_COMPRESSION = ("decompressed within", "hooks removed within")
PIECES = LAYERS | NORMS | ELEMENTWISE | SHAPES | IN_PLACE | DROPOUTS | BUFFERS | PARTS
FAMILIES = (LAYERS, NORMS, ELEMENTWISE, SHAPES, IN_PLACE, DROPOUTS, BUFFERS, PARTS)
