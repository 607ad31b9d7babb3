"""Random numbers: beside other threads, after a restored generator, and in forward passes that are run twice."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as g
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dibit
from dibit.codec import seed_stream
from dibit.codec.seed_stream import Key, dropout_seed
from dibit.nn import NormReLUDropout
from dibit.recipes import RECIPES
from tests.hooks.test_dropout_masks import Reversible
from tests.marks import nothing_compressed
from tests.watched import watched

pytestmark = nothing_compressed

N, D = 40, 16
CPU = torch.device("cpu")


def in_threads(count: int, work: Callable[[list[Any]], None]) -> list[Any]:
    found: list[list[Any]] = [[] for _ in range(count)]
    threads = [threading.Thread(target=work, args=(own,)) for own in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [value for own in found for value in own]


class TestThreads:
    @pytest.mark.parametrize("draws", [lambda: Key().value, lambda: int(dropout_seed(CPU))], ids=["key", "dropout"])
    def test_no_two_threads_draw_the_same(self, draws: Callable[[], int]) -> None:
        found = in_threads(4, lambda own: own.extend(draws() for _ in range(2500)))
        assert len(set(found)) == 10_000

    def test_no_two_threads_draw_the_same_with_backward_passes_between(self) -> None:
        def work(own: list[int]) -> None:
            for i in range(1500):
                key = Key()
                own.append(key.value)
                if i % 3:
                    key.used()

        assert len(set(in_threads(3, work))) == 4500

    @pytest.mark.parametrize("recipe", ["default", "iexact"])
    def test_a_plain_thread_never_repeats_its_numbers(self, recipe: str) -> None:
        stop = threading.Event()

        def train() -> None:
            net = dibit.compress(nn.Sequential(nn.Linear(D, D), nn.Dropout(), nn.Linear(D, D)), recipe)
            while not stop.is_set():
                net(torch.ones(N, D)).sum().backward()

        threads = [threading.Thread(target=train) for _ in range(2)]
        for thread in threads:
            thread.start()
        seen = [tuple(torch.rand(4).tolist()) for _ in range(20_000)]
        stop.set()
        for thread in threads:
            thread.join()
        assert len(set(seen)) == len(seen)


def net(dropout: float) -> nn.Module:
    torch.manual_seed(11)
    layers = [nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout(dropout), nn.Linear(D, D)]
    return nn.Sequential(*layers).train()


class Twice(nn.Module):
    """Runs its inside once more within the backward pass."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x.requires_grad_(), use_reentrant=True)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(p, q) for s, t in zip(a, b, strict=True) for p, q in zip(s, t, strict=True))


class TestSeeds:
    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize(
        ("dropout", "recipe"), [(0.5, "default"), (0.5, "iexact"), (0.0, "default"), (0.0, "small")]
    )
    def test_the_same_seed_is_the_same_run(self, dropout: float, recipe: str, steps: int) -> None:
        model, x = dibit.compress(net(dropout), recipe), torch.randn(N, D)
        runs = []
        for _ in range(3):
            torch.manual_seed(5)
            runs.append([step(model, x) for _ in range(steps)])
        assert same(runs[0], runs[1])
        assert same(runs[0], runs[2])
        assert steps == 1 or not torch.equal(runs[0][0][0], runs[0][1][0]), "each step draws anew"

    @pytest.mark.parametrize(
        "layer",
        [
            nn.BatchNorm1d(D),
            nn.LayerNorm(D),
            nn.LayerNorm(D, elementwise_affine=False),
            g.GraphNorm(D),
            g.LayerNorm(D),
            g.InstanceNorm(D, affine=True),
            g.PairNorm(),
            nn.GroupNorm(2, D),
            nn.RMSNorm(D),
            nn.GELU(),
            nn.Sigmoid(),
            nn.Softmax(-1),
            nn.PReLU(),
            nn.Linear(D, D),
        ],
        ids=lambda layer: f"{type(layer).__module__.split('.')[0]}-{type(layer).__name__}",
    )
    @pytest.mark.parametrize("recipe", ["default", "iexact"])
    def test_so_it_is_whatever_the_one_lossy_residual_is(self, layer: nn.Module, recipe: str) -> None:
        x, w = torch.randn(3 * N, D), torch.randn(3 * N, D)
        model = dibit.compress(nn.Sequential(copy.deepcopy(layer)), recipe)
        runs = []
        seed_stream.forget()
        for _ in range(3):
            torch.manual_seed(5)
            grads = []
            for _ in range(2):
                model.zero_grad()
                own = x.clone().requires_grad_()
                (model(own) * w).sum().backward()
                grads.append([p.grad for p in (own, *model.parameters()) if p.grad is not None])
                if recipe == "iexact":
                    torch.rand(1)  # as dropout does; this recipe leaves the generator alone
            runs.append(grads)
        assert same(runs[0], runs[1])
        assert same(runs[0], runs[2])

    @pytest.mark.parametrize(("dropout", "recipe"), [(0.5, "default"), (0.5, "iexact"), (0.0, "default")])
    def test_the_generators_state_is_enough_to_go_on(self, dropout: float, recipe: str) -> None:
        """In another process, too: nothing else of this one is asked."""
        model, x = dibit.compress(net(dropout), recipe), torch.randn(N, D)
        step(model, x)
        state = torch.get_rng_state()
        first = [step(model, x) for _ in range(2)]
        torch.set_rng_state(state)
        seed_stream.forget()
        assert same(first, [step(model, x) for _ in range(2)])

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_under_mask_the_generator_is_the_plain_models(self, dropout: float) -> None:
        states = []
        for recipe in (None, "exact", "iexact"):
            model, x = net(dropout), torch.randn(N, D)
            if recipe:
                dibit.compress(model, recipe)
            torch.manual_seed(5)
            for _ in range(3):
                step(model, x)
            states.append(torch.get_rng_state())
        assert torch.equal(states[0], states[1])
        assert torch.equal(states[0], states[2])

    def test_a_seeded_dropout_takes_one_number(self) -> None:
        model = dibit.compress(nn.Sequential(nn.Linear(D, D), nn.Dropout(), nn.Dropout()))
        torch.manual_seed(5)
        model(torch.randn(N, D, generator=torch.Generator().manual_seed(0)))
        after = torch.rand(3)
        torch.manual_seed(5)
        seed_stream.draw(), seed_stream.draw()
        assert torch.equal(after, torch.rand(3))

    @pytest.mark.parametrize("again", [False, True], ids=["once", "run again by the backward pass"])
    @pytest.mark.parametrize("anew", [False, True], ids=["in this process", "in a new process"])
    @pytest.mark.parametrize("before", [0, 1, 5])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.slow
    def test_what_the_scores_hold_is_enough_to_go_on(
        self, recipe: str, dropout: float, before: int, anew: bool, again: bool
    ) -> None:
        """Two models that count together, where nothing is drawn between their passes."""

        def made() -> list[nn.Module]:
            return [dibit.compress(Twice(net(dropout)) if again else net(dropout), recipe) for _ in range(2)]

        def steps(models: list[nn.Module], count: int) -> list[list[Tensor]]:
            return [step(model, x) for _ in range(count) for model in (models[0], models[1], models[0])]

        models, x = made(), torch.randn(N, D)
        torch.manual_seed(5)
        steps(models, before)
        saved = [{k: v.clone() for k, v in dibit.scores(model).state_dict().items()} for model in models]
        weights, state = [copy.deepcopy(model.state_dict()) for model in models], torch.get_rng_state()
        first = steps(models, 3)
        models = made()
        if anew:
            seed_stream.forget()
        torch.set_rng_state(state)
        for model, scores, own in zip(models, saved, weights, strict=True):
            model.load_state_dict(own)
            dibit.scores(model).load_state_dict(scores)
        assert same(first, steps(models, 3))

    def test_what_another_thread_draws_while_a_checkpoint_is_read_is_its_own(self) -> None:
        torch.manual_seed(5)
        keys = [Key(moves=False).value for _ in range(6)]
        torch.manual_seed(5)
        seed_stream.forget()
        Key(moves=False), Key(moves=False), Key(moves=False)
        found, state = seed_stream.given(), torch.get_rng_state()
        seed_stream.forget()
        seed_stream.go_on(**found)
        torch.rand(1), Key(moves=False)  # a state of its own
        torch.set_rng_state(state)
        assert [Key(moves=False).value for _ in range(3)] == keys[3:]

    def test_checkpoints_that_are_read_without_end_are_forgotten(self) -> None:
        for i in range(1000):
            seed_stream.go_on(i, 1, 1)
        assert len(seed_stream._loaded) <= seed_stream._MOST

    def test_passes_between_which_nothing_is_drawn_differ(self) -> None:
        model, x = dibit.compress(net(0.0), "iexact"), torch.randn(N, D)
        assert len({tuple(step(model, x)[0].flatten().tolist()) for _ in range(20)}) == 20


class Block(nn.Module):
    """Identity weights, so that a mask can be read off the output and off the gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.lin, self.kind = nn.Linear(D, D), kind
        self.drop = NormReLUDropout(D, 0.5) if kind == "fused" else nn.Dropout(0.5, inplace=kind == "in place")
        nn.init.eye_(self.lin.weight)
        nn.init.zeros_(self.lin.bias)

    def forward(self, h: Tensor) -> Tensor:
        h = self.lin(h)
        if self.kind == "function":
            return F.dropout(h, 0.5, self.training)
        if self.kind == "after the models own draws":
            h = h * (torch.rand(h.shape[0], 1) < 0.7)
        return self.drop(h)


def _reentrant(f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return checkpoint(f, h, use_reentrant=True)


def _not_reentrant(f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return checkpoint(f, h, use_reentrant=False)


def _reversible(f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return Reversible.apply(h, f, False)


AGAIN = {"reentrant": _reentrant, "not reentrant": _not_reentrant, "reversible": _reversible}
KINDS = ["module", "in place", "function", "after the models own draws", "fused"]


class Net(nn.Module):
    def __init__(self, again: Callable[..., Tensor], kind: str, lonely: bool) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(D, D), Block(kind), Block(kind)
        self.again, self.lonely = again, lonely

    def part(self, h: Tensor) -> Tensor:
        h = self.two(self.one(h))
        return F.dropout(h, 0.5) if self.lonely else h

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.first(x)
        self.h.retain_grad()
        return self.again(self.part, self.h)


def differing(out: Tensor, h: Tensor) -> int:
    assert h.grad is not None
    return int(((out.detach() != 0) != (h.grad != 0)).sum())


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("again", AGAIN)
class TestRunAgain:
    @pytest.mark.parametrize("lonely", [False, True], ids=["modules", "and a function"])
    @pytest.mark.parametrize("kind", KINDS[:-1])
    def test_within_a_compressed_model(self, again: str, recipe: str | None, kind: str, lonely: bool) -> None:
        torch.manual_seed(0)
        model = Net(AGAIN[again], kind, lonely).train()
        if recipe:
            dibit.compress(model, recipe)
        for _ in range(2):
            out = model(torch.randn(300, D))
            out.sum().backward()
            assert differing(out, model.h) == 0

    @pytest.mark.parametrize("kind", KINDS[:-1])
    def test_around_a_compressed_model(self, again: str, recipe: str | None, kind: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(Block(kind), Block(kind)).train()
        if recipe:
            dibit.compress(model, recipe)
        h = torch.randn(300, D, requires_grad=True)
        out = AGAIN[again](model, h)
        out.sum().backward()
        assert differing(out, h) == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_draws_the_same_masks(recipe: str, kind: str, first: Any) -> None:
    torch.manual_seed(0)
    model = dibit.compress(nn.Sequential(Block(kind), Block(kind)), recipe).train()
    x = torch.randn(300, D)
    torch.manual_seed(3)
    with first():
        a = copy.deepcopy(model)(x)
    after = torch.rand(3)
    torch.manual_seed(3)
    with torch.autograd.graph.save_on_cpu():
        b = copy.deepcopy(model)(x)
    torch.manual_seed(3)
    c = model(x)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(a == 0, c == 0)
    assert torch.equal(b.detach() == 0, c.detach() == 0)
    if kind != "fused":
        assert torch.equal(a, c)
        assert torch.equal(b, c)


def test_recomputed_passes_of_one_backward_pass_have_keys_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Sigmoid(), nn.Linear(D, D)).train()
    tied = model[1]

    def forward(x: Tensor) -> Tensor:
        h = model(x)
        for _ in range(3):
            h = checkpoint(nn.Sequential.forward, model, h, use_reentrant=True)
            h = checkpoint(tied, checkpoint(tied, h, use_reentrant=True), use_reentrant=True)
        return h

    dibit.compress(model, "iexact")
    with watched(Key.__init__, note=lambda local: local["self"].value, after=True) as found:
        for _ in range(2):
            forward(torch.randn(N, D)).sum().backward()
    assert len(found) > 12
    assert len(set(found)) == len(found)
