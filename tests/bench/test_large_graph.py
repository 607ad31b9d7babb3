"""benchmarks/large_graph.py, smaller: under a limit of the process's data, plain does not fit and the default does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "large_graph.py"


def test_the_default_fits_where_plain_does_not(tmp_path: Path) -> None:
    """200,000 nodes: plain takes about 1.6 GB beside the libraries, the default 0.5."""
    words = ("--nodes", "200000", "--degree", "8", "--limit", "1.4", "--steps", "1", "--folder", str(tmp_path))
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "plain: does not fit in 1.4 GiB" in done.stdout
    assert "default: fits" in done.stdout
