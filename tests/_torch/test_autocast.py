"""Mixed precision: autocast in bf16 and fp16, and models in bf16, compressed against plain in the same precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE
from torch_geometric.utils import to_torch_csr_tensor

import dibit
from dibit import Config, Sample
from dibit.codec import ops
from dibit.engine.ledger import Ledger
from tests.rules.test_operations import EXACT, LOSSY, Net
from tests.rules.test_operations import D as WIDTH
from tests.rules.test_operations import N as ROWS
from tests.unbiased import bias_of

N, D, C = 60, 16, 5
EDGES = torch.randint(0, N, (2, 6 * N), generator=torch.Generator().manual_seed(0)).unique(dim=1).contiguous()
NOISY = Config(block=32, reduce=Sample(2), norm=Config(block=32))
FINE = Config(bits=8, block=32, dropout="mask")
MASK = replace(dibit.recipe("default"), dropout="mask")
ROUNDING = 2**-7  # of a whole gradient, in bf16


class MLP(nn.Module):
    def __init__(self, norm: str | None = "batch_norm", dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.norm = {None: nn.Identity, "batch_norm": nn.BatchNorm1d, "layer_norm": nn.LayerNorm}[norm](D)
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = F.elu(self.norm(self.first(x)))
        return self.last(F.dropout(F.gelu(self.middle(h)), self.dropout, self.training))


KINDS: dict[str, Callable[..., nn.Module]] = {
    "sage": lambda **options: GraphSAGE(D, D, 2, C, **options),
    "sage max": lambda **options: GraphSAGE(D, D, 2, C, aggr="max", **options),
    "gcn": lambda **options: GCN(D, D, 2, C, act="gelu", **options),
    "gin": lambda **options: GIN(D, D, 2, C, **options),
    "gat": lambda **options: GAT(D, D, 2, C, heads=2, **options),
    "gatv2": lambda **options: GAT(D, D, 2, C, heads=2, v2=True, **options),
    "mlp": MLP,
}
WAYS = {"autocast bf16": torch.bfloat16, "autocast fp16": torch.float16, "model bf16": torch.bfloat16}
NORMS = {"sage": None, "sage max": "layer_norm", "gcn": "batch_norm", "gin": "layer_norm", "gat": "batch_norm"}


@contextlib.contextmanager
def precision(way: str) -> Iterator[None]:
    with torch.autocast("cpu", WAYS[way], enabled=way.startswith("autocast")):
        yield


def build(kind: str, way: str, dropout: float = 0.0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = KINDS[kind](norm=NORMS.get(kind, "batch_norm"), dropout=dropout).train()
    x = torch.randn(N, D)
    return (model.bfloat16(), x.bfloat16()) if way == "model bf16" else (model, x)


def forward(model: nn.Module, x: Tensor, way: str, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    with precision(way):
        return model(x, EDGES)


def gradient(model: nn.Module, x: Tensor, way: str, seed: int = 1) -> Tensor:
    """Of a random readout by every parameter, as one float32 vector; each has its parameter's dtype."""
    model.zero_grad()
    y = forward(model, x, way, seed)
    (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    assert all(p.grad.dtype == p.dtype for p in parameters)
    return torch.cat([p.grad.flatten().float() for p in parameters])


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
class TestModels:
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    @pytest.mark.slow
    def test_forward_and_bytes(self, kind: str, way: str, dropout: float) -> None:
        model, x = build(kind, way, dropout)
        plain = forward(model, x, way)
        with dibit.track(model) as before:
            forward(model, x, way)
        for setting in (MASK, "iexact") if dropout else ("default", "exact"):
            model = dibit.compress(build(kind, way, dropout)[0], setting)
            with dibit.track(model) as saved:
                y = forward(model, x, way)
            assert y.dtype == plain.dtype
            assert torch.equal(y, plain)
            assert saved.plain == before.total
            assert saved.total < before.total

    @pytest.mark.slow
    def test_no_factor_is_wrong(self, kind: str, way: str) -> None:
        """With 8 bits the mean gradient is the plain one's, up to the rounding of the half precision itself."""
        model, x = build(kind, way)
        truth = gradient(model, x, way)
        dibit.compress(model, FINE)
        mean = torch.stack([gradient(model, x, way, i) for i in range(3)]).mean(0)
        assert relative(mean, truth) < 3 * ROUNDING


@pytest.mark.parametrize(
    ("kind", "way"), [*((kind, "autocast bf16") for kind in KINDS), *(("mlp", way) for way in [*WAYS][1:])]
)
@pytest.mark.statistics
def test_gradient_is_unbiased(kind: str, way: str) -> None:
    model, x = build(kind, way)
    truth = gradient(model, x, way)
    dibit.compress(model, NOISY)
    bias = bias_of(lambda i: gradient(model, x, way, i), truth, 24)
    assert bias.unbiased, bias
    assert not bias.exact


def run(make: Callable[[], Net], way: str, setting: Config | str | None) -> tuple[Tensor, Ledger, dict]:
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(ROWS, WIDTH)
    if way == "model bf16":
        model, x = model.bfloat16(), x.bfloat16()
    if setting is not None:
        dibit.compress(model, setting)
    x.requires_grad_()
    with dibit.track(model) as saved, precision(way):
        y = model(x + 0)
    y.float().square().sum().backward()
    return y.detach(), saved, {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


# Each once: the methods of tensors are other names of the same rules.
OPERATIONS = {name: make for name, make in {**EXACT, **LOSSY}.items() if not name.startswith("Tensor.")}
FAILS_PLAINLY = {
    ("F.layer_norm bias alone", "autocast bf16"),
    ("F.layer_norm bias alone", "autocast fp16"),
    ("F.cross_entropy weighted", "model bf16"),
    *([("F.mse_loss", "model bf16")] if torch.__version__ < "2.7" else []),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation(name: str, way: str) -> None:
    """Outputs bit for bit, plain bytes, dtypes and values of gradients; unary operations see half precision."""
    make = OPERATIONS[name]
    if (name, way) in FAILS_PLAINLY:
        with pytest.raises(RuntimeError, match=r"expected scalar type|expected BFloat16"):
            run(make, way, None)
        return
    plain, before, truth = run(make, way, None)
    for setting in (FINE, "default"):
        y, saved, grads = run(make, way, setting)
        assert y.dtype == plain.dtype
        assert torch.equal(y, plain)
        assert saved.plain == before.total
        for key, g in truth.items():
            assert (g is None) == (grads[key] is None)
            if g is not None:
                assert grads[key].dtype == g.dtype
                assert grads[key].isfinite().all()
        if setting is FINE:
            assert (
                relative(*(torch.cat([g.flatten() for g in gs.values() if g is not None]) for gs in (grads, truth)))
                < 0.03
            )


class TestAutocast:
    def test_loss_inside_and_outside_and_backward_inside(self) -> None:
        target = torch.arange(N) % C
        found = []
        for setting in (None, FINE):
            for where in ("outside", "inside", "backward inside"):
                model, x = build("gcn", "autocast bf16")
                dibit.compress(model, setting)
                torch.manual_seed(2)
                model(x, EDGES).sum().backward()  # another state of the generator, and a graph that is known
                model.zero_grad()
                torch.manual_seed(1)
                with torch.autocast("cpu", torch.bfloat16):
                    out = model(x, EDGES)
                    if where != "outside":
                        loss = F.cross_entropy(out, target)
                    if where == "backward inside":
                        loss.backward()
                if where == "outside":
                    loss = F.cross_entropy(out, target)
                if where != "backward inside":
                    loss.backward()
                found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        for (loss, truth), (same, grad) in zip(found[:3], found[3:], strict=True):
            assert torch.equal(loss, same)
            assert relative(grad, truth) < 4 * ROUNDING
        assert torch.equal(found[3][1], found[5][1]) or relative(found[3][1], found[5][1]) < ROUNDING

    def test_disabled_inside_is_float32(self) -> None:
        class Parts(MLP):
            def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
                h = F.relu(self.first(x))
                with torch.autocast("cpu", enabled=False):
                    h = F.relu(self.middle(h.float()))
                    assert h.dtype == torch.float32
                return self.last(h)

        results = []
        for setting in (None, "default"):
            torch.manual_seed(0)
            model = dibit.compress(Parts().train(), setting)
            x = torch.randn(N, D)
            with dibit.track(model) as saved:
                results.append((forward(model, x, "autocast bf16"), saved.plain))
            gradient(model, x, "autocast bf16")
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]

    def test_a_module_kept_in_float32_inside_a_bf16_model(self) -> None:
        class Mixed(MLP):
            def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
                h = F.relu(self.first(x))
                return self.last(self.norm(h.float()).to(h.dtype))

        truth = None
        for setting in (None, FINE, NOISY):
            torch.manual_seed(0)
            model = Mixed().train().bfloat16()
            model.norm.float()
            model.middle.requires_grad_(False)
            x = torch.randn(N, D).bfloat16()
            dibit.compress(model, setting)
            if truth is None:
                plain, truth = forward(model, x, "model bf16"), gradient(model, x, "model bf16")
                continue
            assert torch.equal(forward(model, x, "model bf16"), plain)
            bias = bias_of(lambda i, model=model, x=x: gradient(model, x, "model bf16", i), truth, 40)
            mean = torch.stack([gradient(model, x, "model bf16", i) for i in range(6)]).mean(0)
            assert relative(mean, truth) < 3 * ROUNDING if setting is FINE else bias.unbiased
            assert model.norm.weight.grad.dtype == torch.float32

    def test_codes_are_shared_between_layers_that_copy_one_tensor(self) -> None:
        class Three(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.heads = nn.Linear(D, 64), nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                h = self.first(x).float().tanh()
                return sum(head(h) for head in self.heads)

        model = dibit.compress(Three().train(), "iexact")
        with dibit.track(model) as saved, torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(300, D))
        kept = [row.kept for row in saved.rows if row.module.startswith("heads")]
        plain = [row.plain for row in saved.rows if row.module.startswith("heads")]
        assert kept[0] > 0
        assert kept[1:] == [0, 0]
        assert plain == [2 * (300 * 64 + 64 * 64)] * 3  # a bf16 copy of the input and of the weight, each time

    def test_the_parameters_copy_in_autocasts_cache_keeps_its_gradient(self) -> None:
        """A compressed pass leaves nothing in the cache that would cut a plain pass off from its weights."""
        model = dibit.compress(nn.Linear(D, C).train())
        x = torch.randn(N, D)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
            y = model.eval()(x)
        y.float().sum().backward()
        assert model.weight.grad is not None
        assert model.weight.grad.dtype == torch.float32

    def test_the_public_codec_is_the_same_under_autocast(self) -> None:
        x, config = torch.randn(100, 64), dibit.recipe("iexact")
        packed = dibit.encode(x, config, 3)
        with torch.autocast("cpu", torch.float16):
            again = dibit.encode(x, config, 3)
            assert torch.equal(dibit.decode(again), dibit.decode(packed))
        assert torch.equal(again.codes, packed.codes)


class TestScaler:
    def train(self, setting: str | None, steps: int = 30) -> tuple[nn.Module, list[float], list[float]]:
        torch.manual_seed(0)
        model = GraphSAGE(D, 32, 2, C, norm="batch_norm").train()
        y = torch.arange(N) % C
        x = F.one_hot(y, D).float() + 0.3 * torch.randn(N, D)
        dibit.compress(model, setting)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=10)
        losses, scales = [], []
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x, EDGES), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        return model, losses, scales

    @pytest.mark.parametrize("setting", [None, "default", "iexact"])
    def test_trains_and_skips_steps_that_overflow(self, setting: str | None) -> None:
        model, losses, scales = self.train(setting)
        assert min(scales) < 2.0**24  # some step overflowed
        assert losses[-1] < 0.5 * losses[0]
        assert all(p.isfinite().all() for p in model.parameters())

    def test_scores_survive_a_gradient_that_is_not_finite(self) -> None:
        model, x = build("sage", "autocast fp16")
        dibit.compress(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)

        def step(scale: float) -> dict[str, Tensor]:
            optimizer.zero_grad()
            (forward(model, x, "autocast fp16").float().square().sum() * scale).backward()
            if all(p.grad.isfinite().all() for p in model.parameters()):
                optimizer.step()
            state = dibit.scores(model).state_dict()
            return {k: v.clone() for k, v in state.items() if v.dtype == torch.uint8}

        good = step(1.0)
        assert good
        assert all((table > 0).any() for table in good.values())
        for scale in (float("inf"), float("nan")):
            spoilt = step(scale)
            assert spoilt.keys() == good.keys()
            assert all((table < 255).all() for table in spoilt.values())
            assert all(((spoilt[k].int() - good[k].int()).abs() <= 1).all() for k in good)
        after = step(1.0)
        assert all((after[k] > 0).any() for k in after)
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_sampled_weights_do_not_overflow_where_the_plain_gradient_does_not(self) -> None:
        """A kept row counts 8 times: 8 * 20,000 is no fp16 number, the sum of the rows, in float32, is finite."""
        model = dibit.compress(nn.Sequential(nn.Linear(D, D), nn.Linear(D, 1)).train(), Config(reduce=Sample(8)))
        with torch.autocast("cpu", torch.float16):
            y = model(torch.randn(64, D))
        y.backward(torch.full_like(y, 20000.0))
        assert all(p.grad.isfinite().all() for p in model[1].parameters() if p.dim() == 2)


@pytest.mark.parametrize("aggr", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_csr_matrix_of_half_precision(dtype: torch.dtype, aggr: str) -> None:
    """torch has these products; the sum, and any of them under autocast, it refuses without Dibit too."""
    adjacency = to_torch_csr_tensor(EDGES, size=(N, N)).to(dtype)
    found = []
    for setting in (None, FINE):
        torch.manual_seed(0)
        model = dibit.compress(GraphSAGE(D, D, 3, C, aggr=aggr).to(dtype).train(), setting)
        y = model(torch.randn(N, D).to(dtype), adjacency)
        y.float().square().sum().backward()
        found.append((y, torch.cat([p.grad.flatten().float() for p in model.parameters()])))
    assert torch.equal(found[0][0], found[1][0])
    assert relative(found[1][1], found[0][1]) < 0.04


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_of_half_precision(dtype: torch.dtype) -> None:
    nan = float("nan")
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, nan, -nan, float("inf"), -float("inf"), 6e-8, -6e-8], dtype=dtype)
    wanted = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0, 1, 0], dtype=dtype)
    assert torch.equal(ops.apply_mask(torch.ones_like(x), ops.pack_mask(x), 0.0), wanted)
    assert torch.equal(ops.relu(x)[1], ops.pack_mask(x))


def test_loss_rows_under_autocast_leave_out_rows() -> None:
    """The copies that autocast makes are rows for rows: they do not hide how far a residual lies from the output."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(D, 32), nn.Linear(32, C)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.last(self.first(x).float().tanh()).float()

    model, kept = dibit.compress(Rows().train(), MASK), []
    x, rows = torch.randn(600, D), torch.arange(40)
    adjacency = to_torch_csr_tensor(rows.repeat(2, 1), size=(600, 600))
    for _ in range(2):
        with dibit.track(model) as saved, dibit.batch(model, loss_rows=rows), torch.autocast("cpu", torch.bfloat16):
            out = model(x, adjacency)
        out[rows].float().sum().backward()
        kept.append(sum(row.kept for row in saved.rows if row.module == "last"))
    assert 0 < kept[1] < kept[0]
