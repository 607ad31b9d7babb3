"""The codec against its formulas: statistics for what is random, equality for what is not."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dibit import Config, Project, Sample, decode, encode
from dibit.codec import Affine, layout, mix, ops, seed_tensor
from dibit.codec.backends import reference
from dibit.codec.normal_levels import expected_variance, normal_levels
from dibit.residuals.compressed import Compressed
from tests.unbiased import bias_of
from tests.watched import watched

BITS = (1, 2, 4, 8)
CONFIGS = {
    "row": Config(block="row"),
    "block": Config(block=48),
    "1 bit": Config(bits=1, block=7),
    "4 bit": Config(bits=4, block=100),
    "8 bit": Config(bits=8, block=1024),
    "normal": Config(bits=2, block=64, levels="normal"),
    "normal 4 bit": Config(bits=4, block=64, levels="normal"),
    "explicit": Config(bits=2, block=64, levels=(0, 0.5, 2, 3)),
    "float32 ranges": Config(block=16, stats=torch.float32),
    "dither": Config(block=48, rounding="dither"),
    "project": Config(block=48, reduce=Project(4)),
    "sample": Config(block=48, reduce=Sample(4)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.statistics
def test_unbiased(config: Config) -> None:
    x = torch.randn(41, 20) * 2 + 0.5
    bias = bias_of(lambda i: decode(encode(x, config, mix(i, "draw"))), x, 400)
    assert bias.unbiased, bias
    assert not bias.exact


def test_nearest_is_biased_and_within_half_a_bin() -> None:
    x = torch.rand(1000)
    config = Config(block=1000, rounding="nearest", stats=torch.float32)
    error = decode(encode(x, config, 1)) - x
    assert error.abs().max() <= (x.max() - x.min()) / 3 / 2 * 1.0001
    assert torch.equal(decode(encode(x, config, 1)), decode(encode(x, config, 2)))


@pytest.mark.parametrize("rounding", ["stochastic", "dither"])
def test_variance_as_predicted(rounding: str) -> None:
    """f (1 - f) bins^2 for stochastic rounding, 1/12 with the dither subtracted, element by element."""
    draws = 4000
    x = torch.rand(64)
    config = Config(bits=2, block=64, stats=torch.float32, rounding=rounding)  # type: ignore[arg-type]
    bins = (x.max() - x.min()) / 3
    samples = torch.stack([decode(encode(x, config, mix(i))) for i in range(draws)]) / bins
    f = ((x - x.min()) / bins).double().frac()
    predicted = f * (1 - f) if rounding == "stochastic" else torch.full_like(f, 1 / 12)
    measured = samples.double().var(0)
    # the standard error of a variance, from the fourth moment: at most sqrt((1/4)^2 / n)
    assert (measured - predicted).abs().max() < 5 * 0.25 / draws**0.5


def test_normal_levels_reduce_the_variance_as_expected() -> None:
    count, draws = 1024, 200
    x = torch.randn(count)
    config = Config(bits=2, block=count, stats=torch.float32)
    lower, upper = x.min(), x.max()
    h = ((x - lower) / (upper - lower) * 3).double()
    for levels in ((0.0, 1.0, 2.0, 3.0), normal_levels(2, count)):
        grid = torch.tensor(levels, dtype=torch.float64)
        i = torch.bucketize(h, grid[1:-1], right=True)
        predicted = ((h - grid[i]) * (grid[i + 1] - h)).mean()
        used = Config(bits=2, block=count, stats=torch.float32, levels=levels)
        samples = torch.stack([decode(encode(x, used, mix(j))) for j in range(draws)]).double()
        measured = ((samples - x) / (upper - lower) * 3).square().mean(1)
        assert abs(measured.mean() - predicted) < 5 * measured.std() / draws**0.5
        if levels[1] != 1:
            assert predicted < 0.9 * expected_variance((0, 1, 2, 3), count)
    assert config.levels == "uniform"


@pytest.mark.parametrize("levels", ["uniform", "normal"])
@pytest.mark.parametrize("block", [32, 500], ids=["whole blocks", "less than a block"])
@pytest.mark.statistics
def test_one_draw_gives_an_unbiased_square(levels: str, block: int) -> None:
    x = torch.randn(16, 8) + 1
    config = Config(bits=2, block=block, levels=levels)  # type: ignore[arg-type]

    def square(i: int) -> Tensor:
        packed = encode(x, config, mix(i))
        if levels == "uniform":
            return packed.reduced(0.0) * packed.reduced(2.0)
        return packed.reduced(0.0) ** 2 - packed.variance()

    assert (bias := bias_of(square, x**2, 1500)).unbiased, bias
    naive = bias_of(lambda i: encode(x, config, mix(i)).reduced(0.0) ** 2, x**2, 1500)
    assert naive.z > 50, "the plain square of a draw is biased: the test can fail"


@pytest.mark.parametrize("n", [0, 1, 2, 5, 63, 1000, 4103])
@pytest.mark.parametrize("block", [1, 3, 16, 1000, 1024])
def test_backends_agree_code_for_code(n: int, block: int) -> None:
    x = torch.randn(n) * 3 + 1
    seed = seed_tensor(mix(n, block))
    for bits, stats, rounding in itertools.product(BITS, (torch.bfloat16, torch.float32), (0, 1)):
        for levels in ([], list(normal_levels(bits, block))):
            fast = ops.quantize(x, seed, bits, block, levels, stats, rounding)
            plain = reference.quantize(x, seed, bits, block, levels, stats, rounding)
            for a, b in zip(fast, plain, strict=True):
                assert torch.equal(a, b)
            for dither in (0.0, 1.0, 2.0):
                a, b = (
                    f(*fast[:2], seed, n, bits, block, levels, dither, torch.float32)
                    for f in (ops.dequantize, reference.dequantize)
                )
                assert torch.equal(a, b)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 70_001])
def test_masks_and_dropout_agree(n: int) -> None:
    x = torch.randn(n)
    x[::5] = 0
    x[3::50] = float("nan")
    seed = seed_tensor(7)
    bits = ops.pack_mask(x)
    assert torch.equal(bits, reference.pack_mask(x))
    assert bits.numel() == (n + 7) // 8
    x[1::7] = -0.0
    for (y, own), size in ((ops.relu(x), n), (reference.relu(x), n)):
        assert torch.equal(y.view(torch.int32), torch.relu(x).view(torch.int32)), "bit for bit, the sign of zero too"
        assert torch.equal(own, reference.pack_mask(x))
        assert y.numel() == size
    bits = ops.pack_mask(x)
    grad = torch.randn(n)
    for slope in (0.0, 0.2):
        expected = torch.where(x <= 0, grad * slope, grad)
        for f in (ops.apply_mask, reference.apply_mask):
            assert torch.equal(f(grad, bits, slope), expected)
    for f in (ops.scale_masked, reference.scale_masked):
        expected = (x * torch.where(x <= 0, 0.0, 1.25)).nan_to_num(9)
        assert torch.equal(f(x, bits, 1.25).nan_to_num(9).view(torch.int32), expected.view(torch.int32))
    for p in (0.1, 0.5, 0.75):
        assert torch.equal(ops.dropout(x, seed, p).nan_to_num(9), reference.dropout(x, seed, p).nan_to_num(9))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 5), (100, 48), (3000, 33)], ids=str)
@pytest.mark.parametrize("block", [1, 7, 48, 1024])
def test_what_is_decoded_on_the_fly(shape: tuple[int, int], block: int) -> None:
    x, g, seed = torch.randn(shape), torch.randn(shape), seed_tensor(9)
    a, f, s = torch.randn(3, shape[1])
    for bits in BITS:
        codes, ranges, _ = ops.quantize(x.view(-1), seed, bits, block, [], torch.bfloat16, 0)
        for dither in (0.0, 1.0, 2.0):
            back = ops.dequantize(codes, ranges, seed, x.numel(), bits, block, [], dither, torch.float32).view(shape)
            sums = ops.column_sums(codes, ranges, seed, g, bits, block, dither)
            scale = (g * back).abs().double().sum(0) + 1e-30
            assert (((g.double() * back.double()).sum(0) - sums).abs() < 1e-5 * scale).all()
            if dither < 2:
                got = ops.norm_gradient(codes, ranges, seed, g, a, f, s, bits, block, dither)
                own = reference.dither_variance(ranges, x.numel(), bits, block).view(shape) / shape[0] if dither else 0
                assert torch.allclose(got, (g * (1 + own) - a - back * f) * s, rtol=1e-4, atol=1e-4)
            plain = reference.column_sums(codes, ranges, seed, g, bits, block, dither)
            assert torch.allclose(sums, plain, rtol=1e-3, atol=1e-3 * float(scale.max() if scale.numel() else 1))


@pytest.mark.parametrize("reduce", [None, Sample(3), Project(2)], ids=str)
def test_a_function_of_the_rows_is_encoded_in_their_place(reduce: Sample | Project | None) -> None:
    x, shift, scale = torch.randn(50, 12) * 3 + 1, torch.randn(12), torch.rand(12) + 0.5
    config = Config(block=24, reduce=reduce)
    whole = encode((x - shift) * scale, config, 5)
    packed = encode(x, config, 5, Affine(shift, scale, from_statistics=False))
    for a, b in zip(whole.tensors, packed.tensors, strict=True):
        assert torch.equal(a, b)
    assert (packed.shape, packed.dtype) == (whole.shape, whole.dtype)
    x[7, 3] = float("inf")
    assert decode(encode(x, config, 5, Affine(shift, scale, from_statistics=False)))[7, 3].isnan()
    half = encode(x.half(), config, 5, Affine(shift, scale, from_statistics=False))
    assert half.dtype == torch.float32, "statistics are float32 whatever x is"


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_aggregation_of_rows(index: torch.dtype) -> None:
    degrees = torch.randint(12, (300,))
    degrees[5] = degrees[299] = 0
    crow = torch.cat((torch.zeros(1), degrees.cumsum(0))).to(index)
    col = torch.randint(70, (int(degrees.sum()),)).to(index)
    for dtype in (torch.float32, torch.float64):
        values, x = torch.randn(col.numel(), dtype=dtype), torch.randn(70, 33, dtype=dtype)
        dense = torch.zeros(300, 70, dtype=torch.float64)
        dense.index_put_((torch.arange(300).repeat_interleave(degrees), col.long()), values.double(), accumulate=True)
        y = ops.aggregate(crow, col, values, x)
        assert y.dtype == dtype
        assert torch.allclose(y.double(), dense @ x.double(), atol=1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("n", [0, 1, 1000, 70_001])
def test_signs(n: int) -> None:
    seed = seed_tensor(mix(3, n))
    assert torch.equal(ops.signs(seed, n), reference.signs(seed, n))
    if n > 10_000:
        assert abs(ops.signs(seed, n).mean()) < 5 * n**-0.5


def test_dropout_frequency_and_scale() -> None:
    n, p = 200_000, 0.3
    y = ops.dropout(torch.ones(n), seed_tensor(1), p)
    assert set(y.unique().tolist()) == {0.0, float(torch.ones(()).div_(1 - p))}
    assert abs((y == 0).double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [1, 5, 16, 1024, "row"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (100, 48), (33, 128)], ids=str)
def test_bytes(bits: int, block: int | str, shape: tuple[int, int]) -> None:
    """ceil(G bits / 8) a block and 4 bytes of bfloat16 range, the tail being a block like any other; 8 of seed."""
    rows, width = shape
    for reduce, n in (
        (None, rows * width),
        (Project(8), rows * max(1, width // 8)),
        (Sample(8), -(-rows // 8) * width),
    ):
        packed = encode(torch.randn(shape), Config(bits=bits, block=block, reduce=reduce, stats=torch.bfloat16), 1)  # type: ignore[arg-type]
        size = (n // (n // width if reduce is None else 1) if block == "row" else block) if n else 1
        if block == "row":
            size = max(1, width // 8) if isinstance(reduce, Project) else width
        full, tail = divmod(n, int(size))
        codes = full * -(-int(size) * bits // 8) + -(-tail * bits // 8)
        blocks = full + bool(tail)
        ranges = 4 if packed.ranges.dtype == torch.bfloat16 else 8
        flag = 4 if isinstance(reduce, Sample) else 0
        assert packed.nbytes == codes + ranges * blocks + 8 + flag


def test_elements_lie_inside_their_stored_range() -> None:
    x = torch.cat([torch.randn(4096) * s for s in (1e-38, 1e-6, 1.0, 1e30)])
    codes, ranges, _ = ops.quantize(x, seed_tensor(1), 2, 64, [], torch.bfloat16, 0)
    low, high = ranges.float().repeat_interleave(64, 0).T
    assert (low <= x).all()
    assert (x <= high).all()
    value = ops.dequantize(codes, ranges, seed_tensor(1), x.numel(), 2, 64, [], 0.0, torch.float32)
    assert (low <= value).all()
    assert (value <= high).all()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 4),
        torch.zeros(5),
        torch.full((9,), 3.3),
        torch.tensor(2.5),
        torch.tensor([[1.0]]),
        torch.tensor([3e38, -3e38, 1.0]),
        torch.tensor([1e-45, 3e-45, 1e-40]),
        torch.linspace(-1, 1, 50).half(),
        torch.linspace(-1, 1, 50).bfloat16(),
        torch.linspace(-1, 1, 50).double(),
    ],
    ids=["empty", "zeros", "constant", "0-d", "one", "huge", "tiny", "fp16", "bf16", "fp64"],
)
def test_edge_values(x: Tensor) -> None:
    for bits in BITS:
        y = decode(encode(x, Config(bits=bits, stats=torch.float32), 3))
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        if x.numel():
            width = x.double().max() - x.double().min()
            assert (y.double() - x.double()).abs().max() <= width / (2**bits - 1) * 1.01
    if x.numel() and (x == x.flatten()[0]).all():
        assert torch.equal(decode(encode(x, Config(), 1)), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_not_finite_is_never_a_finite_lie(bad: float, config: Config) -> None:
    for row in range(4):  # sampled or not
        x = torch.randn(41, 20)
        x[row, 3] = bad
        y = decode(encode(x, config, 1))
        assert y[row, 3].isnan()
        if config.reduce is None and config.block != 1024:
            assert y.isfinite().any(), "other blocks are untouched"


def test_ranges_stay_float32_where_bfloat16_would_blow_them_up() -> None:
    x = torch.randn(3000) * 0.01 + 1000
    packed = encode(x, Config(), 1)
    assert packed.ranges.dtype == torch.float32
    assert (decode(packed) - x).std() < 0.02
    assert encode(torch.randn(3000), Config(), 1).ranges.dtype == torch.bfloat16


def test_near_float32s_end_nothing_becomes_infinite() -> None:
    """A range rounded up to bfloat16 would be infinite there, and so would a sum of ranges in float32."""
    x = torch.tensor([3.4e38, -3.4e38, 1e38, 3.4028e38]).repeat(300)
    for config in (
        Config(block=2),
        Config(block=1024),
        Config(block=16, levels="normal"),
        Config(block=2, rounding="dither"),
    ):
        for seed in range(20):
            assert decode(encode(x, config, seed)).isfinite().all()


def test_same_seed_same_codes() -> None:
    x = torch.randn(100, 16)
    for config in CONFIGS.values():
        a, b, c = (encode(x, config, seed) for seed in (1, 1, 2))
        assert torch.equal(a.codes, b.codes)
        assert not torch.equal(a.codes, c.codes) or not torch.equal(decode(a), decode(c))


def test_encode_refuses_integers() -> None:
    with pytest.raises(TypeError, match=r"torch.int64; expected a floating-point"):
        encode(torch.arange(3), Config(), 1)


class Encoding(torch.utils.data.Dataset):
    """Encodes in a data loader's worker."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Tensor:
        return encode(big(i), Config(), i).codes


def big(seed: int) -> Tensor:
    """Large enough for the parallel kernels."""
    return torch.randn(3 * 70_000, generator=torch.Generator().manual_seed(seed))


def test_forked_workers_are_safe_after_the_parent_has_used_threads() -> None:
    wanted = [encode(big(i), Config(), i).codes for i in range(2)]
    loader = torch.utils.data.DataLoader(
        Encoding(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for got, codes in zip(loader, wanted, strict=True):
        assert torch.equal(got, codes)


def test_threads_may_use_the_parallel_kernels_at_once() -> None:
    wanted = [encode(big(i), Config(), i).codes for i in range(2)]
    found: list[bool] = []

    def work(i: int) -> None:
        found.extend(torch.equal(encode(big(i), Config(), i).codes, wanted[i]) for _ in range(50))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 100


def test_as_many_threads_as_torch() -> None:
    import numba

    from dibit.codec.backends.cpu import jit
    from dibit.codec.backends.cpu.kernels.elementwise import dropout

    before = torch.get_num_threads()

    def threads_of(local: dict[str, Any]) -> int:
        """0: the serial kernel."""
        return numba.get_num_threads() if local["kernel"] is dropout.parallel else 0

    try:
        with watched(jit._called, note=threads_of) as used:
            for threads in (2, 1):
                torch.set_num_threads(threads)
                ops.dropout(big(0), seed_tensor(1), 0.5)
    finally:
        torch.set_num_threads(before)
    assert used == ([2, 0] if numba.config.NUMBA_NUM_THREADS > 1 else [0, 0]), "with one thread the serial one serves"


def test_ctrl_c_while_a_kernel_is_loaded_comes_afterwards() -> None:
    """LLVM calls back into Python then, where an exception is dropped: the handler must not be the usual one."""
    from dibit.codec.backends.cpu import jit

    during: list[object] = []

    class New:
        signatures: tuple[object, ...] = ()
        stats = kernels_stats()

        def py_func(self) -> None: ...

        def __call__(self) -> str:
            during.append(signal.getsignal(signal.SIGINT))
            signal.raise_signal(signal.SIGINT)
            during.append("went on")
            return "done"

    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        jit._called(New(), ())
    assert during[0] is not usual
    assert during[1] == "went on"
    assert signal.getsignal(signal.SIGINT) is usual


def kernels_stats() -> object:
    from dibit.codec.backends.cpu.kernels.elementwise import relu

    return relu.serial.stats


@pytest.mark.slow
def test_says_once_that_it_compiles(tmp_path: Path) -> None:
    code = (
        "import torch, dibit\nfor n in (100, 100_000): dibit.decode(dibit.encode(torch.randn(n), dibit.Config(), 1))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for times in (1, 0):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stderr.count("dibit: compiling kernels for this processor") == times


ROWS = torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 1, 2, 3], dtype=torch.int32)
ORDER = torch.tensor([4, 0, 1, 3, 2], dtype=torch.int32)


def _signs() -> Tensor:
    return ops.edge_signs(*ROWS, ORDER, torch.randn(3, 2, 9), torch.randn(4, 2, 9))


def _extremes() -> tuple[Tensor, Tensor]:
    """Features, and their maxima over neighbours."""
    x, y = torch.randn(4, 9), torch.zeros(3, 9)
    ops.edge_extremes(y, *ROWS, x, False)
    return x, y


SAMPLES = {
    "quantize": lambda: (torch.randn(100), seed_tensor(1), 2, 16, [], torch.bfloat16, 0),
    "dequantize": lambda: (
        *ops.quantize(torch.randn(100), seed_tensor(1), 2, 16, [], torch.bfloat16, 0)[:2],
        seed_tensor(1),
        100,
        2,
        16,
        [],
        0.0,
        torch.float32,
    ),
    "column_sums": lambda: (
        *ops.quantize(torch.randn(100), seed_tensor(1), 2, 16, [], torch.bfloat16, 0)[:2],
        seed_tensor(1),
        torch.randn(10, 10),
        2,
        16,
        2.0,
    ),
    "norm_gradient": lambda: (
        *ops.quantize(torch.randn(100), seed_tensor(1), 2, 16, [], torch.bfloat16, 0)[:2],
        seed_tensor(1),
        torch.randn(10, 10),
        torch.randn(10),
        torch.randn(10),
        torch.rand(10),
        2,
        16,
        1.0,
    ),
    "pack_mask": lambda: (torch.randn(5, 9),),
    "relu": lambda: (torch.randn(5, 9),),
    "scale_masked": lambda: (torch.randn(5, 9), ops.pack_mask(torch.randn(5, 9)), 1.25),
    "apply_mask": lambda: (torch.randn(5, 9), ops.pack_mask(torch.randn(5, 9)), 0.1),
    "dropout": lambda: (torch.randn(5, 9), seed_tensor(1), 0.5),
    "signs": lambda: (seed_tensor(1), 100),
    "aggregate": lambda: (torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 1, 2, 3]), torch.rand(5), torch.randn(4, 9)),
    "sort_edges": lambda: (torch.tensor([3, 0, 2, 3]), 4),
    "add_neighbours": lambda: (torch.randn(3, 9), *ROWS, torch.rand(5), torch.randn(4, 9)),
    "add_rows": lambda: (torch.randn(4, 9), ROWS[1], torch.randn(5, 9)),
    "add_scaled": lambda: (torch.randn(3, 2, 9), *ROWS, ORDER, torch.rand(5, 2), torch.randn(4, 2, 9)),
    "edge_products": lambda: (*ROWS, ORDER, torch.randn(3, 2, 9), torch.randn(4, 2, 9)),
    "edge_signs": lambda: (*ROWS, ORDER, torch.randn(3, 2, 9), torch.randn(4, 2, 9)),
    "add_signed": lambda: (torch.randn(3, 2, 9), ROWS[0], ORDER, _signs(), torch.rand(5, 2), 0.2),
    "edge_extremes": lambda: (torch.zeros(3, 9), *ROWS, torch.randn(4, 9), False),
    "edge_winners": lambda: (*ROWS, *_extremes()),
    "add_winners": lambda: (torch.zeros(4, 9), *ROWS, *ops.edge_winners(*ROWS, *_extremes()), torch.randn(3, 9), None),
    "row_scores": lambda: (torch.randn(5, 9),),
    "pick_rows": lambda: (torch.arange(9, dtype=torch.uint8), seed_tensor(1), 2),
    "quantize_rows": lambda: (
        torch.randn(20, 6),
        torch.tensor([3, 4, 19]),
        torch.randn(6),
        torch.rand(6),
        seed_tensor(1),
        2,
        16,
        [],
        torch.bfloat16,
        0,
    ),
    "weight_gradient": lambda: (
        *ops.quantize(torch.randn(100), seed_tensor(1), 2, 16, [], torch.bfloat16, 0)[:2],
        seed_tensor(1),
        torch.randn(20, 3),
        torch.arange(10),
        torch.rand(10),
        10,
        10,
        2,
        16,
        [],
        1.0,
    ),
    "norm_relu_dropout": lambda: (
        torch.randn(5, 9),
        torch.randn(9),
        torch.rand(9),
        torch.randn(9),
        seed_tensor(1),
        0.5,
    ),
    "relu_dropout_gradient": lambda: (torch.randn(5, 9), ops.pack_mask(torch.randn(5, 9)), seed_tensor(1), 0.5),
    "passed_rows": lambda: (
        *ops.quantize(torch.randn(60), seed_tensor(1), 2, 16, [], torch.bfloat16, 0)[:2],
        seed_tensor(1),
        torch.randn(6),
        torch.randn(6),
        ops.pack_mask(torch.randn(10, 6)),
        0.0,
        seed_tensor(2),
        0.5,
        0,
        10,
        10,
        2,
        16,
        1.0,
    ),
    "finite": lambda: (torch.randn(5, 9),),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    op = getattr(ops, name)
    assert op in ops.OPS
    torch.library.opcheck(op, SAMPLES[name]())


def test_every_operator_is_checked() -> None:
    assert {op._name for op in ops.OPS} == set(SAMPLES)


@pytest.mark.parametrize(
    "config",
    [Config(bits=2, block=96), Config(bits=4, block="row", rounding="dither"), Config(reduce=Sample(3), block=96)],
)
@pytest.mark.parametrize("affine", [False, True])
def test_in_parts_as_at_once(config: Config, affine: bool) -> None:
    """Rounding numbers go with the element, not with the part; sampled rows are gathered part by part."""
    x = torch.randn(1001, 12)
    function = Affine(torch.randn(12), torch.rand(12), from_statistics=False) if affine else None
    whole = encode(x, config, 3, function)
    expected = whole.reduced()
    dy = torch.randn(1001, 5)
    gradient = Compressed(whole).outer(dy)
    with layout.parts_of(96 * 3):
        own = encode(x, config, 3, function)
        in_parts = Compressed(own).outer(dy)
    assert torch.equal(own.codes, whole.codes)
    assert torch.equal(own.ranges, whole.ranges)
    full = dy if (sample := own.sample(dy.dtype)) is None else dy[sample[0]] * sample[1][:, None]
    for grad in (gradient, in_parts):
        assert torch.allclose(grad, full.T @ expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("levels", [[], [0.0, 0.6, 2.2, 3.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_encoded_and_multiplied_agree(levels: list[float], dtype: torch.dtype) -> None:
    """Gathering, moving and scaling, and products without the tensor: as the definition has them."""
    x, index = torch.randn(300, 12).to(dtype), torch.randperm(300)[:77]
    shift, scale = (v.to(torch.promote_types(dtype, torch.float32)) for v in (torch.randn(12), torch.rand(12)))
    stats = torch.float64 if dtype == torch.float64 else torch.bfloat16
    for rows, moved in itertools.product((index, None), ((shift, scale), (None, None))):
        args = x, rows, *moved, seed_tensor(4), 2, 48, levels, stats, 0
        fast, plain = ops.quantize_rows(*args), reference.quantize_rows(*args)
        assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))
        count = 300 if rows is None else 77
        dy, weight = torch.randn(300, 5).to(dtype), torch.rand(count, dtype=shift.dtype)
        args = *fast[:2], seed_tensor(4), dy, rows, None if rows is None else weight, count, 12, 2, 48, levels, 0.0
        a, b = ops.weight_gradient(*args), reference.weight_gradient(*args)
        assert a.dtype == b.dtype == shift.dtype
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [(0, 3), (1, 1), (7, 5), (3001, 33)])
@pytest.mark.parametrize("p", [0.0, 0.5, 0.3])
def test_norm_relu_and_dropout_in_one_pass(n: tuple[int, int], p: float) -> None:
    x, seed = torch.randn(n), seed_tensor(11)
    mean, gain, bias = torch.randn(n[1]), torch.rand(n[1]), torch.randn(n[1])
    x[1::9], gain[0] = float("nan"), 0
    fast, plain = (f.norm_relu_dropout(x, mean, gain, bias, seed, p) for f in (ops, reference))
    assert torch.equal(fast[0].view(torch.int32), plain[0].view(torch.int32))
    assert torch.equal(fast[1], plain[1])
    h = torch.relu((x - mean) * gain + bias)
    assert torch.equal(fast[0].nan_to_num(7), (h if p == 0 else ops.dropout(h, seed, p)).nan_to_num(7))
    grad = torch.randn(n)
    fast, plain = (f.relu_dropout_gradient(grad, fast[1], seed, p) for f in (ops, reference))
    assert torch.equal(fast, plain)


@pytest.mark.parametrize(("rows", "width"), [(1, 3), (40, 33), (700, 16)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [16, 33 * 8, 10_000])
@pytest.mark.parametrize(("slope", "masked", "dropped"), [(0.0, False, False), (0.2, True, False), (0.0, True, True)])
def test_rows_that_pass_a_norm_relu_and_dropout(
    rows: int, width: int, bits: int, block: int, slope: float, masked: bool, dropped: bool
) -> None:
    """Part by part as the definition has the whole, a block that is not finite among them."""
    x = torch.randn(rows, width)
    x[rows // 2, 0] = float("inf")
    codes, ranges, _ = ops.quantize(x.reshape(-1), seed_tensor(4), bits, block, [], torch.bfloat16, 0)
    mask = ops.pack_mask(torch.randn(rows, width)) if masked else None
    drop = seed_tensor(7) if dropped else None
    for dither, dtype in itertools.product((0.0, 1.0), (torch.float32, torch.float64)):
        weight, bias = torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype)
        args = codes, ranges.to(dtype), seed_tensor(4), weight, bias, mask, slope, drop, 0.3
        rest = rows, bits, block, dither
        with layout.parts_of(500):
            parts = [ops.passed_rows(*args, start, stop, *rest) for start, stop in layout.row_parts(rows, width, block)]
        found, expected = torch.cat(parts), reference.passed_rows(*args, 0, rows, *rest)
        assert found.dtype == expected.dtype == dtype
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("number", [0, 48 * 5, 2**32 // 48 * 48 - 96, 2**40 // 48 * 48])
def test_backends_agree_on_a_part(number: int) -> None:
    x, seed = torch.randn(1000), seed_tensor(5)
    fast = ops.quantize(x, seed, 2, 48, [], torch.bfloat16, 0, number)
    plain = reference.quantize(x, seed, 2, 48, [], torch.bfloat16, 0, number)
    assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))
    a, b = (
        f(*fast[:2], seed, 1000, 2, 48, [], 1.0, torch.float32, number) for f in (ops.dequantize, reference.dequantize)
    )
    assert torch.equal(a, b)
