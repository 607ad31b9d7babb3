"""How many rows are kept by the error that was measured: formulas, what serves a leaf, and the error that comes."""

from __future__ import annotations

import copy
import heapq
import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import InstanceNorm as PyGInstanceNorm
from torch_geometric.utils import to_torch_csr_tensor

import dibit
from dibit import Config, Sample
from dibit.codec import decode, encode, seed_tensor
from dibit.codec.layout import parts_of
from dibit.compile.config_text import NORM, setting_of, settings
from dibit.engine.model_state import state_of
from dibit.engine.noise.meter import concentration, rounding_of
from dibit.engine.noise.noise_flow import _ALIGNED, _ALIGNED_COLUMNS, _COLUMNS, Factor, Leaf, Level, Norm
from dibit.engine.noise.prediction import DEEP, FINE, SHARE_NEAR_LOSS
from dibit.engine.noise.row_plan import _MANY, _SPREAD, RowPlan
from dibit.recipes import recipe
from dibit.study import gradient_error
from tests.unbiased import bias_of

D = 16


def plan_of(count: int, seed: int) -> RowPlan:
    """A plan with leaves as training would measure them."""
    rng = random.Random(seed)
    leaves = {}
    for i in range(count):
        terms = rng.uniform(0.1, 2)
        leaves[f"{i}"] = Leaf(
            noise=terms * rng.uniform(0.3, 1),
            terms=terms,
            rounding=0.1 * terms,
            signal=rng.uniform(0.5, 3),
            elements=rng.choice((64, 128, 512)),
            most=rng.choice((4, 6)),
            sampled=rng.uniform(0, 0.2),
            all_rows=0.01,
            served=rng.random() < 0.5,
        )
    return RowPlan(bound=0.5, leaves=leaves)


class TestFormulas:
    def test_the_error_of_a_leaf(self) -> None:
        leaf = Leaf(noise=2.0, terms=5.0, rounding=0.5, sampled=0.3, all_rows=0.1)
        assert leaf.error(4, Level.SAMPLED) == pytest.approx(0.3 * 5 + 1.3 * (2 * 3 + 0.5 * 4))
        assert leaf.error(1, Level.ALL) == pytest.approx(0.1 * 5 + 1.1 * 0.5)

    def test_noise_of_norms_over_columns_lies_where_rows_are_long(self) -> None:
        leaf = Leaf(terms=5.0, along=20.0, sampled=0.3, all_rows=0.1, sampled_factors=0.2)
        assert leaf.path_error(Level.SAMPLED) == pytest.approx(0.3 * 5)
        leaf.by_columns = True
        assert leaf.path_error(Level.SAMPLED) == pytest.approx(0.3 * 20)
        assert leaf.error(1, Level.SAMPLED, 0.5) == pytest.approx(0.3 * 20 + 0.1 * 5)

    def test_predicted_is_the_error_over_the_signal(self) -> None:
        plan = plan_of(4, 0)
        for level, ratios in itertools.product((Level.SAMPLED, Level.ALL), ({}, {"0": 2, "3": 1})):
            error = 0.0
            for key, leaf in plan.leaves.items():
                ratio = 1 if level and leaf.served else min(leaf.most, ratios.get(key, leaf.most))
                error += leaf.error(ratio, level)
            assert plan.predicted(level, ratios) == pytest.approx(error / sum(x.signal for x in plan.leaves.values()))

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("level", [Level.SAMPLED, Level.ALL])
    def test_ratios_are_within_the_bound_and_near_to_the_fewest_bytes(self, seed: int, level: Level) -> None:
        plan = plan_of(4, seed)
        free = [key for key, leaf in plan.leaves.items() if not (level and leaf.served)]
        options = [range(1, plan.leaves[key].most + 1) for key in free]
        all_rows = plan.predicted(level, dict.fromkeys(free, 1))
        for bound in (1.05 * all_rows, 2 * all_rows, 5 * all_rows):
            chosen = plan.prediction.within(bound * plan.prediction.signal, level)
            assert plan.predicted(level, chosen) <= bound * (1 + 1e-9)
            within = [dict(zip(free, own, strict=True)) for own in itertools.product(*options)]
            fewest = min(plan.prediction.elements(level, r) for r in within if plan.predicted(level, r) <= bound)
            assert plan.prediction.elements(level, chosen) <= 1.6 * fewest

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("level", [Level.SAMPLED, Level.ALL])
    def test_out_of_reach_the_error_is_near_the_least(self, seed: int, level: Level) -> None:
        """And no rows are kept of what adds nothing to it."""
        plan = plan_of(4, seed)
        plan.leaves["quiet"] = Leaf(noise=1e-5, terms=1e-5, rounding=1e-6, signal=0.0, elements=512, most=6)
        least = plan.prediction.error(level, dict.fromkeys(plan.leaves, 1))
        for bound in (0.0, 0.9 * least):
            chosen = plan.prediction.within(bound, level)
            assert plan.prediction.error(level, chosen) <= 1.1 * least
            assert chosen["quiet"] == 6

    @pytest.mark.parametrize("signal", [-1.0, 0.0])
    def test_where_nothing_but_noise_was_seen_what_makes_it_is_kept(self, signal: float) -> None:
        plan = RowPlan(bound=0.5, passes=5, due=5)
        plan.leaves = {key: Leaf(elements=100, most=6) for key in ("loud", "quiet")}
        plan.norms["norm"] = Norm(elements=100, ratio=16, above=20)
        plan.measured("loud", (1.0, 1.0, 0.1, signal, 1.0, 0.0, 0.0, 0.0))
        plan.measured("quiet", (1e-4, 1e-4, 1e-5, 0.0, 1.0, 0.0, 0.0, 0.0))
        plan.decide()
        assert plan.ratios == {"loud": 1, "quiet": 6}
        assert plan.level is Level.SAMPLED, "its noise does not come from norms"

    def test_nothing_is_changed_within_the_bound(self) -> None:
        assert plan_of(3, 1).prediction.within(1e6, level=Level.SAMPLED) == {}

    def test_state_is_whole(self) -> None:
        plan = plan_of(3, 2)
        plan.norms["a/b:1"] = Norm(0.1, 0.2, 0.5, 3, 640, 16)
        plan.ratios, plan.level, plan.passes = {"1": 3}, Level.FINE, 7
        plan.due, plan.apart, plan.finer = 9, 16, 4
        plan.factors["a:gelu:1/factor"] = Factor(0.07, 320, 2, True)
        plan.measured("a:gelu:1/factor", (1.0, 14.0))
        plan.measured("1", (1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 1.0, 3.0))
        other = RowPlan(bound=0.5, ratios={"x": 2})
        other.load_state_dict(plan.state_dict())
        assert vars(other) == vars(plan)
        assert RowPlan().state_dict() == {}

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("plan", [1.0]),
            ("plan", [7.0, 0.0, 1.0, 1.0, 4.0]),
            ("plan", [0.0, 1.0]),
            ("factor/a", [1.0]),
            ("plan", [math.inf, 0.0, 2.0, 2.0, 4.0]),
            ("leaf/a", [1.0] * 3),
            ("leaf/a", [math.nan] * len(vars(Leaf()))),
            ("norm/a", []),
            ("ratio/a", [1.0, 2.0]),
            ("seen/a", [1.0] * 5),
            ("x", [1.0]),
        ],
    )
    def test_a_state_that_does_not_fit_is_measured_anew(self, name: str, values: list[float]) -> None:
        plan = plan_of(3, 2)
        plan.level, plan.passes = Level.ALL, 9
        state = {**plan.state_dict(), name: torch.tensor(values, dtype=torch.float64)}
        other = RowPlan(bound=0.3)
        with pytest.warns(UserWarning, match=rf"rows/{name} has {len(values)} numbers.*measured anew"):
            other.load_state_dict(state)
        assert vars(other) == vars(RowPlan(bound=0.3))

    def test_what_is_not_finite_is_not_learnt(self) -> None:
        plan = RowPlan(bound=0.5)
        plan.measured("a", (math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0))
        plan.decide()
        assert not plan.leaves


class Deep(nn.Module):
    """Aggregation, linear layer, norm, ReLU and dropout, several times."""

    def __init__(self, layers: int, norm: type[nn.Module], residual: bool = False, p: float = 0.2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 4)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(layers))
        self.norms = nn.ModuleList(norm(D) for _ in range(layers))
        self.residual, self.p = residual, p

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            new = F.dropout(F.relu(norm(layer(h))), self.p, self.training)
            h = h + new if self.residual else new
        return self.last(h)


def walked(model: nn.Module, ratio: int, **rhos: float) -> dict[str, Leaf]:
    """The leaves of a plan after a pass, of norms that are all alike."""
    dibit.compress(model, replace(recipe("default"), norm=Config(rounding="dither", reduce=Sample(ratio))))
    state = state_of(model)
    assert state is not None
    y = model(torch.randn(40, D))
    plan = state.scores.plan
    for norm in plan.norms.values():
        norm.rho, norm.ratio = rhos["rho"], ratio
    plan.walk([y], 0)
    return plan.leaves


LOUD = replace(recipe("default"), noise=1e9, norm=Config(rounding="dither", reduce=Sample(5)))


class TestWhatNormsAdd:
    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
    def test_down_a_chain_noise_is_multiplied(self, norm: Any) -> None:
        ratio, rho = 5, 0.03
        leaves = walked(Deep(5, norm), ratio, rho=rho)
        columns = norm is nn.BatchNorm1d
        for variance, name in ((ratio - 1, "sampled"), (0.2, "all_rows")):
            q = expected = 0.0
            for i in reversed(range(5)):
                q = q * (1 + variance * (_ALIGNED_COLUMNS if columns else _ALIGNED)) + variance * rho
                expected = q + (5 - i) * _COLUMNS * variance * _SPREAD * columns
                assert getattr(leaves[f"layers.{i}:linear:1"], name) == pytest.approx(expected)
            assert getattr(leaves["last:linear:1"], name) == 0

    @pytest.mark.parametrize("extra", ["first", "hidden", "all"])
    def test_outputs_that_the_loss_does_not_use_hide_nothing(self, extra: str) -> None:
        class Net(Deep):
            def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
                hidden = [self.first(x)]
                for layer, norm in zip(self.layers, self.norms, strict=True):
                    hidden.append(F.relu(norm(layer(hidden[-1]))))
                chosen = {"first": hidden[:1], "hidden": hidden[3:4], "all": hidden}[extra]
                return self.last(hidden[-1]), *chosen

        found = []
        for kind in (Net, Deep):
            torch.manual_seed(0)
            model = dibit.compress(kind(5, nn.LayerNorm), LOUD)
            state = state_of(model)
            assert state is not None
            optimizer, x = torch.optim.SGD(model.parameters(), lr=0.0), torch.randn(2000, D)
            for _ in range(5):
                optimizer.zero_grad()
                y = model(x)
                (y if kind is Deep else y[0]).square().sum().backward()
                optimizer.step()
            leaves = state.scores.plan.leaves
            found.append([leaves[f"layers.{i}:linear:1"].sampled for i in range(5)])
        assert found[0] == pytest.approx(found[1], rel=0.6)
        assert found[0][0] > 10 * found[0][4] > 0

    @pytest.mark.parametrize("parts", [2, 5, 20])
    def test_parts_that_are_called_one_after_the_other_are_one_way(self, parts: int) -> None:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.ReLU()) for _ in range(parts)]
        model = nn.Sequential(*blocks, nn.Linear(D, D))
        found = []
        for apart in (False, True):
            own = dibit.compress(copy.deepcopy(model), LOUD)
            state = state_of(own)
            assert state is not None
            optimizer, x = torch.optim.SGD(own.parameters(), lr=0.0), torch.randn(2000, D)
            for _ in range(5):
                optimizer.zero_grad()
                h = x
                for part in own if apart else [own]:
                    h = part(h)
                h.square().sum().backward()
                optimizer.step()
            leaves = state.scores.plan.leaves
            found.append([leaves[key].sampled for key in sorted(leaves) if "/input" not in key])
        assert len(found[1]) >= parts
        assert max(found[0]) > 0.3
        assert max(found[1]) == pytest.approx(max(found[0]), rel=0.5)


class TestFactors:
    def walked(self, fixed: bool, ratio: int = 16) -> Leaf:
        """Of a linear layer below GELU, LayerNorm and GELU: two factors, of which the upper one passes the norm."""
        model = nn.Sequential(
            nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D), nn.GELU(), nn.Linear(D, 3)
        )
        dibit.compress(model)
        state = state_of(model)
        assert state is not None
        plan = state.scores.plan
        y = model(torch.randn(100, D))
        for factor in plan.factors.values():
            factor.variance, factor.fixed = 0.07, fixed
        for norm in plan.norms.values():
            norm.rho, norm.ratio = 0.03, ratio
        plan.walk([y], 0)
        return plan.leaves["2:linear:1"]

    def test_their_variance_adds_up_and_is_multiplied_by_norms(self) -> None:
        leaf = self.walked(fixed=False)
        assert leaf.sampled == pytest.approx(15 * 0.03)
        assert leaf.sampled_factors == pytest.approx(0.07 * (1 + 15 * _ALIGNED) + 0.07)
        assert leaf.all_rows_factors == pytest.approx(0.07 * (1 + 0.2 * _ALIGNED) + 0.07)
        assert leaf.q(Level.ALL, 1 / 16) == pytest.approx(0.2 * 0.03 + leaf.all_rows_factors / 16)

    def test_those_of_fixed_bits_are_part_of_the_rest(self) -> None:
        leaf = self.walked(fixed=True)
        assert leaf.sampled == pytest.approx(0.07 * (1 + 15 * _ALIGNED) + 15 * 0.03 + 0.07)
        assert leaf.sampled_factors == 0

    @pytest.mark.parametrize(("terms", "finer"), [(0.5, 0), (8.0, 4), (50.0, 8)])
    def test_more_bits_are_kept_where_they_make_too_much_noise(self, terms: float, finer: int) -> None:
        plan = RowPlan(bound=0.5, passes=9, due=9)
        plan.leaves["x"] = Leaf(terms=terms, signal=1.0, sampled_factors=0.2, all_rows_factors=0.2, fine_factors=0.2)
        plan.factors["f"] = Factor(0.07, 1000, 2)
        plan.measured("f", (0.07, 1.0))
        plan.decide()
        assert plan.finer == finer
        config = plan.factor_config("f", Config(bits=2, levels="normal"), 1000, False)
        assert (config.bits, config.levels) == ((finer, "uniform") if finer else (2, "normal"))
        assert plan.factor_config("g", Config(bits=2), 1000, True).bits == 2

    def test_no_bits_are_spent_where_norms_have_done_all_they_can(self) -> None:
        """Their share of the bound is exceeded at their last level, the bound is not: finer factors would not help."""
        plan = RowPlan(bound=0.5, passes=9, due=9)
        plan.leaves["x"] = Leaf(terms=1.0, signal=1.0, sampled=9.0, all_rows=0.3, fine=0.3, all_rows_factors=0.01)
        plan.factors["f"] = Factor(0.01, 1000, 2)
        plan.measured("f", (0.01, 1.0))
        plan.decide()
        assert (plan.level, plan.finer) == (Level.ALL, 0)

    @pytest.mark.parametrize("config", [Config(bits=2, block=128), Config(bits=4, block=16), Config(bits=1, block=64)])
    def test_their_variance_is_that_of_the_codec(self, config: Config) -> None:
        torch.manual_seed(0)
        x = torch.rand(20_000, D) ** 3
        noise, square = rounding_of(x, config)
        kept = decode(encode(x, config, seed_tensor(7, x.device)))
        assert noise / square == pytest.approx(float((kept - x).square().sum() / x.square().sum()), rel=0.05)


class TestWhereGradientsMeet:
    """h + f(h): squares add up, those of the noise too."""

    def test_by_their_squares(self) -> None:
        layers, ratio, rho, stream, branch = 4, 5, 0.03, 2.0, 0.5
        model = Deep(layers, nn.LayerNorm, residual=True)
        plan, _ = planned(model)
        y = model(torch.randn(40, D))
        for norm in plan.norms.values():
            norm.rho, norm.ratio, norm.outgoing = rho, ratio, 1.0
        for key, leaf in plan.leaves.items():
            leaf.outgoing = stream if key.startswith("last") else branch
        plan.walk([y], 0)
        q, energy = 0.0, stream
        for i in reversed(range(layers)):
            own = q * (1 + (ratio - 1) * _ALIGNED) + (ratio - 1) * rho
            assert plan.leaves[f"layers.{i}:linear:1"].sampled == pytest.approx(own)
            q, energy = (q * energy + own * branch) / (energy + branch), energy + branch
        assert q > 0

    def test_a_stream_that_is_mostly_branches_is_noisy(self) -> None:
        found = []
        for branch in (0.01, 100.0):
            model = Deep(6, nn.LayerNorm, residual=True)
            plan, _ = planned(model)
            y = model(torch.randn(40, D))
            for norm in plan.norms.values():
                norm.rho, norm.ratio = 0.1, 5
            for leaf in plan.leaves.values():
                leaf.outgoing = branch
            plan.leaves["last:linear:1"].outgoing = 1.0
            plan.walk([y], 0)
            found.append(plan.leaves["layers.0:linear:1"].sampled)
        assert found[1] > 3 * found[0]

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
    def test_the_squares_are_measured(self, norm: Any) -> None:
        torch.manual_seed(0)
        model, x = Deep(3, norm, residual=True), torch.randn(600, D)
        sums: dict[str, float] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_full_backward_hook(
                    lambda _, gi, __, name=name: (
                        sums.update({name: float(gi[0].square().sum())}) if gi[0] is not None else None
                    )
                )
        dibit.compress(model, "default")
        state = state_of(model)
        assert state is not None
        model(x.requires_grad_()).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0)
        model(x)
        for key, leaf in state.scores.plan.leaves.items():
            assert leaf.outgoing == pytest.approx(sums[key.partition(":")[0]], rel=1e-4)


class TestUnevenRows:
    """Rows of very different lengths are chosen by their length, too."""

    @staticmethod
    def trained(config: Config, spread: float) -> tuple[nn.Module, Tensor, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 4, bias=False))  # a range a row
        x = torch.randn(6000, 128) * torch.exp(spread * torch.randn(6000, 1))
        readout = torch.sign(x @ torch.randn(128, 4)) / (1 + x.norm(dim=1, keepdim=True))  # less for longer rows
        dibit.compress(model, config)

        def step() -> None:
            model.zero_grad()
            (model(x.clone().requires_grad_() * 1) * readout).sum().backward()

        for _ in range(3):
            step()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0)
        return model, x, step

    @pytest.mark.parametrize(("spread", "uneven"), [(0.0, False), (1.5, True)])
    def test_where_they_are(self, spread: float, uneven: bool) -> None:
        model, _, step = self.trained(replace(recipe("default"), noise=1e6), spread)
        step()
        state = state_of(model)
        assert state is not None
        assert {leaf.uneven for leaf in state.scores.plan.leaves.values()} == {uneven}

    @pytest.mark.statistics
    def test_it_is_unbiased_and_quieter(self) -> None:
        spread, errors = 1.5, []
        for noise in (None, 1e6):  # ratios alone: by gradients alone
            model, _, step = self.trained(replace(recipe("default"), noise=noise), spread)
            state = state_of(model)
            assert state is not None
            state.scores.plan.ratios = {}  # the same number of rows

            def draw(i: int, step: Any = step, model: Any = model, state: Any = state) -> Tensor:
                state.salt = i + 1
                step()
                return torch.cat([p.grad.flatten() for p in model.parameters()])

            truth_model, _, truth = self.trained(Config(bits=8, block=64), spread)
            dibit.decompress(truth_model)
            truth()
            expected = torch.cat([p.grad.flatten() for p in truth_model.parameters() if p.grad is not None])
            assert (bias := bias_of(draw, expected, 150)).unbiased, bias
            errors.append(sum(float((draw(i) - expected).square().sum()) for i in range(20)))
        assert errors[1] < errors[0] / 2


class TestNextToTheLoss:
    """In deep models, where all rows at 2 bits are too noisy, the norms next to the loss keep 4 bits."""

    def test_noise_is_less_from_there_down(self) -> None:
        layers, rho = 12, 0.03
        leaves = walked(Deep(layers, nn.BatchNorm1d), 5, rho=rho)
        q = columns = 0.0
        for i in reversed(range(layers)):
            near = layers - 1 - i < SHARE_NEAR_LOSS * layers
            variance = 0.2 * 4.0 ** (2 - FINE) if near else 0.2
            q = q * (1 + variance * _ALIGNED_COLUMNS) + variance * rho
            columns += _COLUMNS * variance * _SPREAD
            if i < layers - 1:  # in the first pass the order of the norms was not known before
                assert leaves[f"layers.{i}:linear:1"].fine <= leaves[f"layers.{i}:linear:1"].all_rows
        again = walked_again(layers, rho)
        assert again["layers.0:linear:1"].fine == pytest.approx(q + columns)

    @pytest.mark.parametrize(("layers", "bits"), [(DEEP, {2, 4}), (DEEP - 1, {2})])
    def test_which_norms_keep_more_bits(self, layers: int, bits: set[int]) -> None:
        model = Deep(layers, nn.LayerNorm)
        plan, again = planned(model)
        plan.level = Level.FINE
        again()
        config = recipe("default")
        found = {
            key: plan.norm_config(
                key, replace(config.norm or config, rounding="dither"), torch.Size((40, D)), False, model
            )
            for key in plan.norms
        }
        assert all(each.reduce is None for each in found.values())
        assert {each.bits for each in found.values()} == bits
        near = [key for key, each in found.items() if each.bits == 4]
        assert all(plan.norms[key].above < SHARE_NEAR_LOSS * layers for key in near)
        assert any(key.startswith(f"norms.{layers - 1}:") for key in near) or bits == {2}

    @pytest.mark.parametrize(("terms", "level"), [(0.1, Level.ALL), (3.0, Level.FINE)])
    def test_it_is_chosen_by_what_comes_down_the_path(self, terms: float, level: Level) -> None:
        plan = RowPlan(bound=0.5, passes=4)
        plan.norms = {f"{i}": Norm(0.01, above=i, elements=64, ratio=16) for i in range(DEEP)}
        plan.leaves = {"x": Leaf(terms=terms, signal=1.0, sampled=50.0, all_rows=0.06, fine=0.01)}
        plan.measured("x", (0.0, terms, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0))
        plan.decide()
        assert plan.level is level

    def test_concentration_is_that_of_the_eigenvalues(self) -> None:
        x = torch.randn(50, 6) @ torch.diag(torch.tensor([5.0, 1, 1, 0.1, 0.1, 0]))
        values = torch.linalg.eigvalsh(x.T @ x)
        assert float(concentration(x)) == pytest.approx(float(values.square().sum() / values.sum() ** 2), rel=1e-4)
        assert float(concentration(torch.zeros(5, 3))) == 0

    def test_of_many_columns_some_are_compared(self) -> None:
        x = torch.randn(200, 1) @ torch.randn(1, 20_000)
        assert float(concentration(x)) == pytest.approx(1, rel=1e-3)

    def test_a_norm_over_columns_measures_it(self) -> None:
        torch.manual_seed(0)
        model = Deep(2, nn.BatchNorm1d)
        dibit.compress(model, "default")
        x = torch.randn(400, 1) @ torch.randn(1, D) + 0.01 * torch.randn(400, D)  # all rows in one direction
        model(x).square().sum().backward()
        state = state_of(model)
        assert state is not None
        torch.autograd.graph.increment_version([next(model.parameters())])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0)
        model(x)
        first, second = (norm.concentration for _, norm in sorted(state.scores.plan.norms.items()))
        assert first > 0.5  # rounding spreads it a little
        assert 1 / D <= second < 1


def planned(model: nn.Module) -> tuple[RowPlan, Any]:
    """The plan of a model after one pass, and what makes it walk another."""
    dibit.compress(model, "default")
    state = state_of(model)
    assert state is not None
    plan = state.scores.plan

    def again() -> None:
        plan.walk([model(torch.randn(40, D))], 0)

    again()
    return plan, again


def walked_again(layers: int, rho: float) -> dict[str, Leaf]:
    """The leaves after a second walk, which knows the order of the norms from the first."""
    plan, again = planned(Deep(layers, nn.BatchNorm1d))
    for norm in plan.norms.values():
        norm.rho = rho
    again()
    return plan.leaves


def test_biases_are_a_part_of_the_signal() -> None:
    """Where they are most of the gradient, weights may be the noisier."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3))
    x = torch.randn(600, D).sign()  # weights' gradients nearly cancel, the bias's does not
    dibit.compress(model, Config(noise=0.5, reduce=Sample(4)))
    state = state_of(model)
    assert state is not None
    for _ in range(2):
        model(x).sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0)
    own = {name: p.grad for name, p in model.named_parameters()}
    model(x)
    leaf = next(leaf for key, leaf in state.scores.plan.leaves.items() if key.startswith("2:"))
    assert own["2.bias"] is not None
    assert leaf.signal > float(own["2.bias"].square().sum()) / 4 * 0.9  # of two steps that added up


def test_an_instance_norm_knows_its_nodes() -> None:
    """Rows of a graph's InstanceNorm are nodes, whatever numbers they have; its table is no larger than these."""
    model = nn.Sequential(nn.Linear(D, D), PyGInstanceNorm(D), nn.ReLU(), nn.Linear(D, 3))
    dibit.compress(model, Config(norm=Config(reduce=Sample(4, by="gradient"), rounding="dither")))
    for _ in range(2):
        with dibit.batch(model, node_ids=torch.randint(20_000, (2000,))):
            model(torch.randn(2000, D)).square().sum().backward()
        with torch.no_grad():
            model[0].weight.add_(0)
    state = state_of(model)
    assert state is not None
    assert all(table.numel() <= 20_000 for table in state.scores.known.values())


class Served(nn.Module):
    """A norm, what may follow it, and two layers that need its result."""

    def __init__(self, norm: str, then: str, p: float) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(D, D), nn.Linear(D, 3), nn.Linear(D, 3, bias=False)
        self.norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "plain": _plain, "instance": _instance}[norm](D)
        self.then, self.p = then, p
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.add_(torch.randn(D) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        match self.then:
            case "relu":
                h = F.relu(h)
            case "relu_":
                h = F.relu(h, inplace=True)
            case "leaky":
                h = F.leaky_relu(h, 0.2)
            case "changed":
                h += 1
        h = F.dropout(h, self.p, self.training, inplace=self.then == "dropout_")
        return torch.cat((self.last(h), self.other(h)), 1)


def _instance(width: int) -> nn.Module:
    return PyGInstanceNorm(width, affine=True)


def _plain(width: int) -> nn.Module:
    return nn.LayerNorm(width, elementwise_affine=False)


QUIET = Config(noise=0.5, norm=Config(bits=4, rounding="dither"), reduce=Sample(4))


def keeps_all_rows(model: nn.Module, config: Config) -> nn.Module:
    dibit.compress(model, config)
    state = state_of(model)
    assert state is not None
    state.scores.plan.level = Level.ALL
    return model


class TestServed:
    @pytest.mark.parametrize("p", [0.0, 0.5])
    @pytest.mark.parametrize("then", ["", "relu", "relu_", "leaky", "dropout_", "changed"])
    @pytest.mark.parametrize("norm", ["batch", "layer", "plain", "instance"])
    @pytest.mark.statistics
    def test_the_gradient_is_unbiased(self, norm: str, then: str, p: float) -> None:
        model = Served(norm, then, p)
        x, readout = torch.randn(60, D), torch.randn(60, 6)
        state = torch.get_rng_state()

        def run() -> Tensor:
            torch.set_rng_state(state)  # the same masks
            model.zero_grad()
            own = x.clone().requires_grad_()
            (model(own) * readout).sum().backward()
            assert own.grad is not None
            return torch.cat(
                [own.grad.flatten(), *(q.grad.flatten() for q in model.parameters() if q.grad is not None)]
            )

        truth = run()
        keeps_all_rows(model, replace(QUIET, dropout="mask"))
        own = state_of(model)
        assert own is not None
        with dibit.track(model) as ledger:
            run()
        kept = {row.module: row.how for row in ledger.rows if row.operation == "linear"}
        assert ("codes of the norm" in kept["last"]) == (then != "changed" and (then, p) != ("dropout_", 0))

        def draw(i: int) -> Tensor:
            own.salt = i + 1  # type: ignore[union-attr]
            return run()

        assert (bias := bias_of(draw, truth, 150)).unbiased, bias
        assert not bias.exact

    @pytest.mark.parametrize("dropout", ["seed", "mask"])
    def test_the_layer_behind_costs_nothing(self, dropout: Any) -> None:
        totals = []
        for ends in ("norm", "layer"):
            model = Served("batch", "relu", 0.5)
            if ends == "norm":
                model.last.requires_grad_(False)
                model.other.requires_grad_(False)
            keeps_all_rows(model, replace(QUIET, dropout=dropout))
            with dibit.track(model) as ledger:
                model(torch.randn(4000, D).requires_grad_()).sum().backward()
            totals.append(ledger.total)
        assert totals[1] - totals[0] <= 3 * D * 4, "weight and bias of the norm"

    def test_a_sparse_aggregation_between_is_no_hindrance(self) -> None:
        from torch_geometric.nn import SAGEConv

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.norm, self.conv = nn.Linear(D, D), nn.BatchNorm1d(D), SAGEConv(D, 3)

            def forward(self, x: Tensor, graph: Tensor) -> Tensor:
                return self.conv(F.relu(self.norm(self.first(x))), graph)  # type: ignore[no-any-return]

        graph = to_torch_csr_tensor(torch.randint(50, (2, 200)), size=(50, 50))
        model, x, readout = Net(), torch.randn(50, D), torch.randn(50, 3)

        def run(i: int) -> Tensor:
            torch.manual_seed(i)
            model.zero_grad()
            (model(x, graph) * readout).sum().backward()
            return torch.cat([q.grad.flatten() for q in model.parameters() if q.grad is not None])

        truth = run(0)
        keeps_all_rows(model, QUIET)
        assert (bias := bias_of(run, truth, 150)).unbiased, bias

    @pytest.mark.parametrize("shape", [(6, 6, 6), (6, 6, 6, 6), (5, 6, 6)], ids=str)
    def test_channels_are_not_rows(self, shape: tuple[int, ...]) -> None:
        """A BatchNorm keeps its input with the channels last: its shape may be the result's, its layout is not."""
        norm = (nn.BatchNorm1d if len(shape) == 3 else nn.BatchNorm2d)(6)
        model = nn.Sequential(norm, nn.ReLU(), nn.Linear(6, 3))
        x, readout = torch.randn(shape), torch.randn(*shape[:-1], 3)

        def run(i: int) -> Tensor:
            torch.manual_seed(i)
            model.zero_grad()
            (model(x) * readout).sum().backward()
            return torch.cat([q.grad.flatten() for q in model.parameters() if q.grad is not None])

        truth = run(0)
        keeps_all_rows(model, QUIET)
        assert (bias := bias_of(run, truth, 150)).unbiased, bias


class TestTraining:
    def graph(self, n: int = 3000) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (n,))
        return torch.randn(n, D) + 2 * F.one_hot(y, D).float(), y

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
    @pytest.mark.slow
    def test_noise_does_not_grow_with_depth(self, norm: Any) -> None:
        """Rows of the recipe's ratio, unbounded, are hundreds of times off; the recipe is not."""
        x, y = self.graph(8000)
        model = Deep(16, norm).train()

        def step() -> None:
            F.cross_entropy(model(x), y).backward()

        def before() -> None:
            now = copy.deepcopy(model.state_dict())
            for _ in range(4):
                model.load_state_dict(now)  # counts as an optimiser's step
                step()
            model.load_state_dict(now)

        bounded = gradient_error(model, step, "default", 3, before).mean
        unbounded = gradient_error(model, step, replace(recipe("default"), noise=None), 3, before).mean
        assert bounded < 1
        assert unbounded > 10 * bounded

    def test_what_was_decided_is_what_is_kept_and_comes_back(self) -> None:
        x, y = self.graph()

        def train(model: nn.Module, steps: int) -> list[int]:
            optimizer, totals = torch.optim.SGD(model.parameters(), lr=0.01), []
            for i in range(steps):
                torch.manual_seed(i)
                with dibit.track(model) as ledger:
                    loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                totals.append(ledger.total)
            return totals

        torch.manual_seed(0)
        model = dibit.compress(Deep(6, nn.LayerNorm), replace(recipe("default"), noise=0.2))
        twin = copy.deepcopy(model)
        train(model, 5)
        train(twin, 5)
        state = {key: value.clone() for key, value in dibit.scores(model).state_dict().items()}
        other = dibit.compress(Deep(6, nn.LayerNorm), replace(recipe("default"), noise=0.2))
        other.load_state_dict(model.state_dict())
        dibit.scores(other).load_state_dict(state)
        assert train(other, 20) == train(twin, 20)
        for a, b in zip(other.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)
        own, its = dibit.scores(other).state_dict(), dibit.scores(twin).state_dict()
        assert own.keys() == its.keys()
        assert all(torch.equal(own[key], its[key]) for key in own)

    def test_measuring_changes_no_gradient(self) -> None:
        x, y = self.graph(1500)
        found = []
        for measures in (True, False):
            torch.manual_seed(0)
            model = dibit.compress(Deep(4, nn.BatchNorm1d))
            plan = state_of(model).scores.plan  # type: ignore[union-attr]
            plan.due = 0 if measures else 1000  # the pass from which on it measures again
            F.cross_entropy(model(x), y).backward()
            assert bool(plan._pending) == measures
            found.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [0, -1.0, math.inf, math.nan, "0.5"])
def test_a_bound_is_a_number_above_zero(noise: Any) -> None:
    with pytest.raises(ValueError, match="expected a number above 0, or None"):
        Config(noise=noise)


@pytest.mark.parametrize(("layers", "sampled"), [(3, True), (4, False)])
def test_compiled_code_keeps_all_rows_of_many_norms(layers: int, sampled: bool) -> None:
    model = dibit.compress(Deep(layers, nn.LayerNorm))
    hook: Any = next(iter(model._forward_pre_hooks.values()))
    assert (settings(hook.setting.text, NORM).reduce is not None) == sampled
    for config in ("iexact", replace(recipe("default"), noise=None)):
        hook = next(iter(dibit.compress(model, config)._forward_pre_hooks.values()))
        assert hook.setting == setting_of(recipe(config) if isinstance(config, str) else config)


def test_a_bound_may_be_asked_for() -> None:
    model = dibit.compress(Deep(2, nn.LayerNorm), {"last": None, "*": "small"}, noise=0.1)
    hooks: Any = [next(iter(part._forward_pre_hooks.values())) for part in (model, model.last)]
    assert hooks[0].config == replace(recipe("small"), noise=0.1)
    assert hooks[1].config is None
    with pytest.raises(ValueError, match="no config leaves out rows"):
        dibit.compress(Deep(2, nn.LayerNorm), "iexact", noise=0.1)
    with pytest.raises(ValueError, match="expected a number above 0"):
        dibit.compress(Deep(2, nn.LayerNorm), noise=-1)


class TestWhatIsLearnt:
    def plan(self, **leaves: tuple[float, ...]) -> RowPlan:
        plan = RowPlan(bound=0.5)
        for key, values in leaves.items():
            plan.leaves[key] = Leaf(elements=100, most=6)
            plan.measured(key, values)
        return plan

    def test_what_is_not_coming_back_is_forgotten(self) -> None:
        plan = self.plan(a=(1.0, 1.0, 0.1, 1.0, 1.0, 0.0, 0.0, 0.0), b=(1.0, 1.0, 0.1, 100.0, 1.0, 0.0, 0.0, 0.0))
        plan.ratios = {"b": 2}
        for _ in range(6):
            plan.measured("a", (1.0, 1.0, 0.1, 1.0, 1.0, 0.0, 0.0, 0.0))
            plan.decide()
        assert set(plan.leaves) == {"a"}
        assert "b" not in plan.ratios

    def test_a_leaf_with_all_rows_remembers_what_sampling_cost(self) -> None:
        plan = self.plan(a=(0.1, 1.0, 0.1, 1.0, 1.0, 0.0, 0.0, 0.0))
        plan.decide()
        plan.measured("a", (2.0, 2.0, 0.1, 1.0, 0.0, 0.0, 0.0, 0.0))  # all rows: the noise is at most the terms
        plan.decide()
        assert plan.leaves["a"].noise / plan.leaves["a"].terms == pytest.approx(0.1)

    @pytest.mark.parametrize("seed", range(10))
    def test_it_does_not_depend_on_the_size_of_the_gradient(self, seed: int) -> None:
        rng = random.Random(seed)
        plans = RowPlan(bound=0.5), RowPlan(bound=0.5)
        for _ in range(12):
            size = 10.0 ** rng.uniform(-4, 4)
            found = {key: [rng.uniform(0.1, 1) for _ in range(4)] for key in "abc"}
            for plan, scale in zip(plans, (1.0, size), strict=True):
                for key, (noise, rounding, signal, outgoing) in found.items():
                    plan.leaves.setdefault(key, Leaf(elements=100, most=6))
                    squares = (noise, 1.0, rounding, signal, 1.0, outgoing)
                    taken = [scale * x if i != 4 else x for i, x in enumerate(squares)]
                    plan.measured(key, (*taken, 1.0, 2 * scale))
                plan.measured("norm", (0.1 * scale, scale, 0.1, 1.0))
                plan.decide()
            assert plans[1].predicted() == pytest.approx(plans[0].predicted())
            assert (plans[1].ratios, plans[1].level, plans[1].due) == (plans[0].ratios, plans[0].level, plans[0].due)

    @pytest.mark.parametrize("seed", range(10))
    def test_it_follows_a_gradient_that_shrinks(self, seed: int) -> None:
        """Where S shrinks and the gradient's square shrinks faster, or turns, as in the first epochs of a training."""
        rng = random.Random(seed)
        a_pass, later, turn = rng.uniform(0.92, 1.0), rng.uniform(0.98, 1.02), rng.randrange(10, 60)
        plan, terms, share, measured = RowPlan(bound=1e9), 1.0, 5.0, 0
        plan.leaves["a"] = Leaf(elements=100, most=6)
        for i in range(150):
            terms, share = terms * rng.uniform(0.8, 1.0), share * (a_pass if i < turn else later)
            if plan.measures:
                measured += 1
                plan.measured("a", (0.5 * terms, terms, 0.0, share * terms, 1.0, 0.0, 0.0, 0.0))
            plan.decide()
            if plan.passes > 4:
                assert 1 / 1.8 <= plan.predicted() / (2.5 / share) <= 1.8
        assert measured <= 42

    def test_what_is_at_rest_is_seldom_measured(self) -> None:
        plan, due = RowPlan(bound=0.5), []
        plan.leaves["a"] = Leaf(elements=100, most=6)
        for i in range(300):
            if plan.measures:
                due.append(i)
                plan.measured("a", (1.0, 1.0, 0.0, 20.0 if i < 200 else 9.0, 1.0, 0.0, 0.0, 0.0))
            plan.decide()
        apart = [b - a for a, b in itertools.pairwise(due)]
        assert apart[:5] == [1, 1, 1, 4, 4]
        changed = next(k for k, i in enumerate(due) if i >= 200)
        assert apart[:changed] == sorted(apart[:changed])
        assert apart[changed - 1] == apart[-1] == 16
        assert apart[changed] == 4

    @pytest.mark.parametrize("spread", [0.0, 1.0])
    def test_how_far_noise_lies_where_rows_are_long(self, spread: float) -> None:
        torch.manual_seed(0)
        x, readout = torch.randn(4000, D) * (spread * torch.randn(4000, 1)).exp(), torch.randn(4000, 3)
        model = dibit.compress(
            nn.Sequential(nn.Linear(D, D), nn.Linear(D, 3)), replace(QUIET, bits=8, reduce=Sample(1))
        )
        nn.init.eye_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        (model(x) * readout).sum().backward()
        own = state_of(model)
        assert own is not None
        own.scores.plan.decide()
        (leaf,) = (leaf for key, leaf in own.scores.plan.leaves.items() if key.startswith("1:linear"))
        squares, gradient = x.square().sum(1), readout.square().sum(1)
        terms = float((squares * gradient).sum())
        fourth = float(gradient.sum() * squares.square().sum() / squares.sum())
        assert leaf.terms == pytest.approx(terms, rel=0.02)
        assert leaf.along == pytest.approx(math.sqrt(terms * max(terms, fourth)), rel=0.05)
        assert (leaf.along > 1.5 * leaf.terms) == (spread > 0)

    def test_passes_without_a_step_are_measured_a_few_times(self) -> None:
        x = torch.randn(50, D)
        model = dibit.compress(Deep(2, nn.LayerNorm))
        state = state_of(model)
        assert state is not None
        for _ in range(_MANY + 4):
            model(x).sum().backward()
        assert not state.scores.plan.measures

    def test_the_graph_above_the_model_is_not_walked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.randn(50, D, requires_grad=True)
        for _ in range(100):
            x = x * 1
        nodes = []
        push = heapq.heappush
        monkeypatch.setattr(heapq, "heappush", lambda heap, item: nodes.append(item) or push(heap, item))
        model = dibit.compress(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3)))
        model(x).sum().backward()
        assert 0 < len(nodes) < 30

    @pytest.mark.parametrize("measured", [[1], "convs.0:linear:1", None], ids=str)
    def test_what_norms_add_comes_past_a_function_of_the_users(self, measured: Any) -> None:
        class Own(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.measured = measured
                return x * 2

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> Tensor:
                return dy * 2

        class Net(Deep):
            def forward(self, x: Tensor) -> Tensor:
                h: Tensor = Own.apply(self.layers[0](self.first(x)))
                return self.last(self.norms[0](h))  # type: ignore[no-any-return]

        leaves = walked(Net(1, nn.LayerNorm), 5, rho=0.03)
        assert leaves["layers.0:linear:1"].sampled == pytest.approx(4 * 0.03)

    @pytest.mark.parametrize("p", [0.0, 0.5, 0.8])
    def test_the_rounding_of_a_served_leaf_is_the_error_that_comes(self, p: float) -> None:
        torch.manual_seed(0)
        model = Served("batch", "relu", p)
        x, readout = torch.randn(2000, D), torch.randn(2000, 6)

        def run() -> Tensor:
            model.zero_grad()
            (model(x) * readout).sum().backward()
            assert model.last.weight.grad is not None
            return model.last.weight.grad.clone()

        random = torch.get_rng_state()
        keeps_all_rows(model, replace(QUIET, dropout="mask"))
        own = state_of(model)
        assert own is not None
        drawn = []
        for i in range(12):
            torch.set_rng_state(random)
            own.salt = i
            drawn.append(run())
        own.scores.plan.decide()
        spread = torch.stack(drawn).var(0).sum()
        (leaf,) = [leaf for key, leaf in own.scores.plan.leaves.items() if key.startswith("last")]
        passes = len(drawn)  # added up; half of the terms are the other layer's
        assert leaf.rounding / passes / 2 == pytest.approx(float(spread), rel=0.5)

    @pytest.mark.parametrize("norm", ["batch", "layer"])
    def test_what_is_measured_part_by_part_is_what_is_measured_at_once(self, norm: str) -> None:
        torch.manual_seed(0)
        model = Served(norm, "relu", 0.5)
        length = torch.linspace(-3, 3, 4000)[:, None].exp()  # the parts differ
        x, readout = length * torch.randn(4000, D), torch.randn(4000, 6) / length
        found = []
        for part in (1 << 20, 1 << 12):
            own = keeps_all_rows(copy.deepcopy(model), QUIET)
            torch.manual_seed(1)
            with parts_of(part):
                (own(x) * readout).sum().backward()
            state = state_of(own)
            assert state is not None
            found.append(state.scores.plan._pending)
        assert found[0].keys() == found[1].keys()
        for key, values in found[0].items():
            assert values == pytest.approx(found[1][key], rel=1e-3), key

    @pytest.mark.parametrize(("width", "block"), [(16, 16), (16, 128), (32, 64), (64, 128), (64, 16)])
    @pytest.mark.parametrize("power", [0.0, -1.0, 1.0])
    def test_the_rounding_of_rows_of_uneven_lengths_is_the_error_that_comes(
        self, width: int, block: int, power: float
    ) -> None:
        """Whether long rows have small gradients, or large ones."""
        torch.manual_seed(0)
        length = torch.randn(3000, 1).exp()
        length = length.repeat_interleave(max(1, block // width), 0)[:3000]  # the rows of a block are alike
        x, readout = length * torch.rand(3000, width), length**power * torch.randn(3000, 3)
        config = Config(bits=2, block=block, reduce=Sample(1, by="gradient"), noise=0.5)
        model = dibit.compress(nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3)), {"1": config})
        nn.init.eye_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        own = state_of(model)
        assert own is not None
        drawn = []
        for i in range(30):
            own.salt = i
            model.zero_grad()
            (model(x) * readout).sum().backward()
            assert model[1].weight.grad is not None
            drawn.append(model[1].weight.grad.clone())
        own.scores.plan.decide()
        (leaf,) = own.scores.plan.leaves.values()
        assert leaf.rounding / len(drawn) == pytest.approx(float(torch.stack(drawn).var(0).sum()), rel=0.25)
