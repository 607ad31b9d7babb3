"""Each example runs as it stands, and prints what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name: str) -> None:
    if name == "with_lightning":
        pytest.importorskip("lightning")
    done = run(*(TORCHRUN if name == "ddp" else ()), EXAMPLES / f"{name}.py")
    assert done.returncode == 0, done.stderr
    for plain, kept in re.findall(r"plain ([\d.]+), kept ([\d.]+)", done.stdout):
        assert 0 < float(kept) < float(plain) / 3
    (accuracy,) = re.findall(r"test accuracy ([\d.]+) %", done.stdout)
    assert float(accuracy) > 60  # ten classes
    if name == "own_layer":
        without, with_rule = (float(x) for x in re.findall(r"kept ([\d.]+) MB", done.stdout))
        assert with_rule < without - 2 * 4000 * 64 * 3 / 2**20, (
            "of 4 bytes an element of arsinh's input 3 and more are saved"
        )


def test_ddp_alone_says_how_to_start_it() -> None:
    done = run(EXAMPLES / "ddp.py")
    assert done.returncode == 1
    assert "torchrun --nproc-per-node 2 examples/ddp.py" in done.stderr
