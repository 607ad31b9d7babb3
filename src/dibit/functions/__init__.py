"""The former name of `dibit.rules`, for one release."""

import importlib
import sys

from dibit import rules
from dibit.rules import RULES

__all__ = ["RULES"]

# Modules keep their former names, too: `from dibit.functions.activation import smooth`.
_MOVED = {"fused": "norm_relu_dropout", "large": "large_outputs"}
_SAME = "activation add aggregate common dropout linear loss norm positive power product relative returned"
for _name in (*_SAME.split(), *_MOVED):
    _module = importlib.import_module(f"{rules.__name__}.{_MOVED.get(_name, _name)}")
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = _module
