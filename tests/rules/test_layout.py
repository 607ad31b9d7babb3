"""Results of every rule, for inputs of every layout: torch's bits, strides and aliases, and the draws that follow."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from dibit.nn import norm_relu_dropout
from dibit.rules import RULES, large_outputs
from dibit.rules.elementwise import POINTWISE
from dibit.rules.registry import spellings
from tests.marks import nothing_compressed
from tests.rules.domains import MORE, into_domain
from tests.unbiased import bias_of

RECIPES: dict[str, Any] = {
    "default": dibit.Config(bits=2, block=128, dropout="mask"),
    "iexact": "iexact",
}


def layouts(shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Ways to make, of a tensor of ones' own shape, one of this shape and another layout."""
    axes = range(len(shape))
    for order in itertools.islice(itertools.permutations(axes), 0, None, 5 if len(shape) == 4 else 1):
        back = [order.index(i) for i in axes]
        yield f"permuted {order}", lambda x, o=order, b=back: x.permute(o).contiguous().permute(b)
    for i in axes[:2]:
        yield (
            f"every second of {i}",
            lambda x, i=i: x.repeat_interleave(2, i)[(slice(None),) * i + (slice(1, None, 2),)],
        )
        yield f"expanded {i}", lambda x, i=i: x.narrow(i, 0, min(1, x.shape[i])).expand(x.shape)
        yield f"part of {i}", lambda x, i=i: torch.cat((x, x), i).narrow(i, min(1, x.shape[i]), x.shape[i])
    if len(shape) == 4:
        yield "channels_last", lambda x: x.contiguous(memory_format=torch.channels_last)
    yield "flipped", lambda x: x.flip(0) if x.dim() else x


SHAPES = [(), (70,), (9, 8), (70, 1), (1, 70), (0, 8), (5, 4, 8), (3, 4, 5, 8), (40, 2, 1, 1)]
CASES = [(shape, name, make) for shape in SHAPES for name, make in layouts(shape)]


class Net(nn.Module):
    """One operation on a tensor of some layout."""

    def __init__(self, make: Callable[[Tensor], Tensor], operation: Callable[[Tensor, Net], Any], shape: Any) -> None:
        super().__init__()
        self.make, self.operation = make, operation
        width, channels = shape[-1] if shape else 1, shape[1] if len(shape) > 1 else 1
        torch.manual_seed(1)
        self.weight, self.bias = nn.Parameter(torch.randn(5, width)), nn.Parameter(torch.randn(5))
        self.slope, self.gain = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(width))
        self.register_buffer("other", torch.rand(shape) + 0.1)
        self.batch = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Any:
        self.input = self.make(x * 1)
        return self.operation(self.input, self)


def _index(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]) % max(x.shape[1], 1)


def _scattered(x: Tensor) -> Tensor:
    index = (torch.arange(x.shape[0]) % 3)[(...,) + (None,) * (x.dim() - 1)].expand(x.shape)
    return x.new_zeros(3, *x.shape[1:]).scatter_reduce_(0, index, x, "amax", include_self=False)


def _three(x: Tensor) -> Tensor:
    """x as one matrix (1, D, N)."""
    return x.reshape(-1, x.shape[-1]).t().unsqueeze(0)


def _sparse(n: int) -> Tensor:
    return torch.eye(n).roll(1, 0).to_sparse_csr()


def names(operation: str, *owners: Any) -> list[Any]:
    return [getattr(owner, operation) for owner in owners]


def every(operation: str) -> list[Any]:
    return sorted(spellings(operation), key=lambda f: (type(f).__name__, f.__qualname__))


def _with_option(option: str) -> list[Any]:
    """Element-wise functions of `torch.nn.functional` that have this argument."""
    found = [f for name in (*POINTWISE, "relu", "leaky_relu") for f in every(name) if isinstance(f, FunctionType)]
    return [f for f in found if option in inspect.signature(f, follow_wrapped=False).parameters]


# functions with a rule, and a call of each
OPERATIONS: list[tuple[list[Any], Callable[[Any, Tensor, Net], Any]]] = [
    *[
        (
            every(name),
            lambda f, x, net, name=name: f(into_domain(name, x), *MORE.get(name, ())),
        )
        for name in (*POINTWISE, "relu", "leaky_relu")
    ],
    (_with_option("inplace"), lambda f, x, net: f(x, inplace=True)),
    ([F.dropout], lambda f, x, net: f(x, 0.4, True)),
    ([F.dropout], lambda f, x, net: f(x, 0.4, True, True)),
    ([F.dropout], lambda f, x, net: f(x, 0.0, True)),
    ([F.dropout], lambda f, x, net: f(x, 1.0, True)),
    ([F.dropout], lambda f, x, net: f(x, 0.4, False)),
    ([torch.dropout, torch.dropout_], lambda f, x, net: f(x, 0.4, True)),
    ([F.prelu, torch.prelu, Tensor.prelu], lambda f, x, net: f(x, net.slope)),
    *[
        (every(name), call)
        for name in ("add", "mul", "div")
        for call in (
            lambda f, x, net: f(x, net.other),
            lambda f, x, net: f(x, x.abs() + 1),
            lambda f, x, net: f(x, net.gain + 1),
            lambda f, x, net: f(net.gain, x.abs() + 1),
            lambda f, x, net: f(x, 2.0),
        )
    ],
    ([torch.add, Tensor.add], lambda f, x, net: f(x, x)),
    ([torch.mul, Tensor.mul], lambda f, x, net: f(x, x)),
    ([F.linear], lambda f, x, net: f(x, net.weight)),
    ([F.linear], lambda f, x, net: f(x, net.weight, net.bias)),
    ([*names("matmul", torch, Tensor), Tensor.__matmul__], lambda f, x, net: f(x, net.weight.T)),
    ([*names("matmul", torch, Tensor), Tensor.__matmul__], lambda f, x, net: f(x, x.mT.sigmoid())),
    ([Tensor.__rmatmul__], lambda f, x, net: f(net.weight.T, x)),
    ([*names("mm", torch, Tensor), torch.linalg.matmul], lambda f, x, net: f(x, net.weight.T)),
    (names("addmm", torch, Tensor), lambda f, x, net: f(net.bias, x, net.weight.T)),
    (names("bmm", torch, Tensor), lambda f, x, net: f(x, x.mT.sigmoid())),
    ([torch.sparse.mm], lambda f, x, net: f(_sparse(len(x)), x)),
    ([torch.sparse.mm], lambda f, x, net: f(_sparse(len(x)), x, "mean")),
    ([torch.sparse.mm], lambda f, x, net: f(_sparse(len(x)), x, "amax")),
    ([Tensor.scatter_reduce_], lambda f, x, net: _scattered(x)),
    ([F.batch_norm], lambda f, x, net: net.batch(x) if x.dim() < 4 else f(x, None, None, training=True)),
    ([torch.batch_norm], lambda f, x, net: f(x, None, None, None, None, True, 0.1, 1e-5, False)),
    ([F.instance_norm], lambda f, x, net: f(_three(x))),
    ([torch.instance_norm], lambda f, x, net: f(_three(x), None, None, None, None, True, 0.1, 1e-5, False)),
    ([F.layer_norm, torch.layer_norm], lambda f, x, net: f(x, x.shape[-1:], net.gain, net.gain)),
    ([F.layer_norm], lambda f, x, net: f(x, x.shape[-2:])),
    ([norm_relu_dropout], lambda f, x, net: f(x, None, None, None, None, 0.0, True, 0.1, 1e-5)),
    ([F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax], lambda f, x, net: f(x, -1)),
    ([F.log_softmax], lambda f, x, net: f(x, 0) * 2),
    ([F.cross_entropy, F.nll_loss], lambda f, x, net: f(x, _index(x), reduction="none")),
    ([F.mse_loss], lambda f, x, net: f(x, net.other, reduction="none")),
    ([F.binary_cross_entropy_with_logits], lambda f, x, net: f(x, net.other.clamp(0, 1), reduction="none")),
    ([torch.binary_cross_entropy_with_logits], lambda f, x, net: f(x, net.other.clamp(0, 1), reduction=0)),
    ([F.softmax, torch.softmax], lambda f, x, net: f(x, -1)),
]
CALLS = [
    pytest.param(number, function, call, id=f"{number} {getattr(function, '__qualname__', function)}")
    for number, (function, call) in enumerate((f, call) for functions, call in OPERATIONS for f in functions)
]


def test_every_rule_is_called() -> None:
    elsewhere = {Tensor.log_softmax}
    lacks = set(RULES) - {function for functions, _ in OPERATIONS for function in functions} - elsewhere
    assert not lacks, f"add a call of each of {lacks} to OPERATIONS above"


def outcome(net: Net, x: Tensor, change: bool) -> Any:
    """What the operation gives, and what follows draws; `None` if torch refuses it."""
    torch.manual_seed(2)
    own = x.clone().requires_grad_()
    try:
        y = net(own)
        held = y.detach().clone()
        facts = {
            "strides": y.stride(),
            "contiguous": y.is_contiguous(),
            "dtype": y.dtype,
            "type": type(y),
            "requires_grad": y.requires_grad,
            "the input itself": y is net.input,
            "on the input's memory": bool(y.numel()) and y.data_ptr() == net.input.data_ptr(),
        }
        if change:
            y = y.add_(1)
            y.sum().backward()
        else:
            (F.dropout(y, 0.5) * 1.5).sum().backward()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return error
    return held, facts, F.dropout(held.as_strided(held.shape, held.stride()), 0.5), torch.rand(4), own.grad


@pytest.mark.filterwarnings("ignore:dibit. a training forward pass")  # what is small is left to torch
@pytest.mark.parametrize(("number", "function", "call"), CALLS)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Tensor.mT is deprecated")
def test_layout(number: int, function: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the layouts for each spelling of each function; every fourth result is changed in place."""
    monkeypatch.setattr(large_outputs, "MIN_BYTES", 64)
    works = 0
    for i, (shape, name, make) in enumerate(CASES[number % 3 :: 3]):
        change = i % 4 == 3
        torch.manual_seed(0)
        x = torch.randn(shape)
        net = Net(make, lambda x, net: call(function, x, net), shape)
        plain = outcome(net, x, change)
        if isinstance(plain, Exception):
            continue
        works += 1
        assert plain[0].isfinite().all(), "add the function to DOMAIN of tests/rules/domains.py"
        for recipe, config in RECIPES.items():
            net = dibit.compress(Net(make, lambda x, net: call(function, x, net), shape), config)
            found = outcome(net, x, change)
            where = f"{shape} {name} {recipe}: "
            if isinstance(found, Exception):
                raise AssertionError(where + str(found)) from found
            if function is norm_relu_dropout:  # equal to rounding, as it says
                assert torch.allclose(found[0], plain[0], rtol=1e-4, atol=1e-5), where
                continue
            assert torch.equal(found[0].nan_to_num(7), plain[0].nan_to_num(7)), where
            assert found[1] == plain[1], where
            assert torch.equal(found[2].nan_to_num(7), plain[2].nan_to_num(7)), where + "another mask"
            assert torch.equal(found[3], plain[3]), where + "another stream"
            assert found[4].shape == plain[4].shape, where
    assert works


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("shape", "name", "make"), [pytest.param(*case, id=f"{case[0]} {case[1]}") for case in CASES])
@nothing_compressed
def test_own_masks_of_dropout(shape: Any, name: str, make: Callable[[Tensor], Tensor], inplace: bool) -> None:
    """Dibit's draw, in torch's layout; the gradient goes where the result does."""
    x = torch.rand(shape) + 0.5
    seen = []
    for config in (None, dibit.Config()):
        own = x.clone().requires_grad_()
        net = dibit.compress(Net(make, lambda x, net: F.dropout(x, 0.5, True, inplace), shape), config)
        try:
            y = net(own)
        except RuntimeError:  # torch refuses to change it in place
            y = None
        seen.append(y)
    if seen[0] is None:
        return
    plain, y = seen
    assert y.stride() == plain.stride()
    assert (y is net.input) == inplace or not y.numel()
    y.sum().backward()
    if "expanded" not in name and y.numel():
        scale = float((make(torch.ones(shape)) / (make(torch.ones(shape)) * 0.5)).max())
        assert torch.equal(make(own.grad), torch.where(y != 0, scale, 0.0)) or "every second" in name or "part" in name


def test_bias_in_layouts() -> None:
    """The gradient follows the elements, whatever the layout: estimates of a permuted input have the plain mean."""
    torch.manual_seed(0)
    x, readout = torch.randn(6, 5, 8), torch.randn(8, 5, 6)

    def f(h: Tensor, net: Net) -> Tensor:
        return torch.tanh(F.gelu(F.relu(h.permute(2, 1, 0)) * h.permute(2, 1, 0))).square() * 1

    def grad(net: Net, i: int) -> Tensor:
        torch.manual_seed(i)
        own = x.clone().requires_grad_()
        (net(own) * readout).sum().backward()
        assert own.grad is not None
        return own.grad

    truth = grad(Net(lambda x: x, f, x.shape), 0)
    net = dibit.compress(Net(lambda x: x, f, x.shape), dibit.Config(bits=2, block=32))
    bias = bias_of(lambda i: grad(net, i), truth, 200)
    assert bias.unbiased, bias
    assert not bias.exact


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "call",
    [
        lambda x, net: F.linear(x, net.weight, net.bias),
        lambda x, net: x @ net.weight.T,
        lambda x, net: F.batch_norm(x, None, None, training=True),
        lambda x, net: F.layer_norm(x, x.shape[-1:]),
        lambda x, net: F.dropout(x, 0.5),
    ],
)
def test_a_view_of_the_result_changed_in_place(call: Callable[[Tensor, Net], Tensor], recipe: str) -> None:
    def run(x: Tensor, net: Net) -> Tensor:
        y = call(x, net)
        y.transpose(0, 1)[1:].view_as(y.transpose(0, 1)[1:]).mul_(2)
        y.add_(1)
        return y

    found = []
    for config in (None, RECIPES[recipe]):
        torch.manual_seed(0)
        x = torch.randn(5, 4, 8).requires_grad_()
        net = dibit.compress(Net(lambda x: x, run, x.shape), config)
        torch.manual_seed(1)
        y = net(x)
        y.sum().backward()
        found.append((y.detach(), x.grad.shape))  # type: ignore[union-attr]
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
