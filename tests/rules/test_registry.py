"""The table of spellings: who reads it, and what a rule says of its function."""

from __future__ import annotations

import importlib
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dibit import rules
from dibit.engine.module_stack import function_name
from dibit.hooks.dropout_masks import DROPOUTS
from dibit.nn import norm_relu_dropout
from dibit.recompute.repeatable import AUTOCAST, IN_PLACE, PURE, SAVES_RESULT
from dibit.rules import KINDS, RULES
from dibit.rules.elementwise import POINTWISE, elementwise
from dibit.rules.registry import OPERATIONS, rule, spellings
from tests.rules.domains import DOMAIN, MORE


def test_a_function_has_one_rule() -> None:
    found = [function for name in OPERATIONS for function in spellings(name)]
    assert len(found) == len(set(found)) == len(RULES)


def test_in_place_spellings_are_those_of_rules_that_work_in_place() -> None:
    assert {torch.relu_, F.leaky_relu_, torch.sigmoid_, Tensor.exp_, F.elu_, torch.dropout_} <= set(RULES)
    assert not {Tensor.add_, Tensor.mul_, Tensor.div_, Tensor.addmm_} & set(RULES)


@pytest.mark.parametrize(
    ("other", "function"),
    [
        (torch.absolute, torch.abs),
        (Tensor.absolute_, torch.abs_),
        (torch.multiply, torch.mul),
        (Tensor.divide, torch.div),
        (torch.true_divide, torch.div),
        (torch.linalg.matmul, torch.matmul),
        (torch.special.expit, torch.sigmoid),
        (torch.special.erf, torch.erf),
    ],
)
def test_torchs_other_names_have_the_rule(other: Any, function: Any) -> None:
    operation = [next(name for name in OPERATIONS if each in spellings(name)) for each in (other, function)]
    assert operation[0] == operation[1]
    assert other in RULES


def test_masks_are_drawn_for_all_spellings_of_dropout() -> None:
    assert set(DROPOUTS) == {F.dropout, torch.dropout, torch.dropout_, norm_relu_dropout}


def test_what_a_rule_says_reaches_the_tape() -> None:
    assert {torch.exp, Tensor.exp_, F.relu, torch.relu_, F.leaky_relu_, Tensor.__pow__, Tensor.add} <= PURE
    assert not {F.gelu, F.silu, torch.erf, torch.sin, F.linear, torch.bmm, torch.add, F.dropout} & IN_PLACE
    assert not {F.gelu, F.silu, torch.erf, torch.sin, F.linear, torch.bmm, F.dropout} & PURE
    assert {torch.exp_, Tensor.relu_, torch.sigmoid_, F.leaky_relu_} <= IN_PLACE
    assert {torch.exp, torch.log, Tensor.pow_} <= AUTOCAST
    assert not {torch.sqrt, torch.relu, torch.sigmoid} & AUTOCAST
    assert {torch.exp, F.relu, Tensor.sqrt_} <= SAVES_RESULT
    assert not {torch.log, F.leaky_relu, torch.mul} & SAVES_RESULT


def test_positive_results_that_the_tape_knows_are_called_positive() -> None:
    x = torch.arange(-20.0, 21.0)
    found = {
        name
        for name, f in POINTWISE.items()
        if name not in DOMAIN and spellings(name).keys() & PURE and (f.plain(x, *MORE.get(name, ())) > 0).all()
    }
    assert found == {name for name, operation in OPERATIONS.items() if operation.positive}


def test_every_rule_is_booked() -> None:
    assert set(map(function_name, RULES)) == set(KINDS)
    assert set(KINDS.values()) == {"linear inputs", "norm inputs", "ReLU", "dropout", "other"}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_rule_can_be_pickled(name: str) -> None:
    """It may be among the rules of a compressed model that is saved."""
    rule = OPERATIONS[name].rule
    assert pickle.loads(pickle.dumps(rule)) is rule


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("fused", "norm_relu_dropout"),
        ("large", "large_outputs"),
        *((name, name) for name in ("activation", "norm", "positive", "product", "relative", "returned")),
    ],
)
def test_the_former_names_of_modules_can_be_imported(former: str, name: str) -> None:
    assert importlib.import_module(f"dibit.functions.{former}") is importlib.import_module(f"{rules.__name__}.{name}")


def test_a_rule_for_no_function_of_torch_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="a rule was registered for 'tripled', but torch has no function of this name"):

        @rule()
        def tripled(forward: Any, input: Tensor) -> Any: ...


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("no_such", {"derivative": torch.cos, "codec": "recipe"}, "torch has no function 'no_such'"),
        ("sinh", {"derivative": torch.cosh, "codec": "rekative"}, "choose one of recipe, saturating"),
        ("sinh", {"codec": "recipe"}, "needs one of them"),
    ],
)
def test_an_element_wise_rule_that_cannot_be_meant_is_a_sentence(
    name: str, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        elementwise(name, torch.sinh, **settings)  # type: ignore[arg-type]
