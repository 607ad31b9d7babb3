"""Private parts of torch: each may be missing, and nothing but private modules uses them."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dibit._torch import private
from dibit._torch.private import registry

PACKAGE = Path(__file__).parents[2] / "src" / "dibit"
HERE = PACKAGE / "_torch" / "private"
# Private names of others than torch.
ALLOWED = {
    "_thread": "Python's own lock",
    "_exit": "Python's os",
    "_collate": "a method of PyTorch Geometric's ClusterLoader, overridden",
}
# Last parts of names of the list that are names of public things, too.
COMMON = {"name", "nbytes", "out", "stats"}
# Undocumented names that do not look like it: dunder methods of torch, and names of nodes in autograd's graph.
ALSO = re.compile(r"__tensor_(un)?flatten__|\w*Backward0|_orig_mod")
# What the pages of torch's documentation have, though the functions have no docstring, or are in no `__all__`.
ON_PAGES = {
    "torch.Tensor.ccol_indices",
    "torch.Tensor.row_indices",
    "torch.autograd.Function.apply",
    "torch.autograd.function.once_differentiable",
    "torch.broadcast_shapes",
    "torch.jit.is_tracing",
    "torch.to_dlpack",  # the former place of torch.utils.dlpack.to_dlpack
    "torch.utils.dlpack.to_dlpack",
}
PINNED = re.search(r"^torch==(\S+)", (PACKAGE.parents[1] / "constraints.txt").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def without() -> Iterator[Callable[[str], dict[str, Any]]]:
    """What `tests.without` reports of a process in which torch lacks one API."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.without"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=PACKAGE.parents[1]
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(name: str) -> dict[str, Any]:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            assert "error" not in answer, answer["error"]
            return answer

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(without: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The same with all of them."""
    return without("")


@pytest.mark.slow
def test_with_all_of_them(whole: dict[str, Any]) -> None:
    assert whole["warnings"] == []
    assert whole["missing"] == [api.name for api in registry.APIS.values() if api.younger and not api.found]
    for run in whole["runs"].values():
        assert run["same"]
        assert run["finite"]
        assert 0 < max(run["errors"]) < 1e-4
        assert 0 < run["saved"] < run["plain"]


@pytest.mark.parametrize("name", registry.APIS)
@pytest.mark.slow
def test_without(name: str, without: Callable[[str], dict[str, Any]], whole: dict[str, Any]) -> None:
    """A compressed model has the plain one's forward bits, and its gradient but for the codec's error."""
    api, found = registry.APIS[name], without(name)
    assert {*found["missing"]} == {*whole["missing"], name}
    assert len(found["warnings"]) == bool(api.lost and not api.tool and not api.younger)
    for warning in found["warnings"]:
        assert name in warning
        assert api.lost in warning
        assert registry.KNOWN in warning
    assert found["usable"] == (not api.needed) or whole["missing"]  # of an old torch two may be missing
    for form, run in found["runs"].items():
        assert run["same"]
        assert run["finite"]
        if not found["usable"]:
            assert max(run["errors"]) == run["saved"] == 0
        else:
            assert 0 < max(run["errors"]) <= 1.1 * max(whole["runs"][form]["errors"])
            assert whole["runs"][form]["saved"] <= run["saved"] < run["plain"] == whole["runs"][form]["plain"]


@pytest.mark.parametrize(
    "name",
    [
        *("torch.dropout", "torch.dropout_", "torch.batch_norm", "torch.instance_norm", "torch.layer_norm"),
        *("torch.log_softmax", "torch.Tensor.log_softmax", "torch.binary_cross_entropy_with_logits"),
    ],
)
@pytest.mark.slow
def test_without_a_spelling_of_a_function(
    name: str, without: Callable[[str], dict[str, Any]], whole: dict[str, Any]
) -> None:
    """Functions that torch does not document have a rule where there are any; nothing else needs them."""
    assert without(name) == whole


@pytest.mark.slow
def test_without_all_of_them(without: Callable[[str], dict[str, Any]]) -> None:
    found = without(",".join(registry.APIS))
    assert found["missing"] == list(registry.APIS)
    (warning,) = found["warnings"]
    assert "nothing is compressed" in warning
    for run in found["runs"].values():
        assert run["same"]
        assert max(run["errors"]) == run["saved"] == 0


def test_several_missing_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "a.b": registry.PrivateApi("a.b", "work", "time"),
        "a.c": registry.PrivateApi("a.c", "work", "time", since="2.0"),
        "a.d": registry.PrivateApi("a.d", "work", "memory"),
        "a.e": registry.PrivateApi("a.e", "work", "all", look=lambda: 1),
        "a.f": registry.PrivateApi("a.f", "work", "not yet there", since="99.1"),
    }
    monkeypatch.setattr(registry, "APIS", known)
    monkeypatch.setattr(registry, "_said", False)
    with pytest.warns(UserWarning, match=r"is without a\.b, a\.c, a\.d, .* What is lost: time; memory\."):
        private.warn_if_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private.warn_if_missing()  # once


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.WITHOUT, "math.pi, math.e")
    found = {name for name in ("math.pi", "math.e", "math.tau") if registry.PrivateApi(name, "count").found}
    assert found == {"math.tau"}


def test_nothing_else_uses_them() -> None:
    """Not by attribute, not by import, not by a name in a string."""
    known = known_names()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent != HERE:
            found = {(line, name) for line, name in private_names(ast.parse(path.read_text()), known)}
            assert not found, f"{path} uses private names"


def known_names() -> set[str]:
    """What no other file may call by name, of all that is in the list."""
    parts = {part for name in registry.APIS for part in name.split(".") if part.startswith("_")}
    return parts | {name.rpartition(".")[2] for name in registry.APIS} - COMMON


def private_names(tree: ast.Module, known: set[str]) -> Iterator[tuple[int, str]]:
    """Lines and names: anything private of an object that is not the file's own, and what is known to be torch's.

    Also all of `torch.ops`: its operators may change with any version.
    """
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if own else [node.attr]
            if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("torch", "ops"):
                yield node.lineno, "torch.ops"
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dibit"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if (node.module or "").startswith("torch.ops") or (node.module == "torch" and "ops" in names):
                yield node.lineno, "torch.ops"
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            first = node.args[1].values[0] if isinstance(node.args[1], ast.JoinedStr) else node.args[1]
            if isinstance(first, ast.Constant) and first.value.startswith("_"):
                names = [ast.unparse(node.args[1]).lstrip("f").strip("\"'")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value in known or ALSO.fullmatch(node.value) else []
        for name in names:
            private = name.startswith("_") and not name.endswith("__")
            if name in known or ALSO.fullmatch(name) or (private and name not in ALLOWED):
                yield node.lineno, name


pinned = pytest.mark.skipif(
    PINNED is None or torch.__version__.partition("+")[0] != PINNED[1],
    reason="which functions have a docstring differs between versions; constraints.txt has the one that is asked",
)


@pinned
def test_nothing_else_uses_undocumented_functions() -> None:
    """`torch.native_layer_norm` and others that look like public ones."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent != HERE:
            found = sorted(undocumented_functions(ast.parse(path.read_text())))
            assert not found, (
                f"{path} uses functions that torch does not document; find them in dibit/_torch/private with a "
                "fallback, use documented ones, or name them in ON_PAGES above if a page of torch has them"
            )


def undocumented_functions(tree: ast.Module) -> set[tuple[int, str]]:
    """Lines and dotted names of functions of torch and methods of tensors that have no docstring, or are not exported.

    Names of special methods are Python's.
    """
    imported: dict[str, str] = {}  # by the name here, the dotted name there
    uses: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else ""
        elif isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            imported |= names
            uses += [(node.lineno, name) for name in names.values()]
    imported = {name: there or name for name, there in imported.items()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in imported and re.fullmatch(r"[\w.]+", rest):
                uses.append((node.lineno, f"{imported[first]}.{rest}"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # perhaps a method of a tensor
            owner = node.func.value
            if not (isinstance(owner, ast.Name) and owner.id in (*imported, "self", "cls")):
                uses.append((node.lineno, f"torch.Tensor.{node.func.attr}"))
    return {(line, name) for line, name in uses if name.startswith("torch.") and not documented(name)}


def documented(name: str) -> bool:
    """Whether a dotted name is of a documented function, or of none."""
    *path, last = name.split(".")
    owner: Any = importlib.import_module("torch")
    for part in path[1:]:
        owner = getattr(owner, part, None)
    value = getattr(owner, last, None)
    if not inspect.isroutine(value) or last.endswith("__") or name in ON_PAGES:
        return True
    exported = getattr(owner, "__all__", None)
    return bool(value.__doc__) and (exported is None or last in exported)


@pinned
@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\ntorch.native_layer_norm(x, [2], None, None, 1e-5)", "torch.native_layer_norm"),
        ("import torch\nrules = {torch.dropout_: 1}", "torch.dropout_"),
        ("from torch import native_dropout", "torch.native_dropout"),
        ("import torch as t\nt.relu(x)", "torch.relu"),
        ("from torch import Tensor\nTensor.log_softmax", "torch.Tensor.log_softmax"),
        ("y = f(x).log_softmax(1)", "torch.Tensor.log_softmax"),
        ("from torch.overrides import has_torch_function_unary", "torch.overrides.has_torch_function_unary"),
        ("import torch\ntorch.layer_norm_of_others(x)", None),
        ("import torch\nimport torch.nn.functional as F\nF.layer_norm(torch.mm(x, y).exp(), (2,))", None),
        ("from dibit.codec import ops\nops.relu(x)", None),
    ],
)
def test_an_undocumented_function_is_found(code: str, found: str | None) -> None:
    assert {name for _, name in undocumented_functions(ast.parse(code))} == ({found} if found else set())


@pytest.mark.parametrize(
    "line",
    [
        "torch._C",
        "from torch.overrides import _pop_mode",
        "import torch._ops",
        "getattr(x, '_cdata')",
        "getattr(x, f'_{name}')",
        "hasattr(x, '_of_somebody')",
        "torch.ops.aten.silu_backward",
        "from torch import ops",
        "aten.gelu_backward(dy, x)",
        "sys._getframe(1)",
        "frames.peek_interpreter_stack()",
        "from torch.multiprocessing.reductions import StorageWeakRef",
        "x.grad_fn.name() == 'SoftmaxBackward0'",
        "f'{name}Backward0'",
        "x.__tensor_flatten__()",
        "defines(x, '__tensor_flatten__')",
        "getattr(model, '_orig_mod')",
        "x.grad_fn._saved_self",
        "x._version",
    ],
)
def test_a_use_is_found(line: str) -> None:
    assert list(private_names(ast.parse(line), known_names()))


@pytest.mark.parametrize(
    "line", ["self._version", "x.nbytes", "x.grad_fn.next_functions", "from dibit.codec import ops", "model.__dict__"]
)
def test_what_is_documented_is_no_use(line: str) -> None:
    assert not list(private_names(ast.parse(line), known_names()))
