"""Tests replace no part of Dibit: they use what it offers for that (a seam), or look from outside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# What a test may replace for a while: thresholds and tables that make a small case run as a large one does, sizes and
# probes of a machine, what takes a command minutes, and the launch of a GPU's kernels. Before you add to them, look at
# the seams that Dibit has: rules of one's own, `dispatch.using_backend`, `layout.parts_of`,
# `keeper.inputs_kept_exactly`, `seed_stream.forget`, `seed_stream.as_if_captured` and `positive.without_looking`; and
# at `tests.watched`, which replaces nothing.
SEAMS = """
    dibit.doctor.trial dibit.encode dibit.recipe
    dibit.codec.fingerprint.MAX_HASHED_BYTES dibit.codec.backends.triton.launch.run
    dibit.edges.functions.MIN_DEFERRED_ELEMENTS dibit.edges.programs.CHUNK dibit.edges.programs.linear_by_rows
    dibit.rules.large_outputs.MIN_BYTES
    dibit.reproduce.tuned.CELLS dibit.reproduce.tuned.FIRST dibit.reproduce.plan.Reproduction.graphs
    dibit.reproduce.command.measure_section dibit.reproduce.distribution.measure dibit.reproduce.parallel.start
    dibit.rules.RULES dibit.recipes.RECIPES
    dibit.bench.command.measure dibit.bench.show.show
    dibit.bench.workload.TrainingStep.__call__ dibit.bench.workload.TrainingStep.forward
    dibit.experiments.data.load_raw
    dibit.train.data.graph.memory_bytes dibit.train.data.npz.memory_bytes dibit.train.data.split_file.memory_bytes
    dibit.train.data.named.require dibit.train.loop.measure dibit.train.loop.train_one dibit.train.presets.FOLDER
    dibit.train.task.Task.evaluate dibit.train.task.Task.noise dibit.train.task.Task.scaler dibit.train.task.Task.step
    dibit.tools.errors.__file__
"""
DOORS = "dibit._torch.private."  # closed by tests, to see what is there without an API of torch
ALLOWED = {*SEAMS.split()}


def imported(tree: ast.Module) -> dict[str, str]:
    """What the names of a file's imports from Dibit stand for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole, root = alias.name, alias.name.partition(".")[0]
                found[alias.asname or root] = whole if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return {name: whole for name, whole in found.items() if whole.split(".")[0] == "dibit"}


def replaced(text: str) -> Iterator[str]:
    """Dotted names of all that a test file puts something else in the place of."""
    tree = ast.parse(text)
    known = imported(tree)

    def dotted(node: ast.expr) -> str:
        name, *rest = ast.unparse(node).split(".")
        return ".".join((known.get(name, name), *rest))

    def table(node: ast.expr) -> str:
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else dotted(node)

    def targets(node: ast.AST) -> Iterator[str]:
        called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
        called = "" if called == "dict" and isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else called
        if isinstance(node, ast.Call) and called in ("setitem", "delitem", "dict") and node.args:
            yield table(node.args[0])
        elif isinstance(node, ast.Call) and called in ("setattr", "delattr", "object", "patch"):
            first, *rest = (
                part.value if isinstance(part, ast.Constant) else part for part in (*node.args[:2], None, None)
            )
            owner = first if isinstance(first, str) else dotted(first) if isinstance(first, ast.expr) else ""
            yield owner if isinstance(first, str) else f"{owner}.{rest[0]}"
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            given = node.targets if isinstance(node, ast.Assign) else [node.target]
            flat = [part for each in given for part in getattr(each, "elts", [each])]
            yield from (dotted(part) for part in flat if isinstance(part, ast.Attribute))
            tables = (table(part.value) for part in flat if isinstance(part, ast.Subscript))
            yield from (name for name in tables if "(" not in name)  # else what an object holds

    for node in ast.walk(tree):
        yield from (name for name in targets(node) if name.startswith("dibit.") and not name.startswith(DOORS))


FILES = sorted(TESTS.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_but_seams_is_replaced(path: Path) -> None:
    found = sorted(set(replaced(path.read_text())) - ALLOWED)
    assert not found, f"{found} are no seams: look from outside, or use one of Dibit's seams"


def test_what_is_allowed_is_done() -> None:
    done = {name for path in FILES for name in replaced(path.read_text())}
    assert done == ALLOWED


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from dibit.engine.keeper import Keeper\nmonkeypatch.setattr(Keeper, '_encode', f)", "keeper.Keeper._encode"),
        ("from dibit.engine import keeper as k\nk.Keeper.keep = f", "keeper.Keeper.keep"),
        ("import dibit.engine.keeper\ndibit.engine.keeper.LEAST, x = 1, 2", "keeper.LEAST"),
        ("patch.setattr('dibit.engine.keeper.LEAST', 1)", "keeper.LEAST"),
        ("from dibit.engine.keeper import TABLE\npatch.setitem(TABLE, 1, 2)", "keeper.TABLE"),
        ("from dibit.engine.keeper import TABLE\nTABLE[1] = 2", "keeper.TABLE"),
        ("from dibit.engine.keeper import TABLE\nwith mock.patch.dict(TABLE, {}): pass", "keeper.TABLE"),
        ("from dibit.engine import keeper\nkeeper.COUNT += 1", "keeper.COUNT"),
        ("from dibit.engine import keeper\npatch.delattr(keeper, 'LEAST')", "keeper.LEAST"),
        ("from dibit.engine import keeper\nwith mock.patch.object(keeper, 'LEAST', 1): pass", "keeper.LEAST"),
    ],
)
def test_it_would_be_seen(line: str, name: str) -> None:
    assert list(replaced(line)) == [f"dibit.engine.{name}"]
