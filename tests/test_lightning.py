"""The Lightning callback: compressed for the time of `fit`, scores in the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dibit

pl = pytest.importorskip("lightning.pytorch")
from dibit.lightning import DibitCallback  # noqa: E402

CONFIG = dibit.Config(bits=2, block=16, reduce=dibit.Sample(4, by="gradient"))


class Net(pl.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
        self.compressed: list[bool] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        torch.manual_seed(0)
        y = self.body(torch.randn(200, 16))
        self.compressed.append("Dibit" in repr(y.grad_fn) or type(y.grad_fn).__name__ == "LinearBackward")
        return y.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def trainer(folder: Path, callback: DibitCallback, epochs: int) -> object:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


@pytest.mark.parametrize("module", [None, "body"])
def test_compressed_for_the_time_of_fit(tmp_path: Path, module: str | None) -> None:
    net, callback = Net(), DibitCallback(CONFIG, module)
    run = trainer(tmp_path, callback, 3)
    run.fit(net, DataLoader([0]))  # type: ignore[attr-defined]
    assert net.compressed == [True] * 3
    assert callback.saved is not None
    assert 0 < callback.saved.total < callback.saved.plain / 3
    assert run.callback_metrics["dibit/saved_mb"] == pytest.approx(callback.saved.total / 2**20)  # type: ignore[attr-defined]
    assert not any(m._forward_hooks for m in net.modules())


def test_scores_go_with_the_checkpoint(tmp_path: Path) -> None:
    net = Net()
    run = trainer(tmp_path, DibitCallback(CONFIG), 2)
    found: dict[str, dict[str, Tensor]] = {}

    class Save(pl.Callback):  # type: ignore[name-defined,misc]
        def on_train_end(self, trainer: object, pl_module: nn.Module) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")  # type: ignore[attr-defined]

    class Look(pl.Callback):  # type: ignore[name-defined,misc]
        def on_train_start(self, trainer: object, pl_module: nn.Module) -> None:
            found["again"] = dibit.scores(pl_module).state_dict()

    run.callbacks.append(Save())  # type: ignore[attr-defined]
    run.fit(net, DataLoader([0]))  # type: ignore[attr-defined]
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert saved["state_dict"].keys() == net.state_dict().keys()
    assert saved["dibit_scores"]
    again = trainer(tmp_path, DibitCallback(CONFIG), 3)
    again.callbacks.append(Look())  # type: ignore[attr-defined]
    again.fit(Net(), DataLoader([0]), ckpt_path=tmp_path / "a.ckpt", weights_only=False)  # type: ignore[attr-defined]
    assert found["again"].keys() == saved["dibit_scores"].keys()
    of_the_rows = [key for key in found["again"] if not key.startswith("draws/")]  # the others are of the generator
    assert all(torch.equal(found["again"][key], saved["dibit_scores"][key]) for key in of_the_rows)


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="no module of that name; it has 'body'"):
        trainer(tmp_path, DibitCallback(module="boddy"), 1).fit(Net(), DataLoader([0]))  # type: ignore[attr-defined]


def test_a_model_without_an_operation_that_is_known_warns(tmp_path: Path) -> None:
    class Unknown(Net):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self(torch.randn(4, 16)).sum()

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ij,kj->ik", x, self.body[0].weight)

    with pytest.warns(UserWarning, match="nothing was compressed"):
        trainer(tmp_path, DibitCallback(), 1).fit(Unknown(), DataLoader([0]))  # type: ignore[attr-defined]
