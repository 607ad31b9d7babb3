"""Several processes under torchrun: one training, shared; its gradient; a process that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dibit.train import UserError, checkpoint
from dibit.train.distributed import World, world_of_environment

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SIZES = ("--hidden", "16", "--layers", "2", "--device", "cpu", "--loader", "neighbor", "--batch-size", "8")


def start(*words: object, **kwargs: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *TORCHRUN, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **kwargs,
    )


def train(small: Path, *words: object) -> subprocess.Popen[str]:
    return start("-m", "dibit", "train", "--dataset", small, *SIZES, *words)


def test_two_processes_train_one_model(small: Path, tmp_path: Path) -> None:
    out, result = tmp_path / "run", tmp_path / "result.json"
    process = train(small, "--epochs", 20, "--out", out, "--json", result, "--compare")
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert stdout.count("recipe") == 1, "one of them prints"
    assert "2 processes" in stderr
    assert stderr.count("epoch 20/20") == 2, "once a recipe"
    for run in json.loads(result.read_text())["runs"]:
        assert run["test"] > 0.6
        assert run["saved_bytes"] <= run["plain_bytes"]
    first, second = checkpoint.load(out / "default" / "seed0" / "checkpoint.pt")["processes"]
    assert not torch.equal(first["rng"], second["rng"])
    known = [{key for key in of["scores"] if "/seen/" not in key} for of in (first, second)]  # not: when measured next
    assert known[0] == known[1]
    assert any(not torch.equal(first["scores"][key], second["scores"][key]) for key in known[0])


_GRADIENT = """
import sys, dataclasses, torch, torch.distributed as dist
from torch import nn
import dibit
sys.path.insert(0, sys.argv[2])
from dibit.train import Settings
from dibit.train.batches import MiniBatch
from dibit.train.data import load_graph
from dibit.train.distributed import world_of_environment
from dibit.train.task import Task
from tests.unbiased import bias_of

world = world_of_environment()
dist.init_process_group("gloo")
model = {"hidden": 16, "layers": 2, "norm": "none", "dropout": 0}
settings = Settings().updated(dataset=sys.argv[1], device="cpu", loader="cluster", **model)
task = Task.build(settings, load_graph(settings.data, 0), world)
train = task.split(0).train
parts = train[:9], train[9:]  # shares of different size

def gradient(config, rows, world, seed):
    model = task.model(0).train()
    if config is not None:
        dibit.compress(model, config)
    torch.manual_seed(1000 * seed + world.rank)
    wrapped = nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = MiniBatch(task.x, (task.adjacency,), rows, task.graph.y[rows])
    dataclasses.replace(task, world=world).step(wrapped, optimizer, batch)
    return torch.cat([p.grad.flatten() for p in model.parameters()])

alone = gradient(None, train, type(world)(), 0)
shared = gradient(None, parts[world.rank], world, 0)
torch.testing.assert_close(shared, alone)
config = dibit.Config(bits=2, block=64, reduce=dibit.Sample(4))
own = bias_of(lambda seed: gradient(config, parts[world.rank], world, seed), alone, 60)
assert own.unbiased, own
if world.first:
    print("unbiased, squared error", own.relative)
dist.destroy_process_group()
"""


def test_the_gradient_is_that_of_one_process(small: Path, tmp_path: Path) -> None:
    """Exactly so for the plain model, with shares of different size; in expectation for the compressed one."""
    script = tmp_path / "gradient.py"
    script.write_text(_GRADIENT)
    process = start(script, small, Path(__file__).parents[2])
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "unbiased" in stdout


def test_a_process_that_dies_ends_the_run_and_it_goes_on(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = train(small, "--epochs", 300, "--checkpoint-every", 5, "--out", out)
    file, until = out / "checkpoint.pt", time.monotonic() + 120
    while not file.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None
    assert file.exists()
    second = next(p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode != 0
    before = checkpoint.load(file)["state"]["epoch"]
    assert 0 < before < 300
    again = start("-m", "dibit", "train", "--resume", "--out", out)
    _, stderr = again.communicate(timeout=200)
    assert again.returncode == 0, stderr
    assert checkpoint.load(file)["state"]["epoch"] == 300
    assert len(checkpoint.load(file)["state"]["loss"]) == 300


def test_the_whole_graph_cannot_be_shared(small: Path, tmp_path: Path) -> None:
    process = start("-m", "dibit", "train", "--dataset", small, "--out", tmp_path / "run")
    _, stderr = process.communicate(timeout=100)
    assert process.returncode != 0
    assert stderr.count("choose a loader, such as --loader neighbor") == 1
    assert not (tmp_path / "run").exists()


def test_who_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert world_of_environment() == World(0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="torchrun"):
        world_of_environment()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world_of_environment() == World(3, 4, 1)
