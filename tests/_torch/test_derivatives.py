"""Derivatives of activations by torch's own operations and by formulas: both are what autograd computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.private import derivatives

# Function, options of both, what computes its derivative, from the result or from x, and what it has of torch.
CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Any], Callable[..., Tensor], bool, str]] = {
    "gelu": (F.gelu, {}, derivatives.gelu, False, "_gelu"),
    "gelu by tanh": (F.gelu, {"approximate": "tanh"}, derivatives.gelu, False, "_gelu"),
    "silu": (F.silu, {}, derivatives.silu, False, "_silu"),
    "mish": (F.mish, {}, derivatives.mish, False, "_mish"),
    "hardswish": (F.hardswish, {}, derivatives.hardswish, False, "_hardswish"),
    "elu": (F.elu, {}, derivatives.elu, False, "_elu"),
    "elu, alpha": (F.elu, {"alpha": 1.7}, derivatives.elu, False, "_elu"),
    "elu, negative alpha": (F.elu, {"alpha": -0.7}, derivatives.elu, False, "_elu"),
    "elu of its result": (F.elu, {"alpha": 1.7}, derivatives.elu_of_result, True, "_elu"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [True, False], ids=["torch's operation", "formula"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_autograd_computes(
    name: str, own: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, options, derivative, of_result, operation = CASES[name]
    if not own:
        monkeypatch.setattr(derivatives, operation, None)
    x = torch.cat((torch.linspace(-9.03, 9.01, 4001), torch.tensor([0.0, -0.0, 40, -40, 300, -300]))).to(dtype)
    # at 3 and -3 the derivative of Hardswish jumps, and versions of torch differ in which side they take
    x = x[x.abs() != 3].requires_grad_()
    y = function(x, **options)
    (expected,) = torch.autograd.grad(y.sum(), x)
    found = derivative((y if of_result else x).detach(), **options)
    assert found.dtype == dtype
    if of_result:  # exp(x) - 1 has lost a part of what exp(x) had
        expected = torch.where(y <= 0, y.double() + options["alpha"], 1.0).detach().to(dtype)
    computed = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounded = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    # 1 - tanh^2 is 0 but for rounding where x is large, and torch and Dibit multiply it by x or x^3
    assert ((found - expected).double().abs() <= 32 * computed + rounded * expected.double().abs()).all()


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_are_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, options, derivative, _, operation = CASES[name]
    x = torch.tensor([float("nan"), float("inf"), float("-inf")])
    if options.get("alpha", 0) < 0:
        x = x[:2]
    expected = derivative(x, **options)
    monkeypatch.setattr(derivatives, operation, None)
    assert torch.equal(derivative(x, **options).nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize("own", [True, False])
def test_in_place_with_a_negative_slope(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not own:
        monkeypatch.setattr(derivatives, "_elu", None)
    with pytest.raises(RuntimeError, match=r"(?i)in.place"):
        derivatives.elu_of_result(torch.randn(3), alpha=-1.0)
