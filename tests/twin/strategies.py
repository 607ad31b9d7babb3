"""What hypothesis draws: programs of a few pieces."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from tests.twin import events
from tests.twin.grammar import Fill, Index, Op, Program, Read, Twins
from tests.twin.pieces import FAMILIES, PIECES
from tests.twin.run import CONFIGS
from tests.twin.scenarios import FIRST, LOSSES, OUTPUTS, SCENARIOS

WRAPS = ("checkpoint", "reentrant", "no_grad", "inference", "autocast")
ERRORS = ("ValueError", "KeyboardInterrupt", "SystemExit", "GeneratorExit")
# What only the compressed run does around the program: `tests.twin.run`.
AROUND = ("", "", "", "", "track", "batch", "held", "averaged", "copied", "by name", "again")
RECIPES = ("default", "default", *CONFIGS)


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
def programs(draw: st.DrawFn, most: int = 5, recipe: str = "") -> Program:
    """A program of up to `most` pieces, under one recipe if that is given."""
    calm = draw(st.booleans())  # nothing of someone else's memory
    ops = tuple(draw(st.lists(_ops if calm else _elements, min_size=1, max_size=most)))
    scenario = draw(st.sampled_from(("once",) * 12 + tuple(SCENARIOS)))
    recipe = recipe or draw(st.sampled_from(RECIPES))
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
