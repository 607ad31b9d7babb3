"""Section files: which there are, what each holds, and reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dibit.reproduce import store
from dibit.reproduce.store import SECTIONS
from dibit.tools.errors import UserError

COMMAND = "dibit reproduce {section} --out DIR"

# What a section's results hold. A key that ends in "?" may be missing or null, and so may an empty list's items;
# keys that are not named here are let through. {"*": x} is any key with x.
_MEMORY_ROW = {
    "setting": str,
    "measured_mb": float,
    "allocator_mb?": float,
    "closed_mb?": float,
    "closed_cuda_mb?": float,
    "log_mb?": float,
    "bytes_per_node?": float,
    "by_kind?": {"*": float},
}
_SHAPE = {"name": str, "nodes": int, "edges": int, "hidden?": int, "layers?": int, "rows": [_MEMORY_ROW]}
_TIMING_ROW = {
    "setting": str,
    "saved_mb": float,
    "seconds": float,
    "to_exact?": float,
    "to_fp32?": float,
    "low?": float,
    "high?": float,
}
_BLOCKS_ROW = {"setting": str, "saved_mb": float, "gradient_error": {"*": float}, "test": [float]}
_MEASURED = {"analytic": float, "monte_carlo?": float, "error?": float, "expected?": float}
_LAYER = {"setting": str, "module": str, "operation": str, "count": int, "elements?": int}
_LEVELS = {
    "bits": int,
    "count": int,
    "sigma": float,
    "levels": [float],
    "uniform": float,
    "optimal": float,
    "reduction": float,
    "paper?": {"sigma?": float, "uniform?": float, "alpha?": float, "optimal?": float, "reduction?": float},
}
_DISTRIBUTION_ROW = _LAYER | {
    "epoch": int,
    "width?": int,
    "histogram": [float],
    "divergence": {"*": float},
    "models": {"*": [float]},
    "nearest": str,
    "atom?": float,
    "holds": bool,
}
_ACCURACY_ROW = {
    "graph": str,
    "model": str,
    "recipe": str,
    "test": [float],
    "layers?": int,
    "hidden?": int,
    "epochs?": int,
    "seeds?": [int],
    "saved_mb?": float,
    "peak_mb?": float,
    "seconds?": float,
    "difference?": {"mean": float, "low?": float, "high?": float},
}
_TUNED_ROW = _ACCURACY_ROW | {
    "cell": str,
    "norm?": str,
    "published?": float,
    "difference?": {"mean": float, "low?": float, "high?": float, "values?": [float]},
    "verdict?": str,
    "epochs_ratio?": float,
    "noise?": float,
}
_TOGETHER = {"cells": int, "mean": float, "low": float, "high": float, "epochs_ratio?": float}
RESULTS: dict[str, dict[str, Any]] = {
    "memory": {"shapes": [_SHAPE]},
    "blocks": {
        "timing?": {"shape": str, "nodes": int, "edges": int, "rounds?": int, "rows": [_TIMING_ROW]},
        "graphs": [{"name": str, "model": str, "epochs?": int, "seeds?": [int], "rows": [_BLOCKS_ROW]}],
        "paper?": {"*": str},
    },
    "variance": {
        "table": [_LEVELS],
        "measured": [
            {
                "graph": str,
                "model": str,
                "epoch": int,
                "rows": [_LAYER | {"uniform": _MEASURED, "normal": _MEASURED, "fitted?": _MEASURED}],
            }
        ],
    },
    "distribution": {
        "bins?": int,
        "graphs": [{"name": str, "model": str, "rows": [_DISTRIBUTION_ROW]}],
        "verdicts?": [str],
    },
    "accuracy": {
        "rows": [_ACCURACY_ROW],
        "skipped?": [{"graph": str, "why": str}],
        "paper?": [{"setting": str, "accuracy": str, "epochs_per_second?": str, "mark?": str}],
    },
    "tuned": {"rows": [_TUNED_ROW], "together?": {"*": _TOGETHER}},
}
_ENVELOPE = {"section": str, "settings?": {"*": object}, "finished": bool, "seconds?": float, "date?": str}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the section files that exist in a folder, checked, in the page's order.

    Returns:
        {name: section}; MB of 2^20 bytes, accuracies from 0 to 1, seconds. Characters that cannot be printed
        are replaced, for the text goes into terminals, HTML and SVG.

    Raises:
        UserError: the folder does not exist, or a file is not a section that `dibit reproduce` wrote.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; dibit reproduce --out writes it.")
    found = {}
    for name in SECTIONS:
        if (path := folder / f"{name}.json").is_file():
            section = store.read(path)
            check(section, name)
            found[name] = _printable(section)
    return found


def check(section: Any, name: str) -> None:
    """Raise a UserError that names the first place where `section` is not what section `name` holds."""
    _check(section, _ENVELOPE, name)
    if section["section"] != name:
        raise UserError(f"{name}.json holds the section {section['section']!r}; was the file renamed?")
    _check(section, {"results": RESULTS[name], "machine?": {"*": object}, "versions?": {"*": str}}, name)


def _check(value: Any, kind: Any, where: str) -> None:
    if isinstance(kind, dict):
        _expect(isinstance(value, dict), where, "an object")
        for key, inner in kind.items():
            name = key.removesuffix("?")
            if name == "*":
                for found, item in value.items():
                    _check(item, inner, f"{where}.{found}")
            elif value.get(name) is not None:
                _check(value[name], inner, f"{where}.{name}")
            else:
                _expect(key.endswith("?"), f"{where}.{name}", "a value")
    elif isinstance(kind, list):
        _expect(isinstance(value, list), where, "a list")
        for i, item in enumerate(value):
            _check(item, kind[0], f"{where}[{i}]")
    elif kind in (int, float):
        allowed = (int,) if kind is int else (int, float)
        _expect(isinstance(value, allowed) and not isinstance(value, bool), where, "a number")
    else:
        _expect(isinstance(value, kind), where, {str: "a text", bool: "true or false"}.get(kind, "a value"))


def _expect(holds: bool, where: str, what: str) -> None:
    if not holds:
        file, _, place = where.partition(".")
        place = f" at {place}" if place else ""
        raise UserError(f"{file}.json is not what dibit reproduce {file} writes: expected {what}{place}.")


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "\ufffd" for c in value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value
