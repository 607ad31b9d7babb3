"""``dibit bench``: from the words of the command line to a table and JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dibit.tools.errors import Parser, UserError, nearest, require
from dibit.tools.files import json_path, write_atomically
from dibit.tools.progress import Progress

_DESCRIPTION = """\
Measure what Dibit costs and saves on this machine, beside plain PyTorch Geometric, torch.compile, bf16 and activation
checkpoints. Run it on an idle machine: times are medians of interleaved rounds, ratios are taken within a round.
"""
KINDS = ("speed", "memory", "gradient", "noise", "codec")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of ``dibit bench``."""
    parser = Parser(prog="dibit bench", description=_DESCRIPTION)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", parser_class=Parser)
    speed = kinds.add_parser("speed", help="seconds of a training step, forward and backward apart")
    memory = kinds.add_parser("memory", help="megabytes kept, and the peak of a step")
    for each in (speed, memory):
        each.add_argument("--shape", default="arxiv", metavar="NAME", help="Sizes: arxiv (default), flickr, "
                          "products-small or cora.")  # fmt: skip
        each.add_argument("--model", default="sage", metavar="NAME", help="sage (default), gcn, gin, gat or gcn2.")
        each.add_argument("--hidden", type=int, metavar="N", help="Width of the layers (default: the shape's).")
        each.add_argument("--form", default="csr", metavar="NAME", help="The graph as csr (torch.sparse; default) or "
                          "edge_index.")  # fmt: skip
        each.add_argument("--scale", type=float, default=1.0, metavar="F", help="Nodes and edges, times F.")
        each.add_argument("--settings", nargs="+", metavar="NAME", help="Of plain, compile, bf16, checkpoint, exact, "
                          "iexact, small, default; all by default.")  # fmt: skip
    speed.add_argument("--layers", type=int, metavar="L", help="Number of layers (default: the shape's).")
    memory.add_argument("--layers", type=int, nargs="+", metavar="L", help="Numbers of layers (default: 3 8 16).")
    gradient = kinds.add_parser("gradient", help="squared error of the gradient against bytes kept")
    gradient.add_argument("graphs", nargs="+", metavar="GRAPH", help="Names or .npz files, as in dibit train.")
    gradient.add_argument("--root", default="data", metavar="DIR", help="Folder of data sets (default: data).")
    gradient.add_argument("--model", default="sage", metavar="NAME", help="sage (default), gcn, gcn2 or gat.")
    gradient.add_argument("--epochs", type=int, nargs="+", default=[0, 10, 60], metavar="N",
                          help="Epochs to look at (default: 0 10 60).")  # fmt: skip
    gradient.add_argument("--draws", type=int, default=8, metavar="K", help="Draws of the codec (default: 8).")
    gradient.add_argument("--settings", nargs="+", metavar="NAME", help="Of the list that an unknown name prints.")
    gradient.add_argument("--figure", metavar="FILE", help="Draw error against bytes into this SVG file, too.")
    _add_noise(kinds)
    codec = kinds.add_parser("codec", help="GB/s of each kernel beside a copy")
    codec.add_argument("--elements", type=int, default=1 << 24, metavar="N", help="Of the tensor (default: 2^24).")
    codec.add_argument("--block", type=int, default=1024, metavar="G", help="Elements a range (default: 1024).")
    for each in (speed, codec):
        each.add_argument("--rounds", type=int, default=5, metavar="K", help="Rounds (default: 5).")
    for each in (speed, memory, gradient, kinds.choices["noise"], codec):
        each.add_argument("--json", metavar="FILE", help="Write the result to this file, too.")
        each.add_argument("--quiet", action="store_true", help="Print the table and nothing else.")
    return parser


def _add_noise(kinds: Any) -> None:
    noise = kinds.add_parser("noise", help="squared error of the gradient by model, norm, depth and stage of training")
    for flag, what in (
        ("graphs", "Names or .npz files, as in dibit train (default: planted:6000 amazon_computers)."),
        ("models", "Of sage, gcn, gin, gat; all by default."),
        ("norms", "Of none, batch, layer, layer-graph, graph, instance, pair, l2; all by default."),
        ("settings", "Of default, small, iexact, unbounded, all-rows (default: default iexact)."),
    ):
        noise.add_argument(f"--{flag}", nargs="+", metavar="NAME", help=what)
    noise.add_argument("--layers", type=int, nargs="+", metavar="L", help="Convolutions (default: 2 3 4 8 16 32).")
    noise.add_argument("--residual", choices=("both", "with", "without"), default="both",
                       help="Residual connections around each layer (default: both).")  # fmt: skip
    noise.add_argument("--epochs", type=int, nargs="+", metavar="N", help="Epochs to look at (default: 0 30).")
    noise.add_argument("--draws", type=int, default=4, metavar="K", help="Draws of the codec (default: 4).")
    noise.add_argument("--root", default="data", metavar="DIR", help="Folder of data sets (default: data).")
    noise.add_argument("--resume", metavar="FILE", help="A file of --json: cells that it has are not measured again.")
    noise.add_argument("--figure", metavar="FILE", help="Draw a heat map into this SVG file, too.")


def bench(argv: Sequence[str]) -> int:
    """Run ``dibit bench``; returns the exit status."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit:  # --help
        return 0
    if args.kind is None:
        raise UserError(f"What to measure is missing; expected one of {', '.join(KINDS)}.")
    path = json_path(args.json)
    drawing = _figure_path(getattr(args, "figure", None))
    require("rich", "train")
    from dibit.bench.show import show

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        with Progress(f"bench {args.kind}", 1, args.quiet) as progress:
            results = _measure(args, progress, path)
    content = _content(args.kind, results)
    show(content)
    if drawing is not None:
        from dibit.bench.figure import gradient_figure, noise_figure

        write_atomically(drawing, noise_figure(results) if args.kind == "noise" else gradient_figure([results]))
    if path is not None:
        _write(path, content)
    return 0


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _figure_path(given: str | None) -> Path | None:
    """The file to draw into, checked before anything is measured."""
    if given is None:
        return None
    require("matplotlib", "study")
    if Path(given).suffix != ".svg" or not Path(given).parent.is_dir():
        raise UserError(f"--figure is {given!r}, expected a file NAME.svg in a folder that exists.")
    return json_path(given, "--figure")


def _measure_noise(args: argparse.Namespace, progress: Progress, path: Path | None) -> dict[str, Any]:
    from dibit.bench import noise

    models = _known("models", args.models or noise.MODELS, noise.MODELS)
    norms = _known("norms", args.norms or noise.NORMS, noise.NORMS)
    settings = _known("settings", args.settings or noise.SETTINGS, noise.CONFIGS)
    layers, epochs = args.layers or [*noise.LAYERS], args.epochs or [*noise.EPOCHS]
    for count in layers:
        _at_least("layers", count)
    for epoch in epochs:
        _at_least("epochs", epoch, 0)
    _at_least("draws", args.draws, 2)
    residual = {"both": (False, True), "with": (True,), "without": (False,)}[args.residual]
    grid = list(noise.cells(models, norms, layers, residual))
    earlier = _earlier(args.resume) if args.resume else []
    rows = [*earlier]

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        if path is not None:  # a long measurement may be interrupted
            _write(path, _content("noise", {"epochs": epochs, "draws": args.draws, "rows": rows}))

    graphs = args.graphs or [*noise.GRAPHS]
    return noise.measure(graphs, args.root, grid, epochs, args.draws, settings, progress.note, done, earlier)


def _earlier(given: str) -> list[dict[str, Any]]:
    """The rows of a file that `--json` has written."""
    from dibit.bench.noise import IDENTITY

    try:
        rows: list[dict[str, Any]] = json.loads(Path(given).read_text(encoding="utf-8"))["results"]["rows"]
        if all(row[name] is not None for row in rows for name in (*IDENTITY, "error", "bytes")):
            return rows
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"--resume is {given!r}, expected a file that dibit bench noise --json has written.")


def _measure(args: argparse.Namespace, progress: Progress, path: Path | None) -> dict[str, Any]:
    progress.begin("measuring")
    if args.kind == "noise":
        return _measure_noise(args, progress, path)
    if args.kind == "codec":
        from dibit.bench import codec

        _at_least("elements", args.elements)
        _at_least("block", args.block)
        _at_least("rounds", args.rounds)
        return codec.measure(args.elements, args.block, args.rounds, progress.note)
    if args.kind == "gradient":
        from dibit.bench import gradient
        from dibit.experiments.cases import MODELS

        for epoch in args.epochs:
            _at_least("epochs", epoch, 0)
        _at_least("draws", args.draws)
        settings = _known("settings", args.settings or [*gradient.CONFIGS], gradient.CONFIGS)
        (model,) = _known("model", [args.model], MODELS)
        epochs = sorted(set(args.epochs))
        return gradient.measure(args.graphs, args.root, model, epochs, args.draws, settings, progress.note)
    from dibit.bench import footprint, speed
    from dibit.bench.workload import FORMS, SETTINGS, Workload
    from dibit.experiments.shapes import MODELS as BUILDERS
    from dibit.experiments.shapes import NAMED

    _known("shape", [args.shape], NAMED)
    _known("model", [args.model], BUILDERS)
    _known("form", [args.form], FORMS)
    settings = _known("settings", args.settings or [*SETTINGS], SETTINGS)
    if args.hidden is not None:
        _at_least("hidden", args.hidden)
    if not args.scale > 0:
        raise UserError(f"--scale is {args.scale}, expected a number above 0.")
    workload = Workload(args.shape, args.model, hidden=args.hidden, form=args.form, scale=args.scale)
    if args.kind == "memory":
        layers = args.layers or [3, 8, 16]
        for count in layers:
            _at_least("layers", count)
        return footprint.measure(workload, layers, settings, progress.note)
    _at_least("rounds", args.rounds)
    if args.layers is not None:
        _at_least("layers", args.layers)
    workload = Workload(args.shape, args.model, args.layers, args.hidden, args.form, args.scale)
    return speed.measure(workload, settings, args.rounds, progress.note)


def _content(kind: str, results: dict[str, Any]) -> dict[str, Any]:
    from dibit.tools.machine import describe_machine, versions

    return {
        "bench": kind,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe_machine(),
        "versions": versions(),
        "results": results,
    }


def _known(flag: str, given: Sequence[str], known: Any) -> list[str]:
    for name in given:
        if name not in known:
            raise UserError(f"--{flag} has {name!r}, expected {', '.join(known)}.{nearest(name, known)}")
    return list(dict.fromkeys(given))


def _at_least(flag: str, value: int, least: int = 1) -> None:
    if value < least:
        raise UserError(f"--{flag} is {value}, expected a whole number of at least {least}.")
