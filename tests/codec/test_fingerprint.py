"""A fingerprint of content: one definition for all devices, and no change goes unseen."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dibit.codec import dispatch, ops
from dibit.codec.backends import reference
from dibit.codec.fingerprint import fingerprint
from dibit.codec.numpy_views import array

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000, 2**14 * 8, 2**17 + 3, 2**20 + 1])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_the_kernel_gives_the_definitions_number(size: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dibit.codec.fingerprint.MAX_HASHED_BYTES", 0)
    x = torch.randint(256, (size + offset,), dtype=torch.uint8)[offset:]
    assert fingerprint(x) == int(ops.fingerprint(x)) == int(reference.fingerprint(x.clone()))
    for found in (ops.fingerprint(x), reference.fingerprint(x)):
        assert (found.dtype, found.shape) == (torch.int64, ())


def test_values_stay() -> None:
    """They are compared within a process alone, but a definition that changes must do so knowingly."""
    x = torch.arange(20_003).remainder(251).to(torch.uint8)
    assert fingerprint(x) == int(reference.fingerprint(x)) == 62584626412302910


@pytest.mark.parametrize(("size", "asked"), [(2**11, 0), (2**11 + 1, 1)])
def test_the_backend_is_asked_where_python_would_take_longer(size: int, asked: int) -> None:
    calls: list[Tensor] = []
    own = SimpleNamespace(fingerprint=lambda content: calls.append(content) or torch.tensor(5))
    with dispatch.using_backend("cpu", own):
        assert (fingerprint(torch.randn(size)) == 5) == bool(asked)
    assert len(calls) == asked


def test_a_backend_without_one_runs_the_definition() -> None:
    x = torch.randn(5000)
    expected = fingerprint(x)
    with dispatch.using_backend("cpu", SimpleNamespace()):
        assert fingerprint(x) == expected


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5000)
    expected = fingerprint(x)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dispatch.backend.cache_clear()
    try:
        with pytest.warns(UserWarning, match="numba is not installed"):
            assert fingerprint(x) == expected
    finally:
        dispatch.backend.cache_clear()


def changed(x: Tensor, how: str, at: int) -> Tensor:
    y = x.clone()
    flat = y.view(-1)
    if how == "one":
        flat[at] = ~flat[at] if x.dtype == torch.bool else flat[at] + 1
    elif how == "negated":
        flat.copy_(~flat if x.dtype == torch.bool else -flat)
    elif how == "swapped":
        flat[[0, at]] = flat[[at, 0]]
    elif how == "rolled":
        flat.copy_(flat.roll(1))
    return y


@given(
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([2, 33, 5000, 40_000]),
    how=st.sampled_from(["one", "negated", "swapped", "rolled"]),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_every_change_shows_and_a_copy_does_not(dtype: torch.dtype, size: int, how: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(2 if dtype == torch.bool else 100, (size,), generator=generator).to(dtype)
    y = changed(x, how, int(torch.randint(1, size, (1,), generator=generator)))
    assert fingerprint(x) == fingerprint(x.clone())
    assert (fingerprint(x) == fingerprint(y)) == torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_layout_and_offset_do_not_matter() -> None:
    x = torch.randn(300, 40)
    assert fingerprint(x.t()) == fingerprint(x.t().contiguous()) != fingerprint(x)
    assert fingerprint(x[:, 3:9]) == fingerprint(x[:, 3:9].clone())


def test_reading_leaves_the_storage_resizable() -> None:
    """`Tensor.numpy` forbids it for good: a reversible layer that frees its input could not run any more."""
    x = torch.randn(5000, 4)
    fingerprint(x)
    assert array(x).base is not None
    assert x.untyped_storage().resizable()


def test_an_array_keeps_the_memory_that_it_shows() -> None:
    shown = array(torch.arange(6.0).view(2, 3).t())
    _ = [torch.full((2, 3), 7.0) for _ in range(100)]
    assert shown.tolist() == [[0, 3], [1, 4], [2, 5]]
    shown = array(x := torch.zeros(3))
    shown[1] = 5
    assert x.tolist() == [0, 5, 0]
