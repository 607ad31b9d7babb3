"""One program of someone else's, plain and compressed: first forward pass bit for bit, gradient without bias.

A program is a model and a function that calls it as its authors do. Both passes start from the same weights and the
same random state, and torch draws dropout's masks (`dropout="mask"`), so that the results must have the same bits.
"""

from __future__ import annotations

import copy
import os
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dibit
from dibit.api import state_of
from dibit.recipes import recipe
from tests.unbiased import Bias, bias_of

DRAWS = int(os.environ.get("PEERS_DRAWS", "64"))  # in each of the two sets
WORST = 3.0  # of the statistic, which is 1 on average; a program fails where two independent sets are both above
FAR = 100.0  # squared error of the median draw over the gradient's square: no draw is of any use then
SINGLE = 3e-8  # of a parameter's gradient's square: a sum of 10,000 numbers in float32 (measured: 2e-9 in plain torch)
ROUNDING = 1e-12  # of the whole gradient's square: less than that is the order of a sum


@dataclass
class Program:
    """A model in training mode, a call of it, and what brings it back to where it began.

    `reset` is for what no state_dict has: the memory of a temporal network, a cache.
    """

    model: nn.Module
    call: Callable[[nn.Module], Any]
    reset: Callable[[nn.Module], None] = lambda model: None
    inputs: tuple[Tensor, ...] = ()  # leaves whose gradient counts too


@dataclass
class Verdict:
    """How the two compare; `faults` is empty where all is well."""

    name: str
    faults: list[str] = field(default_factory=list)
    statistics: tuple[float, float] = (0.0, 0.0)
    relative: float = 0.0  # squared error of one draw over the gradient's square
    median: float = 0.0  # the same of the median draw
    saved: float = 0.0  # kept bytes over plain bytes
    seconds: float = 0.0

    def __str__(self) -> str:
        a, b = self.statistics
        word = "FAIL" if self.faults else "ok  "
        draws = f"statistic {a:5.2f} {b:5.2f}, one draw {self.relative:8.2g} (median {self.median:8.2g})"
        line = f"{word} {self.name:34} {draws}, kept {self.saved:4.0%}, {self.seconds:3.0f} s"
        return "\n       ".join([line, *self.faults])


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def compare(name: str, build: Callable[[], Program], draws: int = DRAWS, rules: Any = None) -> Verdict:
    """Run a program both ways and say what differs."""
    began = time.monotonic()
    verdict = Verdict(name)
    seed(0)
    plain = build()
    plain.model.train()
    _stir(plain.model)
    # a dry pass: lazy sizes become known, caches are filled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _outputs(plain)
        start = copy.deepcopy(plain.model.state_dict())
        truth, expected = _pass(plain, start)
        again, _ = _pass(plain, start)
        noise = _square(_difference(again, truth))  # of sums whose order changes
        try:
            seed(0)
            other = build()
            other.model.train()
            _stir(other.model)
            config = replace(recipe("default"), dropout="mask")
            dibit.compress(other.model, config, rules=rules)
            with dibit.track(other.model) as ledger:
                seed(1)
                other.reset(other.model)
                _outputs(other)
            verdict.saved = ledger.total / max(1, ledger.plain)
            got, results = _pass(other, start)
            _same_results(verdict, results, expected)
            if got.keys() != truth.keys():
                verdict.faults.append(f"gradients of other tensors: {sorted(got.keys() ^ truth.keys())}")
            else:
                _judge(verdict, other, start, truth, noise, draws)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            verdict.faults.append(f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})")
    verdict.seconds = time.monotonic() - began
    return verdict


def _judge(verdict: Verdict, program: Program, start: Any, truth: dict[str, Tensor], noise: float, draws: int) -> None:
    """Two independent sets of draws; of the whole gradient and of each parameter's."""
    names = sorted(truth)
    whole = torch.cat([truth[name].double().flatten() for name in names])
    sets = []
    for first in (1, 1 + draws):
        samples = []
        for draw in range(first, first + draws):
            _salt(program.model, draw)
            samples.append(_pass(program, start)[0])
            if len(samples) == 2 and all(torch.equal(samples[0][n], samples[1][n]) for n in names):
                break  # nothing is lossy here
        sets.append(samples)
    scale = _square(whole)
    least = max(ROUNDING * scale, 10 * noise)
    found: list[Bias] = []
    for samples in sets:
        rows = [torch.cat([sample[n].double().flatten() for n in names]) for sample in samples]
        found.append(_bias(rows, whole, least))
        verdict.relative = found[-1].relative
        verdict.median = torch.stack([(row - whole).square().sum() for row in rows]).median().item() / max(
            scale, 1e-300
        )
    verdict.statistics = (found[0].statistic, found[1].statistic)
    if min(verdict.statistics) > WORST or any(bias.relative == 0 and not bias.exact for bias in found):
        verdict.faults.append("the gradient is biased")
    if verdict.median > FAR:
        verdict.faults.append("no draw is near the gradient")
    for name in names:
        floor = max(least, SINGLE * _square(truth[name]))
        pair = [_bias([sample[name].double().flatten() for sample in samples], truth[name], floor) for samples in sets]
        wrong = all(not bias.unbiased and bias.statistic > WORST for bias in pair)
        if wrong or any(bias.relative == 0 and not bias.exact for bias in pair):
            values = ", ".join(f"{bias.statistic:.1f} (z {bias.z:.1f})" for bias in pair)
            verdict.faults.append(f"the gradient of {name} is biased: {values}")


def _bias(rows: list[Tensor], truth: Tensor, least: float) -> Bias:
    miss = (torch.stack(rows).mean(0) - truth.double().flatten()).square().sum().item()
    if miss <= least:
        return Bias(0.0, 0.0, 0.0, exact=True)
    if len(rows) < 3:
        spread = max((row - rows[0]).square().sum().item() for row in rows)
        if miss <= max(least, 1e-10 * _square(truth)):
            return Bias(0.0, 0.0, 0.0, exact=True)
        if spread <= least:
            return Bias(float("inf"), float("inf"), 0.0, exact=False)
    return bias_of(lambda i: rows[i], truth, len(rows))


def _pass(program: Program, start: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients and outputs of one pass from the starting state."""
    model = program.model
    model.load_state_dict(start)
    model.zero_grad()
    for x in program.inputs:
        x.grad = None
    outputs = _outputs(program)
    results = [y.detach().clone() for y in outputs]
    generator = torch.Generator().manual_seed(7)
    loss = 0
    for y in outputs:
        if y.is_floating_point() and y.requires_grad:
            weight = torch.randn(y.shape, generator=generator) if y.dim() else torch.ones(())
            loss = loss + (y * weight.to(y.dtype)).sum()
    assert isinstance(loss, Tensor), "no output has a gradient"
    loss.backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"input {i}": x.grad.detach().clone() for i, x in enumerate(program.inputs) if x.grad is not None}
    return {name: g.to_dense() if g.layout != torch.strided else g for name, g in found.items()}, results


def _outputs(program: Program) -> list[Tensor]:
    program.reset(program.model)
    seed(1)
    return list(tensors(program.call(program.model)))


def _same_results(verdict: Verdict, results: list[Tensor], expected: list[Tensor]) -> None:
    if len(results) != len(expected):
        verdict.faults.append(f"{len(results)} results, plain gives {len(expected)}")
        return
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        if a.dtype != b.dtype or a.stride() != b.stride():
            verdict.faults.append(f"result {i}: {a.dtype}, strides {a.stride()}; plain {b.dtype}, {b.stride()}")
        elif not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            verdict.faults.append(f"result {i} differs by {(a.double() - b.double()).abs().max().item():.3g}")


def tensors(value: Any) -> Iterator[Tensor]:
    """All dense tensors among results."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dataclass_fields__") or hasattr(value, "__slots__"):
        for name in getattr(value, "__dataclass_fields__", ()):
            yield from tensors(getattr(value, name))


def _stir(model: nn.Module) -> None:
    """Move parameters a little, so that none is all ones or zeros."""
    with torch.no_grad():
        for p in model.parameters():
            if not isinstance(p, nn.UninitializedParameter) and p.is_floating_point() and p.numel():
                p.add_(torch.randn_like(p) * 0.05)


def _salt(model: nn.Module, draw: int) -> None:
    state = state_of(model)
    assert state is not None
    state.salt = draw


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return torch.cat([(a[name] - b[name]).double().flatten() for name in b])


def _square(x: Tensor) -> float:
    return x.double().square().sum().item()
