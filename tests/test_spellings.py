"""However a call of torch is spelled (`torch.mul`, `Tensor.multiply`, `a * b`), Dibit does the same."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
import dibit.compile.rules
from dibit._torch.private.operations import VARIABLE_FUNCTIONS
from dibit.recompute.mean_pattern import made_by_reciprocal
from dibit.recompute.repeatable import IN_PLACE, PURE
from dibit.rules import positive
from tests.recompute.test_recorder import record, tape

OWNERS = (torch, Tensor, F)
OPERATORS = {"abs", "add", "sub", "mul", "pow", "neg", "matmul", "eq", "ne", "lt", "le", "gt", "ge"}


def aliases() -> dict[str, set[str]]:
    """Of each function, the other names that torch's documentation gives it, with the part of torch: `special.erf`."""
    found: dict[str, set[str]] = {"div": {"__truediv__"}, "mul": {"__rmul__"}, "add": {"__radd__"}}
    for owner in (torch, torch.special, torch.linalg, Tensor):
        here = "" if owner in (torch, Tensor) else f"{owner.__name__.partition('.')[2]}."
        for name in dir(owner):
            text = str(getattr(owner, name, None).__doc__ or "")
            alias = re.search(r"Alias (?:for|of) :(?:func|meth):`~?\.?(?:torch\.)?(?:Tensor\.)?([\w.]+)`", text)
            pair = {here + name, alias[1]} if alias is not None else set()
            if "linalg.diagonal" not in pair:  # which has other dimensions
                for plain in [each for each in pair if "." not in each]:
                    found.setdefault(plain, set()).update(pair - {plain})
    return found


ALIASES = aliases()


def spelled(name: str) -> dict[str, Any]:
    """The functions by this name and its aliases, `mul_` for those that write over their first argument."""
    end = "_" if name.endswith("_") else ""
    names = {name, *(alias + end for alias in ALIASES.get(name.removesuffix("_"), ()))}
    if name.removesuffix("_") in OPERATORS:
        names.add(f"__i{name[:-1]}__" if end else f"__{name}__")
    found = {}
    for each in sorted(names):
        for owner in (torch,) if "." in each else (Tensor,) if each.startswith("__") else OWNERS:
            value: Any = owner
            for part in each.split("."):
                value = getattr(value, part, None)
            if owner is torch:  # others may have put a wrapper of their own in its place
                value = getattr(VARIABLE_FUNCTIONS, each, value)
            if value is not None:
                found[f"{owner.__name__}.{each}"] = value
    return found


def test_torch_documents_the_names_that_these_tests_try() -> None:
    assert {"torch.mul", "Tensor.mul", "torch.multiply", "Tensor.multiply", "Tensor.__mul__"} < set(spelled("mul"))
    assert {"torch.clip", "Tensor.clip", "torch.clamp"} < set(spelled("clamp"))
    assert {"Tensor.divide_", "Tensor.true_divide_"} < set(spelled("div_"))
    assert {"torch.special.log1p", "Tensor.log1p"} < set(spelled("log1p"))
    assert {"torch.special.expit", "torch.nn.functional.sigmoid"} < set(spelled("sigmoid"))


def lists() -> Iterator[tuple[str, Any]]:
    """All sets and tables of torch's functions in Dibit."""
    for module in [module for name, module in sys.modules.items() if name.startswith("dibit.")]:
        for name, value in vars(module).items():
            if (
                isinstance(value, set | frozenset | dict) and name.isupper() and name != "OPTION"
            ):  # `inplace` of `F.relu`
                yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize("known", [pytest.param(known, id=name) for name, known in lists()])
def test_a_list_of_functions_has_all_their_spellings(known: Any) -> None:
    """Whoever adds a list, and writes it by hand, sees here what it lacks."""
    names = {alias for other in (torch, VARIABLE_FUNCTIONS, Tensor, F) for alias in dir(other)}
    lacks = {}
    for each in names:
        found = spelled(each) if re.fullmatch(r"[a-z]\w*", each) else {}
        some = {text for text, function in found.items() if callable(function) and function in known}
        if some:
            lacks.update({text: some for text, function in found.items() if function not in known})
    assert not lacks


# -- the tape ------------------------------------------------------


def repeated(function: Any, name: str) -> Tensor:
    """What the tape makes of a call again."""
    x, t = torch.linspace(0.5, 1.5, 30), tape()
    start = record(t, Tensor.repeat, x, 400, 1)
    y = record(t, function, *ARGUMENTS[name.removesuffix("_")](start))
    leaves = t.cut(y, float("inf"))
    assert leaves is not None
    assert [leaf.tensor() is x for leaf in leaves] == [True]
    return t.program(y, leaves).run([x], t.shared).double()


ARGUMENTS: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    **dict.fromkeys(("abs", "neg", "sigmoid", "exp"), lambda x: (x,)),
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "eq", "ne", "lt", "le", "gt", "ge"), lambda x: (x, 2.0)),
    **dict.fromkeys(("clamp", "clamp_min"), lambda x: (x, 1.0)),
    "cat": lambda x: ((x, x),),
    "transpose": lambda x: (x, 0, 1),
}


@pytest.mark.parametrize("name", [*ARGUMENTS, *(f"{name}_" for name in ("abs", "neg", "sub", "mul", "div", "clamp"))])
def test_the_tape_repeats_it(name: str) -> None:
    found = spelled(name)
    canonical = getattr(Tensor, name, None) or getattr(torch, name)
    assert found.keys() == {text for text, function in found.items() if function in PURE}
    assert len(found) > 1
    expected = repeated(canonical, name)
    for text, function in found.items():
        assert (function in IN_PLACE) == name.endswith("_"), text
        assert torch.equal(repeated(function, name), expected), text


@pytest.mark.parametrize(
    ("name", "more"),
    [("rsqrt", ()), ("rsqrt_", ()), ("reciprocal", ()), ("reciprocal_", ()), ("pow", (-0.5,)), ("pow_", (-0.5,))],
)
def test_a_reciprocal_is_known(name: str, more: tuple[float, ...]) -> None:
    for text, function in spelled(name).items():
        given, t = torch.randn(40, 30), tape()
        x = record(t, torch.abs, given)
        y = record(t, function, x, *more)
        assert made_by_reciprocal(t, record(t, Tensor.view, y, 30, 40)), text


# -- a mean over neighbours ------------------------------------------------------

N = 300


class Mean(nn.Module):
    """The sum over neighbours, divided by their number."""

    def __init__(self, how: dict[str, Any]) -> None:
        super().__init__()
        self.lin, self.last, self.root = nn.Linear(24, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.how = how
        count = torch.arange(N) % 5
        crow = torch.cat((count.new_zeros(1), count.cumsum(0)))
        col = torch.randint(0, N, (int(crow[-1]),), generator=torch.Generator().manual_seed(0))
        self.matrix = torch.sparse_csr_tensor(crow, col, torch.ones(len(col)), (N, N), check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        pointers = self.matrix.crow_indices()
        degree = self.how.get("sub", torch.sub)(pointers[1:], pointers[:-1]).view(-1, 1)
        least = self.how.get("clamp", lambda d: d.clamp(min=1))(degree)
        h = F.relu(self.lin(x))
        mean = self.how.get("div", torch.div)(torch.sparse.mm(self.matrix, h), least)
        return self.last(mean) + self.root(h)


def kept(model: nn.Module, x: Tensor) -> list[tuple[str, str, int]]:
    """What is kept for a step, without the names of functions."""
    dibit.compress(model, dibit.Config(bits=2, dropout="mask"))
    with dibit.track(model) as saved:
        y = model(x)
    y.square().sum().backward()
    return [(row.module, row.how, row.kept) for row in saved.rows]


def means() -> Iterator[Any]:
    for name in ("div", "div_", "sub"):
        for text, function in spelled(name).items():
            yield pytest.param({name.removesuffix("_"): function}, id=text)
    for name in ("clamp", "clamp_", "clamp_min", "clamp_min_"):
        for text, function in spelled(name).items():
            yield pytest.param({"clamp": lambda d, function=function: function(d, 1)}, id=text)
            yield pytest.param({"clamp": lambda d, function=function: function(d, min=1)}, id=f"{text}, min=1")


@pytest.mark.parametrize("how", list(means()))
def test_a_mean_over_neighbours_is_known(how: dict[str, Any]) -> None:
    x = torch.randn(N, 24)
    assert kept(Mean(how), x) == kept(Mean({}), x)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"clamp": lambda d: d.clamp(max=1)}, id="at most 1"),
        pytest.param({"clamp": lambda d: d.clamp(min=2)}, id="at least 2"),
        pytest.param({"clamp": lambda d: d.clamp(1, 3)}, id="from 1 to 3"),
        pytest.param({"div": lambda a, b: torch.div(a, b, rounding_mode="floor")}, id="rounded"),
        pytest.param({"sub": lambda a, b: torch.sub(a, b, alpha=2)}, id="another difference"),
    ],
)
def test_another_quotient_is_no_mean(other: dict[str, Any]) -> None:
    x = torch.randn(N, 24)
    mean, found = kept(Mean({}), x), kept(Mean(other), x)
    assert sum(size for *_, size in found) > sum(size for *_, size in mean)


# -- products of positive factors ------------------------------------------------------


class Gate(nn.Module):
    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.make = nn.Linear(16, 16), nn.Linear(16, 16), make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self.first(x)) * torch.exp(self.second(x))


def factors() -> Iterator[Any]:
    for name in ("exp", "exp_", "sigmoid", "sigmoid_"):
        for text, function in spelled(name).items():
            yield pytest.param(lambda x, function=function: function(x * 1), id=text)
    for name in ("mul", "mul_", "div", "div_"):
        for text, function in spelled(name).items():
            yield pytest.param(lambda x, function=function: function(torch.exp(x) * 1, 2.0), id=text)


@pytest.mark.parametrize("make", list(factors()))
def test_a_positive_factor_is_known(make: Callable[[Tensor], Tensor]) -> None:
    assert _bits(make) == "8 bit, block 1024; 8 bit, block 1024"


@pytest.mark.parametrize("make", [F.relu, lambda x: torch.exp(x) - 1, lambda x: torch.mul(torch.exp(x), other=x)])
def test_another_factor_is_not_known_to_be_positive(make: Callable[[Tensor], Tensor]) -> None:
    assert _bits(make) == "4 bit, block row; 4 bit, block row"


def _bits(make: Callable[[Tensor], Tensor]) -> str:
    """How the factors of the last product are kept if nobody looks at their numbers."""
    model = dibit.compress(Gate(make), "default")
    with positive.without_looking(), dibit.track(model) as saved:
        model(torch.randn(400, 16))
    return [row.how for row in saved.rows if row.operation == "mul"][-1]


# -- sums over edges ------------------------------------------------------
EDGES = torch.randint(0, N, (2, 4000), generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """Sums over edges, and two kinds of scores of edges, with functions of torch as `how` spells them."""

    def __init__(self, how: dict[str, Any]) -> None:
        super().__init__()
        self.lin, self.att, self.how = nn.Linear(24, 32), nn.Parameter(torch.randn(1, 4, 8)), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        heads = h.view(N, 4, 8)
        gather, mul, add, total, scatter, expand, leaky = (
            self.how.get(name, getattr(Tensor, name, None)) or F.leaky_relu
            for name in ("index_select", "mul", "add", "sum", "scatter_add", "expand_as", "leaky_relu")
        )
        scalar = total(mul(gather(heads, 0, EDGES[1]), gather(heads, 0, EDGES[0])), -1)
        sums = leaky(add(gather(heads, 0, EDGES[1]), gather(heads, 0, EDGES[0])), 0.2)
        weights = (scalar + total(mul(sums, self.att), -1)).mean(-1, keepdim=True)
        messages = mul(gather(h, 0, EDGES[0]), weights)
        return scatter(torch.zeros(N, 32), 0, expand(EDGES[1][:, None], messages), messages)


def wide(index: Tensor, x: Tensor) -> Tensor:
    """The index that `gather` takes."""
    return index.view(-1, *(1 for _ in x.shape[1:])).expand(-1, *x.shape[1:])


def layers() -> Iterator[Any]:
    for name in ("index_select", "mul", "add", "sum", "scatter_add", "scatter_add_", "leaky_relu"):
        for text, function in spelled(name).items():
            yield pytest.param({name.removesuffix("_"): function}, id=text)
    for text, function in spelled("gather").items():
        yield pytest.param({"index_select": lambda x, _, i, f=function: f(x, 0, wide(i, x))}, id=text)
    for text, function in (spelled("index_add") | spelled("index_add_")).items():
        yield pytest.param({"scatter_add": lambda out, _, i, m, f=function: f(out, 0, i[:, 0], m)}, id=text)
    yield pytest.param({"index_select": lambda x, _, index: x[index]}, id="x[index]")
    yield pytest.param({"mul": lambda a, b: a * b, "add": lambda a, b: a + b}, id="a * b, a + b")
    for name in ("view_as", "reshape_as"):  # of what has the shape of the messages
        function = getattr(Tensor, name)
        yield pytest.param({"expand_as": lambda i, m, f=function: f(i.expand(m.shape), m)}, id=name)


@pytest.mark.parametrize("how", list(layers()))
def test_a_sum_over_edges_is_known(how: dict[str, Any]) -> None:
    x = torch.randn(N, 24)
    assert kept(Layer(how), x) == kept(Layer({}), x)
