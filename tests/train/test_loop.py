"""Training in this process: what is reached, measured, written, and gone on from."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dibit
from dibit.tools.files import write_atomically
from dibit.train import Interrupted, Settings, TrainingError, UserError, checkpoint
from dibit.train.data import load_graph
from dibit.train.loop import train_one
from dibit.train.result import Result
from dibit.train.settings import RECIPES
from dibit.train.task import Measured, Task, compression_config, measure, pick_device
from tests.train.conftest import small_arrays


def _task(small: Path, **settings: Any) -> Task:
    defaults = {
        "dataset": str(small),
        "hidden": 16,
        "layers": 2,
        "epochs": 12,
        "quiet": True,
        "device": "cpu",
    }
    chosen = Settings.from_flat({**defaults, "out": str(small.parent), **settings})
    chosen.check()
    return Task.build(chosen, load_graph(chosen.data, chosen.run.seed))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoint.pt")["model"]


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learns_and_keeps_the_best(small: Path, tmp_path: Path) -> None:
    task = _task(small, epochs=30, recipe="none")
    result = train_one(task, "none", None, 0, tmp_path / "run")
    assert result.test > 0.6  # three classes
    assert result.loss[-1] < result.loss[0]
    assert (result.epochs, len(result.loss)) == (30, 30)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert (best["epoch"], best["val"], best["test"]) == (result.best_epoch, result.val, result.test)
    model = task.model(5)
    model.load_state_dict(best["state_dict"])
    assert task.evaluate(model, task.split(0)) == (result.val, result.test)
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(("flags", "bound"), [({}, 0.5), ({"recipe": "small"}, 1.0), ({"noise": 0.02}, 0.02)])
def test_the_bound_of_the_noise(flags: dict[str, Any], bound: float) -> None:
    config = compression_config(Settings.from_flat(flags).compression)
    assert config is not None
    assert config.noise == bound


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ({"recipe": "default"}, "--noise 0.1 keeps more rows"),
        ({"recipe": "default", "noise": 0.25}, "--noise 0.05 keeps more rows"),
        ({"recipe": "iexact"}, "--recipe default bounds it"),
    ],
)
def test_much_noise_is_said_once(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, Any],
    advice: str,
) -> None:
    monkeypatch.setattr(Task, "noise", lambda *_: 7.0)
    task = _task(small, quiet=False, epochs=30, **flags)
    config = compression_config(task.settings.compression)
    result = train_one(task, flags["recipe"], config, 0, tmp_path)
    said = capsys.readouterr().err
    assert said.count("the gradient's noise is 7.0 times its own square") == 1
    assert advice in said
    assert [epoch for epoch, _ in result.noise] == [1, 5, 9, 17]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["none", "default", "iexact"])
def test_going_on_gives_the_same_as_never_stopping(small: Path, tmp_path: Path, recipe: str) -> None:
    config = None if recipe == "none" else dibit.recipe(recipe)
    whole = train_one(_task(small, recipe=recipe), recipe, config, 3, tmp_path / "whole")
    train_one(_task(small, recipe=recipe, epochs=5), recipe, config, 3, tmp_path / "parts", resume=True)
    torch.manual_seed(999)  # what this process drew in between must not matter
    parts = train_one(_task(small, recipe=recipe), recipe, config, 3, tmp_path / "parts", resume=True)
    assert parts.loss == whole.loss
    assert (parts.test, parts.val, parts.best_epoch) == (whole.test, whole.val, whole.best_epoch)
    assert _same(_weights(tmp_path / "parts"), _weights(tmp_path / "whole"))


def test_a_finished_run_is_not_trained_again(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = _task(small, recipe="none")
    first = train_one(task, "none", None, 0, tmp_path / "run")
    monkeypatch.setattr(Task, "step", None)
    assert train_one(task, "none", None, 0, tmp_path / "run", resume=True) == first


def test_the_curve_is_every_evaluation(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    evaluate = Task.evaluate

    def noted(self: Task, *args: Any) -> tuple[float, float]:
        told.append(evaluate(self, *args)[0])
        return told[-1], 0.0

    monkeypatch.setattr(Task, "evaluate", noted)
    result = train_one(_task(small, epochs=8, eval_every=3), "default", dibit.recipe("default"), 0, tmp_path / "run")
    assert result.curve == list(zip([3, 6, 8], told, strict=True))
    assert (result.best_epoch, result.val) == max(result.curve, key=lambda point: (point[1], -point[0]))
    train_one(_task(small, epochs=3, eval_every=3), "none", None, 0, tmp_path / "parts", resume=True)
    parts = train_one(_task(small, epochs=8, eval_every=3), "none", None, 0, tmp_path / "parts", resume=True)
    assert [epoch for epoch, _ in parts.curve] == [3, 6, 8]


def test_without_a_log_the_same_is_trained(small: Path, tmp_path: Path) -> None:
    results = [
        train_one(_task(small, epochs=3), "none", None, 0, tmp_path / str(log), log=log) for log in (True, False)
    ]
    assert results[0].loss == results[1].loss
    assert list((tmp_path / "True").glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (tmp_path / "False").iterdir()) == ["best.pt", "checkpoint.pt"]


def test_measuring_changes_nothing(small: Path) -> None:
    task = _task(small)
    model = task.model(0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    measured = measure(task, model, dibit.recipe("default"), task.batches(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert _same(dict(model.state_dict()), before)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert 0 < measured.saved < measured.plain


def test_a_model_in_training_is_measured_as_it_is() -> None:
    """What its steps have taught it, how many rows to keep, counts."""
    from dibit.engine.model_state import states_in

    task = _task(Path(), dataset="planted:6000", hidden=32, layers=3, out=None)
    loose = replace(dibit.recipe("default"), noise=1e9)
    model = dibit.compress(task.model(0), loose)
    at_first = measure(task, task.model(0), loose, task.batches(0))
    optimizer, batch = torch.optim.Adam(model.parameters()), next(iter(task.batches(0)))
    for saved in (at_first.saved, 1.1 * at_first.saved):
        for _ in range(5):
            task.step(model, optimizer, batch)
        assert measure(task, model, None, task.batches(0)).saved >= saved
        (found,) = states_in(model)
        found.state.scores.plan.bound = 1e-9  # as if its gradient had become small


def test_the_most_that_a_training_keeps_is_reported(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter((Measured(5, 100, 9), Measured(7, 100, 8)))
    configs = []

    def measured(_task: Task, _model: object, config: object, _batches: object) -> Measured:
        configs.append(config)
        return next(found)

    monkeypatch.setattr("dibit.train.loop.measure", measured)
    config = dibit.recipe("default")
    result = train_one(_task(small), "default", config, 0, tmp_path)
    assert (result.saved_bytes, result.plain_bytes, result.peak_bytes) == (7, 100, 9)
    assert configs == [config, None]
    kept = checkpoint.load(tmp_path / "checkpoint.pt")
    assert kept["measured"] == {"saved": 5, "plain": 100, "peak": 9}
    assert kept["measured_last"] == {"saved": 7, "plain": 100, "peak": 8}


def test_plain_training_saves_what_it_saves(small: Path) -> None:
    """By hand: two layers of SAGE with BatchNorm on 60 nodes, 8 features, width 16, 36 training nodes."""
    task = _task(small, recipe="none")
    measured = measure(task, task.model(0), None, task.batches(0))
    assert measured.saved == measured.plain
    # aggregated inputs; the norm's input, its mean and deviation; relu's output, dropout's output; targets
    floats = 60 * 8 + 60 * 16 + 60 * 16 + 2 * 16 + 60 * 16 + 60 * 16
    mask = {60 * 16, 60 * 16 * 4}  # one byte an element, or four, by torch's version and device
    graph_free = measured.saved - 4 * floats - 8 * 36
    assert graph_free in mask, graph_free
    assert measured.peak >= measured.saved - 8 * 36


def test_same_seed_same_start_for_both(small: Path, tmp_path: Path) -> None:
    """Compression does not change the forward pass: without dropout the first loss is the plain one."""
    task = _task(small, epochs=1, dropout=0)
    configs = {"none": None, "default": dibit.recipe("default")}
    losses = [train_one(task, name, config, 4, tmp_path / name).loss[0] for name, config in configs.items()]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("last", [True, False])
def test_ctrl_c_in_the_last_epoch_stops_what_would_follow(small: Path, tmp_path: Path, last: bool) -> None:
    task = _task(small, recipe="none", epochs=3)

    def interrupt(epoch: int, epochs: int) -> None:
        if epoch == epochs:
            os.kill(os.getpid(), signal.SIGINT)

    def train() -> Result:
        return train_one(task, "none", None, 0, tmp_path / "run", on_epoch=interrupt, last=last)

    if last:
        assert train().epochs == 3
    else:
        with pytest.raises(Interrupted, match="after epoch 3 of 3"):
            train()
    assert (tmp_path / "run" / "checkpoint.pt").is_file()


def test_early_stop_and_sparse_evaluation(small: Path, tmp_path: Path) -> None:
    result = train_one(
        _task(small, epochs=60, recipe="none", patience=2, eval_every=3), "none", None, 0, tmp_path / "run"
    )
    assert result.epochs < 60
    assert result.epochs == result.best_epoch + 2 * 3
    assert result.best_epoch % 3 == 0


def test_several_labels(tmp_path: Path) -> None:
    arrays = small_arrays(nodes=90)
    arrays["y"] = np.stack([arrays["y"] == 0, arrays["y"] != 1], axis=1)
    path = tmp_path / "multi.npz"
    np.savez(path, **arrays)
    result: Result = train_one(_task(path, epochs=30, recipe="none"), "none", None, 0, tmp_path / "run")
    assert result.test > 0.7


def test_a_loss_that_is_not_finite(small: Path, tmp_path: Path) -> None:
    task = _task(small, recipe="none", norm="none", lr=1e30, epochs=20)
    with pytest.raises(TrainingError, match="lower --lr"):
        train_one(task, "none", None, 0, tmp_path / "run")


def test_features_that_are_the_reason_of_such_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    np.savez(path, **{**small_arrays(), "x": np.full((60, 8), 3e38, np.float32)})
    with pytest.raises(TrainingError, match=r"the features reach 3e\+38: scale them, or give --standardize"):
        train_one(_task(path, recipe="none", epochs=3), "none", None, 0, tmp_path / "run")


def test_nothing_is_gone_on_with_unless_asked_for(small: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def train() -> Result:
        task = _task(small, recipe="none", epochs=3)
        return train_one(task, "none", None, 0, tmp_path / "run", on_epoch=lambda epoch, _: seen.append(epoch))

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK half")
    assert train().loss == train().loss
    assert seen == [1, 2, 3] * 2


def test_another_graph_under_the_same_checkpoint(small: Path, tmp_path: Path) -> None:
    train_one(_task(small, recipe="none", epochs=1), "none", None, 0, tmp_path / "run")
    with pytest.raises(UserError, match="made on another graph"):
        train_one(_task(small, recipe="none", standardize=True), "none", None, 0, tmp_path / "run", resume=True)


def test_a_broken_checkpoint(small: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK half")
    with pytest.raises(UserError, match="cannot be read"):
        train_one(_task(small, recipe="none"), "none", None, 0, tmp_path / "run", resume=True)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def _config(**settings: Any) -> dibit.Config:
    config = compression_config(Settings.from_flat(settings).compression)
    assert config is not None
    return config


def test_any_config_under_any_name(small: Path, tmp_path: Path) -> None:
    """The config decides what is kept, whatever the settings' recipe; the name is a label."""
    task = _task(small, epochs=8, dropout=0)
    configs = {"default": None, "8 bits": dibit.Config(bits=8), "2 bits": dibit.Config(bits=2)}
    plain, eight, two = (train_one(task, name, config, 0, tmp_path / name) for name, config in configs.items())
    assert two.saved_bytes < eight.saved_bytes < eight.plain_bytes == plain.saved_bytes
    assert plain.loss[0] == eight.loss[0] == two.loss[0]  # compression enters with the first gradient
    assert len({plain.loss[-1], eight.loss[-1], two.loss[-1]}) == 3
    assert eight.recipe == "8 bits"
    assert checkpoint.load(tmp_path / "8 bits" / "checkpoint.pt")["recipe"] == "8 bits"
    assert checkpoint.load(tmp_path / "8 bits" / "best.pt")["settings"]["recipe"] == "8 bits"


def test_settings_become_a_config() -> None:
    assert compression_config(Settings.from_flat({"recipe": "none"}).compression) is None
    assert _config() == dibit.recipe("default")
    exact = dibit.recipe("exact")
    assert _config(recipe="exact", bits=4, block=64) == replace(exact, bits=4, block=64)
    assert _config(recipe="iexact", block="row", levels="normal").levels == "normal"
    default = _config(bits=8, block="row")
    assert default.norm is not None
    assert (default.bits, default.norm.bits, default.block, default.norm.block) == (8, 8, "row", "row")


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "none"])
def test_other_levels_go_with_every_recipe(recipe: str) -> None:
    own, normal, uniform = dibit.recipe(recipe), _config(recipe=recipe, levels="normal"), _config(levels="uniform")
    for part, before in ((normal, own), (normal.norm, own.norm)):
        if before is not None:
            rounding = "stochastic" if before.rounding == "dither" else before.rounding
            assert part is not None
            assert part == replace(before, levels="normal", rounding=rounding, norm=part.norm)
    assert uniform == dibit.recipe("default")  # its norm keeps the dither


def test_a_recipe_that_cannot_be_changed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    own = dibit.Config(bits=1, levels=(0.0, 1.0))
    monkeypatch.setattr(dibit, "recipe", lambda name: own)
    with pytest.raises(UserError, match=r"--recipe exact cannot be changed so: levels = .* bits = 2"):
        _config(recipe="exact", bits=2)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps:x", "meta"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(UserError, match="--device is"):
        pick_device(name)
