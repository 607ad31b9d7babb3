"""Every operation with a rule: the forward pass bit for bit, the gradient unbiased or exact, fewer bytes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from dibit import Config, Project, Sample
from dibit.nn import norm_relu_dropout
from dibit.rules import RULES
from dibit.rules.elementwise import POINTWISE
from tests.rules.domains import DOMAIN, MORE, into_domain
from tests.unbiased import bias_of, gradient

N, D = 64, 16


class Net(nn.Module):
    """Linear, the operation, linear: what the operation keeps enters the gradient of what comes before."""

    def __init__(self, operation: Callable[[Tensor, "Net"], Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.operation = operation
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 8)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self.first(x), self)
        return self.last(y) if y.dim() and y.shape[-1] == D else y


def functional(f: Callable[[Tensor], Tensor]) -> Callable[[], Net]:
    return lambda: Net(lambda x, _: f(x))


def module(make: Callable[[], nn.Module]) -> Callable[[], Net]:
    return lambda: Net(lambda x, net: net.parts[0](x), make())


WEIGHT = torch.linspace(-1, 1, D * D).view(D, D)
TARGET = torch.arange(N) % D


def with_weight(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Net]:
    def make() -> Net:
        net = Net(lambda x, net: f(x, net.weight))
        net.weight = nn.Parameter(WEIGHT.clone())
        return net

    return make


# name -> (network, whether its gradients by what comes before are exact under the default recipe's masks)
EXACT = {
    "F.relu": functional(F.relu),
    "F.relu inplace": functional(lambda x: F.relu(x, inplace=True)),
    "torch.relu": functional(torch.relu),
    "Tensor.relu": functional(lambda x: x.relu()),
    "Tensor.relu_": functional(lambda x: x.relu_()),
    "torch.relu_": functional(torch.relu_),
    "F.relu_": functional(F.relu_),
    "nn.ReLU": module(nn.ReLU),
    "nn.ReLU inplace": module(lambda: nn.ReLU(inplace=True)),
    "F.leaky_relu": functional(lambda x: F.leaky_relu(x, 0.2)),
    "F.leaky_relu_": functional(lambda x: F.leaky_relu_(x, 0.2)),
    "nn.LeakyReLU inplace": module(lambda: nn.LeakyReLU(0.3, inplace=True)),
    "returned log_softmax": functional(lambda x: F.log_softmax(x[:, :5], 1)),
    "F.nll_loss": functional(lambda x: F.nll_loss(x, TARGET)),
    "F.nll_loss ignore": functional(lambda x: F.nll_loss(x, TARGET - (TARGET == 3).long() * 103, reduction="sum")),
}
LOSSY = {
    "nn.PReLU": module(nn.PReLU),
    "nn.PReLU by column": module(lambda: nn.PReLU(D)),
    "nn.GELU": module(nn.GELU),
    "F.gelu tanh": functional(lambda x: F.gelu(x, approximate="tanh")),
    "nn.SiLU": module(nn.SiLU),
    "nn.SiLU inplace": module(lambda: nn.SiLU(inplace=True)),
    "nn.Sigmoid": module(nn.Sigmoid),
    "nn.ELU": module(lambda: nn.ELU(0.7)),
    "nn.ELU inplace": module(lambda: nn.ELU(inplace=True)),
    "nn.BatchNorm1d": module(lambda: nn.BatchNorm1d(D)),
    "nn.BatchNorm1d 3-d": lambda: Net(lambda x, net: net.parts[0](x.view(8, 8, D)), nn.BatchNorm1d(8)),
    "nn.BatchNorm1d without affine": module(lambda: nn.BatchNorm1d(D, affine=False)),
    "nn.BatchNorm1d eval": module(lambda: nn.BatchNorm1d(D).eval()),
    "nn.InstanceNorm1d of columns": lambda: Net(
        lambda x, net: net.parts[0](x.t().unsqueeze(0))[0].t(), nn.InstanceNorm1d(D, track_running_stats=True)
    ),
    "nn.InstanceNorm1d eval": lambda: Net(
        lambda x, net: net.parts[0](x.t().unsqueeze(0))[0].t(),
        nn.InstanceNorm1d(D, affine=True, track_running_stats=True).eval(),
    ),
    "nn.LayerNorm": module(lambda: nn.LayerNorm(D)),
    "nn.LayerNorm without affine": module(lambda: nn.LayerNorm(D, elementwise_affine=False)),
    "nn.LayerNorm 2 dimensions": lambda: Net(lambda x, net: net.parts[0](x.view(-1, 4, D)), nn.LayerNorm((4, D))),
    "F.layer_norm bias alone": with_weight(
        lambda x, w: F.layer_norm(x.view(-1, 16, D), (16, D), None, w[:16]).reshape(N, D)
    ),
    "F.linear": with_weight(lambda x, w: F.linear(x, w)),
    "F.linear 3-d": with_weight(lambda x, w: F.linear(x.view(8, 8, D), w).view(N, D)),
    "torch.matmul": with_weight(torch.matmul),
    "Tensor.matmul": with_weight(lambda x, w: x.matmul(w)),
    "@": with_weight(lambda x, w: x @ w),
    "__rmatmul__": with_weight(lambda x, w: w.__rmatmul__(x)),
    "torch.mm": with_weight(torch.mm),
    "Tensor.mm": with_weight(lambda x, w: x.mm(w)),
    "torch.addmm": with_weight(lambda x, w: torch.addmm(x, x, w, beta=0.3, alpha=0.7)),
    "Tensor.addmm": with_weight(lambda x, w: x.addmm(x, w, beta=2)),
    "weight made of the input": functional(lambda x: x @ (x.T @ x / N)),
    "log_softmax inside": functional(lambda x: F.log_softmax(x, 1) * 2),
    "torch.log_softmax inside": functional(lambda x: torch.log_softmax(x, 1) * 2),
    "F.cross_entropy": functional(lambda x: F.cross_entropy(x, TARGET)),
    "F.cross_entropy weighted": functional(
        lambda x: F.cross_entropy(x, TARGET - (TARGET == 3).long() * 103, weight=torch.arange(1.0, D + 1))
    ),
    "F.cross_entropy none": functional(lambda x: F.cross_entropy(x, TARGET, reduction="none")),
    "F.mse_loss": functional(lambda x: F.mse_loss(x, torch.ones(N, D))),
    "F.mse_loss both": functional(lambda x: F.mse_loss(x, x.flip(0), reduction="none")),
    "F.binary_cross_entropy_with_logits": functional(
        lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).float(), weight=WEIGHT.abs().repeat(4, 1))
    ),
}


def aliases(
    operation: str, *more: object, binary: bool = False, positive: bool = False
) -> dict[str, Callable[[], Net]]:
    """An operation by each of its names, on something that autograd does not keep and where it is defined.

    Args:
        operation: its name.
        more: arguments after the first.
        binary: its second argument is another tensor.
        positive: its argument has to be positive.
    """
    positive = positive or DOMAIN.get(operation) == (0, math.inf)

    def make(function: Callable[..., Tensor]) -> Callable[[], Net]:
        if binary:
            return functional(lambda x: function(x, x.flip(0).sigmoid() + 0.5))
        return functional(lambda x: function(x.sigmoid() + 0.5 if positive else into_domain(operation, x * 1.5), *more))

    owners = {"torch": torch, "Tensor": Tensor, "F": F, "special": torch.special}
    found = {
        f"{owner}.{name}": make(getattr(owners[owner], name))
        for owner in owners
        for name in (operation, f"{operation}_")
        if getattr(owners[owner], name, None) in RULES
    }
    assert found, f"no spelling of {operation} has a rule: is its name right, and the rule there?"
    return found


LOSSY |= {
    **aliases("mul", binary=True),
    **aliases("div", binary=True),
    **aliases("true_divide", binary=True),
    **aliases("multiply", binary=True),
    **aliases("divide", binary=True),
    "torch.linalg.matmul": with_weight(torch.linalg.matmul),
    "torch.special.log_softmax": functional(lambda x: torch.special.log_softmax(x, 1)),
    **{
        name: case
        for operation in (*POINTWISE, "absolute", "expit")
        for name, case in aliases(operation, *MORE.get(operation, ())).items()
    },
    "F.hardswish": functional(lambda x: F.hardswish(4 * x)),
    **aliases("pow", 1.7, positive=True),
    **aliases("__pow__", 3),
    **aliases("__ipow__", 3),
    **aliases("softplus", 2.0),
    "square of one tensor": functional(lambda x: x * x),
    "product with a parameter": with_weight(lambda x, w: x * w[0]),
    "product broadcast": functional(lambda x: x * x.sum(1, keepdim=True)),
    "product of gathers": functional(
        lambda x: (x[TARGET * 3 + 1] * x.index_select(0, (TARGET * 2).flip(0)))[:, None].expand(N, 2, D).sum(1)
    ),
    "torch.bmm": functional(lambda x: torch.bmm(x.view(4, 16, D), x.view(4, 16, D).mT).reshape(N, 16)),
    "Tensor.bmm": functional(lambda x: x.view(4, 16, D).bmm(x.flip(0).view(4, D, 16)).reshape(N, 16)),
    "matmul of two activations": functional(lambda x: (x.view(4, 16, D) @ x.view(4, 16, D).mT).reshape(N, 16)),
}
ALL = EXACT | LOSSY
SETTINGS: dict[str, Config | str] = {
    "stochastic": Config(bits=2, block=32, inputs="compress"),
    "dither": Config(bits=2, block=32, rounding="dither", inputs="compress"),
    "normal": Config(bits=2, block=64, levels="normal", inputs="compress"),
    "project": Config(bits=2, block=32, reduce=Project(4), norm=Config(block=32, reduce=Project(4))),
    "sample": Config(bits=2, block=32, reduce=Sample(4), norm=Config(block=32, reduce=Sample(4))),
    "exact": "exact",
    "iexact": "iexact",
    "default": "default",
}


def build(make: Callable[[], Net]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return make().train(), torch.randn(N, D)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("setting", SETTINGS)
def test_forward_is_the_plain_models(name: str, setting: str) -> None:
    net, x = build(ALL[name])
    torch.manual_seed(1)
    plain = net(x)
    assert plain.isfinite().all(), "add the function to DOMAIN of tests/rules/domains.py"
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    net, x = build(ALL[name])
    dibit.compress(net, SETTINGS[setting])
    torch.manual_seed(1)
    assert torch.equal(net(x), plain)
    for key, value in net.named_buffers():
        assert torch.equal(value, buffers[key])


# the recipes are these settings under other names; their own tests follow models
@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("setting", [s for s in SETTINGS if not isinstance(SETTINGS[s], str)])
@pytest.mark.statistics
def test_gradient_is_unbiased(name: str, setting: str) -> None:
    net, x = build(LOSSY[name])
    readout = torch.randn(net(x).shape)
    truth = gradient(net, x, readout)
    dibit.compress(net, SETTINGS[setting])

    def draw(i: int) -> Tensor:
        torch.manual_seed(i)
        return gradient(net, x, readout)

    bias = bias_of(draw, truth, 100)
    assert bias.unbiased, bias


@pytest.mark.parametrize("name", EXACT)
def test_masks_give_the_exact_gradient(name: str) -> None:
    net, x = build(EXACT[name])
    net.last.requires_grad_(False)  # its weight's gradient is a linear layer's, and not exact
    net.first.weight.requires_grad_(False)
    readout = torch.randn(net(x).shape)
    truth = gradient(net, x, readout)
    dibit.compress(net, Config(bits=1, block=8))
    assert torch.equal(gradient(net, x, readout), truth) or torch.allclose(
        gradient(net, x, readout), truth, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", ALL)
def test_ledger_and_no_more_bytes_than_plain(name: str) -> None:
    net, x = build(ALL[name])
    with dibit.track(net) as plain:
        net(x)
    dibit.compress(net, "default")
    with dibit.track(net) as saved:
        net(x)
    assert plain.total == plain.plain == saved.plain, "what the rule books by forward.plain is not what torch keeps"
    assert saved.total <= plain.total + 3 * 8, f"{saved}"  # a seed, where plain torch keeps nothing
    if plain.total:
        assert saved.total < plain.total
    assert "exact" not in {row.how for row in saved.rows if row.kept > N * 4 and row.operation != "matmul"}


def test_every_rule_is_exercised() -> None:
    called = set()
    rules = {f: (lambda forward, *a, f=f, r=r, **k: (called.add(f), r(forward, *a, **k))[1]) for f, r in RULES.items()}
    for make in ALL.values():
        net, x = build(make)
        dibit.compress(net, rules=rules)(x)
    elsewhere = {
        F.sigmoid,  # where no compiler looks, F.sigmoid(x) is x.sigmoid()
        F.tanh,
        torch.add,
        # torch shows these to a mode as Tensor.add, mul, div and matmul
        *(getattr(Tensor, f"__{name}__") for name in ("add", "radd", "mul", "rmul", "truediv", "div", "matmul")),
        torch.sparse.mm,
        Tensor.scatter_reduce_,
        F.dropout,
        torch.dropout,
        torch.dropout_,
        norm_relu_dropout,
    }
    # torch.nn's own functions call these where no mode is active
    inner = {
        torch.prelu,
        Tensor.prelu,
        torch.batch_norm,
        torch.instance_norm,
        torch.layer_norm,
        Tensor.log_softmax,
        torch.binary_cross_entropy_with_logits,
    }
    assert set(RULES) - called - elsewhere - inner == set()


@pytest.mark.parametrize(
    ("f", "twin"),
    [
        (lambda x: torch.prelu(x, torch.full((1,), 0.2)), lambda x: F.prelu(x, torch.full((1,), 0.2))),
        (lambda x: x.prelu(torch.full((1,), 0.2)), lambda x: F.prelu(x, torch.full((1,), 0.2))),
        (
            lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
            lambda x: F.batch_norm(x, None, None, training=True),
        ),
        (
            lambda x: torch.instance_norm(x.t()[None], None, None, None, None, True, 0.1, 1e-5, False)[0].t(),
            lambda x: F.instance_norm(x.t()[None])[0].t(),
        ),
        (lambda x: torch.layer_norm(x, (D,)), lambda x: F.layer_norm(x, (D,))),
        (lambda x: x.log_softmax(1) * 1, lambda x: F.log_softmax(x, 1) * 1),
        (
            lambda x: torch.binary_cross_entropy_with_logits(x, WEIGHT[:, 0].abs().repeat(4)[:, None].expand(N, D)),
            lambda x: F.binary_cross_entropy_with_logits(x, WEIGHT[:, 0].abs().repeat(4)[:, None].expand(N, D)),
        ),
    ],
    ids=[
        "torch.prelu",
        "Tensor.prelu",
        "torch.batch_norm",
        "torch.instance_norm",
        "torch.layer_norm",
        "Tensor.log_softmax",
        "torch.binary_cross_entropy_with_logits",
    ],
)
def test_the_other_spelling_is_the_same(f: Callable[[Tensor], Tensor], twin: Callable[[Tensor], Tensor]) -> None:
    grads = []
    for operation in (f, twin):
        net, x = build(functional(operation))
        dibit.compress(net, Config(bits=2, block=32))
        torch.manual_seed(3)
        grads.append(gradient(net, x, torch.ones(net(x).shape)))
        with dibit.track(net) as saved:
            net(x)
        assert "exact" not in {row.how for row in saved.rows}
    assert torch.equal(*grads)


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("spelling", ["F", "torch"])
    def test_reseeded_mask_is_the_forwards(self, p: float, inplace: bool, spelling: str) -> None:
        def operation(x: Tensor) -> Tensor:
            if spelling == "F":
                return F.dropout(x * 1, p, True, inplace)
            return torch.dropout_(x * 1, p, True) if inplace else torch.dropout(x * 1, p, True)

        x = torch.randn(100, 7).requires_grad_()
        net = dibit.compress(_Wrap(operation), Config())
        y = net(x)
        y.backward(torch.ones_like(y))
        scale = float(torch.ones(()).div_(1 - p))
        kept = y != 0
        assert torch.equal(y.detach(), torch.where(kept, x.detach() * scale, 0.0))
        assert torch.equal(x.grad, torch.where(kept, scale, 0.0))
        assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
        assert not torch.equal(net(x) != 0, kept), "each pass draws anew"

    @pytest.mark.parametrize("inplace", [False, True])
    def test_kept_mask_is_torchs_own_draw_for_draw(self, inplace: bool) -> None:
        def run(config: Config | None) -> tuple[Tensor, Tensor, Tensor]:
            x = torch.linspace(-1, 1, 700).view(100, 7).requires_grad_()
            net = dibit.compress(_Wrap(lambda x: F.dropout(x * 1, 0.3, True, inplace)), config)
            torch.manual_seed(5)
            y = net(x)
            y.square().sum().backward()
            return y.detach(), x.grad, torch.rand(3)

        for a, b in zip(run(None), run(Config(dropout="mask")), strict=True):
            assert torch.equal(a, b)

    def test_dropout_of_features_keeps_nothing_but_a_seed(self) -> None:
        """Where the plain gradient rests on the features besides, as in a layer that reads them as they are."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.drop, self.last, self.root = nn.Dropout(0.5), nn.Linear(64, 4), nn.Linear(64, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.drop(x)) + self.root(x)

        x = torch.randn(500, 64)
        net = dibit.compress(Net())
        for _ in range(2):  # the first pass learns of it
            with dibit.track(net) as saved:
                y = net(x)
            y.sum().backward()
        assert saved.total == 8
        assert saved.plain == x.nbytes
        seen = {}
        net.drop.register_forward_hook(lambda m, a, out: seen.setdefault("x", out))
        torch.manual_seed(0)
        net.zero_grad()
        net(x).sum().backward()
        assert torch.allclose(net.last.weight.grad, seen["x"].sum(0).expand(4, 64), rtol=1e-4, atol=1e-4)


class _Wrap(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


class TestNothingThatIsNotNeeded:
    """Invariant 4."""

    def saved(self, net: nn.Module, x: Tensor) -> int:
        dibit.compress(net)
        with dibit.track(net) as saved:
            net(x)
        return saved.total

    def test_frozen_weight_keeps_no_input(self) -> None:
        net = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D).requires_grad_(False))
        assert self.saved(net, torch.randn(N, D)) == 0

    def test_features_are_kept_by_reference(self) -> None:
        assert self.saved(nn.Linear(D, D), torch.randn(N, D)) == 0

    def test_eval_and_no_grad_keep_and_draw_nothing(self) -> None:
        net = dibit.compress(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)))
        x, state = torch.randn(N, D), torch.get_rng_state()
        with dibit.track(net) as saved:
            net.eval()(x)
            with torch.no_grad():
                net.train()(x)
        assert saved.rows == []
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_papers_keep_features_too(self) -> None:
        net = dibit.compress(nn.Linear(D, D), "iexact")
        with dibit.track(net) as saved:
            net(torch.randn(N, D))
        assert saved.total > 0


@pytest.mark.parametrize("levels", ["uniform", "normal"])
@pytest.mark.parametrize("kind", ["batch", "layer"])
@pytest.mark.statistics
def test_one_draw_of_a_norms_input_serves_both_of_its_uses(kind: str, levels: str) -> None:
    """Few rows and columns: the element's own term, x_hat times itself, is a large part, and must be unbiased too."""
    torch.manual_seed(2)
    norm: nn.Module = nn.BatchNorm1d(6, affine=False) if kind == "batch" else nn.LayerNorm(6, elementwise_affine=False)
    x, readout = torch.randn(8, 6), torch.randn(8, 6)
    truth = gradient(norm.train(), x, readout)
    # one wide block with an outlier: the bins are coarse, and the rounding variance large
    dibit.compress(norm, Config(bits=2, block=48, levels=levels))  # type: ignore[arg-type]

    def draw(i: int) -> Tensor:
        torch.manual_seed(i)
        return gradient(norm, x, readout)

    bias = bias_of(draw, truth, 4000)
    assert bias.unbiased, bias
