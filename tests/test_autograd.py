"""Autograd's hard cases: a compressed model goes on to be a module like any other, whoever calls it and however."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch_geometric import seed_everything
from torch_geometric.nn import GAE, GAT, GCN, VGAE, GCNConv, GraphSAGE
from torch_geometric.utils import dropout_edge, dropout_node, mask_feature

import dibit
from dibit import Config, Sample
from tests.marks import nothing_compressed
from tests.unbiased import bias_of, gradient

N, D, C = 50, 12, 4
SMALL = Config(block=32, reduce=Sample(2), norm=Config(block=32))  # lossy wherever it can be at this size


def graph(n: int = N) -> Tensor:
    return torch.randint(n, (2, 5 * n), generator=torch.Generator().manual_seed(n))


class MLP(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(D, width), nn.BatchNorm1d(width), nn.Linear(width, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.elu(self.norm(self.first(x))))


def assert_unbiased(
    model: nn.Module, run: Callable[[], Tensor], draws: int = 60, config: Config | str = SMALL, exact: bool = False
) -> None:
    """`run` gives a gradient as one vector; the model is compressed between the truth and the draws."""
    torch.manual_seed(0)
    truth = run()
    dibit.compress(model, config)

    def draw(i: int) -> Tensor:
        torch.manual_seed(i)
        return run()

    bias = bias_of(draw, truth, draws)
    assert bias.unbiased, bias
    assert bias.exact == exact


def grads(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class TestShapes:
    @pytest.mark.parametrize("shape", [(0, D), (1, D), (2, 5, D), (3, 1, D), (D,)], ids=str)
    @nothing_compressed
    def test_rows_of_any_number_and_dimension(self, shape: tuple[int, ...]) -> None:
        model = nn.Sequential(nn.Linear(D, 7), nn.ELU(), nn.LayerNorm(7), nn.Linear(7, C))
        x = torch.randn(shape)
        readout = torch.randn(*shape[:-1], C)
        plain = model(x)
        run = lambda: gradient(model, x, readout)  # noqa: E731
        assert_unbiased(model, run, exact=shape[0] == 0)
        assert torch.equal(model(x), plain)

    @pytest.mark.parametrize("recipe", ["default", "exact", "iexact"])
    def test_one_column(self, recipe: str) -> None:
        model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 1))
        x, readout = torch.randn(40, 1), torch.randn(40, 1)
        torch.manual_seed(0)
        truth = gradient(model, x, readout)
        dibit.compress(model, recipe)
        bias = bias_of(lambda i: torch.manual_seed(i) and gradient(model, x, readout), truth, 100)
        assert bias.unbiased, bias

    @pytest.mark.parametrize("how", ["transposed", "strided", "expanded", "sliced"])
    def test_views(self, how: str) -> None:
        x = {
            "transposed": torch.randn(D, N).T,
            "strided": torch.randn(2 * N, 2 * D)[::2, ::2],
            "expanded": torch.randn(1, D).expand(N, D),
            "sliced": torch.randn(N + 7, D + 3)[3 : N + 3, 2 : D + 2],
        }[how]
        model = MLP().train()
        readout = torch.randn(N, C)

        def run() -> Tensor:
            return grads(model, (model(x) * readout).sum())

        if how == "expanded":  # all rows alike: BatchNorm's variance is 0 and its gradient rounding noise
            model.norm = nn.LayerNorm(16)
        assert_unbiased(model, run, config=Config(block=32, reduce=Sample(2), inputs="compress"), exact=False)

    def test_batches_of_changing_size_are_what_they_are_on_their_own(self) -> None:
        torch.manual_seed(0)
        model = dibit.compress(GraphSAGE(D, 16, 2, C, norm="batch_norm").train())
        batches = [(torch.randn(n, D), graph(n)) for n in (80, 1, 33, 80, 2000, 5)]
        batches = [b for b in batches if b[0].shape[0] > 1]  # BatchNorm wants two rows

        def run(i: int) -> Tensor:
            torch.manual_seed(i)
            return grads(model, model(*batches[i]).square().sum())

        run(0)  # shows that the graph is the same still in the backward pass
        alone = [run(i) for i in range(len(batches))]
        for i in reversed(range(len(batches))):
            assert torch.equal(run(i), alone[i])


class TestBackward:
    def test_part_of_the_inputs_and_of_the_outputs(self) -> None:
        """Each gradient may be asked for alone; none changes what the others are."""
        model, x = MLP().train(), torch.randn(N, D, requires_grad=True)
        dibit.compress(model, SMALL)
        wanted = [x, *model.parameters()]
        torch.manual_seed(1)
        out = model(x)
        together = torch.autograd.grad(out[:, 0].sum() + 2 * out[:, 1].sum(), wanted, retain_graph=True)
        for part, whole in zip(wanted, together, strict=True):
            (alone,) = torch.autograd.grad(out[:, 0].sum() + 2 * out[:, 1].sum(), part, retain_graph=True)
            assert torch.allclose(alone, whole, rtol=1e-4, atol=1e-5)
        first = torch.autograd.grad(out[:, 0].sum(), wanted, retain_graph=True)
        second = torch.autograd.grad(out[:, 1].sum(), wanted)
        for a, b, whole in zip(first, second, together, strict=True):
            assert torch.allclose(a + 2 * b, whole, rtol=1e-4, atol=1e-4)

    def test_accumulation_is_the_sum(self) -> None:
        model = dibit.compress(GraphSAGE(D, 16, 2, C).train())
        batches = [(torch.randn(n, D), graph(n)) for n in (30, 50)]
        alone = []
        for i, batch in enumerate(batches):
            torch.manual_seed(i)
            alone.append(grads(model, model(*batch).square().sum()))
        model.zero_grad()
        for i, batch in enumerate(batches):
            torch.manual_seed(i)
            model(*batch).square().sum().backward()
        together = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.allclose(together, sum(alone), rtol=1e-5, atol=1e-5)

    def test_two_passes_before_one_backward(self) -> None:
        """Contrastive losses: two views through one model."""
        model, x, edges = GCN(D, 16, 2, C).train(), torch.randn(N, D), graph()

        def run() -> Tensor:
            a, b = model(x, edges), model(x.flip(0), edges)
            return grads(model, (a * b).sum())

        assert_unbiased(model, run, draws=120)

    def test_hooks_and_retained_gradients_see_the_plain_ones(self) -> None:
        """Elementwise and linear operations hand on the gradient exactly, whatever their weights' estimates are."""
        seen: list[list[Tensor]] = []
        for config in (None, SMALL):
            torch.manual_seed(0)
            model, x = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, C)), torch.randn(N, D)
            x.requires_grad_()
            dibit.compress(model, config)
            hidden: list[Tensor] = []
            model[0].register_forward_hook(lambda m, a, out, hidden=hidden: (out.retain_grad(), hidden.append(out))[0])
            caught: list[Tensor] = []
            out = model(x)
            out.register_hook(caught.append)
            out.square().sum().backward()
            seen.append([hidden[0].grad, caught[0], x.grad])
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))

    def test_no_second_derivative_of_a_penalty(self) -> None:
        model, x = dibit.compress(MLP().train()), torch.randn(N, D, requires_grad=True)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(model(x).sum(), x, create_graph=True)

    def test_a_loss_of_no_gradient(self) -> None:
        model = dibit.compress(MLP().train())
        out = model(torch.randn(N, D))
        (out.detach() * out[:0].sum()).sum().backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


class TestCheckpoint:
    """Under an activation checkpoint nothing is kept in the first place: both together are exact, never wrong."""

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("where", ["outside", "inside"])
    def test_with_torch_checkpoint(self, where: str, reentrant: bool) -> None:
        class Parts(MLP):
            def head(self, x: Tensor) -> Tensor:
                return self.last(F.elu(x))

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.head, self.norm(self.first(x)), use_reentrant=reentrant)

        model: nn.Module = (Parts() if where == "inside" else MLP()).train()
        x, readout = torch.randn(N, D), torch.randn(N, C)

        def run() -> Tensor:
            inner = x.clone().requires_grad_()
            out = checkpoint(model, inner, use_reentrant=reentrant) if where == "outside" else model(inner)
            return grads(model, (out * readout).sum())

        # a reentrant checkpoint runs its backward pass on a second, compressed forward pass of the whole model
        assert_unbiased(model, run, exact=where == "outside" and not reentrant)


class TestModules:
    def test_shared_weights(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.step, self.again = nn.Linear(D, D), nn.Linear(D, D)
                self.again.weight = self.step.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.step(F.elu(self.again(F.elu(self.step(x)))))

        model, x = Tied(), torch.randn(N, D)
        assert_unbiased(model, lambda: gradient(model, x, x.detach()))

    @pytest.mark.parametrize("how", ["inside out", "outside in", "part"])
    def test_nested(self, how: str) -> None:
        model, x, readout = MLP().train(), torch.randn(N, D), torch.randn(N, C)
        whole = nn.Sequential(nn.Linear(D, D), nn.ELU(), model)
        truth = gradient(whole, x, readout)
        if how != "outside in":
            dibit.compress(model, "iexact")
        if how != "part":
            dibit.compress(whole, SMALL)
        if how == "outside in":
            dibit.compress(model, "iexact")
        bias = bias_of(lambda i: torch.manual_seed(i) and gradient(whole, x, readout), truth, 80)
        assert bias.unbiased, bias
        assert not bias.exact
        with dibit.track(model if how == "part" else whole) as saved:
            whole(x)
        assert saved.total < saved.plain

    @pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
    @pytest.mark.slow
    def test_parametrised_weights(self, kind: str) -> None:
        model = MLP().train()
        getattr(parametrizations, kind)(model.last)
        if kind == "spectral_norm":
            model.last.parametrizations.weight.eval()  # its power iteration changes the weight at each call
        x, readout = torch.randn(N, D), torch.randn(N, C)
        plain = model(x)
        assert_unbiased(model, lambda: gradient(model, x, readout), draws=400)
        assert torch.equal(model(x), plain)

    def test_functional_call(self) -> None:
        model, x, readout = MLP().train(), torch.randn(N, D), torch.randn(N, C)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        values = {name: (p.detach() + 0.1).requires_grad_() for name, p in model.named_parameters()}

        def run() -> Tensor:
            out = torch.func.functional_call(model, (values, buffers), (x,))
            return torch.cat([g.flatten() for g in torch.autograd.grad((out * readout).sum(), list(values.values()))])

        assert_unbiased(model, run)
        with dibit.track(model) as saved:
            run()
        assert saved.total < saved.plain

    def test_transforms_of_torch_func_are_exact(self) -> None:
        model, x = nn.Sequential(nn.Linear(D, 16), nn.ELU(), nn.LayerNorm(16), nn.Linear(16, C)), torch.randn(N, D)
        values = dict(model.named_parameters())

        def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, values, (x,)).square().sum()

        transforms = {
            "grad": torch.func.grad(loss),
            "per row": torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0)),
            "second": torch.func.grad(lambda v, x: sum(g.sum() for g in torch.func.grad(loss)(v, x).values())),
        }
        truth = {name: f(values, x) for name, f in transforms.items()}
        dibit.compress(model, SMALL)
        for name, f in transforms.items():
            got = f(values, x)
            assert all(torch.equal(truth[name][key], got[key]) for key in got)

    def test_lazy_weights_begin_at_the_first_call(self) -> None:
        model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(C)).train()
        dibit.compress(model, SMALL)
        x = torch.randn(N, D)
        model(x).sum().backward()
        with dibit.track(model) as saved:
            model(x)
        assert saved.total < saved.plain

    def test_frozen_layers_keep_no_input(self) -> None:
        """A frozen weight needs no input: only what is before and behind it."""
        model = nn.Sequential(nn.Linear(D, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, C))
        model[2].requires_grad_(False)
        x, readout = torch.randn(500, D), torch.randn(500, C)
        dibit.compress(model, Config(reduce=Sample(2)))
        with dibit.track(model) as saved:
            model(x)
        assert not [row for row in saved.rows if row.module == "2" and row.kept]
        dibit.decompress(model)
        assert_unbiased(model, lambda: grads(model, (model(x) * readout).sum()))


class TestDraws:
    """Models that draw random numbers themselves: the very numbers of the plain model."""

    def edges(self, model: nn.Module) -> Tensor:
        x, edges = torch.randn(N, D, generator=torch.Generator().manual_seed(4)), graph()

        class Dropping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> Tensor:
                kept, _ = dropout_edge(edges, 0.4)
                kept, _, _ = dropout_node(kept, 0.1, num_nodes=N)
                hidden, _ = mask_feature(x, 0.2)
                return self.model(hidden + 0.1 * torch.randn_like(hidden), kept)

        torch.manual_seed(5)
        return Dropping().train()()

    @pytest.mark.parametrize("recipe", ["default", "exact", "iexact"])
    def test_edge_dropping_and_noise(self, recipe: str) -> None:
        torch.manual_seed(0)
        model = GAT(D, 8, 2, C, heads=2).train()  # without dropout of its own, default draws what the model draws
        plain = self.edges(model)
        dibit.compress(model, recipe)
        assert torch.equal(self.edges(model), plain)

    @pytest.mark.parametrize("recipe", ["default", "exact", "iexact"])
    def test_variational_autoencoder(self, recipe: str) -> None:
        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.hidden, self.mu, self.logstd = GCNConv(D, 16), GCNConv(16, 4), GCNConv(16, 4)

            def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
                h = self.hidden(x, edges).relu()
                return self.mu(h, edges), self.logstd(h, edges)

        torch.manual_seed(0)
        model, x, edges = VGAE(Encoder()).train(), torch.randn(N, D), graph()

        def losses() -> list[float]:
            found = []
            seed_everything(3)  # negative edges come of Python's generator
            for _ in range(3):
                torch.manual_seed(
                    len(found)
                )  # the decoder's pass draws nothing, and so its backward pass draws one number
                z = model.encode(x, edges)
                loss = model.recon_loss(z, edges) + model.kl_loss() / N
                found.append(loss.item())
                loss.backward()
            return found

        plain = losses()
        dibit.compress(model, recipe)
        assert losses() == plain

    def test_autoencoder_trains(self) -> None:
        """`encode` and `recon_loss` are called outside forward: the first is compressed, the second is as it was."""
        torch.manual_seed(0)
        model, x, edges = GAE(GCN(D, 16, 2, 8)).train(), torch.randn(N, D), graph()

        def run() -> Tensor:
            torch.manual_seed(1)  # of the negative samples
            z = model.encode(x, edges)
            negative = torch.randint(N, (2, 99), generator=torch.Generator().manual_seed(1))
            return grads(model, model.recon_loss(z, edges, negative))

        truth = run()
        dibit.compress(model, SMALL)

        def draw(i: int) -> Tensor:
            torch.manual_seed(i)
            z = model.encode(x, edges)
            negative = torch.randint(N, (2, 99), generator=torch.Generator().manual_seed(1))
            return grads(model, model.recon_loss(z, edges, negative))

        bias = bias_of(draw, truth, 80)
        assert bias.unbiased, bias


class TestThreads:
    def test_two_models_in_two_threads(self) -> None:
        """A pass knows only its own thread's model; each gradient is what it is alone."""
        models = [GraphSAGE(D, 16, 2, C).train() for _ in range(2)]
        for model, recipe in zip(models, ("default", "iexact"), strict=True):
            dibit.compress(model, recipe)
        x, edges = torch.randn(300, D), graph(300)
        for model in models:  # shows that the graph is the same still in the backward pass
            model(x, edges).sum().backward()
        kept: dict[int, set[int]] = {0: set(), 1: set()}
        errors: list[BaseException] = []
        barrier = threading.Barrier(2)

        def work(i: int) -> None:
            try:
                for _ in range(20):
                    barrier.wait(30)
                    with dibit.track(models[i]) as saved:
                        models[i](x, edges).square().sum().backward()
                    kept[i].add(saved.total)
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for i in range(2):
            with dibit.track(models[i]) as saved:
                models[i](x, edges)
            assert kept[i] == {saved.total}

    def test_one_model_in_two_threads(self) -> None:
        """Hogwild: passes of one model at once, each with its own tape and residuals."""
        model, x, edges = GraphSAGE(D, 16, 2, C).train(), torch.randn(300, D), graph(300)
        truth = grads(model, (model(x, edges) * 1.0).sum())
        dibit.compress(model, SMALL)
        found: list[Tensor] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(25):
                    parts = torch.autograd.grad((model(x, edges) * 1.0).sum(), list(model.parameters()))
                    found.append(torch.cat([g.flatten() for g in parts]))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        bias = bias_of(lambda i: found[i], truth, len(found))
        assert bias.unbiased, bias
