"""Programs: small trees that print as runnable Python."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from tests.twin import events
from tests.twin.pieces import PIECES
from tests.twin.scenarios import FIRST, LOSSES, OUTPUTS, PREAMBLE, SCENARIOS


@dataclass(frozen=True)
class Op:
    """A piece, `back` places after the value it is combined with, inside something."""

    piece: str
    back: int = 1
    wrap: str = ""

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
