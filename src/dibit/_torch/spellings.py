"""Torch's functions by their names, under all their spellings: `torch.mul`, `Tensor.mul`, `torch.multiply`, `a * b`.

Whatever asks which function of torch was called asks by a set that `torch_functions` gives. So a spelling that is
entered here is known to the rules, to the tape and to the sums over edges.
"""

from __future__ import annotations

from operator import attrgetter
from types import MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.private.operations import VARIABLE_FUNCTIONS

# By the name of a function: torch's other names for it, and the operators that take the same arguments. Names with a
# dot are those of functions in a part of torch. What is here for `sub` holds for `sub_`, too: `subtract_`, `__isub__`.
_OTHER_NAMES = {
    "abs": "absolute __abs__",
    "add": "__add__ __radd__",
    "bitwise_and": "__and__ __rand__",
    "bitwise_not": "__invert__",
    "bitwise_or": "__or__ __ror__",
    "cat": "concat concatenate",
    "clamp": "clip",
    "dim": "ndimension",
    "div": "divide true_divide __truediv__ __div__",
    "eq": "__eq__",
    "ge": "greater_equal __ge__",
    "gt": "greater __gt__",
    "le": "less_equal __le__",
    "lt": "less __lt__",
    "matmul": "linalg.matmul __matmul__",
    "mul": "multiply __mul__ __rmul__",
    "ne": "not_equal __ne__",
    "neg": "negative __neg__",
    "numel": "nelement",
    "pow": "__pow__",
    "rdiv": "__rtruediv__ __rdiv__",  # no function of torch has this name
    "rpow": "__rpow__",  # nor this
    "rsub": "__rsub__",
    "sigmoid": "special.expit",
    "sub": "subtract __sub__",
    "transpose": "swapaxes swapdims",
}


def torch_functions(names: str, in_place: bool = False) -> set[Any]:
    """Functions of `torch`, `torch.special` and `torch.nn.functional`, methods of tensors, under all their spellings.

    Args:
        names: of the functions, with spaces between them.
        in_place: those that write over their first argument are meant, too: `mul_` beside `mul`.
    """
    wanted = [f"{name}{end}" for name in names.split() for end in (("", "_") if in_place else ("",))]
    return {function for name in wanted for spelled in _spelled(name) for function in _named(spelled)}


def _spelled(name: str) -> list[str]:
    """A function's name, and its other names."""
    if name.endswith("_") and not name.endswith("__"):
        others = _OTHER_NAMES.get(name[:-1], "").split()
        return [name, *(f"__i{other[2:]}" if other.startswith("__") else f"{other}_" for other in others)]
    return [name, *_OTHER_NAMES.get(name, "").split()]


def _named(name: str) -> set[Any]:
    """The functions that have exactly this name."""
    if "." in name:
        part, name = name.rsplit(".", 1)
        owners: tuple[Any, ...] = (attrgetter(part)(torch),)
    else:
        # PyTorch Geometric puts a wrapper in the place of torch.index_select; the mode sees what the wrapper calls
        owners = torch, VARIABLE_FUNCTIONS, torch.special, Tensor, F
    found = {getattr(owner, name, None) for owner in owners} - {None}
    return {function for function in found if type(function) is not MethodWrapperType}  # `torch.__eq__` of the module
