"""What the GPU's launchers launch: each kernel in each configuration, noted and not run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dibit._torch.autocast import HALF
from dibit.codec import seed_tensor
from dibit.codec.backends import reference
from dibit.codec.backends import triton as cuda
from dibit.codec.backends.triton import launch
from dibit.codec.packed import levels_of
from dibit.config import Config, Sample
from dibit.recipes import RECIPES

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Configuration:
    """A kernel as it is compiled.

    Attributes:
        signature: type of each argument, "constexpr" for constants.
        constants: their values.
        aligned: numbers of the arguments that are multiples of 16, or of addresses that are.
        warps, registers: see `dibit.codec.backends.triton.launch`.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    registers: int | None

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.constants)


def configurations() -> list[Configuration]:
    """All that are used, each once."""
    found: dict[Configuration, None] = {}

    def note(kernel: Any, programs: Any, args: tuple[Any, ...], meta: dict[str, Any], chosen: dict[str, Any]) -> None:
        signature, constants, aligned = {}, dict(meta), []
        for i, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False)):
            if isinstance(arg, Tensor):
                signature[name] = _TYPES[arg.dtype]
                if arg.data_ptr() % 16 == 0:
                    aligned.append(i)
            elif isinstance(arg, float):
                signature[name] = "fp32"
            elif arg == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i64" if abs(arg) >= 2**31 else "i32"
                if arg % 16 == 0:
                    aligned.append(i)
        signature |= dict.fromkeys(meta, "constexpr")
        own = Configuration(
            kernel,
            tuple((name, signature[name]) for name in kernel.arg_names),
            tuple(constants.items()),
            tuple(aligned),
            chosen["num_warps"],
            chosen.get("maxnreg"),
        )
        found[own] = None

    with mock.patch.object(launch, "run", note):
        _codec()
        _products()
        _elementwise()
        _edges()
    return list(found)


def _used() -> Iterator[tuple[Config, int]]:
    """Of the recipes, what rules make of them for paths and long tails, and each other setting once; with widths."""
    for config in RECIPES.values():
        for width in (128, 256, 40) if config is RECIPES["default"] else (128, 40):
            yield replace(config, norm=None), width
            yield config.norm or replace(config, reduce=None, norm=None), width
        yield replace(config, bits=8, block=1024, reduce=None, norm=None), 128
        yield replace(config, bits=4, reduce=None, norm=None), 128
    yield Config(stats=torch.float32), 128
    yield Config(rounding="nearest"), 128
    yield Config(block=7, bits=1), 40
    for bits in (1, 2, 4, 8):
        yield Config(bits=bits), 128
        yield Config(bits=bits, rounding="dither"), 128
        yield Config(block=256, bits=bits, levels="normal"), 128
        yield Config(block="tensor", bits=bits), 128


def _codec() -> None:
    seed, index = seed_tensor(1), torch.arange(160)
    for config, width in _used():
        rounding = int(config.rounding == "nearest")
        sampled = isinstance(config.reduce, Sample)
        for dtype in (torch.float32, *HALF) if config == Config() else (torch.float32,):
            x, vector = torch.randn(333, width).to(dtype), torch.randn(width)
            for rows, moved in itertools.product((None, index) if sampled else (None,), (False, True)):
                block = config.block_size(333 if rows is None else 160, width)
                levels = levels_of(config, block)
                moves = (vector, vector) if moved else (None, None)
                cuda.quantize_rows(x, rows, *moves, seed, config.bits, block, levels, config.stats, rounding)
            block = config.block_size(333, width)
            levels = levels_of(config, block)
            kept = reference.quantize(x.view(-1), seed, config.bits, block, levels, config.stats, 0)
            for dither in {0.0, 2.0 if not levels else 0.0, float(config.rounding == "dither")}:
                cuda.dequantize(*kept[:2], seed, x.numel(), config.bits, block, levels, dither, dtype)


def _products() -> None:
    seed, index = seed_tensor(1), torch.arange(333)
    for config, width in _used():
        block = config.block_size(333, width)
        levels = levels_of(config, block)
        x, dy = torch.randn(333, width), torch.randn(999, 40)
        kept = reference.quantize(x.view(-1), seed, config.bits, block, levels, config.stats, 0)
        dither, sampled = float(config.rounding == "dither"), isinstance(config.reduce, Sample)
        for dtype in (torch.float32, torch.bfloat16) if config == Config() else (torch.float32,):
            own = (dy.to(dtype), index, dy[:333, 0]) if sampled else (dy[:333].to(dtype), None, None)
            cuda.weight_gradient(*kept[:2], seed, *own, 333, width, config.bits, block, levels, dither)
        if not levels and not sampled:
            for weight in (0.0, 1.0, 2.0):
                cuda.column_sums(*kept[:2], seed, x, config.bits, block, weight)
            for weight in (0.0, 1.0):
                cuda.norm_gradient(*kept[:2], seed, x, x[0], x[1], x[2], config.bits, block, weight)


def _elementwise() -> None:
    seed = seed_tensor(1)
    for width, dtype in itertools.product((128, 40), (torch.float32, *HALF)):
        x = torch.randn(400, width).to(dtype)
        mask, vector = reference.pack_mask(x), torch.randn(width)
        cuda.pack_mask(x)
        cuda.relu(x)
        cuda.row_scores(x)
        cuda.finite(x)
        for slope in (0.0, 0.2):
            cuda.apply_mask(x, mask, slope)
        cuda.scale_masked(x, mask, 1.25)
        for p in (0.0, 0.5):
            cuda.dropout(x, seed, p)
            cuda.norm_relu_dropout(x, vector, vector, vector, seed, p)
            cuda.relu_dropout_gradient(x, mask, seed, p)
    cuda.signs(seed, 1000)
    for rows, count in ((1000, 100), (5000, 1600)):
        cuda.pick_rows(torch.zeros(rows, dtype=torch.uint8), seed, count)


def _edges() -> None:
    for pointers, (heads, width) in itertools.product((torch.int32, torch.int64), ((1, 128), (1, 40), (4, 32), (8, 8))):
        crow, col = torch.arange(0, 90, 3, dtype=pointers), torch.arange(87, dtype=pointers)
        a, x, scale = torch.randn(29, heads, width), torch.randn(87, heads, width), torch.randn(87, heads)
        for order in (None, col):
            cuda.add_scaled(a, crow, col, order, scale, x)
            cuda.edge_products(crow, col, order, a, x)
            cuda.add_signed(a, crow, order, cuda.edge_signs(crow, col, order, a, x), scale, 0.2)
        flat = a.flatten(1), crow, col
        for values in (None, scale[:, 0].contiguous()):
            cuda.add_neighbours(*flat, values, x.flatten(1))
        y, rows = a.flatten(1), x.flatten(1)
        for least in (False, True):
            cuda.edge_extremes(y, crow, col, rows, least)
        kept = cuda.edge_winners(crow, col, rows, y)
        for own, initial in itertools.product((col, None), (None, torch.zeros(29, 16, dtype=torch.uint8))):
            cuda.add_winners(rows, crow, own, *kept, y, initial)


if __name__ == "__main__":
    found = configurations()
    print(*(f"{own.kernel.__name__}: {own}" for own in found), f"{len(found)} configurations", sep="\n")
