"""Squared error of the whole gradient against the bytes kept, at several epochs of a real training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dibit
from dibit import Config, Project, Sample

_DITHER = Config(block=1024, reduce=Sample(10), rounding="dither")


def _rows(ratio: int, norm: Config, bits: int = 2, block: int = 1024) -> Config:
    return Config(bits=bits, block=block, reduce=Sample(ratio), norm=norm)


# What a linear layer's input and a norm's input become; the recipes, and what they were chosen from.
CONFIGS: dict[str, Config] = {
    "exact": dibit.recipe("exact"),
    "iexact": dibit.recipe("iexact"),
    "default": dibit.recipe("default"),
    "rows/8, norm rows/8": _rows(8, Config(reduce=Sample(8))),
    "rows/8 4 bit, norm rows/8": _rows(8, Config(reduce=Sample(8)), bits=4),
    "rows/4, norm rows/8": _rows(4, Config(reduce=Sample(8))),
    "rows/4, norm rows/8 dither": _rows(4, Config(reduce=Sample(8), rounding="dither")),
    "rows/3, norm rows/10 dither": _rows(3, _DITHER),
    "8 bit, norm rows/10 dither": Config(bits=8, norm=_DITHER),
    "8 bit, norm projected/8": Config(bits=8, norm=Config(reduce=Project(8))),
    "2 bit": Config(),
}


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
        model: of `dibit.reproduce.training.MODELS`.
        epochs: steps taken before each measurement, 0 first.
        draws: of the codec, at each.
        settings: names of `CONFIGS`.
        note: is told how far the measurement is.

    Returns:
        {"model", "epochs", "draws", "graphs"}: by graph rows of setting, bytes a node (all that the step keeps, by
        `dibit.track`), and by epoch the mean of :math:`|g - g_{plain}|^2 / |g_{plain}|^2` with its standard error.
    """
    from dibit.reproduce.plan import Plan, load_prepared
    from dibit.reproduce.stages import stages
    from dibit.reproduce.training import case

    plan = Plan(epochs=max(1, *epochs))
    found = []
    for name in graphs:
        note(f"loading {name}")
        graph = load_prepared(name, root)
        own = case(plan, graph, model)
        rows: dict[str, dict[str, Any]] = {s: {"setting": s, "errors": {}, "standard_errors": {}} for s in settings}
        for stage in stages(own, tuple(epochs), None, note):
            for setting, row in rows.items():
                note(f"{graph.name}, epoch {stage.epoch}, {setting}")
                if "bytes_per_node" not in row:
                    row["bytes_per_node"] = stage.saved_bytes(CONFIGS[setting]) / graph.num_nodes
                error = stage.gradient_error(CONFIGS[setting], draws)
                row["errors"][str(stage.epoch)] = error.mean
                row["standard_errors"][str(stage.epoch)] = error.error
        found.append({"graph": graph.name, "nodes": graph.num_nodes, "rows": list(rows.values())})
    return {"model": model, "epochs": list(epochs), "draws": draws, "graphs": found}
