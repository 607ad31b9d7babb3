"""Squared error of the whole gradient against the bytes kept, at several epochs of a real training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dibit import Config, Sample
from dibit.recipes import BOUNDED, RECIPES


def _rows(
    ratio: int,
    norm_ratio: int,
    by: str = "gradient",
    norm_by: str | None = None,
    *,
    bits: int = 2,
    block: int = 128,
    rounding: str = "stochastic",
    levels: str = "uniform",
    norm_bits: int = 2,
    norm_rounding: str = "dither",
) -> Config:
    norm = Config(
        bits=norm_bits,
        reduce=Sample(norm_ratio, by=norm_by or ("uniform" if by == "norm" else by)),  # type: ignore[arg-type]
        rounding=norm_rounding,  # type: ignore[arg-type]
    )
    reduce = Sample(ratio, by=by)  # type: ignore[arg-type]
    return Config(bits=bits, block=block, reduce=reduce, norm=norm, rounding=rounding, levels=levels)  # type: ignore[arg-type]


_CURVE = ((2, 6), (4, 10), (6, 16), (10, 24), (16, 40))  # one row of so many, of linear and of norm inputs
# Settings of one kind, from many bytes to few: the curves of the figure.
FAMILIES: dict[str, dict[str, Config]] = {
    "papers": {name: RECIPES[name] for name in ("exact", "iexact")},
    "all rows": {"2 bit": Config(), "8 bit": Config(bits=8)},
    **{
        f"rows by {by}" if by != "uniform" else "rows uniformly": {
            f"{by} 1/{r} + 1/{n}": _rows(r, n, by) for r, n in _CURVE
        }
        for by in ("uniform", "norm", "gradient")
    },
}
# The recipes, and what lies beside the default at about its bytes.
_BESIDE: dict[str, Config] = {
    **RECIPES,
    **{f"{name} ratios": replace(RECIPES[name], noise=None) for name in BOUNDED},  # without the bound on the error
    "rows/3 at 1 bit": _rows(3, 16, bits=1),
    "rows/12 at 4 bit": _rows(12, 16, bits=4),
    "rows/24 at 8 bit": _rows(24, 16, bits=8),
    "the same rows at 8 bit (more bytes)": _rows(6, 16, bits=8, norm_bits=8),
    "blocks of 256": _rows(6, 16, block=256),
    "blocks of 1024": _rows(6, 16, block=1024),
    "normal levels": _rows(6, 16, levels="normal"),
    "dither": _rows(6, 16, rounding="dither"),
    "norm rows uniformly": _rows(6, 16, norm_by="uniform"),
    "norm rows/8 at 1 bit": _rows(6, 8, norm_bits=1),
    "norm rows/32 at 4 bit": _rows(6, 32, norm_bits=4),
    "norm without dither": _rows(6, 16, norm_rounding="stochastic"),
    "gradient 1/8 + 1/10": _rows(8, 10),
    "gradient 1/5 + 1/32": _rows(5, 32),
}
CONFIGS: dict[str, Config] = {name: config for family in FAMILIES.values() for name, config in family.items()} | _BESIDE


def measure(
    graphs: Sequence[str],
    root: str,
    model: str,
    epochs: Sequence[int],
    draws: int,
    settings: Sequence[str],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Train plainly; at each epoch repeat the same step with every config: same weights, same dropout masks.

    Args:
        graphs: names or files, as `dibit train --dataset` takes them.
        root: folder of data sets.
        model: of `dibit.experiments.cases.MODELS`.
        epochs: steps taken before each measurement, 0 first.
        draws: of the codec, at each.
        settings: names of `CONFIGS`.
        note: called with a line that says how far the measurement is.

    Returns:
        {"model", "epochs", "draws", "graphs"}: by graph rows of setting, bytes a node (all that the step keeps, by
        `dibit.track`: at the first epoch, and by epoch), and by epoch the mean of
        :math:`|g - g_{plain}|^2 / |g_{plain}|^2` with its standard error.
    """
    from dibit.experiments.cases import case
    from dibit.experiments.data import load_prepared
    from dibit.experiments.stages import stages

    found = []
    for name in graphs:
        note(f"loading {name}")
        graph = load_prepared(name, root)
        own = case(graph, model, max(1, *epochs))
        rows: dict[str, dict[str, Any]] = {
            s: {"setting": s, "bytes": {}, "errors": {}, "standard_errors": {}} for s in settings
        }
        for stage in stages(own, tuple(epochs), None, note):
            for setting, row in rows.items():
                note(f"{graph.name}, epoch {stage.epoch}, {setting}")
                row["bytes"][str(stage.epoch)] = stage.saved_bytes(CONFIGS[setting]) / graph.num_nodes
                row.setdefault("bytes_per_node", row["bytes"][str(stage.epoch)])
                error = stage.gradient_error(CONFIGS[setting], draws)
                row["errors"][str(stage.epoch)] = error.mean
                row["standard_errors"][str(stage.epoch)] = error.error
        found.append({"graph": graph.name, "nodes": graph.num_nodes, "rows": list(rows.values())})
    return {"model": model, "epochs": list(epochs), "draws": draws, "graphs": found}
