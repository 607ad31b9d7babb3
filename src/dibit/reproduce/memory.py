"""Saved MB on the papers' shapes: measured, by the closed form, and by the authors' log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

import dibit
from dibit.codec.encode import encoded_bytes
from dibit.config import Config
from dibit.experiments.shapes import ARXIV, SHAPES, Shape, random_graph, sage
from dibit.reproduce.paper import LOG_MB
from dibit.reproduce.plan import Measurement, Reproduction, Values, key
from dibit.reproduce.variants import MEMORY, variants
from dibit.rules import KINDS
from dibit.tools.units import MB


def closed_form(shape: Shape, config: Config | None, mask_bytes: int = 4) -> float:
    """Saved MB of the papers' layers by formula (targets of the training nodes counted, 8 bytes each).

    Plain: the aggregated input of each layer; a hidden layer's BatchNorm input, ReLU output, dropout output, and a
    dropout mask of `mask_bytes` an element (torch keeps 1 on CUDA, 4 on a CPU). Compressed: each layer's own and its
    aggregated input projected, with the two stored projections; BatchNorm's input whole; two masks of 1 bit.
    """
    n, hidden = shape.nodes, shape.layers - 1
    targets = 8 * shape.train
    if config is None:
        aggregated = sum(4 * n * width for width in shape.widths)
        return (aggregated + hidden * n * shape.hidden * (3 * 4 + mask_bytes) + targets) / MB
    inputs = sum(2 * _packed(n, width // 8, config) + 2 * 4 * width * (width // 8) for width in shape.widths)
    norms = hidden * _packed(n, shape.hidden, config)
    return (inputs + norms + hidden * 2 * n * shape.hidden / 8 + targets) / MB


def _packed(rows: int, width: int, config: Config) -> int:
    """q(w): bytes of rows x width as the config quantises them, projected before or not at all."""
    return encoded_bytes(torch.Size((rows, width)), replace(config, reduce=None))


def measurements(run: Reproduction) -> list[Measurement]:
    """One measurement a shape and setting."""
    del run  # the shapes are the papers' at any size
    return [
        Measurement(
            _name(shape, setting),
            key("memory", variants()[setting], shape=asdict(shape)),
            partial(_compute, shape, setting),
        )
        for shape in SHAPES
        for setting in MEMORY
    ]


def _compute(shape: Shape, setting: str, note: Callable[[str], None]) -> dict[str, Any]:
    del note  # a second or two
    return measure(shape, variants()[setting])


def table(run: Reproduction, results: Values) -> dict[str, Any]:
    """Measured, closed form, log, side by side."""
    del run
    shapes = []
    for shape in SHAPES:
        rows = []
        for setting in MEMORY:
            if _name(shape, setting) not in results:
                continue
            config = variants()[setting]
            papers = config is None or config.inputs == "compress"
            rows.append(
                {
                    "setting": setting,
                    **results[_name(shape, setting)],
                    "closed_mb": closed_form(shape, config) if papers else None,
                    "closed_cuda_mb": closed_form(shape, None, mask_bytes=1) if config is None else None,
                    "log_mb": LOG_MB.get(setting) if shape is ARXIV else None,
                }
            )
        shapes.append({**asdict(shape), "rows": rows})
    return {"shapes": shapes}


def measure(shape: Shape, config: Config | None) -> dict[str, Any]:
    """Saved MB of one forward pass by the ledger and by the C allocator (`None` where it does not tell), by kind."""
    from dibit.tools.memory import allocated_bytes

    x, adjacency = random_graph(shape)
    model = sage(shape)
    dibit.compress(model, config)
    with dibit.track(model):  # what is allocated once in a process is no activation
        model(x, adjacency)
    before = allocated_bytes()
    with dibit.track(model) as saved:
        out = model(x, adjacency)
    after = allocated_bytes()
    targets = 8 * shape.train
    held = None if before is None or after is None else (after - before - out.nbytes + targets) / MB
    kinds: dict[str, float] = defaultdict(float)
    for row in saved.rows:
        kinds[KINDS.get(row.operation, "other")] += row.kept / MB
    kinds["targets"] = targets / MB
    return {
        "measured_mb": (saved.total + targets) / MB,
        "allocator_mb": held,
        "bytes_per_node": saved.total / shape.nodes,
        "by_kind": dict(kinds),
    }


def _name(shape: Shape, setting: str) -> str:
    return f"{shape.name} {setting}"
