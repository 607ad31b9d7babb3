"""`peak_bytes` on steps whose peak is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dibit.tools.memory import peak_bytes


def _temporary() -> torch.Tensor:
    a = torch.empty(1000)  # 4,000 bytes
    b = torch.empty(5000)  # and 20,000: the peak
    del b
    c = torch.empty(2000)  # and 8,000
    return a[:1] + c[:1]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (_temporary, 24_000),
        (lambda: None, 0),
        (lambda: [torch.empty(1000, dtype=torch.uint8) for _ in range(7)], 7_000),
        (lambda: [torch.empty(1000).sum() for _ in range(7)], 4_000 + 7 * 4),  # one at a time; the sums stay
    ],
    ids=["temporary", "nothing", "kept", "one-at-a-time"],
)
def test_known_peaks(step: Callable[[], object], expected: int) -> None:
    assert peak_bytes(step) == expected


def test_what_was_live_before_does_not_count() -> None:
    held = torch.zeros(100_000)
    assert peak_bytes(held.neg_) == 0
    assert peak_bytes(held.neg) == 400_000


def test_a_backward_pass_needs_what_was_saved() -> None:
    x, w = torch.rand(1000, 100), torch.rand(100, 100, requires_grad=True)

    def step() -> None:
        hidden = x @ w
        for _ in range(3):
            hidden = hidden.relu()  # keeps its output, 400,000 bytes each
        hidden.sum().backward()

    peak = peak_bytes(step)
    w.grad = None
    assert 4 * 400_000 <= peak <= 6 * 400_000
    with torch.no_grad():
        assert peak_bytes(lambda: (x @ w).relu().relu().relu().sum()) <= 2 * 400_000 + 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_known_peak_on_cuda() -> None:
    peak = peak_bytes(lambda: [torch.empty(2**20, device="cuda", dtype=torch.uint8) for _ in range(3)], "cuda")
    assert peak == 3 * 2**20
