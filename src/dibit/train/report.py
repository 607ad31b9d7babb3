"""Results as a table and as JSON."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dibit.tools.errors import require, shown
from dibit.tools.machine import describe_machine, versions
from dibit.tools.statistics import paired_difference
from dibit.tools.units import MB
from dibit.train.metrics import TITLES
from dibit.train.result import Result
from dibit.train.task import Task


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Summarise the results by recipe, and compare the recipe with "none" where both are there.

    Returns:
        {"by_recipe": {recipe: means over the seeds}, "ratios": none over recipe, or recipe over none for the
        time; "difference": test metric, recipe minus none, paired by seed}; the last two are None without a
        comparison. Metrics from 0 to 1, bytes, seconds.
    """
    recipes = list(dict.fromkeys(r.recipe for r in results))
    by_recipe = {recipe: _mean([r for r in results if r.recipe == recipe]) for recipe in recipes}
    summary: dict[str, Any] = {"by_recipe": by_recipe, "ratios": None, "difference": None}
    if len(recipes) == 2:
        plain, other = (by_recipe[recipe] for recipe in recipes)
        summary["ratios"] = {
            "saved": plain["saved_bytes"] / other["saved_bytes"],
            "peak": plain["peak_bytes"] / max(1, other["peak_bytes"]),
            "time": other["seconds_per_epoch"] / plain["seconds_per_epoch"],
        }
        tests = [{r.seed: r.test for r in results if r.recipe == recipe} for recipe in recipes]
        summary["difference"] = paired_difference([tests[1][seed] - tests[0][seed] for seed in tests[0]])
    return summary


def print_table(results: Sequence[Result], task: Task) -> None:
    """Print one row a recipe on stdout, and under a comparison the ratios and the difference."""
    tables, consoles, texts = require("rich.table"), require("rich.console"), require("rich.text")
    summary = summarise(results)
    title = TITLES[task.graph.metric]
    graph = task.graph
    table = tables.Table(
        title=texts.Text(  # of a plain string, rich would take [...] and :...: for its own
            f"{task.settings.model.model} on {shown(graph.name, 200)} ({graph.num_nodes:,} nodes, "
            f"{graph.edge_index.shape[1]:,} edges), {task.device}",
            style="table.title",
        )
    )
    for heading in ("recipe", f"test {title} %", "saved MB", "peak MB", "s/epoch", "noise"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right", no_wrap=True)
    for recipe, row in summary["by_recipe"].items():
        spread = "" if row["test_std"] is None else f" ± {100 * row['test_std']:.2f}"
        table.add_row(
            recipe,
            f"{100 * row['test']:.2f}{spread}",
            f"{row['saved_bytes'] / MB:.2f}",
            f"{row['peak_bytes'] / MB:.2f}",
            f"{row['seconds_per_epoch']:.4f}",
            "-" if row["noise"] is None else f"{row['noise']:.2g}",
        )
    ratios, difference = summary["ratios"], summary["difference"]
    if ratios is not None:
        table.add_section()
        table.add_row(
            "ratio",
            f"{100 * difference['mean']:+.2f}",
            _less(ratios["saved"]),
            _less(ratios["peak"]),
            f"{ratios['time']:.2f}x",
            "",
        )
    console = consoles.Console() if sys.stdout.isatty() else consoles.Console(width=100)
    console.print(table)
    if difference is not None and difference["low"] is not None:
        low, high = 100 * difference["low"], 100 * difference["high"]
        text = f"{100 * difference['mean']:+.2f} points, 95 % confidence interval {low:+.2f} to {high:+.2f}"
        console.print(f"Test {title}, recipe minus none, {difference['pairs']} seeds: {text}", highlight=False)


def to_json(results: Sequence[Result], task: Task) -> bytes:
    """Return settings, results, versions and machine as JSON; metrics from 0 to 1, bytes, seconds."""
    graph = task.graph
    content = {
        "settings": task.settings.flat(),
        "graph": {
            "name": graph.name,
            "nodes": graph.num_nodes,
            "edges": graph.edge_index.shape[1],
            "features": graph.x.shape[1],
            "classes": graph.num_classes,
            "metric": graph.metric,
            "fingerprint": graph.fingerprint(),
        },
        "runs": [asdict(result) for result in results],
        "summary": summarise(results),
        "versions": versions(),
        "machine": describe_machine(task.device),
    }
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _less(ratio: float) -> str:
    """Say how many times less memory the recipe takes, or more."""
    return f"{ratio:.1f}x less" if ratio >= 1 else f"{1 / ratio:.1f}x more"


def _mean(results: Sequence[Result]) -> dict[str, Any]:
    tests = [r.test for r in results]
    noise = [value for r in results for _, value in r.noise]
    return {
        "seeds": len(results),
        "test": statistics.fmean(tests),
        "test_std": statistics.stdev(tests) if len(tests) > 1 else None,
        "val": statistics.fmean(r.val for r in results),
        "saved_bytes": statistics.fmean(r.saved_bytes for r in results),
        "peak_bytes": statistics.fmean(r.peak_bytes for r in results),
        "seconds_per_epoch": statistics.fmean(r.seconds_per_epoch for r in results),
        "noise": statistics.median(noise) if noise else None,
    }
