"""The settings that the papers compare, by the names they have in every table."""

from __future__ import annotations

from dataclasses import replace

from dibit.config import Config, Rows
from dibit.recipes import recipe

RATIOS = (2, 4, 8, 16, 32, 64)
LARGEST_BLOCK = 1024  # i-EXACT's own limit: G/R = 64 means 1,024 elements at R = 16 and at 128


def blocks(ratio: int) -> Config:
    """i-EXACT with G/R = `ratio`: so many rows share a range, up to 1,024 elements."""
    return replace(recipe("exact"), block=Rows(ratio, most=LARGEST_BLOCK))


def variants() -> dict[str, Config | None]:
    """Every setting by its name; `None` is plain FP32."""
    exact, iexact = recipe("exact"), recipe("iexact")
    return {
        "FP32": None,
        "EXACT": exact,
        **{f"G/R = {ratio}": blocks(ratio) for ratio in RATIOS},
        "whole tensor": replace(exact, block="tensor"),
        "EXACT + VM": replace(exact, levels="normal"),
        "i-EXACT": iexact,
        "i-EXACT + VM": replace(iexact, levels="normal"),
        # across-row blocks of whole activations: where the papers' model is not meant to hold
        "no projection": replace(iexact, reduce=None),
        "default": recipe("default"),
    }


MEMORY = ("FP32", "EXACT", *(f"G/R = {ratio}" for ratio in RATIOS), "EXACT + VM", "default")
BLOCKS = ("FP32", "EXACT", *(f"G/R = {ratio}" for ratio in RATIOS), "whole tensor")
DISTRIBUTION = ("EXACT", "i-EXACT", "no projection")
ACCURACY = ("FP32", "EXACT", "i-EXACT", "i-EXACT + VM", "default")
