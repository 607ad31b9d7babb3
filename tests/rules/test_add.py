"""A sum is written over an operand that nobody else has, and over no other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dibit
from dibit.engine.forward_pass import ForwardPass
from dibit.engine.model_state import ModelState
from dibit.rules import add
from dibit.tools.memory import peak_bytes

N, D = 9000, 128
tells = pytest.mark.skipif(sys.version_info >= (3, 14), reason="operands may be borrowed there")


class Net(nn.Module):
    """Two products, and a sum of them as the test has it."""

    def __init__(self, join: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.skip = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.join = join
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, self.first(x), x)


class Sums(TorchDispatchMode):
    """Whether each sum that torch is asked for writes over its first operand."""

    def __init__(self) -> None:
        super().__init__()
        self.over: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.over.append(func.overloadpacket is torch.ops.aten.add_)
        return func(*args, **(kwargs or {}))


def written_over(join: Callable[..., Tensor], hook: Any = None) -> list[bool]:
    """Whether each sum of a pass was written over an operand; results and gradients are the plain model's."""
    net, x, readout = Net(join), torch.randn(N, D), torch.randn(N, D)
    if hook is not None:
        net.skip.register_forward_hook(hook)

    def run() -> list[Tensor]:
        net.zero_grad()
        net.seen.clear()
        own = x.clone().requires_grad_()
        with sums:
            y = net(own)
        ((y * readout).sum() + sum((part * readout[: len(part)]).sum() for part in net.seen)).backward()
        return [y.detach().clone(), own.grad, net.first.bias.grad, *(part.detach().clone() for part in net.seen)]

    sums = Sums()
    plain = run()
    dibit.compress(net, "default")
    sums.over.clear()
    for a, b in zip(plain, run(), strict=True):
        assert torch.equal(a, b) if a is plain[0] else torch.allclose(a, b, rtol=1e-4, atol=1e-3)
    return sums.over


@tells
@pytest.mark.parametrize(
    "join",
    [
        lambda net, h, x: h + net.skip(x),
        lambda net, h, x: net.skip(x) + h,
        lambda net, h, x: net.skip(x) + net.first(x),
        lambda net, h, x: h.add(net.skip(x)),
    ],
)
def test_over_a_temporary(join: Callable[..., Tensor]) -> None:
    assert written_over(join) == [True]


def _local(net: Net, h: Tensor, x: Tensor) -> Tensor:
    t = net.skip(x)
    return (h + t) - 3 * t


def _attribute(net: Net, h: Tensor, x: Tensor) -> Tensor:
    net.kept = net.skip(x)
    return (h + net.kept) - 3 * net.kept


def _kept(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
    module.last = [y]
    return y


def _asinh(net: Net, h: Tensor, x: Tensor) -> Tensor:
    def skip() -> Tensor:
        t = net.skip(x)
        net.seen.append(torch.asinh(t))  # keeps t, exactly
        return t

    return h + skip()


def _view(net: Net, h: Tensor, x: Tensor) -> Tensor:
    def skip() -> Tensor:
        t = net.skip(x)
        net.seen.append(t[:5])
        return t

    return h + skip()


def _detached(net: Net, h: Tensor, x: Tensor) -> Tensor:
    def skip() -> Tensor:
        t = net.skip(x)
        net.seen.append(t.detach())  # another tensor on its memory
        return t

    return h + skip()


def _retained(net: Net, h: Tensor, x: Tensor) -> Tensor:
    def skip() -> Tensor:
        t = net.skip(x)
        t.retain_grad()
        return t

    return h + skip()


def _hooked(net: Net, h: Tensor, x: Tensor) -> Tensor:
    def skip() -> Tensor:
        t = net.skip(x)
        t.register_hook(lambda g: None)
        return t

    return h + skip()


@pytest.mark.parametrize(
    "join",
    [
        _local,
        _attribute,
        _view,
        _detached,
        _retained,
        _hooked,
        lambda net, h, x: h + h,
        lambda net, h, x: torch.add(h, net.skip(x)),
        lambda net, h, x: h + x,
        lambda net, h, x: sum([h, net.skip(x)][1:], h),
        lambda net, h, x: h + F.leaky_relu(x),
    ],
)
def test_over_nothing_that_someone_has(join: Callable[..., Tensor]) -> None:
    assert not any(written_over(join))


def test_not_over_what_a_hook_holds() -> None:
    assert written_over(lambda net, h, x: h + net.skip(x), _kept) == [False]


def test_not_over_what_autograd_keeps() -> None:
    assert written_over(_asinh) == [False]


@tells
def test_a_buffer_less_at_the_peak() -> None:
    net, x = dibit.compress(Net(lambda net, h, x: h + net.skip(x)), "default"), torch.randn(N, D)
    net(x)
    own = x.nbytes
    assert peak_bytes(lambda: net(x)) < 2.1 * own
    assert peak_bytes(lambda: dibit.decompress(net)(x)) > 2.9 * own


def test_a_chain_of_sums() -> None:
    net, x = Net(lambda net, h, x: h + net.skip(x) + net.first(x) + net.skip(h)), torch.randn(N, D)
    expected = net(x)
    assert torch.equal(dibit.compress(net)(x), expected)


def test_what_is_left_to_torch() -> None:
    forward = ForwardPass(ModelState(None), ())
    forward.stack.function = torch.add
    x = torch.randn(N, D)
    for a, b in ((x, 1.0), (x, x[:1]), (x, x.double()), (x.T, x.T), (x[:5], x[:5]), (x.long(), x.long())):
        assert add.add(forward, a, b) is NotImplemented
    assert add.add(forward, x, x, alpha=2) is NotImplemented
    assert torch.equal(add.add(forward, x, x), x + x)
