"""PyG's own tests, plain and then compressed: which of those that pass plain fail compressed, by cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Tests that may fail compressed, each with the reason.
ALLOWED: dict[str, str] = {}


def run(checkout: Path, out: Path, tests: str, *, dropout: str, again: bool, limit: float) -> int:
    """Run both and print the report.

    Args:
        checkout: a copy of PyG's repository at the tag of the version that is installed.
        out: folder for the results; the plain ones are made once.
        tests: folder or file below the checkout.
        dropout: "seed" for the default recipe, "mask" where torch is to draw dropout's masks.
        again: run the plain tests anew.
        limit: seconds for each of the two runs.

    Returns:
        How many tests that pass plain fail compressed and are not allowed to.
    """
    if not (checkout / tests).exists():
        raise SystemExit(f"{checkout} has no {tests}; give the path of a copy of PyG's repository.")
    out.mkdir(parents=True, exist_ok=True)
    plain = out / f"plain-{tests.replace('/', '.')}.jsonl"
    if again or not plain.exists():
        _pytest(checkout, tests, plain, limit, "--peers", "plain")
    before = _outcomes(plain)
    passed = [test for test, entry in before.items() if entry["outcome"] == "passed"]
    only = out / "passed.txt"
    only.write_text("\n".join(passed))
    compressed = out / f"compressed-{tests.replace('/', '.')}.jsonl"
    options = ("--peers", "compressed", "--peers-only", str(only), "--peers-dropout", dropout)
    _pytest(checkout, tests, compressed, limit, *options)
    after = _outcomes(compressed)
    failed = {test: after[test] for test in passed if test in after and after[test]["outcome"] != "passed"}
    missing = [test for test in passed if test not in after]
    return _report(len(passed), failed, missing)


def _report(passed: int, failed: dict[str, dict[str, str]], missing: list[str]) -> int:
    causes: dict[str, list[str]] = defaultdict(list)
    for test, entry in failed.items():
        if test not in ALLOWED:
            causes[entry.get("cause", "the process ended in this test").splitlines()[0][:160]].append(test)
    for cause, names in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(names)}: {cause}")
        for name in names:
            print(f"    {name}")
    allowed = sorted(set(failed) & set(ALLOWED))
    for name in allowed:
        print(f"\nallowed: {name}\n    {ALLOWED[name]}")
    for name in sorted(set(ALLOWED) - set(failed)):
        print(f"\nallowed, but it passes or did not run: {name}")
    if missing:
        print(f"\n{len(missing)} tests did not run, the first of them {missing[0]}: the run ended early.")
    bad = sum(map(len, causes.values()))
    print(f"\n{passed} tests pass plain; {bad} of them fail compressed, {len(allowed)} more are allowed to.")
    return bad + len(missing)


def _pytest(checkout: Path, tests: str, log: Path, limit: float, *options: str) -> None:
    log.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.peers.plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        "--timeout",
        "120",
        "-c",
        str(checkout / "pyproject.toml"),
        "--rootdir",
        str(checkout),
        "-o",
        "addopts=",
        "-m",
        "not rag and not dataset",
        "--peers-log",
        str(log),
        *options,
        str(checkout / tests),
    ]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    began = time.monotonic()
    # not in the checkout: the installed torch_geometric is to be tested, not the one there
    with log.with_suffix(".txt").open("w") as output:
        process = subprocess.Popen(command, cwd=log.parent, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(2)
            done = _outcomes(log)
            seconds = time.monotonic() - began
            print(f"\r{log.stem}: {len(done)} tests, {seconds:.0f} s ", end="", flush=True)
            if seconds > limit:
                process.kill()
    print()


def _outcomes(log: Path) -> dict[str, dict[str, str]]:
    return dict(_entries(log.read_text().splitlines())) if log.exists() else {}


def _entries(lines: Iterable[str]) -> Iterable[tuple[str, dict[str, str]]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line, half written
        yield entry["test"], entry
