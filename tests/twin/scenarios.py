"""The parts of a program that are text: what precedes the model, losses, outputs, and ways to use a model."""

from __future__ import annotations

PREAMBLE = '''\
import contextlib, copy, ctypes, threading
import numpy as np, torch, torch.nn.functional as F, torch_geometric.nn as pyg
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.utils import softmax, to_torch_csr_tensor
from tests.twin.help import fill_by_numba, left, plain_step, step

N, C = {n}, 16
_rng = torch.Generator().manual_seed(3)
edges = torch.randint(N, (2, 6 * N), generator=_rng)
adj = to_torch_csr_tensor(edges.unique(dim=1), size=(N, N))
index = torch.randint(N, (N,), generator=_rng)
group = torch.arange(N) * 3 // N
OUTSIDE = torch.randn(N, C, generator=_rng)
READOUT = torch.randn(N, C, generator=_rng)


class Returned(torch.autograd.Function):
    """h * t, of which t comes from outside."""

    @staticmethod
    def forward(ctx, h, t):
        ctx.save_for_backward(t)
        return t

    @staticmethod
    def backward(ctx, dy):
        return dy * .5, None


class Doubled(torch.autograd.Function):
    """2 * h * o, by hand."""

    @staticmethod
    def forward(ctx, h, o):
        ctx.save_for_backward(h, o)
        return 2 * h * o

    @staticmethod
    def backward(ctx, dy):
        h, o = ctx.saved_tensors
        return 2 * o * dy, 2 * h * dy


class Shifted(torch.autograd.Function):
    """3 * h, in place."""

    @staticmethod
    def forward(ctx, h):
        ctx.mark_dirty(h)
        return h.mul_(3)

    @staticmethod
    def backward(ctx, dy):
        return 3 * dy


class Boom(nn.Module):
    """Ends the first forward pass of each thread."""

    def __init__(self, error):
        super().__init__()
        self.error, self.ended = error, set()

    def forward(self, h):
        thread = threading.current_thread().name
        if thread not in self.ended:
            self.ended.add(thread)
            raise self.error()
        return h
'''

LOSSES = {
    "readout": "(y * READOUT[: len(y)].to(y.dtype)).sum()",
    "square": "(y.square() * (1 + READOUT[: len(y)].to(y.dtype))).mean() * 9",  # of no norm is it a constant
    "cross_entropy": "F.cross_entropy(y, index[: len(y)] % C)",
    "rows": "F.cross_entropy(y[: N // 3], index[: N // 3] % C)",
    "bce": "F.binary_cross_entropy(y if bool(((y >= 0) & (y <= 1)).all()) else y.sigmoid(), "
    "(READOUT[: len(y)] > 0).float())",
    "distance": "((y - y[index[: len(y)] % len(y)]).square().sum(-1) + 1e-2).sqrt().mean()",
    "similarity": "F.cosine_similarity(y, READOUT[: len(y)]).sum()",
}

OUTPUTS = {
    "tensor": "h",
    "dictionary": "{'y': h, 'more': [h.detach(), (index,)]}",
    "tuple": "(h, first)",
    "log_softmax": "h.log_softmax(-1)",
    "sigmoid": "(4 * h).sigmoid()",
    "softmax": "h.softmax(-1)",
    "selection": "h[: N // 2]",
}

# How the model is used. `CHANGE` stands for what changes between the passes.
SCENARIOS = {
    "once": "y = run(x)\nCHANGE\nloss(y).backward()",
    "twice forward": "y = run(x)\nz = run(x * .5)\nCHANGE\n(loss(y) + loss(z)).backward()",
    "two losses": "y = run(x)\nloss(y).backward(retain_graph=True)\nCHANGE\n(loss(y) * .5).backward()",
    "retained": "y = run(x)\nCHANGE\ntotal = loss(y)\ntotal.backward(retain_graph=True)\ntotal.backward()",
    "skipped": "run(x)\ny = run(x)\nCHANGE\nloss(y).backward()",
    "eval before": "model.eval()\nrun(x)\nmodel.train()\ny = run(x)\nCHANGE\nloss(y).backward()",
    "eval after": "y = run(x)\nmodel.eval()\nrun(x)\nmodel.train()\nCHANGE\nloss(y).backward()",
    "no_grad before": "with torch.no_grad():\n    run(x)\ny = run(x)\nCHANGE\nloss(y).backward()",
    "no_grad between": "y = run(x)\nwith torch.no_grad():\n    run(x)\nCHANGE\nloss(y).backward()",
    "inference between": "y = run(x)\nwith torch.inference_mode():\n    run(x.detach() + 1)\nCHANGE\n"
    "loss(y).backward()",
    "two steps": "loss(run(x)).backward()\nstep(torch.optim.SGD, *model.parameters())\ny = run(x)\nCHANGE\n"
    "loss(y).backward()",
    "step before backward": "y = run(x)\nCHANGE\nstep(torch.optim.Adam, *[p for n, p in model.named_parameters() "
    "if n in ('table', 'untouched')])\nloss(y).backward()",
    "reused graph": "y = run(x)\nCHANGE\nloss(y).backward()\nloss(y).backward()",
    "whole checkpoint": "y = look(checkpoint(model, x, extra, use_reentrant=False))\nCHANGE\nloss(y).backward()",
    "whole checkpoint, reentrant": ""
    "y = look(checkpoint(model, x, extra, use_reentrant=True))\nCHANGE\nloss(y).backward()",
    "torch.autograd.grad": "y = run(x)\nCHANGE\nps = [p for p in model.parameters() if p.requires_grad]\n"
    "for p, g in zip(ps, torch.autograd.grad(loss(y), ps, allow_unused=True)):\n    p.grad = g",
    "other sizes between": "y = run(x)\nx2 = x.detach()[:].clone()\nrun(x2)\nCHANGE\nloss(y).backward()",
    "deep copy between": "y = run(x)\nother = copy.deepcopy(model)\nlook(other(x, extra))\nCHANGE\nloss(y).backward()",
    "zero_grad between": "loss(run(x)).backward()\nmodel.zero_grad()\ny = run(x)\nCHANGE\nloss(y).backward()",
    "interrupted": "try:\n    run(x)\nexcept BaseException as error:\n    look(type(error).__name__)\n"
    "look(repr(left()))\nlook(plain_step())\nmodel.boom.error = None\n"
    "y = run(x)\nCHANGE\nloss(y).backward()\nlook(plain_step())",
    "two threads": "ys = [None, None]\n"
    "def work(i):\n    ys[i] = model(x, extra)\n"
    "threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]\n"
    "[t.start() for t in threads]\n[t.join() for t in threads]\n[look(y) for y in ys]\nCHANGE\n"
    "sum(loss(y) for y in ys).backward()",
    "backward in a thread": "from concurrent.futures import ThreadPoolExecutor\ny = run(x)\nCHANGE\n"
    "with ThreadPoolExecutor(1) as pool:\n    pool.submit(loss(y).backward).result()",
    "hooked": "handle = model.register_forward_hook(lambda m, a, y: (look(y), None)[1])\ny = run(x)\n"
    "handle.remove()\nCHANGE\nloss(y).backward()",
    "float64": "model.double()\nextra = extra.double()\ny = run(x.double())\nCHANGE\nloss(y).backward()",
    "bfloat16": "model.bfloat16()\nextra = extra.bfloat16()\ny = run(x.bfloat16())\nCHANGE\nloss(y).backward()",
    "autocast": "with torch.autocast('cpu', torch.bfloat16):\n    y = run(x)\nCHANGE\nloss(y).backward()",
    "save_on_cpu": "with torch.autograd.graph.save_on_cpu():\n    y = run(x)\nCHANGE\nloss(y).backward()",
    "hooks disabled": "with torch.autograd.graph.disable_saved_tensors_hooks('not here'):\n    y = run(x)\nCHANGE\n"
    "loss(y).backward()",
    "anomaly": "with torch.autograd.detect_anomaly(check_nan=False):\n    y = run(x)\n    loss(y).backward()",
    "full backward hook": "handle = model.first.register_full_backward_hook(lambda m, a, b: tuple(g if g is None else "
    "2 * g for g in a))\ny = run(x)\nCHANGE\nloss(y).backward()\nhandle.remove()",
    "functional_call": "other = {n: p * 1.5 for n, p in model.named_parameters()}\n"
    "y = look(torch.func.functional_call(model, other, (x, extra)))\nCHANGE\nloss(y).backward()",
    "default device": "with torch.device('cpu'):\n    y = run(x)\nCHANGE\nloss(y).backward()",
    "penalty": "y = run(x)\nCHANGE\n(loss(y) + .1 * sum(p.square().sum() for p in model.parameters())).backward()",
    "state loaded between": "state = copy.deepcopy(model.state_dict())\nloss(run(x)).backward()\n"
    "model.load_state_dict(state)\ny = run(x)\nCHANGE\nloss(y).backward()",
    "weights loaded after": "state = {n: v * .5 for n, v in model.state_dict().items() if v.is_floating_point() and "
    "n in ('table', 'buffer')}\ny = run(x)\nmodel.load_state_dict(state, strict=False)\nloss(y).backward()",
    "accumulated": "total = 0\nfor i in range(3):\n    total = total + loss(run(x))\nCHANGE\ntotal.backward()",
}

# What the features go through first.
FIRST = {
    "linear": "nn.Linear(C, C)",
    "lazy": "nn.LazyLinear(C)",
    "SAGE": "pyg.SAGEConv(C, C)",
    "nothing": "nn.Identity()",
}
