"""The former name of `dibit.rules`, for one release."""

import importlib
import sys

from dibit import rules
from dibit.rules import RULES

__all__ = ["RULES"]

# Modules keep their former names, too: `from dibit.functions.activation import smooth`.
for _name in (
    "activation",
    "add",
    "aggregate",
    "common",
    "dropout",
    "fused",
    "large",
    "linear",
    "loss",
    "norm",
    "power",
):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = importlib.import_module(f"{rules.__name__}.{_name}")
