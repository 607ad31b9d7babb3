"""Plain and compressed, program by program: those of `known`, and some hundred random ones."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.twin.grammar import Program
from tests.twin.known import KNOWN
from tests.twin.search import footer, verdict_of
from tests.twin.strategies import programs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def check(program: Program) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problems = verdict_of(program).problems
    assert not problems, "\n".join([*problems, "", program.source(), footer(program)])


@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str) -> None:
    check(KNOWN[name])


@settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(programs())
def test_any_program_has_the_same_outcome(program: Program) -> None:
    check(program)
