"""Which functions of torch can be run again for the same bits: cheap and deterministic ones, by their names.

Those that have no rule are listed here. A function that has one says so at its rule (`dibit.rules.registry.rule`),
which enters all its spellings by `repeatable`.
"""

from __future__ import annotations

import inspect
from collections.abc import Set
from types import FunctionType
from typing import Any

from torch import Tensor

from dibit._torch.spellings import torch_functions

_SHAPES = (
    "view reshape unsqueeze squeeze expand expand_as transpose permute t flatten contiguous narrow select detach flip "
    "repeat view_as reshape_as __getitem__ index_select gather unflatten"
)
_ARITHMETIC = "sub neg clamp clamp_min where masked_fill rsub rdiv rpow"
_LOGIC = "eq ne lt le gt ge logical_and logical_or logical_not isinf isnan bitwise_and bitwise_or bitwise_not"
_MADE = "zeros ones full arange new_zeros new_ones new_full zeros_like ones_like full_like"
_COMBINED = "cat stack scatter_add scatter_reduce index_add cumsum"
_CASTS = "to long int float double bool half bfloat16"

IN_PLACE = torch_functions(
    "add_ sub_ mul_ div_ neg_ clamp_ clamp_min_ masked_fill_ fill_ zero_ scatter_add_ scatter_reduce_ index_add_"
)
PURE = torch_functions(" ".join((_SHAPES, _ARITHMETIC, _LOGIC, _MADE, _COMBINED, _CASTS))) | IN_PLACE
CREATED = torch_functions("zeros ones full arange")
UNIFORM = {function: value for value, name in enumerate(("zeros", "ones")) for function in torch_functions(name)}
SELECTIONS = torch_functions(_SHAPES)
SIZES_ONLY = torch_functions(
    "new_zeros new_ones new_full zeros_like ones_like full_like"
)  # read no element of their input
LIKE = {Tensor.expand_as: Tensor.expand, Tensor.view_as: Tensor.view, Tensor.reshape_as: Tensor.reshape}
AUTOCAST = torch_functions("rpow cumsum cat stack")  # their result may have another dtype under autocast
SAVES_RESULT = torch_functions("rpow")  # their backward pass needs what they gave
# Functions with an `inplace` option: its place among the arguments, and the function that it stands for.
OPTION: dict[Any, tuple[int, Any]] = {}


def repeatable(plain: Set[Any], in_place: Set[Any], *, autocast: bool, saves_result: bool) -> None:
    """Enter a function with a rule, by all its spellings.

    Args:
        plain: those that return a new tensor.
        in_place: those that write over their first argument.
        autocast: autocast may run it in another dtype.
        saves_result: plain torch keeps its result for the backward pass.
    """
    spellings = plain | in_place
    PURE.update(spellings)
    IN_PLACE.update(in_place)
    if autocast:
        AUTOCAST.update(spellings)
    if saves_result:
        SAVES_RESULT.update(spellings)
    for function in plain:
        if in_place and isinstance(function, FunctionType):
            names = list(inspect.signature(function, follow_wrapped=False).parameters)
            if "inplace" in names:
                OPTION[function] = names.index("inplace"), next(iter(in_place))


def without_option(function: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A call, with `inplace=True` as the function that it stands for: `F.relu(x, True)` as `torch.relu_(x)`."""
    place, stands_for = OPTION.get(function, (0, None))
    if stands_for is None or not (kwargs.get("inplace") or any(args[place : place + 1])):
        return function, args, kwargs
    return stands_for, args[:place], {name: value for name, value in kwargs.items() if name != "inplace"}
