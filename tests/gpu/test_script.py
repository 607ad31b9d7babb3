"""benchmarks/gpu.py from a clean checkout: in the interpreter, without what a GPU's machine may lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
# As if these were not installed.
WITHOUT = (
    "import importlib.util as u, runpy, sys\n"
    "find, gone = u.find_spec, sys.argv.pop(1).split()\n"
    "u.find_spec = lambda name, *a: None if name.split('.')[0] in gone else find(name, *a)\n"
    "sys.modules.update(dict.fromkeys(gone))\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


def run(*args: str, without: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, without, str(SCRIPT), *args],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_kernels_and_steps(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    small = "--device cpu --scale 0.0005 --rounds 1 --steps 1 --settings plain default"
    parts = "--only graph programs kernels train profile"
    done = run(*small.split(), *parts.split(), "--out", str(out), without="numba rich matplotlib", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["device"] == "interpreter"
    assert [row["setting"] for row in found["train"]["rows"]] == ["plain", "default"]
    assert all(row["seconds"] > 0 for row in found["train"]["rows"])
    assert [row["plain_bits"] for row in found["programs"]] == [True, True]
    assert found["kernels"][0]["kernel"] == "copy"
    assert len(found["kernels"]) > 20
    assert "quantise + pack, 2 bit, block 1024" in done.stdout
    assert "steps, round 1 of 1" in done.stderr


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run("--only", "check", without="numba scipy rich matplotlib yaml")
    assert done.returncode == 2
    assert done.stdout == (
        "gpu.py: torch sees no GPU here; run it on a machine with one, or in the interpreter (see --help).\n"
    )
