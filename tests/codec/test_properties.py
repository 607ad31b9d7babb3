"""The codec on whatever hypothesis thinks of: any shape, dtype, setting and magnitude, and what is no number at all."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from dibit import Config, Project, Rows, Sample, decode, encode
from dibit.codec import encoded_bytes, mix, ops, seed_tensor
from dibit.codec.backends import reference
from tests.unbiased import bias_of

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STATS = (torch.bfloat16, torch.float32)

shapes = st.lists(st.integers(0, 33), max_size=3).map(tuple)
seeds = st.integers(-(2**63), 2**63 - 1)
blocks = st.one_of(
    st.integers(1, 300),
    st.sampled_from(["row", "tensor"]),
    st.builds(Rows, st.integers(1, 5), most=st.none() | st.integers(1, 64)),
)
reductions = st.none() | st.builds(Project, st.integers(1, 9)) | st.builds(Sample, st.integers(1, 9))


@st.composite
def configs(draw: st.DrawFn, rounding: tuple[str, ...] = ("stochastic", "dither", "nearest")) -> Config:
    bits = draw(st.sampled_from([1, 2, 4, 8]))
    how = draw(st.sampled_from(rounding))
    levels: object = "uniform"
    if how != "dither":
        inner = st.lists(st.floats(0.01, 2**bits - 1.01), min_size=2**bits - 2, max_size=2**bits - 2, unique=True).map(
            lambda middle: (0.0, *sorted(middle), float(2**bits - 1))
        )
        levels = draw(st.sampled_from(["uniform", "normal"]) | (inner if bits < 8 else st.nothing()))
    return Config(
        bits=bits,
        block=draw(blocks),
        reduce=draw(reductions),
        levels=levels,  # type: ignore[arg-type]
        stats=draw(st.sampled_from(STATS)),
        rounding=how,  # type: ignore[arg-type]
    )


@st.composite
def tensors(draw: st.DrawFn, special: bool = False, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """Normal numbers of any scale and offset, constants, few distinct values, numbers near the ends of their dtype."""
    shape = draw(shapes)
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    match draw(st.sampled_from(["normal", "constant", "few", "spread", "skewed"])):
        case "constant":
            x = torch.full_like(x, draw(st.floats(-1, 1)))
        case "few":
            x = x.sign() * (x.abs() > 0.7)
        case "spread":
            x = x.sign() * 10.0 ** (x.clamp(-3, 3) * 6)
        case "skewed":
            x = x.relu() ** 3
    most = torch.finfo(dtype).max
    scale = 10.0 ** draw(st.floats(-46, 38))  # below 1e-38 float32 is subnormal, below 1e-45 it is 0
    offset = draw(st.sampled_from([0.0, 0.0, 1.0, -1000.0]))
    x = ((x + offset) * scale).clamp(-most, most).to(dtype)
    if special and x.numel():
        for value in draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=3)):
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    return x


def block_of(x: Tensor, config: Config) -> int:
    return config.block_size(x.shape[:-1].numel(), x.shape[-1] if x.ndim else 1)


@given(x=tensors(), config=configs(), seed=seeds)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_an_element_comes_back_within_a_bin_and_inside_its_blocks_range(x: Tensor, config: Config, seed: int) -> None:
    assume(config.reduce is None or config.reduce.ratio == 1)
    before = x.clone()
    packed = encode(x, config, seed)
    y = decode(packed)
    assert torch.equal(x, before)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    ranges = 2 * (packed.ranges.dtype.itemsize - config.stats.itemsize) * packed.ranges.shape[0]
    assert packed.nbytes == encoded_bytes(x.shape, config) + ranges + 8
    if not x.numel():
        return
    low, high = packed.ranges.double().repeat_interleave(block_of(x, config), 0)[: x.numel()].T
    flat, back = x.double().view(-1), y.double().view(-1)
    assert ((low <= flat) & (flat <= high)).all(), "what is stored encloses the block"
    assert back.isfinite().all(), "finite numbers come back finite"
    levels = torch.tensor(reference_levels(packed.block, config), dtype=torch.float64)
    gap = levels.diff().max() / levels[-1] * (high - low)
    # the arithmetic rounds in the dtype of the work and once into the dtype of x
    eps = torch.finfo(x.dtype).eps + torch.finfo(torch.float32).eps * (x.dtype != torch.float64)
    slack = 4 * eps * torch.maximum(low.abs(), high.abs()) + 2 * torch.finfo(x.dtype).smallest_normal * 2.0**-9
    if config.rounding != "dither":
        assert ((back >= low - slack) & (back <= high + slack)).all()
    assert ((back - flat).abs() <= gap * (0.5 if config.rounding == "nearest" else 1) + slack).all()


def reference_levels(block: int, config: Config) -> list[float]:
    from dibit.codec.normal_levels import normal_levels

    if config.levels == "normal" and config.bits > 1 and block > 2:
        return list(normal_levels(config.bits, block))
    return list(range(2**config.bits)) if isinstance(config.levels, str) else list(config.levels)


@given(x=tensors(special=True), config=configs(), seed=seeds)
@settings(max_examples=400, deadline=None, derandomize=True)
@pytest.mark.slow
def test_what_is_no_number_is_never_a_finite_lie_and_spoils_no_other_block(
    x: Tensor, config: Config, seed: int
) -> None:
    y = decode(encode(x, config, seed))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y[~x.isfinite()].isnan().all()
    if config.reduce is None and x.numel():
        size = block_of(x, config)
        for part, back in zip(x.view(-1).split(size), y.view(-1).split(size), strict=True):
            assert bool(back.isnan().all()) if not part.isfinite().all() else bool(back.isfinite().all())


@given(
    x=tensors(special=True, dtypes=(torch.float32, torch.float64)),
    bits=st.sampled_from([1, 2, 4, 8]),
    block=st.integers(1, 400),
    normal=st.booleans(),
    stats=st.sampled_from(STATS),
    rounding=st.sampled_from([reference.STOCHASTIC, reference.NEAREST]),
    seed=seeds,
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_backends_agree_code_for_code(
    x: Tensor, bits: int, block: int, normal: bool, stats: torch.dtype, rounding: int, seed: int
) -> None:
    from dibit.codec.normal_levels import normal_levels

    x, key = x.reshape(-1), seed_tensor(seed)
    stats = torch.float64 if x.dtype == torch.float64 else stats
    levels = list(normal_levels(bits, block)) if normal and bits > 1 and block > 2 else []
    fast = ops.quantize(x, key, bits, block, levels, stats, rounding)
    plain = reference.quantize(x, key, bits, block, levels, stats, rounding)
    for a, b in zip(fast, plain, strict=True):
        assert same(a, b)
    for dither in (0.0, 1.0, 2.0) if not levels else (0.0,):
        a, b = (
            f(*fast[:2], key, x.numel(), bits, block, levels, dither, x.dtype)
            for f in (ops.dequantize, reference.dequantize)
        )
        assert same(a, b)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, any NaN being any other."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan])


@given(x=tensors(dtypes=(torch.float32, torch.float64)), config=configs(("stochastic", "dither")), label=st.integers())
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.statistics
def test_unbiased(x: Tensor, config: Config, label: int) -> None:
    assume(x.numel())
    assume(x.abs().max() < 1e37)  # a projection of more overflows float32, as the plain product would
    bias = bias_of(lambda i: decode(encode(x, config, mix(i, label))), x, 200)
    assert bias.unbiased, bias


@given(x=tensors(dtypes=(torch.float32,)), config=configs(), seed=seeds)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_memory_layout_makes_no_difference(x: Tensor, config: Config, seed: int) -> None:
    wide = torch.stack((x, x + 1), dim=-1)[..., 0]
    flipped = x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim else x
    for other in (wide, flipped):
        assert same(decode(encode(other, config, seed)), decode(encode(x, config, seed)))
