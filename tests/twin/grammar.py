"""Programs: small trees that print as runnable Python, and the hypothesis strategies that draw them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from tests.twin import events
from tests.twin.pieces import FAMILIES, PIECES

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
    """Ends the first forward pass."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, h):
        error, self.error = self.error, None
        if error is not None:
            raise error()
        return h
'''

LOSSES = {
    "readout": "(y * READOUT[: len(y)].to(y.dtype)).sum()",
    "square": "y.square().mean() * 9",
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
    "backward in a thread": "y = run(x)\nCHANGE\nt = threading.Thread(target=loss(y).backward)\nt.start()\nt.join()",
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

WRAPS = ("checkpoint", "reentrant", "no_grad", "inference", "autocast")
ERRORS = ("ValueError", "KeyboardInterrupt", "SystemExit", "GeneratorExit")
# What only the compressed run does around the program: `tests.twin.run`.
AROUND = ("", "", "", "", "track", "batch", "held", "averaged", "copied", "by name", "again")
RECIPES = ("default", "default", "default", "small", "exact", "iexact", "8 bits", "rows", "seed")


@dataclass(frozen=True)
class Op:
    """A piece, `back` places after the value it is combined with, inside something."""

    piece: str
    back: int = 1
    wrap: str = ""

    kinds = ("piece",)

    @property
    def draws(self) -> bool:
        return PIECES[self.piece].draws

    def init(self) -> str:
        return PIECES[self.piece].init

    def body(self) -> str:
        return PIECES[self.piece].body


@dataclass(frozen=True)
class Read:
    """A tensor of someone else's, read by a copying operation, and changed: in the pass, at its end, after it."""

    source: str
    read: str
    use: str
    change: str
    when: str  # "now", "end", "after" or "never"
    back: int = 1
    wrap: str = ""
    draws = False

    def init(self) -> str:
        return "@m = nn.Linear(C, C)" if "@m" in events.USES[self.use] else ""

    def body(self) -> str:
        source = events.SOURCES[self.source][0]
        lines = [] if self.source != "of the pass" else ["made = torch.rand(N, C)"]
        lines += [f"@r = {events.READS[self.read].format(source)}", events.USES[self.use]]
        if self.when == "now":
            lines += ["@s = " + source, _on("@s", self.change)]
        return "\n".join(lines)

    def at_end(self) -> str:
        source = events.SOURCES[self.source][0]
        return f"@s = {source}\n{_on('@s', self.change)}" if self.when == "end" else ""

    def after(self) -> str:
        source = events.SOURCES[self.source][1]
        return f"@s = {source}\n{_on('@s', self.change)}" if self.when == "after" and source else ""


@dataclass(frozen=True)
class Index:
    """Integers of someone else's, read by a copying operation, and changed `when`."""

    source: str
    read: str
    use: str
    change: str
    when: str
    back: int = 1
    wrap: str = ""
    draws = False

    def init(self) -> str:
        layer = {"embedding": "@m = nn.Embedding(N, C)", "conv": "@m = pyg.SAGEConv(C, C)"}
        return layer.get(self.use, "")

    def body(self) -> str:
        source = events.INDEX_SOURCES[self.source]
        read = f"@r = {events.INDEX_READS[self.read].format(source)}\n{events.INDEX_USES[self.use]}"
        return f"{read}\n{self._change()}" if self.when == "now" else read

    def at_end(self) -> str:
        return self._change() if self.when == "end" else ""

    def after(self) -> str:
        return self._change().replace("self.", "model.") if self.when == "after" else ""

    def _change(self) -> str:
        return f"@s = {events.INDEX_SOURCES[self.source]}\n{_on('@s', self.change, events.INDEX_CHANGES)}"


@dataclass(frozen=True)
class Fill:
    """Fresh memory, filled where torch does not see it."""

    make: str
    fill: str
    use: str
    back: int = 1
    wrap: str = ""
    draws = False

    def init(self) -> str:
        return "@m = nn.Linear(C, C)" if "@m" in events.FILLED_USES[self.use] else ""

    def body(self) -> str:
        return f"@t = {events.MAKES[self.make]}\n{events.FILLS[self.fill]}\n{events.FILLED_USES[self.use]}"


@dataclass(frozen=True)
class Twins:
    """Two constants of the same content; the one that no gradient needs is written."""

    content: str
    change: str
    back: int = 1
    wrap: str = ""
    draws = False

    def init(self) -> str:
        return "@m = nn.Parameter(torch.ones(C))"

    def body(self) -> str:
        v, u = events.TWINS[self.content]
        if self.content in ("ones", "zeros", "a weight's copy"):
            use = "@w = h.detach().requires_grad_() * @v\nh = h * @u + h"
        elif self.content == "booleans":
            use = "@w = h.detach().requires_grad_()[@v]\n@w = h[@u]\nh = h + @w.mean(0)"
        else:
            flat = ".view(-1)"
            use = f"@w = h.detach().requires_grad_()[@v{flat}]\nh = h + h[@u{flat}]"
        change = events.TWIN_CHANGES[self.change]
        if self.content == "booleans":
            change = change.replace("mul_(3)", "logical_not_()")
        return f"@v, @u = {v}, {u}\n{use}\n{change}"


@dataclass(frozen=True)
class Program:
    """A model, what happens to it, and what is compressed how."""

    ops: tuple[Op | Read | Index | Fill | Twins, ...]
    scenario: str = "once"
    loss: str = "readout"
    output: str = "tensor"
    recipe: str = "default"
    around: str = ""
    features_need_gradient: bool = False
    first: str = "linear"  # what x goes through before the rest
    n: int = 60
    error: str = "ValueError"
    boom: int = 0
    graph_given: bool = False  # as arguments, not as globals
    moved: bool = False  # parameters are not as they were initialised

    @property
    def draws(self) -> bool:
        return any(op.draws for op in self.ops)

    @property
    def low(self) -> bool:
        """Whether some of it is computed in bfloat16."""
        return any(word in str(self) for word in ("bfloat16", "autocast"))

    @property
    def changes(self) -> bool:
        """Whether memory changes that a pass has read: plain may then be wrong itself."""
        return any(not isinstance(op, Op) for op in self.ops) or self.scenario in (
            "step before backward",
            "weights loaded after",
        )

    def events(self) -> Iterator[str]:
        """For the count of what was tried."""
        yield f"scenario: {self.scenario}"
        yield f"recipe: {self.recipe}"
        if self.around:
            yield f"around: {self.around}"
        for op in self.ops:
            if op.wrap:
                yield f"inside: {op.wrap}"
            match op:
                case Op(piece):
                    yield f"piece: {piece}"
                case Read():
                    yield f"read: {op.source}"
                    yield f"read by: {op.read}"
                    if op.when != "never":
                        yield f"changed ({op.when}): {op.change}"
                case Index():
                    yield f"integers read: {op.source}, {op.read}"
                    if op.when != "never":
                        yield f"integers changed ({op.when}): {op.change}"
                case Fill():
                    yield f"filled: {op.make} by {op.fill}"
                case Twins():
                    yield f"equal constants: {op.content}, {op.change}"

    def source(self) -> str:
        """The program as a module of its own: `Net`, `use`."""
        init, forward, between = _Lines(8), _Lines(8), _Lines(4)
        needed = {max(0, at - op.back) for at, op in enumerate(self.ops) if "@o" in op.body()}
        ends = []
        for at, op in enumerate(self.ops):
            if at in needed:
                forward.add(f"o{at} = h")
            other = f"o{max(0, at - op.back)}"
            if self.scenario == "interrupted" and at == min(self.boom, len(self.ops) - 1):
                forward.add("h = self.boom(h)")
            init.add(_named(op.init(), at, other))
            _wrapped(forward, op, at, other)
            if isinstance(op, Read | Index):
                ends.append(_named(op.at_end(), at, other))
                between.add(_named(op.after(), at, other))
        for lines in ends:
            forward.add(lines)
        body = SCENARIOS[self.scenario].replace("CHANGE\n", between.dedented())
        text = "\n".join(init.lines) + "\n".join(forward.lines) + body + self.output
        return "\n".join(
            [
                PREAMBLE.format(n=self.n),
                "",
                "class Net(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                "        self.first = " + FIRST[self.first],
                *(["        self.tied = nn.Parameter(torch.randn(C, C) * .3)"] if "self.tied" in text else []),
                *(["        self.register_buffer('buffer', torch.randn(N, C))"] if ".buffer" in text else []),
                *(["        self.table = nn.Parameter(torch.randn(N, C))"] if ".table" in text else []),
                *(["        self.attribute = torch.randn(N, C)"] if ".attribute" in text else []),
                *(["        self.held = [torch.randn(N, C)]"] if ".held" in text else []),
                *(["        self.register_buffer('order', index.clone())"] if ".order" in text else []),
                *(["        self.several = [index.clone()]"] if ".several" in text else []),
                *([f"        self.boom = Boom({self.error})"] if ".boom" in text else []),
                *init.lines,
                "",
                "    def forward(self, x, extra, edges=edges, index=index, adj=adj):",
                "        h = self.first(x)" if self.first != "SAGE" else "        h = self.first(x, edges)",
                *(["        first = h"] if "first" in OUTPUTS[self.output] else []),
                *forward.lines,
                f"        return {OUTPUTS[self.output]}",
                "",
                "",
                "def loss(y):",
                "    while not isinstance(y, torch.Tensor):",
                "        y = next(iter(y.values())) if isinstance(y, dict) else y[0]",
                "    y = y if y.dtype == torch.float32 else y.float()",
                f"    return {LOSSES[self.loss]}",
                "",
                "",
                "def use(model, x, extra, look):",
                "    def run(x):",
                f"        return look(model(x, extra{', edges, index, adj' if self.graph_given else ''}))",
                "",
                textwrap.indent(body, "    "),
                "",
            ]
        )


FIRST = {
    "linear": "nn.Linear(C, C)",
    "lazy": "nn.LazyLinear(C)",
    "SAGE": "pyg.SAGEConv(C, C)",
    "nothing": "nn.Identity()",
}


class _Lines:
    def __init__(self, indent: int) -> None:
        self.lines: list[str] = []
        self.indent = " " * indent

    def add(self, text: str) -> None:
        self.lines += [self.indent + line for line in text.splitlines()]

    def dedented(self) -> str:
        return "".join(line[len(self.indent) :] + "\n" for line in self.lines)


def _on(name: str, change: str, changes: dict[str, str] = events.CHANGES) -> str:
    """A change, of the tensor by this name."""
    return re.sub(r"\bt\b(?=[.,\[\]) ])", name, changes[change])


def _named(text: str, at: int, other: str) -> str:
    text = text.replace("@nm", f"p{at}m").replace("@nv", f"p{at}v").replace("@n", f"p{at}")
    for mark, name in (("@m", f"self.p{at}"), ("@o", other)):
        text = text.replace(mark, name)
    for mark in "tursvw":
        text = text.replace("@" + mark, f"{mark}{at}")
    return text


def _wrapped(forward: _Lines, op: Op | Read | Index | Fill | Twins, at: int, other: str) -> None:
    body = _named(op.body(), at, other)
    inner = textwrap.indent(body, "    ")
    match op.wrap:
        case "checkpoint" | "reentrant":
            more = f", {other}" if other in body else ""
            forward.add(f"def part{at}(h{more}):\n{inner}\n    return h")
            forward.add(f"h = checkpoint(part{at}, h{more}, use_reentrant={op.wrap == 'reentrant'})")
        case "no_grad":
            forward.add(f"before{at} = h\nwith torch.no_grad():\n{inner}\nh = h + before{at}")
        case "inference":
            forward.add(f"before{at} = h\nwith torch.inference_mode():\n{inner}\nh = before{at} + h")
        case "autocast":
            forward.add(f"with torch.autocast('cpu', torch.bfloat16):\n{inner}\nh = h.float()")
        case _:
            forward.add(body)


# -- strategies ---------------------------------------------------------------------------------------------------


def _of(table: dict) -> st.SearchStrategy[str]:  # type: ignore[type-arg]
    return st.sampled_from(sorted(table))


_wraps = st.sampled_from(("",) * 16 + WRAPS)
_back = st.integers(0, 3)
_pieces = st.one_of([_of(family) for family in FAMILIES])
_ops = st.builds(Op, _pieces, _back, _wraps)
_reads = st.builds(
    Read,
    _of(events.SOURCES),
    _of(events.READS),
    _of(events.USES),
    _of(events.CHANGES),
    st.sampled_from(("after", "after", "after", "end", "now", "never")),
    _back,
)
_indices = st.builds(
    Index,
    _of(events.INDEX_SOURCES),
    _of(events.INDEX_READS),
    _of(events.INDEX_USES),
    _of(events.INDEX_CHANGES),
    st.sampled_from(("after", "after", "after", "end", "now", "never")),
    _back,
)
_fills = st.builds(Fill, _of(events.MAKES), _of(events.FILLS), _of(events.FILLED_USES))
_twins = st.builds(Twins, _of(events.TWINS), _of(events.TWIN_CHANGES))
_elements = st.one_of(_ops, _ops, _ops, _ops, _ops, _reads, _reads, _indices, _fills, _twins)


@st.composite
def programs(draw: st.DrawFn, most: int = 5) -> Program:
    """A program of up to `most` pieces."""
    calm = draw(st.booleans())  # nothing of someone else's memory
    ops = tuple(draw(st.lists(_ops if calm else _elements, min_size=1, max_size=most)))
    scenario = draw(st.sampled_from(("once",) * 12 + tuple(SCENARIOS)))
    recipe = draw(st.sampled_from(RECIPES))
    return sensible(
        Program(
            ops,
            scenario,
            loss=draw(_of(LOSSES)),
            output=draw(st.sampled_from(("tensor",) * 4 + tuple(OUTPUTS))),
            recipe=recipe,
            around=draw(st.sampled_from(AROUND)),
            features_need_gradient=draw(st.booleans()),
            first=draw(st.sampled_from(("linear",) * 4 + tuple(FIRST))),
            n=draw(st.sampled_from((60, 60, 60, 400))),
            error=draw(st.sampled_from(ERRORS)),
            boom=draw(st.integers(0, 4)),
            moved=draw(st.booleans()),
            graph_given=draw(st.booleans()),
        )
    )


def sensible(program: Program) -> Program:
    """Without what cannot be compared: two threads that share torch's generator or running statistics."""
    if program.scenario == "two threads":
        drop = {name for name in PIECES if PIECES[name].draws or "buffer" in PIECES[name].init or "Norm" in name}
        drop |= {"GIN", "sequential", "lists", "spectral norm", "GCN cached"}
        ops = tuple(op for op in program.ops if isinstance(op, Op) and op.piece not in drop and "lazy" not in op.piece)
        program = replace(program, ops=ops or (Op("relu"),), first="linear")
    if program.first == "nothing" and not program.features_need_gradient:
        program = replace(program, features_need_gradient=True)
    if (
        program.recipe == "seed"
        and program.draws
        and not all(op.piece in ("nn.Dropout", "nn.Dropout in place") for op in program.ops if op.draws)
    ):
        program = replace(program, recipe="default")
    return program
