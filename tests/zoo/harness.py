"""Runs a case plain and compressed, from the same weights and the same random state."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dibit
from dibit import Config
from dibit.api import state_of
from dibit.engine.ledger import Ledger
from tests.unbiased import Bias, bias_of
from tests.zoo.case import Case

Gradients = dict[str, Tensor]
ROUNDING = 1e-12  # of the whole gradient's square


@dataclass
class Run:
    """One forward and backward pass."""

    outputs: list[Tensor]
    buffers: dict[str, Tensor]
    gradients: Gradients
    ledger: Ledger


def build(case: Case) -> nn.Module:
    """The module in training mode; every parameter is moved a little, so that none is all ones or zeros.

    A copy, since some layers have a module as a default argument (`act=Sigmoid()`): all their instances share it, hooks
    included.
    """
    _seed(0)
    model = copy.deepcopy(case.build()).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@functools.cache
def plain(case: Case) -> Run:
    model = build(case)
    run = _run(case, model)
    fresh = build(case)
    with dibit.track(fresh) as ledger:
        _forward(case, fresh)
    return replace(run, ledger=ledger)


@functools.cache
def compressed(case: Case, config: Config | str, draw: int = 0) -> Run:
    """`draw` changes the codec's random numbers and no others."""
    model = dibit.compress(build(case), config)
    _salt(model, draw)
    run = _run(case, model)
    fresh = dibit.compress(build(case), config)
    with dibit.track(fresh) as ledger:  # the forward pass alone: a checkpoint runs another in the backward pass
        _forward(case, fresh)
    return replace(run, ledger=ledger)


def biases(
    case: Case, config: Config | str, draws: int, first: int = 1, rules: Mapping[Any, Any] | None = None
) -> dict[str, Bias]:
    """Of each parameter and input: how far the mean gradient of many draws is from the plain one."""
    truth = _run(case, build(case)).gradients
    model = dibit.compress(build(case), config, rules=rules)
    samples = []
    for draw in range(first, first + draws):
        _salt(model, draw)
        samples.append(_run(case, model).gradients)
        if len(samples) == 2 and _same(*samples):
            break  # nothing is lossy here
    assert all(sample.keys() == truth.keys() for sample in samples), "some gradient is missing or was None before"
    # some gradients are zero but for rounding, such as that of a bias before a softmax
    least = ROUNDING * sum(g.double().square().sum().item() for g in truth.values())
    found = {}
    for name in truth:
        if not truth[name].isfinite().all():
            continue  # nothing to compare with: PPFConv's input on torch 2.6
        bias = bias_of(lambda i, name=name: samples[i][name], truth[name], len(samples))
        miss = (torch.stack([sample[name].double() for sample in samples]).mean(0) - truth[name]).square().sum()
        found[name] = replace(bias, exact=True, z=0.0) if miss <= least else bias
    return found


def biased(case: Case, config: Config | str, draws: int, rules: Mapping[Any, Any] | None = None) -> dict[str, Bias]:
    """Gradients that look biased three times in a row, each time with other draws.

    z < 5 holds for a scalar parameter with probability 0.96 to 0.995 only (its statistic is the square of Student's
    t), and the zoo looks at thousands: two more rounds of 4 times the draws make a false alarm over all of them rarer
    than 1 in 1,000.
    """
    found = {name: bias for name, bias in biases(case, config, draws, 1, rules).items() if _is_biased(bias)}
    for attempt in (1, 2):
        if found:
            again = biases(case, config, 4 * draws, attempt * 1000, rules)
            found = {name: again[name] for name in found if _is_biased(again[name])}
    return found


def _same(a: Gradients, b: Gradients) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _is_biased(bias: Bias) -> bool:
    """A gradient without any noise must be the plain one (up to the order of a sum)."""
    return not bias.unbiased or (bias.relative == 0 and not bias.exact)


def draws_dropout(case: Case) -> bool:
    """Whether the plain forward pass draws random numbers."""
    model = build(case)
    outputs = []
    for seed in (1, 2):
        _seed(seed)
        outputs.append(_forward(case, model, seed)[0])
    return any(not torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def _run(case: Case, model: nn.Module) -> Run:
    outputs, leaves = _forward(case, model)
    results = [y.detach().clone() for y in outputs]  # reversible layers free their outputs in the backward pass
    model.zero_grad()
    _readout(outputs).backward()
    named = {**leaves, **dict(model.named_parameters())}
    gradients = {name: x.grad.detach() for name, x in named.items() if x.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return Run(results, buffers, gradients, Ledger())


def _forward(case: Case, model: nn.Module, seed: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the float inputs by name."""
    leaves: dict[str, Tensor] = {}
    args, kwargs = case.inputs()
    args, kwargs = _feed(args, "input", leaves, case.inner), _feed(kwargs, "input", leaves, case.inner)
    _seed(seed)
    return list(_tensors(model(*args, **kwargs))), leaves


def _feed(value: Any, name: str, leaves: dict[str, Tensor], inner: bool) -> Any:
    """Note the leaves; an inner layer gets a copy of them, which autograd made."""
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        leaves[name] = value
        return value.clone() if inner else value
    if isinstance(value, dict):
        return {key: _feed(item, f"{name} {key}", leaves, inner) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_feed(item, f"{name} {i}", leaves, inner) for i, item in enumerate(value))
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _readout(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    parts = [y for y in outputs if y.is_floating_point() and y.requires_grad]
    return sum((y * torch.randn(y.shape, generator=generator)).sum() for y in parts)


def _salt(model: nn.Module, draw: int) -> None:
    state = state_of(model)
    assert state is not None
    state.salt = draw


def _seed(seed: int) -> None:
    """PyG's negative sampling draws from Python's and NumPy's generators too."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
