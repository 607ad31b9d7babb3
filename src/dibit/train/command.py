"""``dibit train``: from the words of the command line to the table."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

from dibit.train.checkpoint import write_atomically
from dibit.train.errors import Interrupted, json_path, require
from dibit.train.folder import RunFolder, how_to_go_on
from dibit.train.parser import build_parser, parse
from dibit.train.settings import Settings


def train(argv: Sequence[str]) -> int:
    """Run ``dibit train``; returns the exit status."""
    if any(word in ("-h", "--help") for word in argv):
        build_parser().print_help()
        return 0
    settings = parse(argv)
    settings.check()
    for module in ("rich", "tensorboard"):  # before the training, not after it
        require(module)
    json_file = json_path(settings.run.json)
    folder = RunFolder(settings)
    folder.check()
    from dibit.train.data import load_graph  # late: torch_geometric takes seconds
    from dibit.train.loop import train_one
    from dibit.train.report import print_table, to_json
    from dibit.train.task import Task, compression_config, pick_device

    pick_device(settings.run.device)
    recipes = _recipes(settings)
    configs = {name: compression_config(replace(settings.compression, recipe=name)) for name in recipes}
    with warnings.catch_warnings():
        # torch says that CSR is in beta whenever one is made.
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        graph = load_graph(settings.data, settings.run.seed)
        if graph.metric != "accuracy":
            require("torchmetrics")
        seeds = range(settings.run.seed, settings.run.seed + settings.run.seeds)
        for seed in seeds:
            graph.split(seed)  # an empty part is said now
        task = Task.build(folder.settings, graph)
        folder.open()
        if not settings.run.quiet:
            print(
                f"{_headline(folder.settings)}; files in {shlex.quote(str(folder.path))}",
                file=sys.stderr,
                flush=True,
            )
        runs = [(name, seed) for seed in seeds for name in recipes]
        try:
            results = [
                train_one(task, name, configs[name], seed, folder.of(name, seed), last=(name, seed) == runs[-1])
                for name, seed in runs
            ]
        except KeyboardInterrupt as stop:  # between two epochs' ends; the last checkpoint is whole
            raise Interrupted(f"interrupted; {how_to_go_on(folder.path)}") from stop
    results.sort(key=lambda r: recipes.index(r.recipe))
    print_table(results, task)
    if json_file is not None:
        write_atomically(json_file, to_json(results, task))
    return 0


def _recipes(settings: Settings) -> list[str]:
    recipe = settings.compression.recipe
    return ["none", recipe] if settings.run.compare else [recipe]


def _headline(settings: Settings) -> str:
    model = settings.model
    return (
        f"Training {model.model}, {model.layers} layers of {model.hidden}, on {settings.data.dataset}, "
        f"{settings.optimisation.epochs} epochs"
    )
