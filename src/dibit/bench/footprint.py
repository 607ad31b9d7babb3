"""Megabytes of a training step: what the backward pass keeps, the peak, and the system's own count of it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dibit.bench.workload import TrainingStep, Workload
from dibit.tools.units import MB


def measure(
    workload: Workload, layers: Sequence[int], settings: Sequence[str], note: Callable[[str], None]
) -> dict[str, Any]:
    """Each number of layers and setting in a process of its own.

    Returns:
        {"workloads", "rows"}, a row a number of layers and setting, in MB (2^20 bytes). `saved`: what the C allocator
        has handed out across the model's forward pass, without the logits and with the targets; `ledger`: the same by
        `dibit.track`, where that sees it; `peak`: live tensor bytes at the worst moment of a step, data, weights and
        optimiser counted; `resident`: how far the peak of the process's resident memory during a step lies above the
        resident memory before it, plus data, weights and optimiser, as in `peak`.
    """
    rows = []
    for count in layers:
        for setting in settings:
            note(f"{count} layers, {setting}")
            own = replace(workload, layers=count)
            command = [sys.executable, "-m", "dibit.bench.footprint", json.dumps([asdict(own), setting])]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["killed"]
                rows.append({"layers": count, "setting": setting, "failed": lines[-1][:160]})
            else:
                rows.append({"layers": count, "setting": setting, **json.loads(done.stdout.splitlines()[-1])})
    return {"workloads": [str(replace(workload, layers=count)) for count in layers], "rows": rows}


def one(workload: Workload, setting: str) -> dict[str, float | None]:
    """Measure in this process."""
    from dibit.tools.memory import peak_bytes, release

    step = TrainingStep(*workload.build(), setting)
    step()  # compiles kernels, makes the optimiser's state
    inputs = step.input_bytes()
    release()  # what the allocator keeps for later would hide the growth
    before = _status("VmRSS")
    reset = _reset_peak()
    step()
    top = _status("VmHWM")
    saved, ledger = kept(step, setting)
    return {
        "saved": saved,
        "ledger": ledger,
        "peak": (peak_bytes(step) + inputs) / MB,
        "resident": (top - before + inputs) / MB if reset and top and before else None,
    }


def kept(step: TrainingStep, setting: str) -> tuple[float | None, float | None]:
    """MB that the model's forward pass keeps: by the C allocator, and by `dibit.track`; a warm step."""
    import dibit
    from dibit.tools.memory import allocated_bytes

    gc.collect()
    targets = step.batch.y.nbytes
    start = allocated_bytes()
    logits = step.logits()
    held = allocated_bytes()
    saved = None if start is None or held is None else (held - start - logits.nbytes + targets) / MB
    del logits
    if setting != "plain" and setting not in dibit.recipes.RECIPES:
        return saved, None
    with dibit.track(step.model) as tracked:
        step.logits()
    return saved, (tracked.total + targets) / MB


def _status(name: str) -> int:
    """A figure of this process in bytes, where Linux tells it, else 0."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _reset_peak() -> bool:
    """Begin the resident set's high-water mark anew; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    fields, name = json.loads(sys.argv[1])
    print(json.dumps(one(Workload(**fields), name)))
