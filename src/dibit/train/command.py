"""``dibit train``: from the words of the command line to the table."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dibit.tools.errors import Interrupted, TrainingError, UserError, require
from dibit.tools.files import json_path, reason, write_atomically
from dibit.train.arguments import build_parser, parse
from dibit.train.distributed import World, joined, world_of_environment
from dibit.train.run_folder import RunFolder, how_to_go_on, recipes, trainings
from dibit.train.settings import Settings


def train(argv: Sequence[str]) -> int:
    """Run ``dibit train``; returns the exit status."""
    if build_parser().helps(argv):
        return 0
    settings = parse(argv)
    settings.check()
    for module in ("yaml", "rich", "tensorboard"):  # before the training, not after it
        require(module)
    json_file = json_path(settings.run.json)
    world = world_of_environment()
    if world.size > 1 and settings.loader.loader == "full":
        raise UserError(
            f"{world.size} processes were started, but --loader full is one step on the whole graph, which they cannot "
            "share; choose a loader, such as --loader neighbor."
        )
    from dibit.train.batches import check_installed  # late: torch_geometric takes seconds
    from dibit.train.task import pick_device

    device = pick_device(settings.run.device, world.local_rank if world.size > 1 else None)
    check_installed(settings)
    with joined(world, device):
        _train(settings, json_file, world)
    return 0


def _train(settings: Settings, json_file: Path | None, world: World) -> None:
    folder = RunFolder(world.shared(_placed(settings)))  # the name of a new one has the time in it
    with folder:
        _train_in(folder, settings, json_file, world)


def _train_in(folder: RunFolder, settings: Settings, json_file: Path | None, world: World) -> None:
    from dibit.train.data import load_graph
    from dibit.train.loop import check_checkpoint, train_one
    from dibit.train.report import print_table, to_json
    from dibit.train.task import Task, compression_config

    if world.first:
        folder.check()
    names = recipes(settings)
    configs = {name: compression_config(replace(settings.compression, recipe=name)) for name in names}
    with warnings.catch_warnings():
        # torch says that CSR is in beta whenever one is made.
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        graph = load_graph(settings.data, settings.run.seed)
        if graph.metric != "accuracy":
            require("torchmetrics")
        runs = trainings(settings)
        for _, seed in runs:
            graph.split(seed)  # an empty part is said now
        task = Task.build(folder.settings, graph, world)
        if world.first:
            if folder.resume:  # before anything is written
                for name, seed in runs:
                    check_checkpoint(task, name, configs[name], seed, folder.path_for(name, seed))
            folder.open()
            if not settings.run.quiet:
                print(
                    f"{_headline(folder.settings, world)}; files in {shlex.quote(str(folder.path))}",
                    file=sys.stderr,
                    flush=True,
                )
        world.shared(None)  # nobody looks into the folder before it is there
        try:
            results = [
                train_one(
                    task,
                    name,
                    configs[name],
                    seed,
                    folder.path_for(name, seed),
                    last=(name, seed) == runs[-1],
                    note=folder.note,
                    resume=folder.resume,
                )
                for name, seed in runs
            ]
        except KeyboardInterrupt as stop:  # between two epochs' ends; the last checkpoint is whole
            raise Interrupted(f"interrupted; {how_to_go_on(folder.path)}") from stop
        except OSError as error:
            what = "training had to stop" if error.filename is None else f"{error.filename} cannot be written"
            raise TrainingError(
                f"{what}: {reason(error)}; what was written before is whole: make room, and {how_to_go_on(folder.path)}"
            ) from error
    if not world.first:
        return
    results.sort(key=lambda r: names.index(r.recipe))
    print_table(results, task)
    if json_file is not None:
        write_atomically(json_file, to_json(results, task))


def _placed(settings: Settings) -> Settings:
    """The settings with the folder that the run will be in."""
    return settings if settings.run.out is not None else settings.updated(out=str(RunFolder(settings).path))


def _headline(settings: Settings, world: World) -> str:
    model, loader = settings.model, settings.loader.loader
    batches = "" if loader == "full" else f" in batches ({loader})"
    processes = "" if world.size == 1 else f" and {world.size} processes"
    return (
        f"Training {model.model}, {model.layers} layers of {model.hidden}, on {settings.data.dataset}, "
        f"{settings.optimisation.epochs} epochs{batches}{processes}"
    )
