"""Sampling by scores: known probabilities, a fixed number of rows, nothing lost that could count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dibit import Config, Sample, decode, encode
from dibit.codec import encoded_bytes, mix, norm_scores, ops, seed_tensor
from dibit.codec.backends import reference
from dibit.codec.keep_probabilities import FIXED_POINT_ONE, FLOOR, LEFT_OUT, keep_probabilities
from dibit.codec.row_sampling import add_scores, by_length, row_scores, unevenness
from tests.unbiased import bias_of


def scores_like(kind: str, n: int) -> Tensor:
    torch.manual_seed(n)
    match kind:
        case "long tail":
            return row_scores(torch.randn(n, 4) * torch.exp(3 * torch.randn(n, 1)))
        case "few count":
            x = torch.zeros(n, 4)
            x[:: max(1, n // 3)] = 5
            return row_scores(x)
        case "nothing known":
            return torch.zeros(n, dtype=torch.uint8)
        case "equal":
            return torch.full((n,), 130, dtype=torch.uint8)
        case "left out":
            s = row_scores(torch.randn(n, 4))
            s[(n + 1) // 2 :] = LEFT_OUT
            return s
    raise AssertionError(kind)


KINDS = ("long tail", "few count", "nothing known", "equal", "left out")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "count"), [(1, 1), (7, 2), (950, 106), (1000, 1), (1000, 480), (4097, 1366)])
def test_probabilities_add_up_to_the_rows(kind: str, n: int, count: int) -> None:
    scores = scores_like(kind, n)
    if (scores < LEFT_OUT).sum() < count:
        count = max(1, int((scores < LEFT_OUT).sum()))
    chance = keep_probabilities(scores, count)
    own = chance[scores.long()]
    assert chance.max() <= FIXED_POINT_ONE
    assert 0 <= count * FIXED_POINT_ONE - own.sum() <= n
    assert ((own > 0) == (scores < LEFT_OUT)).all()
    uncertain = own[(own < FIXED_POINT_ONE) & (own > 0)].double()
    value = torch.exp2((scores.double() - 127) / 2) * (scores > 0) * (scores < LEFT_OUT)
    value = torch.where(scores < LEFT_OUT, value + (FLOOR * value.sum() / (scores < LEFT_OUT).sum() or 1), 0)
    ratio = uncertain / value[(own < FIXED_POINT_ONE) & (own > 0)]
    if len(ratio):
        assert ratio.max() / ratio.min() < 1 + 1e-4, "proportional wherever not certain"
        certain = own == FIXED_POINT_ONE
        assert not certain.any() or (value[certain].min() * ratio.min() / FIXED_POINT_ONE) >= 1 - 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [7, 1000])
@pytest.mark.statistics
def test_rows_come_as_often_as_they_should(kind: str, n: int) -> None:
    scores, draws = scores_like(kind, n), 4000
    count = max(1, n // 8)
    own = keep_probabilities(scores, count)[scores.long()].double() / FIXED_POINT_ONE
    often = torch.zeros(n, dtype=torch.float64)
    for i in range(draws):
        index, weight = ops.pick_rows(scores, seed_tensor(mix(i, "rows")), count)
        assert index.shape == weight.shape == (count,)
        live = weight > 0
        assert live.sum() >= count - 1
        assert (index[live].diff() > 0).all(), "without replacement"
        assert torch.allclose(weight[live].double(), 1 / own[index[live]])
        often[index[live]] += 1
    error = (often / draws - own) / (own * (1 - own) / draws).sqrt().clamp(min=1e-9)
    assert error[own * (1 - own) > 0].abs().max() < 5
    assert (often[own == 1] == draws).all()
    assert (often[own == 0] == 0).all()


@pytest.mark.parametrize("by", ["uniform", "norm", "gradient"])
@pytest.mark.statistics
def test_unbiased(by: str) -> None:
    """Rows of zeros and certain rows among them; `gradient` is given scores that have nothing to do with x."""
    torch.manual_seed(0)
    x = torch.randn(57, 6) * torch.exp(1.5 * torch.randn(57, 1))
    x[5:9] = 0
    x[20] = 100
    scores = scores_like("long tail", 57) if by == "gradient" else None
    config = Config(bits=8, block=24, reduce=Sample(4, by=by))  # type: ignore[arg-type]
    bias = bias_of(lambda i: decode(encode(x, config, mix(i), scores=scores)), x, 3000)
    assert bias.unbiased, bias
    if by == "norm":
        packed = encode(x, config, 0)
        assert packed.scores is not None
        assert 20 in packed.sample(torch.float32)[0]
        assert packed.count == 15


def test_norms_beat_uniform_on_a_long_tail() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 8) * torch.exp(1.5 * torch.randn(2000, 1))
    dy = torch.randn(2000, 3)

    def error(by: str) -> float:
        total = 0.0
        for i in range(20):
            packed = encode(x, Config(bits=8, block="row", reduce=Sample(8, by=by)), mix(i))  # type: ignore[arg-type]
            index, weight = packed.sample(torch.float32)
            total += float((dy[index].T @ (packed.reduced() * weight[:, None]) - dy.T @ x).square().sum())
        return total

    assert error("norm") < 0.4 * error("uniform")


def test_backends_agree() -> None:
    for kind in KINDS:
        scores = scores_like(kind, 999)
        for count in (1, 100, 300):
            for i in range(5):
                fast, plain = (f.pick_rows(scores, seed_tensor(mix(i)), count) for f in (ops, reference))
                assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))
    for width in (1, 15, 16, 40):
        x = torch.randn(700, width) * torch.exp(10 * torch.randn(700, 1))
        x[3], x[4], x[5, 0], x[6, 0] = 0, 1e-30, float("nan"), float("inf")
        fast, plain = ops.row_scores(x), reference.row_scores(x)
        assert ((fast.int() - plain.int()).abs() <= 1).all()
        assert (fast == plain).float().mean() > 0.99
        assert fast[3] == fast[4] == 0
        assert fast[5] == fast[6] == LEFT_OUT
    assert ops.row_scores(torch.empty(4, 0)).tolist() == [0] * 4


def test_scores_stand_for_squared_norms() -> None:
    x = torch.randn(500, 9) * torch.exp(5 * torch.randn(500, 1))
    exact = x.double().square().sum(1)
    value = torch.exp2(row_scores(x).double() - 127)
    assert ((exact / value >= 1 - 1e-6) & (exact / value < 2 + 1e-6)).all()
    y = torch.randn(500, 9) * torch.exp(5 * torch.randn(500, 1))
    both = exact + y.double().square().sum(1)
    value = torch.exp2(add_scores(row_scores(x), row_scores(y)).double() - 127)
    assert ((both / value >= 0.5) & (both / value < 4)).all()
    nan = torch.tensor([LEFT_OUT, LEFT_OUT, 7, 0, 254], dtype=torch.uint8)
    assert add_scores(nan, torch.tensor([3, LEFT_OUT, 7, 0, 254], dtype=torch.uint8)).tolist() == [255, 255, 8, 0, 254]


def test_huge_rows_are_not_left_out() -> None:
    x = torch.full((8, 4), 1e30)
    assert norm_scores(x).tolist() == [LEFT_OUT - 1] * 8
    x[3, 1] = float("nan")
    assert decode(encode(x, Config(reduce=Sample(4, by="norm")), 1)).isnan().all(), "never a finite lie"


@pytest.mark.parametrize("by", ["uniform", "norm", "gradient"])
@pytest.mark.slow
def test_at_least_one_row(by: str) -> None:
    x = torch.randn(3, 40)
    config = Config(reduce=Sample(1000, by=by))  # type: ignore[arg-type]
    scores = row_scores(x) if by == "gradient" else None
    packed = encode(x, config, 1, scores=scores)
    assert packed.reduced().shape == (1, 40)
    assert bias_of(lambda i: decode(encode(x, config, mix(i), scores=scores)), x, 3000).unbiased
    with pytest.raises(ValueError, match="by = 'size' was given"):
        Sample(8, by="size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Sample\.ratio = 0 was given; expected a whole number of at least 1"):
        Sample(0)


def test_scores_take_their_byte() -> None:
    x = torch.randn(800, 32)
    a, b = (encode(x, Config(reduce=Sample(8, by=by)), 1) for by in ("uniform", "norm"))  # type: ignore[arg-type]
    assert b.nbytes - a.nbytes == 800
    again = b.without_tensors().with_tensors(b.tensors)
    assert torch.equal(decode(again), decode(b))


@pytest.mark.parametrize("by", ["uniform", "norm", "gradient"])
@pytest.mark.parametrize(("rows", "kept"), [(5000, 500), (950, 106), (200, 100), (150, 150), (3, 3)])
def test_of_few_rows_more_are_kept(by: str, rows: int, kept: int) -> None:
    """One of 10, or of so few that at least 100 are kept; all of them without scores, and no range is wasted."""
    reduce = Sample(10, by=by, least=100)  # type: ignore[arg-type]
    x = torch.randn(rows, 16)
    scores = norm_scores(x) if by != "uniform" else None
    packed = encode(x, Config(bits=2, block=16, reduce=reduce), 0, scores=scores)
    assert packed.reduced_shape == (kept, 16)
    assert (packed.scores is None) == (by == "uniform" or kept == rows)
    assert packed.codes.nbytes + packed.ranges.nbytes == encoded_bytes(x.shape, Config(bits=2, block=16, reduce=reduce))


def test_at_least_so_many_rows_is_checked() -> None:
    with pytest.raises(ValueError, match="least"):
        Sample(8, least=0)


def test_the_score_of_a_product_of_lengths() -> None:
    dy, x = torch.randn(500, 3) * torch.exp(torch.randn(500, 1)), torch.randn(500, 5) * torch.exp(torch.randn(500, 1))
    dy[3], x[4] = 0, 0
    a, b = row_scores(dy), norm_scores(x)
    a[7] = LEFT_OUT
    found = by_length(a, b)
    assert found.dtype == torch.uint8
    assert found[3] == found[4] == 0
    assert found[7] == LEFT_OUT
    exact = (dy.square().sum(1) * x.square().sum(1)).log2() + 127
    rest = torch.tensor([i for i in range(500) if i not in (3, 4, 7)])
    assert ((found[rest] - exact[rest]).abs() <= 2).all()
    largest = by_length(torch.full((1,), 250, dtype=torch.uint8), torch.full((1,), 250, dtype=torch.uint8))
    assert largest == LEFT_OUT - 1, "too large for a byte is no row that is left out"


def test_unevenness_is_that_of_the_lengths() -> None:
    x = torch.exp(torch.randn(20_000, 1)) * torch.nn.functional.normalize(torch.randn(20_000, 4))
    lengths = x.norm(dim=1)
    exact = float(lengths.square().mean() / lengths.mean() ** 2)
    assert unevenness(norm_scores(x)) == pytest.approx(exact, rel=0.1)
    assert unevenness(torch.full((9,), 131, dtype=torch.uint8)) == pytest.approx(1)
    assert unevenness(torch.zeros(9, dtype=torch.uint8)) == 1
