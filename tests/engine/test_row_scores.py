"""Rows kept by the gradients of the last step: when scores change, to whom they belong, what they cost."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dibit
from dibit import Config, Sample
from dibit.codec.row_sampling import add_scores, row_scores
from dibit.engine.row_scores import _folded
from tests.unbiased import bias_of

_SAMPLE = Sample(4, by="gradient")
CONFIG = Config(bits=8, block=64, reduce=_SAMPLE, norm=Config(bits=8, reduce=_SAMPLE))
N, D = 200, 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        return self.third(h) + self.second(h)[:, :3]


def readout(n: int = N) -> Tensor:
    """Most rows count little, some much, some not at all."""
    torch.manual_seed(1)
    r = torch.randn(n, 3) * torch.exp(2 * torch.randn(n, 1))
    r[::5] = 0
    return r


def step(net: nn.Module, x: Tensor, r: Tensor, lr: float = 0.0) -> None:
    net.zero_grad()
    (net(x) * r).sum().backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= lr * p.grad


def trained(steps: int = 2) -> tuple[Net, Tensor, Tensor]:
    net, x, r = dibit.compress(Net(), CONFIG), torch.randn(N, D), readout()
    for _ in range(steps):
        step(net, x, r)
    return net, x, r


def test_scores_are_the_last_steps_gradients() -> None:
    net, _, r = trained(1)
    known = dibit.scores(net).state_dict()
    assert {key for key, table in known.items() if table.dim()} == {"norm:batch_norm:1", "third:linear:1"}
    # one residual serves both layers: their gradients add up
    second = torch.zeros(N, D)
    second[:, :3] = r
    expected = add_scores(row_scores(r), row_scores(second))
    assert torch.equal(known["third:linear:1"], expected)
    assert all(table.dtype == torch.uint8 and table.shape == (N,) for table in known.values() if table.dim())


@pytest.mark.statistics
def test_gradient_is_unbiased_with_rows_that_count_and_rows_that_do_not() -> None:
    net, x, r = trained()
    plain = Net()
    plain.load_state_dict(net.state_dict())

    def gradient(model: nn.Module) -> Tensor:
        model.zero_grad()
        (model(x) * r).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    truth = gradient(plain)
    bias = bias_of(lambda i: torch.manual_seed(i) and gradient(net), truth, 400)
    assert bias.unbiased, bias
    assert not bias.exact


@pytest.mark.statistics
def test_unbiased_where_the_gradient_appears_anew() -> None:
    """Rows without a gradient so far are kept too."""
    net, x, r = trained()
    new = torch.zeros_like(r)
    new[::5] = 1
    plain = Net()

    def gradient(model: nn.Module) -> Tensor:
        model.zero_grad()
        (model(x) * new).sum().backward()
        return model.third.weight.grad.flatten().clone()

    truth = gradient(plain)
    assert bias_of(lambda i: torch.manual_seed(i) and gradient(net), truth, 1000).unbiased


def test_the_error_falls() -> None:
    x, r = torch.randn(N, D), readout()

    def error(by: str) -> float:
        config = Config(bits=8, block=64, reduce=Sample(4, by=by))  # type: ignore[arg-type]
        net = dibit.compress(Net(), {"third": config, "second": config})
        for _ in range(2):
            step(net, x, r)
        plain = Net()
        step(plain, x, r)
        total = 0.0
        for i in range(30):
            torch.manual_seed(i)
            step(net, x, r)
            total += float((net.third.weight.grad - plain.third.weight.grad).square().sum())
        return total

    assert error("gradient") < 0.2 * error("uniform")


def test_scores_change_with_the_parameters_alone() -> None:
    net, x, r = trained(1)
    scores = dibit.scores(net)
    step(net, x, r, 0.1)
    net(x)
    first = dict(scores.known)
    assert first
    for factor in (100.0, 1e4):  # accumulation: passes without a step between
        (net(x) * r * factor).sum().backward()
        assert all(scores.known[k] is first[k] for k in first)
    with torch.no_grad():
        net.first.bias.add_(0.0)
    net(x)
    assert all(not torch.equal(scores.known[k], first[k]) for k in first)
    # the second pass was the last
    assert (scores.known["third:linear:1"].int() - row_scores(r * 1e4).int()).abs().max() <= 1


def test_a_pass_keeps_the_scores_that_it_was_sampled_by() -> None:
    grads = []
    for interrupted in (False, True):
        net, x, r = trained()
        torch.manual_seed(7)
        a = net(x)
        if interrupted:  # another pass measures, and its measurement counts, before the first goes back
            (net(x) * r.flip(0)).sum().backward()
            with torch.no_grad():
                net.norm.bias.add_(0.0)
            net(x)
        net.zero_grad()
        (a * r).sum().backward()
        grads.append(net.third.weight.grad)
    assert torch.equal(*grads)


def test_passes_without_backward_cost_nothing_that_stays() -> None:
    net, x, _ = trained()
    for _ in range(20):
        net(x)
    assert not dibit.scores(net)._pending
    step(net, x, readout(), 0.1)
    for _ in range(20):
        step(net, x, readout())
    assert [len(measured) for measured in dibit.scores(net)._pending.values()] == [1, 1]


class Weighted(nn.Module):
    """Attention's scores: the sum over a head's columns of x times a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.weight = nn.Linear(D, 4 * D), nn.Parameter(torch.randn(1, 4, D))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x).view(-1, 4, D) * self.weight).sum(-1)


class TestProductWithAParameter:
    """What multiplies a parameter is kept row by row, each head of a node a row."""

    def test_bytes(self) -> None:
        model = dibit.compress(Weighted(), CONFIG)
        with dibit.track(model) as saved:
            model(torch.randn(N, D))
        (row,) = (row for row in saved.rows if row.operation == "mul")
        codes, ranges, scores = N * 4 * D // 4, N * 4 * D // 4 // 64 * 4, N * 4
        assert "sample 1/4 by gradient" in row.how
        assert codes + ranges + scores <= row.kept <= codes + ranges + scores + 16

    @pytest.mark.statistics
    def test_the_gradient_is_unbiased_and_decides_the_next_steps_rows(self) -> None:
        model, x = dibit.compress(Weighted(), CONFIG), torch.randn(N, D)
        torch.manual_seed(2)
        r = torch.randn(N, 4) * torch.exp(2 * torch.randn(N, 4))
        plain = Weighted()

        def gradient(model: nn.Module) -> Tensor:
            model.zero_grad()
            (model(x) * r).sum().backward()
            return model.weight.grad.flatten().clone()

        exact, first = gradient(plain), gradient(model)
        assert not torch.equal(first, exact)
        with torch.no_grad():
            model.weight.add_(0)  # a step of the optimiser

        def draw(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return gradient(model)

        assert bias_of(draw, exact, 200).unbiased
        assert torch.equal(dibit.scores(model).state_dict()[":mul:1"], row_scores(r.reshape(-1, 1).expand(-1, D)))

    def test_heads_belong_to_their_nodes_ids(self) -> None:
        model, ids = dibit.compress(Weighted(), CONFIG), torch.randperm(3 * N)[:N]
        r = torch.randn(N, 4)
        with dibit.batch(model, node_ids=ids):
            (model(torch.randn(N, D)) * r).sum().backward()
        table = dibit.scores(model).state_dict()[":mul:1"]
        assert torch.equal(table.view(-1, 4)[ids], row_scores(r.reshape(-1, 1).expand(-1, D)).view(-1, 4))


def test_nan_gradients_are_ignored() -> None:
    net, x, r = trained(1)
    before = {k: v.clone() for k, v in dibit.scores(net).state_dict().items()}
    bad = r.clone()
    bad[7] = float("nan")
    bad[8] = float("inf")
    net(x)
    (net(x) * bad).sum().backward()
    after = dibit.scores(net).state_dict()
    key = "third:linear:1"
    assert torch.equal(after[key], before[key]), "rows that are not finite keep what they had"
    assert torch.equal(after["norm:batch_norm:1"] > 0, before["norm:batch_norm:1"] > 0)


class TestBatches:
    def test_scores_go_by_node(self) -> None:
        net, r = dibit.compress(Net(), CONFIG), readout()
        x = torch.randn(N, D)
        key = "third:linear:1"
        for ids in torch.randperm(N).split(50):
            with dibit.batch(net, node_ids=ids):
                step(net, x[ids], r[ids], 0.01)
        table = dibit.scores(net).state_dict()[key]
        second = torch.zeros(N, D)
        second[:, :3] = r
        assert torch.equal(table, add_scores(row_scores(r), row_scores(second)))

    def test_accumulated_batches_add_up(self) -> None:
        net, r, x = dibit.compress(Net(), CONFIG), readout(), torch.randn(N, D)
        for ids in torch.arange(N).split(64):
            with dibit.batch(net, node_ids=ids):
                (net(x[ids]) * r[ids]).sum().backward()
        assert (dibit.scores(net).state_dict()["third:linear:1"] > 0).sum() == (r.abs().sum(1) > 0).sum()

    @pytest.mark.statistics
    def test_unbiased(self) -> None:
        net, r, x = dibit.compress(Net(), CONFIG), readout(), torch.randn(N, D)
        ids = torch.randperm(N)[:120]
        other = torch.randperm(N)[:80]  # some of the nodes were seen, some not
        with dibit.batch(net, node_ids=other):
            step(net, x[other], r[other], 1e-3)
        plain = Net()
        plain.load_state_dict(net.state_dict())

        def gradient(model: nn.Module) -> Tensor:
            model.zero_grad()
            with dibit.batch(model, node_ids=ids):
                (model(x[ids]) * r[ids]).sum().backward()
            return torch.cat([p.grad.flatten() for p in model.parameters()])

        truth = gradient(plain)
        assert bias_of(lambda i: torch.manual_seed(i) and gradient(net), truth, 400).unbiased

    def test_without_names_one_warning_and_norms(self) -> None:
        net, x, r = trained(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for n in (50, 60, 70):
                step(net, x[:n], r[:n], 0.01)
        said = [str(w.message) for w in caught if "dibit" in str(w.message)]
        assert len(said) == 1
        assert "are of 200 rows, but this batch has 50; rows are kept by their norms instead" in said[0]

    def test_plain_models_and_bad_names(self) -> None:
        net = Net()
        with dibit.batch(net, node_ids=torch.arange(N)):
            net(torch.randn(N, D))
        for bad, error, message in (
            (torch.ones(3), TypeError, "node_ids of type torch.float32; expected an int64 tensor"),
            ([1, 2], TypeError, "node_ids of type list"),
            (torch.tensor([-1, 2]), ValueError, r"shape \(2,\) with negative numbers"),
            (torch.ones(2, 2).long(), ValueError, r"shape \(2, 2\); expected \(rows,\)"),
        ):
            with pytest.raises(error, match=message), dibit.batch(net, node_ids=bad):
                pass


def versions(net: nn.Module) -> int:
    return sum(p._version for p in net.parameters())


def by_data(net: nn.Module, lr: float) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.data.add_(p.grad, alpha=-lr)
        p.grad = None


def by_data_zeroed(net: nn.Module, lr: float) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.data -= lr * p.grad
            p.grad.zero_()


def by_copy(net: nn.Module, lr: float) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.data = p.data - lr * p.grad
        p.grad = None


class ByData(torch.optim.Optimizer):
    """As some optimisers outside of torch are written."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__(net.parameters(), {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data, alpha=-group["lr"])


class TestStepsThroughData:
    """Version counters stand still; the measurements count all the same, and none are piled up."""

    @pytest.mark.parametrize("ids", [None, torch.arange(N)])
    @pytest.mark.parametrize("how", [by_data, by_data_zeroed, by_copy, ByData])
    def test_scores_are_used_and_memory_is_flat(self, how: Any, ids: Tensor | None) -> None:
        net, r, x = dibit.compress(Net(), CONFIG), readout(), torch.randn(N, D)
        scores, changed, sizes = dibit.scores(net), [], []
        for i in range(12):
            before = dict(scores.known)
            with dibit.batch(net, node_ids=ids):
                y = net(x)
            changed.append(any(scores.known[k] is not before.get(k) for k in scores.known))
            (y * r * (i + 1)).sum().backward()
            was = versions(net)
            if how is ByData:
                optimizer = ByData(net, 1e-3)
                optimizer.step(), optimizer.zero_grad()
            else:
                how(net, 1e-3)
            assert versions(net) == was
            sizes.append(sum(len(measured) for measured in scores._pending.values()))
        assert all(changed[3:]), changed  # one pass without a word, one to look, one to see
        assert max(sizes) <= 4, sizes

    def test_passes_that_add_up_are_sampled_alike(self) -> None:
        net, r, x = dibit.compress(Net(), CONFIG), readout(), torch.randn(N, D)
        with dibit.batch(net, node_ids=torch.arange(N)):
            step(net, x, r, 1e-3)
            net(x)
            before = dict(dibit.scores(net).known)
            assert before
            for _ in range(8):
                (net(x) * r).sum().backward()
                assert all(dibit.scores(net).known[k] is table for k, table in before.items())

    def test_batches_without_a_step_are_one_table_that_says_what_the_list_said(self) -> None:
        net, r, x = dibit.compress(Net(), CONFIG), readout(), torch.randn(N, D)
        scores = dibit.scores(net)
        expected: dict[str, Tensor] = {}
        for ids in [*torch.randperm(N).split(40), *torch.randperm(N).split(30)]:
            with dibit.batch(net, node_ids=ids):
                y = net(x[ids])
            assert sum(map(len, scores._pending.values())) == 0
            (y * r[ids]).sum().backward()
            for key, measured in scores._pending.items():
                assert len(measured) == 1
                expected[key] = _folded(expected.get(key), measured)
        assert expected
        assert all(torch.equal(table, expected[key]) for key, table in scores.state_dict().items() if table.dim())

    def test_parameters_of_any_kind(self) -> None:
        net, r, x = dibit.compress(Net(), CONFIG), readout(), torch.randn(N, D)
        with torch.inference_mode():
            net.teacher = nn.Linear(D, D)
        net.lazy = nn.LazyLinear(3)
        net.empty, net.phase = nn.Parameter(torch.empty(0)), nn.Parameter(torch.randn(3, dtype=torch.complex64))
        net.turned = nn.Parameter(torch.randn(5, 7).t())
        for _ in range(4):
            (net(x) * r).sum().backward()
            by_data(net, 1e-3)
        assert dibit.scores(net).known


class TestState:
    def test_never_in_the_state_dict(self) -> None:
        net, _, _ = trained()
        assert set(net.state_dict()) == set(Net().state_dict())
        assert not any("score" in name for name, _ in net.named_buffers())

    def test_saved_and_loaded(self) -> None:
        net, x, r = trained(3)
        saved = dibit.scores(net).state_dict()
        other = dibit.compress(Net(), CONFIG)
        other.load_state_dict(net.state_dict())
        dibit.scores(other).load_state_dict(saved)
        grads = []
        for model in (net, other):
            torch.manual_seed(5)
            step(model, x, r)
            grads.append(model.third.weight.grad)
        assert torch.equal(*grads)

    def test_bad_states(self) -> None:
        net = dibit.compress(Net(), CONFIG)
        with pytest.raises(TypeError, match=r"the scores of 'a' are torch.float32 of shape \(3,\); expected uint8"):
            dibit.scores(net).load_state_dict({"a": torch.zeros(3)})
        with pytest.raises(ValueError, match="not compressed"):
            dibit.scores(Net())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_have_their_own(self, copied: Any) -> None:
        net, x, r = trained(3)
        net(x)
        other = copied(net)
        assert dibit.scores(other) is not dibit.scores(net)
        assert set(dibit.scores(other).known) == set(dibit.scores(net).known)
        step(other, x, r)

    def test_decompressed_models_have_none(self) -> None:
        net, _, _ = trained()
        dibit.compress(dibit.decompress(net), CONFIG)
        assert not dibit.scores(net).known


def test_the_ledger_counts_a_byte_a_row() -> None:
    net, x, _ = trained()
    plain = dibit.compress(Net(), Config(bits=8, block=64, reduce=Sample(4), norm=Config(bits=8, reduce=Sample(4))))
    totals = []
    for model in (plain, net):
        with dibit.track(model) as saved:
            model(x)
        totals.append(saved.total)
    assert totals[1] - totals[0] == 2 * N
    assert any("sample 1/4 by gradient" in row.how for row in saved.rows)


def test_the_ledger_says_where_one_row_is_all() -> None:
    net = dibit.compress(Net(), Config(bits=8, reduce=Sample(1000)))
    with dibit.track(net) as saved:
        net(torch.randn(5, D))
    assert any("sample 1/1000 (one row of 5)" in row.how for row in saved.rows)


def test_scores_follow_the_device_of_the_rows() -> None:
    table = dibit.scores(dibit.compress(Net(), CONFIG))
    table.load_state_dict({"a": torch.zeros(4, dtype=torch.uint8)})
    found = table.lookup("a", torch.empty(4, 2, device="meta"), None)
    assert found is not None
    assert found.device.type == "meta"


@pytest.mark.parametrize("times", [2, 6])
@pytest.mark.parametrize("norm", [False, True])
def test_rows_that_are_no_nodes_have_no_names(times: int, norm: bool) -> None:
    """A layer on edges beside layers on nodes, in batches whose nodes are named."""

    class Edges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.nodes, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.edges = nn.Linear(8, 4)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            h = self.nodes(torch.relu(self.first(x)))[index]
            return self.edges(torch.relu(self.norm(h) if norm else h))

    config = Config(reduce=Sample(3, by="gradient"), norm=Config(reduce=Sample(3, by="gradient")))
    model = dibit.compress(Edges(), config)
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.randn(60, 8)
    for _ in range(3):
        index = torch.randint(60, (60 * times,))
        with dibit.batch(model, node_ids=torch.arange(60)):
            y = model(x, index)
        y.square().sum().backward()
        optimizer.step()
    tables = {key: table for key, table in dibit.scores(model).state_dict().items() if table.dtype == torch.uint8}
    assert all(len(table) == 60 for table in tables.values())
    assert any(key.startswith("nodes") for key in tables)
