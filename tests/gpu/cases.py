"""Calls on which the GPU's kernels must give the definition's numbers: in the interpreter, and on a real GPU.

Used by the tests here and by benchmarks/gpu.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dibit.codec import seed_tensor
from dibit.codec.backends import reference
from dibit.codec.keep_probabilities import LEFT_OUT
from dibit.edges.extremes import LEAST_WIDTH

BITS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = -3


class Case(NamedTuple):
    """A call of an operator, tensors on the CPU; `tolerance` relative to the largest number, 0 for bit for bit."""

    title: str
    operator: str
    args: tuple[Any, ...]
    tolerance: float = 0.0


def apart(found: Any, expected: Any, tolerance: float) -> float:
    """How far results lie from the expected ones: 0 where they are the same, NaN with NaN."""
    worst = 0.0
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
        if torch.equal(a, b):
            continue
        if not tolerance:
            return float("inf")
        a, b = a.double(), b.double()
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return worst


def computed(kernels: Any, case: Case, device: str = "cpu") -> Any:
    """What an operator returns, or what it has written to its first argument; on the CPU."""
    args = [x.to(device, copy=True) if isinstance(x, Tensor) else x for x in case.args]
    found = getattr(kernels, case.operator)(*args)
    if found is None:
        found = args[0]
    if case.operator == "edge_extremes":
        found = found, found.signbit() & ~found.isnan()  # also of zeros
    return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()


def expected(case: Case) -> Any:
    """By the definition; sums in float64, whose order does not show."""
    found = computed(reference, case)
    if not case.tolerance or case.operator not in ("weight_gradient", "column_sums"):
        return found
    wide = tuple(
        x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 and x.dim() == 2 else x for x in case.args
    )
    return getattr(reference, case.operator)(*wide).to(found.dtype)


def awkward(n: int) -> Tensor:
    """Numbers that take every branch: constants, NaN, infinities, tiny ones, both zeros."""
    x = torch.randn(n) * 3 + 1
    x[n // 2 : n // 2 + 400] = -2.5
    x[n // 4 : n // 4 + 300] *= 1e-40
    x[1::50], x[3::50] = 0.0, -0.0
    x[n // 7 :: max(1, n // 2)] = float("nan")
    x[n // 5 :: max(1, n // 2)] = float("-inf")
    return x


def levels_of(bits: int) -> list[float]:
    """Unequal levels."""
    top = 2**bits - 1
    return [top * (i / top) ** 1.5 for i in range(top + 1)]


def codes(bits: int, scale: int) -> Iterator[Case]:
    """Quantised and unpacked: block sizes, levels, ranges, rounding, dither, dtypes, short blocks."""
    seed = seed_tensor(SEED)
    sizes = (1, 5), (3, 1), (7, 703), (128, 1025), (128, 4103), (1000, 4103), (1024, 4103), (1024, 0), (9001, 9001)
    for block, n in sizes:
        x = awkward(n * scale // block * block + n % block if n > 5 else n)  # the short block stays as it is
        for levels, (stats, rounding) in itertools.product(
            ([], levels_of(bits)), ((torch.bfloat16, 0), (torch.float32, 0), (torch.bfloat16, 1))
        ):
            title = f"{bits} bit, block {block} of {x.numel()}, {'levels' if levels else 'uniform'}, {str(stats)[6:]}"
            args = (x, seed, bits, block, levels, stats, rounding)
            yield Case(f"quantise {title}, rounding {rounding}", "quantize", args)
            kept = reference.quantize(*args)[:2]
            for dither, dtype in itertools.product((0.0,) if levels else (0.0, 2.0), DTYPES):
                own = (*kept, seed, x.numel(), bits, block, levels, dither, dtype)
                yield Case(f"unpack {title}, {str(dtype)[6:]}, dither {dither}", "dequantize", own)
    for n, block in ((70_000, 32_000), (20_000, 9_000)):  # blocks that several programs share
        args = (torch.randn(n), seed, bits, block, [], torch.bfloat16, 0)
        yield Case(f"quantise {bits} bit, block {block} of {n}", "quantize", args)
        own = (*reference.quantize(*args)[:2], seed, n, bits, block, [], 1.0, torch.float32)
        yield Case(f"unpack {bits} bit, block {block} of {n}", "dequantize", own)
    for spread in (3e38, 1e30, 1e-30, 1e-44):
        args = ((torch.rand(500) * 2 - 1) * spread, seed, bits, 64, [], torch.float32, 0)
        yield Case(f"quantise {bits} bit, numbers up to {spread}", "quantize", args)
        for dither in (0.0, 1.0):
            own = (*reference.quantize(*args)[:2], seed, 500, bits, 64, [], dither, torch.float32)
            yield Case(f"unpack {bits} bit, numbers up to {spread}, dither {dither}", "dequantize", own)
    for number in (480, 2**32 // 48 * 48 - 480, 2**40 // 48 * 48):  # 64 bits, whose lower half wraps within a block
        args = (torch.randn(1000), seed, bits, 48, [], torch.bfloat16, 0, number)
        yield Case(f"quantise {bits} bit, from {number}", "quantize", args)
        own = (*reference.quantize(*args)[:2], seed, 1000, bits, 48, [], 1.0, torch.float32, number)
        yield Case(f"unpack {bits} bit, from {number}", "dequantize", own)
    for dtype in DTYPES[1:]:
        args = ((torch.randn(3000) * 100).to(dtype), seed, bits, 128, [], torch.bfloat16, 0)
        yield Case(f"quantise {bits} bit, {str(dtype)[6:]}", "quantize", args)
        args = (torch.full((200,), 65504.0).to(dtype), seed, bits, 128, [], torch.bfloat16, 0)
        own = (*reference.quantize(*args)[:2], seed, 200, bits, 128, [], 0.0, dtype)
        yield Case(f"unpack {bits} bit, the largest of {str(dtype)[6:]}", "dequantize", own)


def rows(bits: int, scale: int) -> Iterator[Case]:
    """Gathered, moved and scaled on the way; products with what was encoded, sums in another order."""
    seed = seed_tensor(SEED)
    for (width, block), dtype in itertools.product(
        ((12, 48), (33, 128), (128, 128), (128, 1024), (256, 64), (40, 9000), (8, 7), (16, 63), (32, 121)), DTYPES[:2]
    ):
        n = 101 * scale
        x, index = torch.randn(n, width).to(dtype), torch.randperm(n)[: n // 3 + 5].sort().values
        x[7, 1], x[index[5], 2] = float("nan"), 1e30
        moves = torch.randn(width), torch.rand(width)
        for where, moved in itertools.product((index, None), (moves, (None, None))):
            title = f"{'some' if where is not None else 'all'} rows{', moved' if moved[0] is not None else ''}"
            args = (x, where, *moved, seed, bits, block, [], torch.bfloat16, 0)
            yield Case(f"quantise {bits} bit, {title}, width {width}, block {block}", "quantize_rows", args)
    for n, width, block in ((70, 128, 128), (70, 40, 1024), (33, 130, 96), (9, 8, 7), (33, 300, 9000)):
        n = n * scale
        x, title = torch.randn(n, width), f"{bits} bit, width {width}, block {block}"
        for levels, dither in (([], 0.0), ([], 1.0), (levels_of(bits), 0.0)):
            kept = reference.quantize(x.view(-1), seed, bits, block, levels, torch.bfloat16, 0)[:2]
            dy, index, weight = torch.randn(3 * n, 70), torch.randperm(3 * n)[:n], torch.rand(n) * 9
            for own in ((dy, index, weight), (dy[:n].contiguous(), None, None)):
                args = (*kept, seed, *own, n, width, bits, block, levels, dither)
                yield Case(f"weight gradient, {title}", "weight_gradient", args, 3e-6)
        kept = reference.quantize(x.view(-1), seed, bits, block, [], torch.bfloat16, 0)[:2]
        g, vectors = torch.randn(n, width), [torch.randn(width) for _ in range(3)]
        for dither in (0.0, 2.0):
            yield Case(f"column sums, {title}", "column_sums", (*kept, seed, g, bits, block, dither), 3e-6)
        for dither in (0.0, 1.0):
            args = (*kept, seed, g, *vectors, bits, block, dither)
            yield Case(f"norm gradient, {title}", "norm_gradient", args, 3e-6 if dither else 0.0)
        mask, drop = reference.pack_mask(torch.randn(n, width)), seed_tensor(8)
        first = math.lcm(block, width) // width  # the first row after 0 that begins a block, if there is one
        first = first if first < n else 0
        for bits_of, slope, own in ((None, 0.0, None), (mask, 0.2, None), (mask, 0.0, drop), (None, 0.0, drop)):
            args = (*kept, seed, *vectors[:2], bits_of, slope, own, 0.3, first, n, n, bits, block, 1.0)
            yield Case(f"rows behind a norm, slope {slope}, {title}", "passed_rows", args)


def elementwise(scale: int) -> Iterator[Case]:
    """Masks, dropout, signs, norm with ReLU and dropout."""
    seed = seed_tensor(SEED)
    for n, dtype in itertools.product((0, 1, 7, 8, 9, 1000, 9001), DTYPES):
        n = n * scale if n > 9 else n
        x, grad, title = awkward(n).to(dtype), torch.randn(n).to(dtype), f"{n} elements, {str(dtype)[6:]}"
        mask = reference.pack_mask(x)
        yield Case(f"pack a mask, {title}", "pack_mask", (x,))
        yield Case(f"ReLU, {title}", "relu", (x,))
        for slope in (0.0, 0.2):
            yield Case(f"apply a mask, slope {slope}, {title}", "apply_mask", (grad, mask, slope))
        yield Case(f"scale by a mask, {title}", "scale_masked", (grad, mask, 1.25))
        for p in (0.5, 0.9):
            yield Case(f"dropout {p}, {title}", "dropout", (x, seed, p))
        for p in (0.0, 0.3):
            yield Case(f"back through dropout {p} and ReLU, {title}", "relu_dropout_gradient", (grad, mask, seed, p))
        yield Case(f"finite, {title}", "finite", (grad,))
        yield Case(f"finite, {title}, not", "finite", (x,))
        yield Case(f"signs, {n}", "signs", (seed, n))
    for (n, width), p in itertools.product(((1, 1), (7, 5), (300, 33), (40, 128)), (0.0, 0.5)):
        x = torch.randn(n * scale, width)
        x[1::9] = float("nan")
        args = (x, torch.randn(width), torch.rand(width), torch.randn(width), seed, p)
        yield Case(f"norm, ReLU and dropout {p}, width {width}", "norm_relu_dropout", args)


def sampling(scale: int) -> Iterator[Case]:
    """The same rows are picked, by every kind of scores."""
    for n, count in ((1, 1), (7, 2), (1000, 1), (1000, 480), (5000, 700), (3000, 1500)):
        n, count = (n * scale, count * scale) if n > 7 else (n, count)
        few, left_out = torch.zeros(n, 4), reference.row_scores(torch.randn(n, 4))
        few[:: max(1, n // 3)] = 5
        left_out[(n + 1) // 2 :] = LEFT_OUT
        kinds = {
            "long tail": reference.row_scores(torch.randn(n, 4) * torch.exp(3 * torch.randn(n, 1))),
            "nothing known": torch.zeros(n, dtype=torch.uint8),
            "few count": reference.row_scores(few),
            "left out": left_out,
        }
        for kind, scores in kinds.items():
            some = min(count, int((scores < LEFT_OUT).sum()))
            yield Case(f"pick {some} of {n} rows, {kind}", "pick_rows", (scores, seed_tensor(n + some), some), 1e-6)
    for width, dtype in itertools.product((1, 15, 40, 300), DTYPES):
        x = torch.randint(-8, 9, (130 * scale, width)).to(dtype)  # sums are exact in any order
        x[3], x[5, 0], x[6, 0] = 0, float("nan"), float("inf")
        yield Case(f"scores of rows, width {width}, {str(dtype)[6:]}", "row_scores", (x,))


def edges(scale: int) -> Iterator[Case]:
    """Sums over the edges of graphs: nodes without edges and with many, in an order of their own or in the graph's."""
    for (nodes, others, each, pointers), (heads, width) in itertools.product(
        ((1, 1, 1, torch.int32), (12, 10, 4, torch.int32), (3, 40, 20, torch.int64)),
        ((1, 1), (1, 20), (1, 300), (4, 8), (3, 33)),
    ):
        nodes, title = nodes * scale, f"{nodes * scale} nodes, {heads} heads of {width}, {str(pointers)[6:]}"
        degree = torch.randint(2 * each + 1, (nodes,)) * (torch.rand(nodes) < 0.8)
        degree[0] = 1
        crow = torch.cat((torch.zeros(1, dtype=torch.int64), degree.cumsum(0))).to(pointers)
        count = int(crow[-1])
        col, order = torch.randint(others, (count,)).to(pointers), torch.randperm(count).to(pointers)
        a, x, scales = torch.randn(nodes, heads, width), torch.randn(others, heads, width), torch.randn(count, heads)
        x[0, 0, 0], scales[count // 2] = float("nan"), -0.0
        out, flat = torch.randn(nodes, heads, width), (torch.randn(nodes, heads * width), x.flatten(1))
        for values in (None, scales[:, 0].contiguous()):
            how = "sums" if values is None else "weighted sums"
            yield Case(f"{how}, {title}", "add_neighbours", (flat[0], crow, col, values, flat[1]))
        for own in (None, order):
            graph, how = (crow, col, own), f"{title}{'' if own is None else ', in the order of the caller'}"
            signs = reference.edge_signs(*graph, a, x)
            yield Case(f"scaled sums, {how}", "add_scaled", (out, *graph, scales, x))
            yield Case(f"products of ends, {how}", "edge_products", (*graph, a, x), 3e-6)
            yield Case(f"signs of sums, {how}", "edge_signs", (*graph, a, x))
            for slope in (0.0, 0.2):
                yield Case(f"sums by sign, slope {slope}, {how}", "add_signed", (out, crow, own, signs, scales, slope))


def extremes(scale: int) -> Iterator[Case]:
    """Maxima and minima over edges, those that attain them, and the gradient: ties, NaN, infinities, zeros of both
    signs, nodes without edges, with one and with many, and with an equal value that was there before."""
    for (nodes, others, each, pointers), width in itertools.product(
        ((1, 1, 1, torch.int32), (5, 7, 2, torch.int32), (2, 20, 9, torch.int64)), (1, 17, 130)
    ):
        nodes = nodes * scale
        degree = torch.randint(2 * each + 1, (nodes,)) * (torch.rand(nodes) < 0.8)
        degree[0], degree[-1] = 1, 2 * each
        crow = torch.cat((torch.zeros(1, dtype=torch.int64), degree.cumsum(0))).to(pointers)
        count = int(crow[-1])
        col, plain = torch.randint(others, (count,)).to(pointers), torch.randn(others, width)
        odd = torch.tensor([math.nan, -math.inf, math.inf])[torch.randint(3, plain.shape)]
        features = {
            "no ties": plain,
            "few numbers": torch.randint(-1, 2, plain.shape).float(),
            "after a ReLU": (plain - 1).relu(),
            "not finite": torch.where(torch.rand(plain.shape) < 0.9, plain, odd),
        }
        if width >= LEAST_WIDTH:  # else torch on the CPU picks another of several zeros
            features["zeros of both signs"] = plain.sign() * 0.0
        for kind, x in features.items():
            title = f"{kind}, {nodes} nodes, width {width}, {str(pointers)[6:]}"
            y = torch.randn(nodes, width)
            for least in (True, False):
                yield Case(f"{'minima' if least else 'maxima'} of {title}", "edge_extremes", (y, crow, col, x, least))
            reference.edge_extremes(y := y.clone(), crow, col, x, False)
            yield Case(f"winners of {title}", "edge_winners", (crow, col, x, y))
            kept, grad = reference.edge_winners(crow, col, x, y), torch.randn(nodes, width)
            grad[0, 0] = math.inf
            before = torch.randint(256, (nodes, -(-width // 8)), dtype=torch.uint8)
            for own, initial in ((col, before), (None, None)) if kind != "no ties" else ((col, None),):
                out = torch.randn(others if own is not None else count, width)
                how = f"{title}{', rows of edges' if own is None else ''}{'' if initial is None else ', shared'}"
                yield Case(f"gradient of {how}", "add_winners", (out, crow, own, *kept, grad, initial))


FAMILIES: dict[str, Callable[[int], Iterator[Case]]] = {
    "elementwise": elementwise,
    "sampling": sampling,
    "edges": edges,
    "extremes": extremes,
}
for _bits in BITS:
    FAMILIES[f"codes, {_bits} bit"] = partial(codes, _bits)
    FAMILIES[f"rows, {_bits} bit"] = partial(rows, _bits)
