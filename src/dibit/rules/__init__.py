"""The rules: what is kept for each function of torch. One file a family of operations.

A rule takes the `ForwardPass` and the function's own arguments. It computes the plain forward, keeps a residual, and
returns the result; or it returns `NotImplemented`, and the function runs as it is, kept exactly. `RULES` has the rule
of each function under each of its spellings (`dibit.rules.registry`).
"""

from collections.abc import Mapping
from typing import Any

from dibit.engine.model_state import Rule
from dibit.engine.module_stack import function_name

# Each enters its rules in `OPERATIONS`.
from dibit.rules import activation, add, aggregate, dropout, linear, loss, norm, norm_relu_dropout, power, product
from dibit.rules.registry import OPERATIONS, spellings, table

__all__ = [
    "EXACT",
    "KINDS",
    "RULES",
    "activation",
    "add",
    "aggregate",
    "dropout",
    "linear",
    "loss",
    "norm",
    "norm_relu_dropout",
    "power",
    "product",
]

RULES: dict[Any, Rule] = table({name: operation.rule for name, operation in OPERATIONS.items()})
# The functions whose rules run under `Config(lossless=True)`.
EXACT = {function for name, operation in OPERATIONS.items() if operation.exact for function in spellings(name)}
# What the ledger's rows hold, by the name that they have there; see `dibit.rules.registry.Operation.kind`.
KINDS: Mapping[str, str] = {
    function_name(function): operation.kind for name, operation in OPERATIONS.items() for function in spellings(name)
}


def serve(function: Any, rule: Rule, exact: bool) -> None:
    """Let a rule serve a function of another package from now on; `exact`: see `dibit.rules.registry.Operation`."""
    RULES[function] = rule
    if exact:
        EXACT.add(function)
