"""`python -m tests.twin --minutes 30 [--seed N] [--jobs 2] [--recipe NAME]`: random programs until time is up.

The exit status is 1 if any find.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn, TimeElapsedColumn

from tests.twin.run import CONFIGS
from tests.twin.search import work


def main() -> int:
    """Exit status: 1 where there was any find."""
    parser = argparse.ArgumentParser(prog="python -m tests.twin", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--recipe", choices=CONFIGS, default="", help="of all programs; default: a drawn one of each")
    parser.add_argument("--out", type=Path, help="folder for the programs found")
    given = parser.parse_args()
    console = Console(soft_wrap=True)
    context = multiprocessing.get_context("spawn")
    out: Any = context.Queue()
    folder = Path(tempfile.mkdtemp(prefix="twin"))
    jobs = {}
    for job in range(given.jobs):
        seed = given.seed + job
        running = folder / f"running{seed}.py"
        jobs[seed] = context.Process(target=work, args=(given.minutes, seed, out, str(running), given.recipe)), running
        jobs[seed][0].start()
    counts: dict[int, tuple[int, int, int]] = dict.fromkeys(jobs, (0, 0, 0))
    events: Counter[str] = Counter()
    finds: Counter[str] = Counter()
    at_work = set(jobs)
    with Bar(TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("programs", total=None)
        while at_work:
            try:
                seed, count, told = out.get(timeout=5)
            except queue.Empty:
                for seed in sorted(at_work):
                    process, running = jobs[seed]
                    if not process.is_alive() and out.empty():
                        at_work.discard(seed)
                        finds["the process ended"] += 1
                        console.print(f"the process ended ({process.exitcode}) in:", markup=False)
                        console.print(running.read_text() if running.exists() else "", markup=False, highlight=False)
                continue
            if count is None:
                events += told
                at_work.discard(seed)
                continue
            counts[seed] = count
            total, compared, failed = (sum(column) for column in zip(*counts.values(), strict=True))
            bar.update(
                task,
                description=f"{total} programs ({compared} gradients compared, {failed} fail plain), "
                f"{finds.total()} finds",
            )
            if told is not None:
                text, problems, number, seconds = told
                finds[problems[0][:60]] += 1
                console.print(f"\n# program {number} of seed {seed}, after {seconds:.0f} s", markup=False)
                console.print(text, markup=False, highlight=False)
                if given.out is not None:
                    given.out.mkdir(parents=True, exist_ok=True)
                    (given.out / f"find-{seed}-{number}.py").write_text(text)
    for process, _ in jobs.values():
        process.join()
    console.print("programs by what happens in them:")
    for name, count in sorted(events.items()):
        console.print(f"  {count:6}  {name}", markup=False, highlight=False)
    console.print(f"{sum(count[0] for count in counts.values())} programs, {finds.total()} finds")
    for name, count in finds.most_common():
        console.print(f"  {count:6}  {name}", markup=False, highlight=False)
    return int(bool(finds))


if __name__ == "__main__":
    sys.exit(main())
