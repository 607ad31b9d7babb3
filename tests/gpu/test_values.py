"""The GPU's kernels against the definition, code for code, in Triton's interpreter: `TRITON_INTERPRET=1 pytest`.

A run of its own: the switch is read when the kernels are defined, and such kernels cannot be compiled.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from torch_geometric.nn import GraphSAGE
from torch_geometric.utils import erdos_renyi_graph, to_torch_csr_tensor

import dibit
import tests.gpu.interpreter  # noqa: F401
from dibit import Config, Project, Rows, Sample, decode, encode
from dibit.codec import Affine, cuda, mix, ops, reference, seed_tensor
from dibit.codec.chances import LEFT_OUT
from dibit.codec.levels import normal_levels
from dibit.config import RECIPES

BITS = (1, 2, 4, 8)
HALF = (torch.bfloat16, torch.float16)


def same(own: object, definition: object) -> None:
    """Bit for bit, NaN with NaN."""
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (own, definition)), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


def awkward(n: int) -> Tensor:
    """Numbers that show every branch: NaN, infinities, constants, huge and tiny ones."""
    x = torch.randn(n) * 3 + 1
    x[n // 3 : n // 3 + 300] *= 1e-40
    x[n // 2 : n // 2 + 400] = -2.5
    x[n // 7 :: max(1, n // 2)] = float("nan")
    x[n // 5 :: max(1, n // 2)] = float("-inf")
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [1, 3, 128, 1000, 1024])
@pytest.mark.parametrize("spread", ["uniform", "normal"])
def test_codes_and_values(bits: int, block: int, spread: str) -> None:
    levels = [] if spread == "uniform" else list(normal_levels(bits, block))
    for n, (stats, rounding) in itertools.product(
        (0, 1, 5, 4103), ((torch.bfloat16, 0), (torch.float32, 0), (torch.bfloat16, 1))
    ):
        x, seed = awkward(n), seed_tensor(mix(n, block))
        args = x, seed, bits, block, levels, stats, rounding
        kept = reference.quantize(*args)
        same(cuda.quantize(*args), kept)
        for dither in (0.0, 2.0) if spread == "uniform" else (0.0,):
            args = *kept[:2], seed, n, bits, block, levels, dither, torch.float32
            same(cuda.dequantize(*args), reference.dequantize(*args))


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_blocks_that_several_programs_share(bits: int) -> None:
    for n, block in ((70_000, 32_000), (9_001, 9_001), (20_000, 9_000)):
        x, seed = torch.randn(n), seed_tensor(3)
        x[n - 1] = float("inf") if bits == 2 else 1e30
        args = x, seed, bits, block, [], torch.bfloat16, 0
        kept = reference.quantize(*args)
        same(cuda.quantize(*args), kept)
        args = *kept[:2], seed, n, bits, block, [], 1.0, torch.float32
        same(cuda.dequantize(*args), reference.dequantize(*args))
    x = torch.randn(700, 40)
    args = x, torch.arange(0, 700, 2), x[0], x[1], seed_tensor(1), bits, 9_000, [], torch.bfloat16, 0
    same(cuda.quantize_rows(*args), reference.quantize_rows(*args))


@pytest.mark.parametrize("number", [64 * 5, 2**32 - 640, 2**40])
def test_a_part_of_a_longer_tensor(number: int) -> None:
    """The counter has 64 bits; within a block its lower half wraps."""
    args = torch.randn(1000), seed_tensor(-5), 2, 64, [], torch.bfloat16, 0, number
    kept = reference.quantize(*args)
    same(cuda.quantize(*args), kept)
    args = *kept[:2], seed_tensor(-5), 1000, 2, 64, [], 1.0, torch.float32, number
    same(cuda.dequantize(*args), reference.dequantize(*args))


@pytest.mark.parametrize("scale", [3e38, 1e30, 1e-30, 1e-44])
def test_huge_and_tiny_ranges(scale: float) -> None:
    x, seed = (torch.rand(500) * 2 - 1) * scale, seed_tensor(2)
    args = x, seed, 2, 64, [], torch.float32, 0
    kept = reference.quantize(*args)
    same(cuda.quantize(*args), kept)
    for dither in (0.0, 1.0):
        args = *kept[:2], seed, 500, 2, 64, [], dither, torch.float32
        same(cuda.dequantize(*args), reference.dequantize(*args))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype) -> None:
    x, seed = (torch.randn(3000) * 100).to(dtype), seed_tensor(4)
    args = x, seed, 2, 128, [], torch.bfloat16, 0
    kept = reference.quantize(*args)
    same(cuda.quantize(*args), kept)
    args = *kept[:2], seed, 3000, 2, 128, [], 1.0, dtype
    same(cuda.dequantize(*args), reference.dequantize(*args))
    x = torch.full((200,), 65504.0).to(dtype)
    kept = reference.quantize(x, seed, 2, 128, [], torch.bfloat16, 0)
    args = *kept[:2], seed, 200, 2, 128, [], 0.0, dtype
    same(cuda.dequantize(*args), reference.dequantize(*args))
    x = torch.randn(77, 21).to(dtype)
    x[3] = float("nan")
    same(cuda.dropout(x, seed, 0.3), reference.dropout(x, seed, 0.3))
    same(cuda.pack_mask(x), reference.pack_mask(x))
    same(cuda.relu(x), reference.relu(x))
    mask = reference.pack_mask(x)
    for slope in (0.0, 0.2):
        same(cuda.apply_mask(x, mask, slope), reference.apply_mask(x, mask, slope))
    same(cuda.finite(x), reference.finite(x))


@pytest.mark.parametrize(("width", "block"), [(12, 48), (33, 128), (128, 128), (128, 1024), (64, 16), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_gathered_moved_and_scaled_on_the_way(width: int, block: int, dtype: torch.dtype) -> None:
    x, index = torch.randn(101, width).to(dtype), torch.randperm(101)[:38].sort().values
    x[7, 1], x[index[5], 2] = float("nan"), 1e30
    shift, scale = torch.randn(width), torch.rand(width)
    for rows, moved, bits in itertools.product((index, None), ((shift, scale), (None, None)), (2, 8)):
        args = x, rows, *moved, seed_tensor(4), bits, block, [], torch.bfloat16, 0
        same(cuda.quantize_rows(*args), reference.quantize_rows(*args))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 9001])
def test_masks_dropout_and_signs(n: int) -> None:
    x, seed = torch.randn(n), seed_tensor(7)
    x[::5], x[3::50], x[4::60] = 0, float("nan"), float("-inf")
    same(cuda.pack_mask(x), reference.pack_mask(x))
    same(cuda.relu(x), reference.relu(x))
    mask, grad = reference.pack_mask(x), torch.randn(n)
    for slope in (0.0, 0.2):
        same(cuda.apply_mask(grad, mask, slope), reference.apply_mask(grad, mask, slope))
    for p in (0.5, 0.9):
        same(cuda.dropout(x, seed, p), reference.dropout(x, seed, p))
    same(cuda.signs(seed, n), reference.signs(seed, n))
    same(cuda.finite(x), reference.finite(x))
    same(cuda.finite(grad), reference.finite(grad))
    if n:
        grad[n - 1] = float("inf")
        same(cuda.finite(grad), reference.finite(grad))
        assert cuda.finite(grad).isnan()


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 33), (40, 128)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_norm_relu_and_dropout_in_one_pass(shape: tuple[int, int], p: float) -> None:
    x, seed, width = torch.randn(shape), seed_tensor(11), shape[1]
    x[1::9] = float("nan")
    args = x, torch.randn(width), torch.rand(width), torch.randn(width), seed, p
    kept = reference.norm_relu_dropout(*args)
    same(cuda.norm_relu_dropout(*args), kept)
    args = torch.randn(shape), kept[1], seed, p
    same(cuda.relu_dropout_gradient(*args), reference.relu_dropout_gradient(*args))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "width", "block"), [(70, 128, 128), (70, 40, 1024), (33, 130, 96), (9, 8, 7)])
def test_products(bits: int, rows: int, width: int, block: int) -> None:
    """Sums in another order: within float32's rounding of the definition's in float64."""
    x, seed = torch.randn(rows, width), seed_tensor(9)
    for levels in ([], list(normal_levels(bits, block))):
        kept = reference.quantize(x.view(-1), seed, bits, block, levels, torch.bfloat16, 0)
        dy, index, weight = torch.randn(200, 70), torch.randperm(200)[:rows], torch.rand(rows) * 9
        for own, dither in ((True, 0.0), (False, 0.0 if levels else 1.0)):
            args = (dy, index, weight) if own else (dy[:rows].contiguous(), None, None)
            more = rows, width, bits, block, levels, dither
            close(
                cuda.weight_gradient(*kept[:2], seed, *args, *more),
                reference.weight_gradient(*kept[:2], seed, args[0].double(), *args[1:], *more),
            )
    kept = reference.quantize(x.view(-1), seed, bits, block, [], torch.bfloat16, 0)
    g, vectors = torch.randn(rows, width), [torch.randn(width) for _ in range(3)]
    for dither in (0.0, 2.0):
        args = bits, block, dither
        close(cuda.column_sums(*kept[:2], seed, g, *args), reference.column_sums(*kept[:2], seed, g.double(), *args))
    args = *kept[:2], seed, g, *vectors, bits, block
    same(cuda.norm_gradient(*args), reference.norm_gradient(*args))


def close(own: Tensor, definition: Tensor) -> None:
    assert own.dtype == torch.float32
    assert (own - definition).abs().max() <= 3e-6 * definition.abs().max()


@pytest.mark.parametrize("width", [1, 15, 40, 300])
def test_scores_of_rows(width: int) -> None:
    x = torch.randn(130, width) * torch.exp(10 * torch.randn(130, 1))
    x[3], x[4], x[5, 0], x[6, 0] = 0, 1e-30, float("nan"), float("inf")
    for own in (x, x.bfloat16()):
        found, plain = cuda.row_scores(own), reference.row_scores(own)
        assert ((found.int() - plain.int()).abs() <= 1).all()
        assert (found == plain).float().mean() > 0.95
        assert found[3] == found[4] == 0
        assert found[5] == found[6] == LEFT_OUT
    assert cuda.row_scores(torch.empty(4, 0)).tolist() == [0] * 4


def score_tables(n: int) -> Iterator[Tensor]:
    yield reference.row_scores(torch.randn(n, 4) * torch.exp(3 * torch.randn(n, 1)))
    yield torch.zeros(n, dtype=torch.uint8)
    few = torch.zeros(n, 4)
    few[:: max(1, n // 3)] = 5
    yield reference.row_scores(few)
    left_out = reference.row_scores(torch.randn(n, 4))
    left_out[(n + 1) // 2 :] = LEFT_OUT
    yield left_out


@pytest.mark.parametrize(("n", "count"), [(1, 1), (7, 2), (1000, 1), (1000, 480), (5000, 700), (3000, 1500)])
def test_the_same_rows_are_picked(n: int, count: int) -> None:
    for i, scores in enumerate(score_tables(n)):
        some = min(count, int((scores < LEFT_OUT).sum()))
        seed = seed_tensor(mix(i, n))
        index, weight = cuda.pick_rows(scores, seed, some)
        expected, its = reference.pick_rows(scores, seed, some)
        assert torch.equal(index, expected)
        assert torch.allclose(weight, its, rtol=1e-6, atol=0)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's tensors go through the GPU's kernels."""
    monkeypatch.setattr(ops, "_backend", lambda *_: cuda)
    monkeypatch.setattr(cuda, "aggregate", reference.aggregate, raising=False)


CONFIGS = {
    **RECIPES,
    "rows": Config(block=Rows(2)),
    "whole": Config(block="tensor", bits=4),
    "dither": Config(rounding="dither", block=100),
    "nearest": Config(rounding="nearest", block=100),
    "normal": Config(levels="normal", bits=4, block=64),
    "project": Config(reduce=Project(4)),
    "sample": Config(reduce=Sample(3, by="norm"), stats=torch.float32),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.usefixtures("interpreted")
def test_the_codec_on_these_kernels(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(150, 16)
    function = Affine(x.mean(0), x.std(0), watches=True)
    for affine in (None, function):
        own = encode(x, config, 3, affine)
        value = decode(own)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_backend", lambda *_: reference)
            plain = encode(x, config, 3, affine)
            same(value, decode(plain))
        same(own.tensors, plain.tensors)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("recipe", ["default", "iexact"])
def test_a_training_step_on_these_kernels(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of a whole model, to float32's rounding those of the other backend."""
    config = RECIPES[recipe]
    if recipe == "default":
        config = Config(block=32, reduce=Sample(4, by="gradient"), norm=Config(reduce=Sample(3, by="gradient")))
    torch.manual_seed(1)
    edges = erdos_renyi_graph(60, 0.1)
    adjacency = to_torch_csr_tensor(edges, size=(60, 60))
    x = torch.randn(60, 9)
    found: list[list[Tensor]] = []
    for backend in (cuda, reference):
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_backend", lambda *_, own=backend: own)
            torch.manual_seed(2)
            model = dibit.compress(GraphSAGE(9, 16, 2, 3, dropout=0.5, norm="batch_norm"), config)
            optimiser = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(2):
                optimiser.zero_grad()
                model(x, adjacency).square().mean().backward()
                optimiser.step()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 8
    for own, other in zip(*found, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-6)
