"""What the rule of an element-wise function says of it: its derivative under all options; the page that names it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dibit.rules.elementwise import POINTWISE
from dibit.rules.registry import OPERATIONS
from tests.rules.domains import MORE, into_domain

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
# By function, a value for each of its options that is not the default.
OPTIONS: dict[str, dict[str, Any]] = {
    "elu": {"alpha": 0.7},
    "gelu": {"approximate": "tanh"},
    "pow": {"exponent": -1.5},
    "softplus": {"beta": 2.0, "threshold": 0.5},
}
# Rules that torch's documentation of autocast lists for some device, under "ops that autocast to float32" or to its own
# dtype. (https://docs.pytorch.org/docs/stable/amp.html)
AUTOCAST = {
    *("exp", "log", "pow", "reciprocal", "rsqrt", "softplus"),
    *("layer_norm", "log_softmax", "cross_entropy", "nll_loss", "mse_loss", "binary_cross_entropy_with_logits"),
    *("linear", "matmul", "addmm", "bmm", "prelu"),
}
# In that documentation, and no rule so far: one that is added belongs to `AUTOCAST` above.
OTHERS_UNDER_AUTOCAST = {
    *("acos", "asin", "cosh", "erfinv", "expm1", "log10", "log1p", "log2", "sinh", "tan", "cumsum", "cumprod"),
    *(
        "cosine_similarity",
        "norm",
        "softmax",
        "softmin",
        "prod",
        "smooth_l1_loss",
        "l1_loss",
        "kl_div",
        "huber_loss",
        "group_norm",
    ),
    *("renorm", "sum", "cdist", "dist", "mv", "addmv", "addbmm", "baddbmm"),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_every_option_has_a_value_here(name: str) -> None:
    assert set(POINTWISE[name].options) == set(OPTIONS.get(name, ())), "add a value of each option to OPTIONS above"


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, "") for name in POINTWISE] + [(name, option) for name, options in OPTIONS.items() for option in options],
)
def test_the_derivative_is_autograds(name: str, option: str) -> None:
    """At the defaults, and at another value of each option, which changes the result."""
    f, size = POINTWISE[name], torch.cat((torch.linspace(-6, 6, 999), torch.randn(999))).double()
    options = [OPTIONS[name][each] if each == option else default for each, default in f.options.items()]
    if name in MORE and not option:
        options = [*MORE[name]]
    x = into_domain("log" if name == "pow" else name, size).requires_grad_()
    y = f.plain(x, *options)
    (truth,) = torch.autograd.grad(y.sum(), x)
    found: list[Tensor] = []
    if f.derivative is not None:
        found.append(f.derivative(x.detach(), *options))
    if f.of_result is not None:
        found.append(f.of_result(y.detach(), *options))
    for slope in found:
        assert torch.allclose(slope, truth, rtol=1e-9, atol=1e-12)
    if option and name not in MORE:
        assert not torch.allclose(y, f.plain(x, *f.options.values())), f"this value of {option} changes nothing"


def test_rules_for_autocast_are_those_of_torchs_documentation() -> None:
    """Without a GPU nobody else notices a rule that lacks `low_precision` or `full_precision`, which wrap it."""
    hand_on = {"matmul", "addmm"}  # to the rules for dense matrices, which are marked
    marked = {name for name, operation in OPERATIONS.items() if hasattr(operation.rule, "__wrapped__")}
    assert marked | hand_on == AUTOCAST
    missing = {*OPERATIONS} & OTHERS_UNDER_AUTOCAST
    assert not missing, f"autocast may run {missing} in another dtype: give `autocast=`, and add them to AUTOCAST above"


def test_every_rule_has_a_row_in_the_documentation() -> None:
    """In the first column of the table of docs/operations.md, by its name or as it is written there."""
    written = {
        "add": "a + b",
        "binary_cross_entropy_with_logits": "BCE with logits",
        "div": "a / b",
        "matmul": "a @ b",
        "mse_loss": "MSE",
        "mul": "a * b",
        "nll_loss": "NLL",
        "sparse_mm": "sparse.mm",
    }
    table = PAGE.read_text(encoding="utf-8").split("### ")[0]
    named = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| "))
    words = {re.sub(r"[\W_]", "", word).lower() for word in re.findall(r"[\w-]+", named)}
    missing = {
        name
        for name in OPERATIONS
        if name.replace("_", "") not in words and not (name in written and written[name] in named)
    }
    assert not missing, f"add a row for each of {missing} to the table of docs/operations.md"
