"""Large tensors go into buffers of our own: torch's bits, torch's accounting, the plain gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from dibit import Config
from dibit._torch import huge_pages as buffers
from dibit.codec.backends import cpu
from dibit.rules import aggregate, large_outputs
from dibit.tools.memory import peak_bytes
from tests.unbiased import bias_of, gradient
from tests.watched import watched

N, D = 9000, 128


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.skip, self.last = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)
        self.norm, self.plain = nn.BatchNorm1d(D), nn.BatchNorm1d(D, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) + self.skip(x)
        h = F.relu(self.norm(h))
        h = torch.add(h, self.plain(self.last(h)))
        return self.last(h)


def test_forward_is_torchs_bit_for_bit() -> None:
    torch.manual_seed(0)
    net, x = Net().train(), torch.randn(N, D)
    assert x.nbytes >= buffers.MIN_BYTES
    with watched(buffers.empty, note=lambda local: tuple(local["shape"])) as used:
        expected = net(x)
        stats = net.norm.running_var.clone()
        assert not used
        net.norm.reset_running_stats()
        for recipe in ("default", "exact", "iexact"):
            dibit.compress(net, recipe)
            net.norm.reset_running_stats()
            assert torch.equal(net(x), expected)
            assert torch.equal(net.norm.running_var, stats)
    assert used.count((N, D)) >= 3 * 4


def test_gradients_of_what_loses_nothing() -> None:
    """Additions, products with the weight and ReLU hand their gradients on exactly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D, bias=False))
    x, readout = torch.randn(N, D), torch.randn(N, D)

    def run() -> list[Tensor]:
        inner = x.clone().requires_grad_()
        net.zero_grad()
        ((net(inner) + inner) * readout).sum().backward()
        return [inner.grad, net[0].bias.grad]

    plain = run()
    dibit.compress(net, "default")
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(plain, run(), strict=True))


@pytest.mark.parametrize("config", [Config(), Config(bits=8, rounding="dither"), "iexact", "default"], ids=str)
@pytest.mark.statistics
def test_the_gradients_of_batch_norm_are_unbiased(config: Config | str) -> None:
    torch.manual_seed(0)
    net, x = nn.BatchNorm1d(D), torch.randn(N, D) + 0.3
    readout = torch.randn(N, D) + x  # a gradient along the input: the term that needs it counts
    truth = gradient(net, x, readout)
    dibit.compress(net, config)
    for part in (slice(0, N * D), slice(N * D, None)):  # of the input, of weight and bias
        bias = bias_of(lambda i, part=part: torch.manual_seed(i) and gradient(net, x, readout)[part], truth[part], 40)
        assert bias.unbiased, bias
        assert not bias.exact


@pytest.mark.parametrize("width", [D, D // 2])
def test_a_product_over_its_own_input(width: int) -> None:
    x, weight = torch.randn(20_001, D), torch.randn(D, width)
    expected, start = x @ weight, x.clone()
    y = large_outputs.mm_over(x, weight)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-4)
    assert (y.data_ptr() == x.data_ptr()) == (width == D)
    assert width == D or torch.equal(x, start)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize(("ones", "index"), [(True, torch.int64), (True, torch.int32), (False, torch.int64)])
def test_aggregates_have_torchs_bits(reduce: str, ones: bool, index: torch.dtype) -> None:
    torch.manual_seed(0)
    count = torch.randint(0, 12, (N,)) * (torch.rand(N) < 0.8)  # some rows are empty
    crow = torch.cat((torch.zeros(1, dtype=torch.int64), count.cumsum(0)))
    col = torch.randint(0, N, (int(crow[-1]),))
    values = torch.ones(len(col)) if ones else torch.rand(len(col))
    matrix = torch.sparse_csr_tensor(crow.to(index), col.to(index), values, (N, N), check_invariants=False)
    x = torch.randn(N, D)
    with watched(cpu.aggregate.__wrapped__, note=lambda local: len(local["crow"])) as used:
        assert torch.equal(aggregate.product(matrix, x, reduce), torch.sparse.mm(matrix, x, reduce))
    assert (N + 1 in used) == ones
    assert aggregate._adds_in_torchs_order()


def test_buffers_are_torchs_own() -> None:
    x = torch.randn(300, 5000).T
    y = buffers.empty_like(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y.is_contiguous()
    assert peak_bytes(lambda: buffers.empty((1 << 21,), torch.float32)) == 1 << 23
    assert buffers.empty((0, 3), torch.float64).shape == (0, 3)


@pytest.mark.parametrize("divisor", [(N, 1), (N, D), (1,)])
def test_quotients_by_a_constant(divisor: tuple[int, ...]) -> None:
    """Such as the mean over neighbours: torch's bits, and an exact gradient."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(D, D)

        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return self.lin(x) / by

    net, x, by = Mean(), torch.randn(N, D), torch.rand(divisor) + 0.5
    y = net(x, by)
    grad = torch.autograd.grad(y.sum(), net.lin.bias)[0]
    own = dibit.compress(net, {"lin": None, "*": "default"})(x, by)
    assert type(own.grad_fn).__name__ == "QuotientByConstantBackward"
    assert torch.equal(own, y)
    assert torch.allclose(torch.autograd.grad(own.sum(), net.lin.bias)[0], grad, rtol=1e-5)
