"""Seconds of a training step, forward and backward apart: all settings in one process, interleaved."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from dibit.bench.workload import TrainingStep, Workload
from dibit.engine.model_state import state_of
from dibit.engine.noise.row_plan import FIRST_MEASURED

Times = dict[str, list[tuple[float, float]]]


def measure(workload: Workload, settings: Sequence[str], rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Every round runs each setting once; one round more, the first, warms up and is dropped.

    A compressed model measures its gradient's noise in its first four steps, and later in one of 4 to 16. The first
    four are not counted, since a training has thousands of steps.

    Args:
        workload: what is trained.
        settings: "plain" among them, or the ratios are to the first.
        rounds: counted rounds.
        note: called with a line that says how far the measurement is.

    Returns:
        {"workload", "rounds", "rows"}, a row a setting: median seconds of the step, its forward and its backward half
        (with the optimiser), and the ratio to plain, a median over the rounds of the ratio within a round, with its
        quartiles; or {"setting", "failed"} with the reason.
    """
    steps, failed, batches = {}, {}, workload.batches()
    for setting in settings:
        note(f"warming up {setting}")
        try:
            step = TrainingStep(workload.network(), batches[0], setting)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in range(1 if state_of(step.model) is None else FIRST_MEASURED):
                    step()
            steps[setting] = step
        except Exception as error:
            failed[setting] = reason(error)
    times: Times = {setting: [] for setting in steps}
    for done in range(rounds + 1):
        for setting in [each for each in steps if each not in failed]:
            note(f"round {done} of {rounds}, {setting}")
            step = steps[setting]
            step.batch = batches[done % len(batches)]
            try:
                start = time.perf_counter()
                loss = step.forward()
                middle = time.perf_counter()
                step.backward(loss)
                times[setting].append((middle - start, time.perf_counter() - middle))
            except Exception as error:
                failed[setting] = reason(error)
    counted = {setting: own[1:] for setting, own in times.items() if setting not in failed}
    base = "plain" if "plain" in counted else next(iter(counted), "")
    rows = [_row(setting, counted, base) if setting in counted else failed_row(setting, failed) for setting in settings]
    return {"workload": str(workload), "rounds": rounds, "base": base, "rows": rows}


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def failed_row(setting: str, failed: dict[str, str]) -> dict[str, Any]:
    return {"setting": setting, "failed": failed[setting]}


def _row(setting: str, times: Times, base: str) -> dict[str, Any]:
    own, other = times[setting], times[base]
    ratios = [sum(a) / sum(b) for a, b in zip(own, other, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {
        "setting": setting,
        "seconds": statistics.median(sum(t) for t in own),
        "forward": statistics.median(t[0] for t in own),
        "backward": statistics.median(t[1] for t in own),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
    }
