"""The comparison and the plugin find what they are for: a program that is right, wrong results, bias, an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.peers.compare import Program, compare

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEST = """
import dibit, torch
from torch import nn
class Model(nn.Module):
    def __init__(self, a=nn.ReLU()):
        super().__init__()
        self.a, self.b = a, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
def test_compressed():
    model = Model()
    assert dibit.compress.__module__ and dibit.scores(model) is not None
    x = torch.rand(3, 4)
    assert torch.equal(model.b(x), nn.Sequential.forward(model.b, x))
def test_parts():
    part = nn.Linear(4, 4)
    whole = nn.Sequential(part)
    hooks = list(part._forward_pre_hooks.values())
    assert len(hooks) == 1 and hooks[0].name == "0"
def test_fails():
    assert not list(nn.Linear(4, 4)._forward_pre_hooks)
"""


def _program() -> Program:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 4))
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(1))
    return Program(model, lambda model: model(x))


class _Half(torch.autograd.Function):
    """A linear layer whose weight's gradient is a tenth too large, with noise."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        noise = 1.1 + 0.1 * torch.randn(weight.shape, generator=_NOISE)
        return dy @ weight, dy.T @ x * noise, dy.sum(0)


_NOISE = torch.Generator()


def test_a_right_program_has_no_faults() -> None:
    verdict = compare("right", _program, 32)
    assert not verdict.faults, verdict
    assert verdict.relative > 0
    assert verdict.saved < 1


def test_bias_is_found() -> None:
    verdict = compare("bias", _program, 32, {F.linear: lambda forward, x, weight, bias: _Half.apply(x, weight, bias)})
    assert any("of 0.weight is biased" in fault for fault in verdict.faults), verdict


def test_other_bits_are_found() -> None:
    verdict = compare("bits", _program, 2, {F.relu: lambda forward, x, inplace=False: x.clamp_min(1e-6)})
    assert any(fault.startswith("result 0 differs") for fault in verdict.faults), verdict


def test_an_error_is_found() -> None:
    verdict = compare("error", _program, 2, {F.relu: lambda forward, x, inplace=False: 1 / 0})
    assert any("ZeroDivisionError" in fault for fault in verdict.faults), verdict


def test_the_plugin_compresses_what_a_test_builds(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-p", "tests.peers.plugin", "-p", "no:cacheprovider", "-q", "."]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for how, ending in {"plain": "2 failed, 1 passed", "compressed": "1 failed, 2 passed"}.items():
        done = subprocess.run(
            [*command, "--peers", how, "--peers-log", str(tmp_path / how)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert ending in done.stdout, done.stdout
        assert (tmp_path / how).read_text().count('"outcome": "started"') == 3
