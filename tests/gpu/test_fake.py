"""Every operator on fake CUDA tensors: what it returns has the shape, dtype and device of what a kernel returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dibit.codec import ops
from tests.codec.test_codec import SAMPLES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SAMPLES)
def test_on_fake_cuda_tensors(name: str, dtype: torch.dtype) -> None:
    op, args = getattr(ops, name), SAMPLES[name]()
    if name in ("aggregate", "column_sums", "norm_gradient", "norm_relu_dropout") and dtype == torch.bfloat16:
        pytest.skip("their users hand them float32 in the place of half precision")
    if dtype != torch.float32:
        coded = ("dequantize", "weight_gradient", "column_sums", "norm_gradient")
        args = tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args)
        if name in coded and dtype == torch.float64:
            args = (args[0], args[1].double(), *args[2:])
    expected = op(*args)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

        found = op(*map(moved, args))
    assert mode is not None
    for own, real in zip(_tensors(found), _tensors(expected), strict=True):
        assert (own.dtype, own.dim()) == (real.dtype, real.dim())
        known = [size for size in own.shape if not isinstance(size, torch.SymInt)]
        assert known == [*real.shape][-len(known) :]
        assert len(known) == real.dim() or name == "edge_winners", "only its first size depends on the numbers"
        assert own.stride() == real.stride()
        assert own.device.type == "cuda"


def _tensors(found: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if found is None:  # it writes to an argument
        return ()
    return found if isinstance(found, tuple) else (found,)
