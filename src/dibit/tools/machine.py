"""What computed the results: versions and machine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Return the versions of what computed the results."""
    from importlib.metadata import version

    packages = {name: version(name) for name in ("dibit", "torch", "torch_geometric", "numpy", "numba", "scipy")}
    return {**packages, "python": platform.python_version()}


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describe where the results were computed; no names of hosts, users or folders."""
    device = torch.device(device)
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """Return the processor's model where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
