"""A pytest plugin: every module that somebody else's tests build is compressed, as `dibit.compress(model)` would.

    python -m pytest -p tests.peers.plugin --peers compressed --peers-log results.jsonl PATH

A module is compressed at the end of its constructor. Of modules that are built inside another's constructor, or before
they are given to it, the outermost holds in the end, since compressing a model replaces what its parts had.
"""

from __future__ import annotations

import functools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._guards import TracingContext
from torch.fx import GraphModule
from torch_geometric.nn import Sequential

import dibit


class _Local(threading.local):
    depth = 0  # constructors of modules that are running in this thread
    busy = False  # a model is being compressed: what that builds is Dibit's own


_local = _Local()


def compress_what_is_built(config: Any) -> None:
    """From here on every module is compressed once its outermost constructor has returned."""
    for kind in [nn.Module, *_subclasses(nn.Module)]:
        _wrap(kind, config)

    def init_subclass(cls: type[nn.Module], **kwargs: Any) -> None:
        super(nn.Module, cls).__init_subclass__(**kwargs)
        _wrap(cls, config)

    nn.Module.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment, method-assign]
    _finish(Sequential, "_set_jittable_template", config)
    GraphModule.__deepcopy__ = _within(GraphModule.__deepcopy__)  # type: ignore[method-assign]


def _within(function: Any) -> Any:
    """A function that builds parts of something larger: what it copies carries its hooks already."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _local.depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            _local.depth -= 1

    return wrapper


def _finish(kind: type[nn.Module], method: str, config: Any) -> None:
    """Compress at the end of a method, the last that the constructor calls: it looks at the frame that called it."""
    function = getattr(kind, method)

    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        function(self, *args, **kwargs)
        _compress(self, config)

    setattr(kind, method, wrapper)


def _compress(model: nn.Module, config: Any) -> None:
    if type(model).__module__.startswith("torch.jit.") or TracingContext.try_get() is not None:
        return  # tracing and compiling build modules of their own, which no user has
    if _local.depth == 0 and not _local.busy:
        _local.busy = True
        try:
            dibit.compress(model, config)
        finally:
            _local.busy = False


def _subclasses(kind: type) -> list[type]:
    found = []
    for child in type.__subclasses__(kind):
        found += [child, *_subclasses(child)]
    return list(dict.fromkeys(found))


def _wrap(kind: type[nn.Module], config: Any) -> None:
    init = vars(kind).get("__init__")
    if init is None or hasattr(init, "__peers__") or issubclass(kind, torch.jit.ScriptModule | Sequential):
        return

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        _local.depth += 1
        try:
            init(self, *args, **kwargs)
        finally:
            _local.depth -= 1
        if type(self).__init__ is wrapper:
            _compress(self, config)

    wrapper.__peers__ = True  # type: ignore[attr-defined]
    wrapper.__defaults__ = getattr(init, "__defaults__", None)  # Dibit looks there for modules that all instances share
    wrapper.__kwdefaults__ = getattr(init, "__kwdefaults__", None)
    kind.__init__ = wrapper  # type: ignore[method-assign]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peers")
    group.addoption("--peers", choices=("plain", "compressed"), default="plain")
    group.addoption("--peers-log", help="file that gets one line of JSON a test")
    group.addoption("--peers-only", help="file with the names of the tests to run, one a line")
    group.addoption("--peers-dropout", choices=("seed", "mask"), default="seed")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--peers") == "compressed":
        recipe = dibit.recipes.recipe("default")
        mask = config.getoption("--peers-dropout") == "mask"
        compress_what_is_built(replace(recipe, dropout="mask") if mask else "default")
    if path := config.getoption("--peers-log"):
        config.pluginmanager.register(_Log(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--peers-only")
    if path is not None:
        names = set(Path(path).read_text().splitlines())
        items[:] = [item for item in items if item.nodeid in names]


class _Log:
    """Writes how each test ended, as it ends: a crash of the process loses only the test that ran."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.file.write(json.dumps({"test": nodeid, "outcome": "started"}) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        entry = {"test": report.nodeid, "outcome": report.outcome}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            entry["cause"] = crash.message if crash is not None else str(report.longrepr)
            entry["text"] = report.longreprtext
        self.file.write(json.dumps(entry) + "\n")
