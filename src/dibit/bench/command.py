"""``dibit bench``: from the words of the command line to a table and JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dibit.recipes import RECIPES
from dibit.tools.errors import UserError, nearest, require, shown
from dibit.tools.files import json_path, write_atomically
from dibit.tools.parser import Parser, usage
from dibit.tools.progress import MeasurementProgress

_DESCRIPTION = """\
Measure what Dibit costs and saves on this machine, beside plain PyTorch Geometric, torch.compile, bf16 and activation
checkpoints. Run it on an idle machine: times are medians of interleaved rounds, ratios are taken within a round."""
KINDS = {
    "speed": "seconds of a training step, forward and backward apart",
    "memory": "megabytes kept, and the peak of a step",
    "gradient": "squared error of the gradient against bytes kept",
    "noise": "squared error of the gradient by model, norm, depth and stage of training",
    "codec": "GB/s of each kernel beside a copy",
}


def build_parser(kind: str) -> Parser:
    """Build the parser of ``dibit bench KIND``."""
    parser = Parser(f"dibit bench {kind}", f"Measure {KINDS[kind]}.")
    flag = parser.flag
    if kind in ("speed", "memory"):
        flag("shape", str, "Sizes: arxiv, flickr, products-small, cora or mesh.", "NAME", default="arxiv")
        names = "sage, gcn, gin, gat, gatv2, transformer, edgecnn, mesh or gcn2."
        flag("model", str, names, "NAME", default="sage")
        flag("hidden", int, "Width of the layers (default: the shape's).", least=1)
        flag("form", str, "The graph as csr (torch.sparse) or edge_index.", "NAME", default="csr")
        flag("order", str, "Edges sorted by target or source, or shuffled.", "NAME", default="target")
        flag("loader", str, "Steps on the full graph, or on batches by neighbor.", "NAME", default="full")
        flag("scale", float, "Nodes and edges, times F.", "F", default=1.0)
        text = f"Of plain, compile, bf16, checkpoint, {', '.join(reversed(RECIPES))}; all by default."
        flag("settings", str, text, "NAME", several=True)
    if kind == "speed":
        flag("layers", int, "Number of layers (default: the shape's).", "L", least=1)
    if kind == "memory":
        flag("layers", int, "Numbers of layers.", "L", default=[3, 8, 16], least=1, several=True)
    if kind == "gradient":
        parser.add_argument("graphs", nargs="+", metavar="GRAPH", help="Names or .npz files, as in dibit train.")
        flag("model", str, "sage, gcn, gcn2 or gat.", "NAME", default="sage")
        flag("epochs", int, "Epochs to look at.", default=[0, 10, 60], least=0, several=True)
        flag("draws", int, "Draws of the codec.", "K", default=8, least=1)
        flag("settings", str, "Of the list that an unknown name prints.", "NAME", several=True)
        flag("figure", str, "Draw error against bytes into this SVG file, too.", "FILE")
    if kind == "noise":
        for name, text in (
            ("graphs", "Names or .npz files, as in dibit train (default: planted:6000 amazon_computers)."),
            ("models", "Of sage, gcn, gin, gat; all by default."),
            ("norms", "Of none, batch, layer, layer-graph, graph, instance, pair, l2; all by default."),
            ("settings", f"Of {', '.join(RECIPES)}, unbounded, all-rows (default: default iexact)."),
        ):
            flag(name, str, text, "NAME", several=True)
        flag("layers", int, "Convolutions (default: 2 3 4 8 16 32).", "L", least=1, several=True)
        sides = Literal["both", "with", "without"]
        flag("residual", sides, "Residual connections around each layer.", default="both")
        flag("epochs", int, "Epochs to look at (default: 0 30).", least=0, several=True)
        flag("draws", int, "Draws of the codec.", "K", default=4, least=2)
        flag("resume", str, "A file of --json: cells that it has are not measured again.", "FILE")
        flag("figure", str, "Draw a heat map into this SVG file, too.", "FILE")
    if kind in ("gradient", "noise"):
        flag("root", str, "Folder of data sets.", "DIR", default="data")
    if kind == "codec":
        flag("elements", int, "Of the tensor.", default=1 << 24, least=1)
        flag("block", int, "Elements a range.", "G", default=1024, least=1)
    if kind in ("speed", "codec"):
        flag("rounds", int, "Rounds.", "K", default=5, least=1)
    flag("json", str, "Write the result to this file, too.", "FILE")
    flag("quiet", bool, "Print the table and nothing else.", default=False)
    return parser


def bench(argv: Sequence[str]) -> int:
    """Run ``dibit bench``; returns the exit status."""
    if not argv:
        raise UserError(f"What to measure is missing; expected one of {', '.join(KINDS)}.")
    kind, *words = argv
    if kind in ("-h", "--help"):
        print(usage("dibit bench", "[--help] KIND", _DESCRIPTION, KINDS))
        return 0
    if kind not in KINDS:
        hint = nearest(kind, KINDS)
        raise UserError(f"There is nothing to measure named {shown(kind)!r}, expected {', '.join(KINDS)}.{hint}")
    parser = build_parser(kind)
    if parser.helps(words):
        return 0
    args = parser.parse(words)
    args.kind = kind
    path = json_path(args.json)
    drawing = _figure_path(getattr(args, "figure", None))
    require("rich", "train")
    from dibit.bench.show import show

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        with MeasurementProgress(f"bench {args.kind}", 1, args.quiet) as progress:
            results = measure(args, progress, path)
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


def _measure_noise(args: argparse.Namespace, progress: MeasurementProgress, path: Path | None) -> dict[str, Any]:
    from dibit.bench import noise

    models = _known("models", args.models or noise.MODELS, noise.MODELS)
    norms = _known("norms", args.norms or noise.NORMS, noise.NORMS)
    settings = _known("settings", args.settings or noise.SETTINGS, noise.CONFIGS)
    layers, epochs = args.layers or [*noise.LAYERS], args.epochs or [*noise.EPOCHS]
    residual = {"both": (False, True), "with": (True,), "without": (False,)}[args.residual]
    grid = list(noise.networks(models, norms, layers, residual))
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


def measure(args: argparse.Namespace, progress: MeasurementProgress, path: Path | None) -> dict[str, Any]:
    """What the arguments ask for, as the module of that kind returns it; checks them first."""
    progress.begin("measuring")
    if args.kind == "noise":
        return _measure_noise(args, progress, path)
    if args.kind == "codec":
        from dibit.bench import codec

        return codec.measure(args.elements, args.block, args.rounds, progress.note)
    if args.kind == "gradient":
        from dibit.bench import gradient
        from dibit.experiments.cases import MODELS

        settings = _known("settings", args.settings or [*gradient.CONFIGS], gradient.CONFIGS)
        (model,) = _known("model", [args.model], MODELS)
        epochs = sorted(set(args.epochs))
        return gradient.measure(args.graphs, args.root, model, epochs, args.draws, settings, progress.note)
    from dibit.bench import footprint, speed
    from dibit.bench.workload import FORMS, LOADERS, ORDERS, SETTINGS, Workload
    from dibit.experiments.shapes import BY_EDGES, NAMED
    from dibit.experiments.shapes import MODELS as BUILDERS

    _known("shape", [args.shape], NAMED)
    _known("model", [args.model], BUILDERS)
    for name, known in (("form", FORMS), ("order", ORDERS), ("loader", LOADERS)):
        _known(name, [getattr(args, name)], known)
    settings = _known("settings", args.settings or [*SETTINGS], SETTINGS)
    if not args.scale > 0:
        raise UserError(f"--scale is {args.scale}, expected a number above 0.")
    _check_form(args, BY_EDGES)
    layers = None if args.kind == "memory" else args.layers
    how = args.form, args.scale, args.order, args.loader
    workload = Workload(args.shape, args.model, layers, args.hidden, *how)
    if args.kind == "memory":
        return footprint.measure(workload, args.layers, settings, progress.note)
    return speed.measure(workload, settings, args.rounds, progress.note)


def _check_form(args: argparse.Namespace, by_edges: Sequence[str]) -> None:
    """Whether the model takes its graph in the form and the order that were asked for."""
    if args.order != "target" and (args.loader != "full" or not (args.form == "edge_index" or args.model in by_edges)):
        raise UserError(f"--order {args.order} is for --form edge_index on the full graph.")
    if args.model == "gcn2" and (args.form == "edge_index" or args.loader != "full"):
        raise UserError("--model gcn2 takes the graph as csr, on the full graph.")


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
