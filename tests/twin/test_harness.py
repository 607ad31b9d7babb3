"""The harness notices what is planted: each kind of difference, in a model that is otherwise right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn

from dibit import recipes
from tests.twin.compare import WORST, judge
from tests.twin.grammar import Fill, Index, Op, Program, Read, Twins
from tests.twin.run import CONFIGS, Twin
from tests.twin.scenarios import SCENARIOS
from tests.twin.strategies import RECIPES, programs

pytestmark = pytest.mark.filterwarnings("ignore")

PROGRAM = Program((Op("linear"), Op("relu"), Op("running mean")))
_noise = torch.Generator().manual_seed(0)
_kept: list[Tensor] = []


def _on_result(change: Callable[[Tensor], Any]) -> Callable[[nn.Module], Any]:
    return lambda model: model.register_forward_hook(lambda module, args, y: change(y))


def _on_gradient(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], Any]:
    return lambda model: [p.register_hook(change) for p in model.parameters()]


def _fail(y: Tensor) -> None:
    raise ValueError("planted")


def _rare(g: Tensor) -> Tensor:
    """Unbiased; one draw of 20 is 20 times the gradient, the others are nothing."""
    return g * (20.0 if torch.rand((), generator=_noise) < 0.05 else 0.0)


def _slanted(g: Tensor) -> Tensor:
    return g * (1.15 + 0.1 * torch.randn(g.shape, generator=_noise))


PLANTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "other bits": (_on_result(lambda y: y + 1e-6), "other bits"),
    "other strides": (_on_result(lambda y: y.t().contiguous().t()), "strides"),
    "another sign of zero": (_on_result(lambda y: torch.where(y == 0, -y, y)), "other bits"),
    "an error": (_on_result(_fail), "fails where plain works: ValueError"),
    "no gradient": (_on_result(lambda y: y.detach().requires_grad_()), "gradients of other tensors"),
    "a wrong gradient": (_on_gradient(lambda g: 1.01 * g), "mean 0.01 of it away"),
    "a biased gradient": (_on_gradient(_slanted), "biased"),
    "no draw is near": (_on_gradient(_rare), "typical draw"),
    "torch's generator": (_on_result(lambda y: torch.rand(1) and None), "generator"),
    "a buffer": (lambda model: model.p2.add_(1), "other bits"),
    "a hook": (_on_result(lambda y: None), "attributes"),
    "an attribute": (lambda model: setattr(model, "left", 1), "attributes"),
    "saved-tensor hooks": (
        _on_result(lambda y: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x).__enter__()),
        "saved-tensor hooks",
    ),
    "a function mode": (_on_result(lambda y: _Mode().__enter__() and None), "function modes"),
    "memory": (_on_gradient(lambda g: _kept.append(g.clone()) or g), "for ever"),
}
PROGRAMS = {"a buffer": Program((Op("linear"), Op("relu"), Op("constant ones")))}


class _Mode(torch.overrides.TorchFunctionMode):
    """Does nothing."""


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.slow
def test_finds_what_is_planted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, expected = PLANTED[name]
    compress = Twin.compress

    def planted(self: Twin, model: nn.Module, salt: int) -> nn.Module:
        model = compress(self, model, salt)
        with torch.no_grad():
            plant(model)
        return model

    monkeypatch.setattr(Twin, "compress", planted)
    problems = _judged(PROGRAMS.get(name, Program((Op("linear"), Op("relu")))))
    _kept.clear()
    assert any(expected in problem for problem in problems), problems


def test_finds_nothing_where_nothing_is_planted() -> None:
    assert not _judged(PROGRAM)


@pytest.mark.parametrize(
    "op",
    [
        Read("buffer", "t[i]", "times", "numpy", "after"),
        Index("buffer", "clone", "gathered", "numpy", "after"),
        Fill("zeros", "numpy", "times"),
        Twins("ones", "data"),
    ],
    ids=lambda op: type(op).__name__,
)
def test_plain_is_right_where_copies_are_kept(op: Any) -> None:
    """Where memory changes, the truth is what plain gives as if all that it saved had been copied."""
    twin = Twin(Program((op,)))
    plain, ideal = twin.plain(), twin.ideal()
    assert plain.gradients
    assert all(torch.equal(g, ideal.gradients[name]) for name, g in plain.gradients.items())


def test_every_recipe_is_tried() -> None:
    assert set(recipes.RECIPES) <= set(CONFIGS) == set(RECIPES) == set(WORST)


def test_a_search_may_have_one_recipe() -> None:
    found = []

    @settings(max_examples=10, database=None, phases=(Phase.generate,))
    @given(programs(recipe="lossless"))
    def look(program: Program) -> None:
        found.append(program.recipe)

    look()
    assert set(found) == {"lossless"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_run_plain(scenario: str) -> None:
    outcome = Twin(Program((Op("linear"),), scenario=scenario, features_need_gradient=True)).plain()
    assert outcome.error == ("RuntimeError" if scenario == "reused graph" else ""), outcome.message
    assert outcome.gradients
    assert not outcome.left


def _judged(program: Program) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return judge(program).problems
