"""Run the tests' core on several versions of Python and torch, each in an environment of its own: `make matrix`.

Prints progress, and writes docs/versions.md from all results in the folder. `--only 3.11-2.6.0` runs one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
# The floor of pyproject.toml, the version that everything else here is run on, the newest, and a newer Python.
CELLS = (("3.11", "2.6.0"), ("3.11", "2.13.0"), ("3.11", "2.14.1"), ("3.13", "2.13.0"))
CORE = ("codec", "recompute", "residuals", "engine", "rules", "edges", "hooks", "compile", "_torch", "zoo")
FREE = ("torch", "triton", "nvidia", "numba", "llvmlite", "numpy", "scipy", "sympy")  # as torch and Python ask
HEAD = """\
# Versions

Dibit's own tests ran on these versions of Python and torch. `make matrix` makes this page (about an hour on two cores);
`make test` and CI take torch 2.13.0 on Python 3.11 alone.

| Python | torch | PyTorch Geometric | passed | skipped | failed | date |
|---|---|---|---:|---:|---:|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PYTHON-TORCH", help="such as 3.11-2.6.0")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "matrix", help="of the environments")
    parser.add_argument("--tests", nargs="+", default=[f"tests/{name}" for name in CORE])
    parser.add_argument("--failed", action="store_true", help="run again only what failed, and count what passes now")
    args = parser.parse_args()
    for python, torch in CELLS:
        name = f"{python}-{torch}"
        if args.only and name not in args.only:
            continue
        interpreter = _pyenv(python) or shutil.which(f"python{python}")
        if interpreter is None:
            print(f"{name}: there is no python{python} here; it is left out.", flush=True)
            continue
        _install(interpreter, torch, args.folder / name)
        if args.failed:
            _again(args.folder / name)
        else:
            _record(args.folder / name, *_test(args.folder / name, args.tests))
    found = [(cell, args.folder / "-".join(cell) / "result.json") for cell in CELLS]
    results = [(cell, json.loads(path.read_text())) for cell, path in found if path.exists()]
    PAGE.write_text(_page(results))
    print(PAGE.read_text())


def _page(results: list[tuple[tuple[str, str], dict[str, Any]]]) -> str:
    rows = [
        f"| {python} | {torch} | {r['pyg']} | {r['passed']} | {r['skipped']} | {len(r['failed'])} | {r['date']} |\n"
        for (python, torch), r in results
    ]
    lists = [
        f"\n## Failed on Python {python}, torch {torch}\n\n" + "".join(f"- `{name}`\n" for name in r["failed"])
        for (python, torch), r in results
        if r["failed"]
    ]
    return HEAD + "".join(rows) + "".join(lists)


def _pyenv(python: str) -> str | None:
    found = sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python"))
    return str(found[-1]) if found else None


def _install(interpreter: str, torch: str, folder: Path) -> None:
    if (folder / ".ready").exists():
        return
    print(f"{folder.name}: installing", flush=True)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith(FREE)]
    subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
    (folder / "constraints.txt").write_text("\n".join(pins) + "\n")
    pip = [folder / "bin" / "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    subprocess.run([*pip, "-c", folder / "constraints.txt", f"torch=={torch}", "-e", f"{ROOT}[test]"], check=True)
    (folder / ".ready").touch()


def _test(folder: Path, tests: list[str]) -> tuple[dict[str, int], list[str]]:
    """Counts of what passed and was skipped, and the names of what failed."""
    print(f"{folder.name}: testing", flush=True)
    own = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(folder / "numba")}
    command = [folder / "bin" / "pytest", "-n", str(os.cpu_count()), "--dist", "loadgroup", *tests]
    log = folder / "log.txt"
    with log.open("w") as out:
        subprocess.run(command, cwd=ROOT, env=os.environ | own, stdout=out, stderr=subprocess.STDOUT, check=False)
    text = log.read_text()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)\b", text)}
    return counts, list(dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.M)))


def _again(folder: Path) -> None:
    """Run what failed once more."""
    before = json.loads((folder / "result.json").read_text())
    if before["failed"]:
        counts, failed = _test(folder, before["failed"])
        _record(folder, {**before, "passed": before["passed"] + counts.get("passed", 0)}, failed)


def _record(folder: Path, counts: dict[str, int], failed: list[str]) -> None:
    show = [folder / "bin" / "python", "-c", "import torch_geometric as g; print(g.__version__)"]
    result = {
        "pyg": subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip(),
        "passed": counts.get("passed", 0),
        "skipped": counts.get("skipped", 0),
        "failed": failed,
        "date": datetime.date.today().isoformat(),
    }
    (folder / "result.json").write_text(json.dumps(result))
    print(folder.name, result, flush=True)


if __name__ == "__main__":
    sys.exit(main())
