"""``dibit reproduce``: from the words of the command line to the tables and the page."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from dibit.reproduce import parallel, sections, tuned
from dibit.reproduce.plan import Measurement, Reproduction, ReproductionPlan
from dibit.reproduce.store import DAYS, SECTIONS, Store, write
from dibit.tools.errors import Interrupted, TrainingError, UserError, nearest, require
from dibit.tools.files import json_path, reason
from dibit.tools.parser import Parser
from dibit.tools.progress import MeasurementProgress

_DESCRIPTION = """\
Repeat what EXACT and i-EXACT measured, with their numbers beside ours: as tables here, as JSON and as one
self-contained page, DIR/report.html. Each result is written as soon as it exists; the same command goes on where it
was stopped, and sections that are run one by one end up in the same page.
"""


def build_parser() -> Parser:
    """Build the parser of ``dibit reproduce``."""
    parser = Parser("dibit reproduce", _DESCRIPTION)
    flag = parser.flag
    parser.add_argument(
        "section", metavar="SECTION", help="memory, blocks, variance, distribution, accuracy, all (of these), or tuned."
    )
    flag("out", str, "Folder of the results and of report.html.", "DIR")
    text = (
        "Graphs, as in dibit train: names or .npz files; the last one is looked at most closely. Default: cora and "
        "amazon-computers (more with --full), or a generated graph where they cannot be loaded."
    )
    flag("dataset", str, text, "NAME", several=True)
    flag("root", str, "Folder of data sets.", "DIR", default="data")
    flag("full", bool, "Everything: all graphs and models, five seeds; hours.", default=False)
    flag("seeds", int, "Trainings of each setting (default: 3, full: 5).", "K", least=1)
    flag("epochs", int, "Epochs of each training (default: 50, full: 150).", least=1)
    flag("rounds", int, "Rounds of the timing (default: 4, full: 7).", least=1)
    group = parser.add_argument_group(
        "tuned",
        "Published settings, splits, seeds and epochs; --seeds K takes the seeds below K, --epochs N fewer epochs.",
    )
    text = f"Graphs and models: {', '.join(tuned.CELLS)}, or all (default: {' and '.join(tuned.FIRST)})"
    flag("cell", str, text, "CELL", group, several=True)
    flag("recipe", str, "Only these (default: each cell's own).", "RECIPE", group, several=True)
    flag("jobs", int, "Trainings side by side, each on one thread (default: one a core).", group=group, least=1)
    flag("json", str, "Write all sections to this file, too.", "FILE")
    flag("overwrite", bool, "Forget the results that DIR holds.", default=False)
    flag("quiet", bool, "Print the tables and nothing else.", default=False)
    return parser


def reproduce(argv: Sequence[str]) -> int:
    """Run ``dibit reproduce``; returns the exit status."""
    parser = build_parser()
    if parser.helps(argv):
        return 0
    args = parser.parse(argv)
    if args.section not in (*SECTIONS, "all"):
        hint = nearest(args.section, (*SECTIONS, "all"))
        raise UserError(f"There is no section {args.section!r}, expected {', '.join(SECTIONS)} or all.{hint}")
    if not args.out:
        raise UserError("--out is missing; give the folder of the results, such as --out runs/reproduce.")
    plan = _plan(args)
    json_file = json_path(args.json)
    for module in ("matplotlib", "markdown_it", "pydantic", "rich"):  # before hours of work, not after them
        require(module, "study")
    require("tensorboard")
    with Store(Path(args.out), args.overwrite) as store, warnings.catch_warnings():
        store.check()
        # torch says that CSR is in beta whenever one is made.
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        run = Reproduction(plan, store, args.quiet)
        if args.section == "tuned":  # a data set that cannot be loaded is said now
            tuned.check_data(run)
        elif args.section != "memory":
            run.graphs()
        store.open()
        try:
            every = [section for section in SECTIONS if section not in DAYS]
            for section in every if args.section == "all" else (args.section,):
                measure_section(run, section)
        except KeyboardInterrupt as stop:
            command = shlex.join(["dibit", "reproduce", *(word for word in argv if word != "--overwrite")])
            raise Interrupted(f"interrupted; what was measured is kept, go on with: {command}") from stop
        except OSError as error:
            what = "measuring had to stop" if error.filename is None else f"{error.filename} cannot be written"
            raise TrainingError(
                f"{what}: {reason(error)}; what was measured is kept: make room, and the same command goes on, without "
                "--overwrite"
            ) from error
    if json_file is not None:
        write(json_file, sections.read(store.path))
    return 0


def measure_section(run: Reproduction, section: str) -> None:
    """Measure one section, and write it after every measurement."""
    from dibit.reproduce.report import render
    from dibit.reproduce.terminal import print_section

    experiment = importlib.import_module(f"dibit.reproduce.{section}")
    units = experiment.measurements(run)
    done: dict[str, Any] = {}
    total = 0.0
    with (
        MeasurementProgress(section, len(units), run.quiet) as progress,
        closing(_results(run, units, progress)) as results,
    ):
        for name, value, seconds, computed in results:
            done[name] = value
            total += seconds
            progress.end(seconds, computed, name)
            if computed:
                run.store.section(section, _content(run, section, experiment.table(run, done), total, False))
    content = _content(run, section, experiment.table(run, done), total, True)
    run.store.section(section, content)
    print_section(content)
    page = render(run.store.path, run.store.manifest.add)
    if not run.quiet:
        print(f"{section} is in {shlex.quote(str(page))}", file=sys.stderr, flush=True)


def _results(
    run: Reproduction, units: list[Measurement], progress: MeasurementProgress
) -> Generator[tuple[str, Any, float, bool], None, None]:
    """The measurements as they come: name, value, seconds, and whether it was computed now."""
    separate = {}
    for unit in units:
        if not unit.files:
            progress.begin(unit.name)
            yield unit.name, *run.store.unit(unit.key, partial(unit.compute, progress.note))
        elif (held := run.store.held(unit.key)) is not None:
            _clear(run, unit)  # a kill may have come between the result and this
            yield unit.name, *held, False
        else:
            separate[unit.name] = unit

    def begin(name: str) -> None:
        run.store.expect(separate[name].key)
        run.store.manifest.add(*separate[name].files)
        progress.begin(name)

    jobs = {name: unit.compute for name, unit in separate.items()}
    with closing(parallel.run(jobs, run.plan.jobs, progress.note, begin)) as computed:
        for name, value, seconds in computed:
            value = run.store.keep(separate[name].key, value, seconds)
            _clear(run, separate[name])
            yield name, value, seconds, True


def _clear(run: Reproduction, unit: Measurement) -> None:
    """Remove what a measurement wrote while it ran."""
    folder = unit.files[0].parent
    if os.path.lexists(folder):
        run.store.manifest.remove(below=folder)


def _content(
    run: Reproduction, section: str, results: dict[str, Any], seconds: float, finished: bool
) -> dict[str, Any]:
    from dibit.tools.machine import describe_machine, versions

    threads = {"threads": 1} if section == "tuned" else {}  # of each training
    return {
        "section": section,
        "settings": run.plan.settings(section),
        "finished": finished,
        "seconds": seconds,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe_machine() | threads,
        "versions": versions(),
        "results": results,
    }


def _plan(args: argparse.Namespace) -> ReproductionPlan:
    others = {"--dataset": args.dataset, "--full": args.full}
    own = {"--cell": args.cell, "--recipe": args.recipe, "--jobs": args.jobs is not None}
    if args.section == "tuned":
        for flag in (flag for flag, given in others.items() if given):
            raise UserError(f"{flag} does not apply to tuned, whose graphs --cell chooses; leave it out.")
    else:
        for flag in (flag for flag, given in own.items() if given):
            raise UserError(f"{flag} does not apply to {args.section}, only to tuned; leave it out.")
    defaults = {"seeds": 5, "epochs": 150, "rounds": 7, "draws": 8} if args.full else {}
    given = {
        name: getattr(args, name) for name in ("seeds", "epochs", "rounds", "jobs") if getattr(args, name) is not None
    }
    plan = ReproductionPlan(
        full=args.full,
        datasets=tuple(args.dataset or ()),
        root=args.root,
        cells=tuple(args.cell or ()),
        recipes=tuple(args.recipe or ()),
        tuned_seeds=args.seeds,
        tuned_epochs=args.epochs,
        **{"jobs": os.cpu_count() or 1, **defaults, **given},
    )
    tuned.check(plan)
    return plan
