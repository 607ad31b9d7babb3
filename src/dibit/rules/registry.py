"""Every function of torch that has a rule, under all its spellings: `torch.relu`, `Tensor.relu_`, `F.relu` ...

A rule is written once, for one spelling. The decorator `rule` above it says what others must know of the function.
`table` makes the tables of eager and of compiled code (`dibit.rules.RULES`, `dibit.compile.rules.RULES`). It finds the
spellings by the name of the rule (`dibit._torch.spellings`); functions that a rule serves with other arguments, or
beside those of its name, are in `_MORE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dibit import nn
from dibit._torch.private.operations import VARIABLE_FUNCTIONS
from dibit._torch.spellings import torch_functions
from dibit.engine.loss_reach import row_by_row
from dibit.engine.model_state import Rule
from dibit.recompute.repeatable import repeatable

Adapter = Callable[[Rule], Rule]


@dataclass(frozen=True)
class Operation:
    """A function with a rule.

    Attributes:
        name: of the function and of its rule, such as "relu".
        rule: takes the pass and the function's arguments.
        kind: what it keeps, in reports of memory: "linear inputs", "norm inputs", "ReLU", "dropout" or "other".
        in_place: the rule has an argument `inplace`, and so serves `torch.relu_`, too.
        exact: the rule runs under `Config(lossless=True)`.
        positive: its results are positive and have a wide range, see `dibit.rules.positive`.
    """

    name: str
    rule: Rule
    kind: str
    in_place: bool
    exact: bool
    positive: bool


OPERATIONS: dict[str, Operation] = {}


def rule(
    name: str = "",
    *,
    kind: str = "other",
    in_place: bool = False,
    autocast: Callable[[Rule], Rule] | None = None,
    runs_again: bool = False,
    saves_result: bool = False,
    exact: bool = False,
    in_its_row: str | bool = False,
    positive: bool = False,
) -> Callable[[Rule], Rule]:
    """Register the rule of a function, and state the properties of the function that other parts of Dibit need.

    The rule's `torch.autograd.Function` states itself how far a gradient spreads in it, by `ctx.hops`: see
    `dibit.engine.loss_reach`.

    Args:
        name: of the function; default: that of the rule.
        kind, in_place: see `Operation`.
        autocast: `low_precision` or `full_precision` of `dibit._torch.autocast`, if autocast may run the function in
            another dtype.
        runs_again: the function is cheap and gives the same bits when it is run again, so that results need not be
            kept that can be computed from something smaller.
        saves_result: plain torch keeps the result, not the input.
        exact: what the rule keeps is exact if `ForwardPass.keep` gives exact residuals, and no more than plain torch
            keeps.
        in_its_row: a gradient stays in its row where torch's own function runs, too; the name of its operation in
            autograd's graph if that is not the function's.
        positive: see `Operation`.
    """

    def register(function: Rule) -> Rule:
        made = function if autocast is None else autocast(function)
        if not spellings(name or function.__name__):
            raise ValueError(
                f"a rule was registered for {name or function.__name__!r}, but torch has no function of this name; "
                "choose the name of one, or give the rule to dibit.compress(rules=...)."
            )
        operation = Operation(name or function.__name__, made, kind, in_place, exact, positive)
        OPERATIONS[operation.name] = operation
        if in_its_row:
            row_by_row(operation.name if in_its_row is True else in_its_row)
        if runs_again:
            found = spellings(operation.name)
            written = {each for each, adapter in found.items() if adapter is _in_place}
            repeatable(found.keys() - written, written, autocast=autocast is not None, saves_result=saves_result)
        return made

    return register


def spellings(name: str) -> dict[Any, Adapter | None]:
    """The functions of torch by this name, each with what makes its own rule of the rule of this name."""
    found: dict[Any, Adapter | None] = dict.fromkeys(torch_functions(name))
    if name in OPERATIONS and OPERATIONS[name].in_place:
        found |= dict.fromkeys(torch_functions(f"{name}_"), _in_place)
    return found | _MORE.get(name, {})


def table(rules: Mapping[str, Rule]) -> dict[Any, Rule]:
    """Rules by function, from rules by name."""
    return {
        function: own if adapter is None else adapter(own)
        for name, own in rules.items()
        for function, adapter in spellings(name).items()
    }


def _in_place(rule: Rule) -> Rule:
    return lambda where, *args, **kwargs: rule(where, *args, inplace=True, **kwargs)


def _swapped(rule: Rule) -> Rule:
    return lambda where, input, other: rule(where, other, input)


def _torch_dropout(rule: Rule) -> Rule:
    return lambda where, input, p, train: rule(where, input, p, train)


def _torch_dropout_(rule: Rule) -> Rule:
    return lambda where, input, p, train: rule(where, input, p, train, True)


def _torch_norm(rule: Rule) -> Rule:
    """Of BatchNorm and InstanceNorm, whose functions of `torch` have other arguments than those of `F`."""

    def spelled(
        where: Any,
        input: Tensor,
        weight: Any,
        bias: Any,
        running_mean: Any,
        running_var: Any,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Any:
        return rule(where, input, running_mean, running_var, weight, bias, training, momentum, eps)

    return spelled


def _torch_layer_norm(rule: Rule) -> Rule:
    def spelled(
        where: Any,
        input: Tensor,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Any:
        return rule(where, input, normalized_shape, weight, bias, eps)

    return spelled


def _torch_log_softmax(rule: Rule) -> Rule:
    def spelled(where: Any, input: Tensor, dim: int, dtype: Any = None, *, out: Any = None) -> Any:
        return rule(where, input, dim, dtype=dtype) if out is None else NotImplemented

    return spelled


def _torch_binary_cross_entropy(rule: Rule) -> Rule:
    def spelled(
        where: Any, input: Tensor, target: Tensor, weight: Any = None, pos_weight: Any = None, reduction: int = 1
    ) -> Any:
        named = ("none", "mean", "sum")[reduction]
        return rule(where, input, target, weight, reduction=named, pos_weight=pos_weight)

    return spelled


def _undocumented(name: str, adapter: Adapter, *more: Any) -> dict[Any, Adapter | None]:
    """Functions of `torch` and of `more` that its documentation does not have: those that this version still has."""
    owners = (torch, VARIABLE_FUNCTIONS, *more)
    return {getattr(owner, name): adapter for owner in owners if hasattr(owner, name)}


# By the name of a rule: functions that it serves beside those of its name, and adapters for other arguments.
_MORE: dict[str, dict[Any, Adapter | None]] = {
    "matmul": {torch.mm: None, Tensor.mm: None, Tensor.__rmatmul__: _swapped},
    "sparse_mm": {torch.sparse.mm: None},
    "dropout": _undocumented("dropout", _torch_dropout) | _undocumented("dropout_", _torch_dropout_),
    "batch_norm": _undocumented("batch_norm", _torch_norm),
    "instance_norm": _undocumented("instance_norm", _torch_norm),
    "layer_norm": _undocumented("layer_norm", _torch_layer_norm),
    "norm_relu_dropout": {nn.norm_relu_dropout: None},
    "log_softmax": _undocumented("log_softmax", _torch_log_softmax, torch.special, Tensor),
    "binary_cross_entropy_with_logits": _undocumented("binary_cross_entropy_with_logits", _torch_binary_cross_entropy),
}
