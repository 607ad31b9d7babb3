"""Threads that suit the machine (before torch starts), real graphs where they are present, one seed for every test."""

import os
import signal

_CORES = str(len(os.sched_getaffinity(0)))
for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, _CORES)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background of a shell: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)  # before the workers look for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several workers share the tests one by one, but those of a file of tests/reproduce share one run."""
    for item in items:
        if item.path.parent.name == "reproduce":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"the real graphs are not here: no folder {DATA}")
    return DATA
