"""Training one model with one seed: epochs, evaluation, checkpoints, and going on from them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import dibit
from dibit.codec import seed_stream
from dibit.recipes import UNBOUNDED
from dibit.tools.errors import Interrupted, TrainingError
from dibit.train import checkpoint, events, generators
from dibit.train.batches import MiniBatch
from dibit.train.interrupt import stop_after_epoch
from dibit.train.progress import EpochProgress
from dibit.train.result import Result
from dibit.train.run_folder import BEST, CHECKPOINT, how_to_go_on
from dibit.train.run_state import TrainingProgress, identity, load_weights, own_seed
from dibit.train.task import Measured, Task, adam, compressed, measure

# Steps, at least, between two measurements of noise, each of which costs two: in the beginning, and later.
_NOISE_SOON, _NOISE_EVERY = 4, 40
_NOISY = 3.0  # above this, training is slowed down


def train_one(
    task: Task,
    name: str,
    config: dibit.Config | None,
    seed: int,
    folder: Path,
    on_epoch: Callable[[int, int], None] | None = None,
    last: bool = True,
    note: Callable[[Path], None] = lambda file: None,
    resume: bool = False,
    log: bool = True,
) -> Result:
    """Train one model.

    Args:
        task: NodeDataset and settings.
        name: What to call the way of compression, in the result, the checkpoint and messages.
        config: How to compress; None trains plainly.
        seed: Of weights, dropout and split.
        folder: Of checkpoint.pt, best.pt and the TensorBoard logs; created if need be.
        on_epoch: Called after each epoch with its number and that of the last.
        last: Nothing follows this training, so that Ctrl-C in its last epoch has nothing to stop.
        note: Called with each file that is written, before it is.
        resume: Go on from the checkpoint in `folder`, if there is one; else it is replaced.
        log: Write TensorBoard's logs.

    Raises:
        Interrupted: After Ctrl-C, once the epoch is finished and the checkpoint written.
        TrainingError: The loss is not finite.
        UserError: The checkpoint cannot be read, or is another training's.
        OSError: A file cannot be written; the last checkpoint is whole.
    """
    return _Training(task, name, config, seed, folder, note, resume, log).run(on_epoch, last)


def check_checkpoint(task: Task, name: str, config: dibit.Config | None, seed: int, folder: Path) -> None:
    """Look whether `train_one` can go on from what is in `folder`; nothing is written.

    Raises:
        UserError: The checkpoint cannot be read, or is another training's.
    """
    path = folder / CHECKPOINT
    loaded = checkpoint.of_this_training(path, identity(task, name, config, seed))
    if loaded is not None:
        load_weights(path, loaded, task.model(seed))


_LARGE = 1e6  # features beyond this are the likelier reason of a loss that is not finite than the step size


class _Training:
    """Everything that one training holds while it runs."""

    def __init__(
        self,
        task: Task,
        name: str,
        config: dibit.Config | None,
        seed: int,
        folder: Path,
        note: Callable[[Path], None],
        resume: bool,
        log: bool,
    ) -> None:
        self.logs = log
        self.task, self.name, self.seed, self.folder, self.note = task, name, seed, folder, note
        self.settings = task.settings
        self.split = task.split(seed)
        self.identity = identity(task, name, config, seed)
        self.world = task.world
        self.state = TrainingProgress()
        self.best: dict[str, torch.Tensor] = {}
        self.best_is_written = True
        self.model: nn.Module = task.model(seed)
        self.batches = task.batches(seed)
        loaded = checkpoint.of_this_training(folder / CHECKPOINT, self.identity) if resume else None
        self.measured = Measured(**loaded["measured"]) if loaded else self._measure(config)
        # of the trained model, once the training has come to its end
        self.measured_last = Measured(**loaded.get("measured_last", loaded["measured"])) if loaded else self.measured
        self.compressed = config is not None
        compressed(self.model, config)  # in place
        self.optimizer = adam(self.model, self.settings.optimisation)
        self.scaler = task.scaler()
        if self.world.size > 1:
            torch.manual_seed(own_seed(seed, self.world.rank))  # dropout, samples and codes are each process's own
        if loaded:
            self._restore(loaded)
        else:
            seed_stream.restart()  # an earlier training in this process may have begun from the same seed
        self.trained = self.model if self.world.size == 1 else nn.parallel.DistributedDataParallel(self.model)

    def _measure(self, config: dibit.Config | None) -> Measured:
        """What the model keeps and takes as it is, compressed first if there is a config."""
        found = measure(self.task, self.model, config, self.batches) if self.world.first else None
        return self.world.shared(found)

    def _measure_again(self) -> Measured:
        """The same of the trained model; no draw of any generator is lost, should the training go on."""
        state, given = generators.state(self.task.device), seed_stream.given()
        found = self._measure(None)
        generators.restore(state, self.task.device)
        seed_stream.go_on(**given)
        return found

    def run(self, on_epoch: Callable[[int, int], None] | None, nothing_follows: bool) -> Result:
        """Train to the end."""
        optimisation, every = self.settings.optimisation, self.settings.run.checkpoint_every
        self.model.train()
        if self.world.first:
            self.note(self.folder / CHECKPOINT)  # first: a link in the folder's place is refused
            self.note(self.folder / BEST)
            self.folder.mkdir(parents=True, exist_ok=True)
        label = f"{self.name:<7} seed {self.seed}"
        with (
            EpochProgress(label, optimisation.epochs, self.state.epoch, self._silent()) as progress,
            self._log() as log,
            stop_after_epoch(progress) as stop,
        ):
            while self.state.epoch < optimisation.epochs and not self._out_of_patience():
                self._epoch(log, progress)
                state = self.state
                noise = state.noise[-1][1] if state.noise and state.noise[-1][0] == state.epoch else None
                progress.epoch(state.epoch, state.loss[-1], state.last_val, state.seconds[-1], noise)
                if on_epoch is not None:
                    on_epoch(state.epoch, optimisation.epochs)
                last = state.epoch == optimisation.epochs or self._out_of_patience()
                if last and self.compressed:  # more rows may be kept by now
                    self.measured_last = self._measure_again()
                stopped = bool(self.world.sums(stop.is_set())[0])  # of one, of all
                if last or stopped or state.epoch % every == 0:
                    self._save()
                if stopped and not last:
                    raise Interrupted(self._how_to_go_on())
        if self.world.sums(stop.is_set())[0] and not nothing_follows:
            raise Interrupted(self._how_to_go_on())
        return self._result()

    def _silent(self) -> bool:
        return self.settings.run.quiet or not self.world.first

    def _epoch(self, log: Any, progress: EpochProgress) -> None:
        state, optimisation = self.state, self.settings.optimisation
        start = time.perf_counter()
        total = rows = 0.0
        self.batches.begin(state.epoch)
        for number, batch in enumerate(self.batches, 1):
            mean, own = self.task.step(self.trained, self.optimizer, batch, self.scaler)
            total, rows = total + float(mean) * own, rows + own  # float: waits for a GPU
            state.steps, state.unmeasured = state.steps + 1, state.unmeasured + 1
            progress.within("batch", number, len(self.batches))
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)
        seconds = time.perf_counter() - start
        total, rows = self.world.sums(total, rows)
        loss = total / rows if rows else math.nan
        state.epoch += 1
        if not math.isfinite(loss):
            largest = float(self.task.x.abs().max())
            advice = "try a lower --lr, or --clip 0.5"
            if largest > _LARGE:
                advice = f"the features reach {largest:.2g}: scale them, or give --standardize"
            raise TrainingError(
                f"the loss of {self.name}, seed {self.seed}, is {loss} in epoch {state.epoch}; {advice}."
            )
        state.loss.append(loss)
        state.seconds.append(seconds)
        log.add_scalar("loss/train", loss, state.epoch)
        log.add_scalar("seconds/epoch", seconds, state.epoch)
        if state.epoch % optimisation.eval_every and state.epoch != optimisation.epochs:
            return
        self._noise(batch, log, progress)
        if self.world.size > 1:  # statistics of norm layers are each process's own since its last forward pass
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        val, test = self.task.evaluate(self.model, self.split, partial(progress.within, "evaluating"))
        log.add_scalar(f"{self.task.graph.metric}/val", val, state.epoch)
        log.add_scalar(f"{self.task.graph.metric}/test", test, state.epoch)
        state.last_val = val
        state.curve.append((state.epoch, val))
        state.since_best += 1
        if val > state.val:
            state.val, state.test, state.best_epoch, state.since_best = val, test, state.epoch, 0
            self.best = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            self.best_is_written = False

    def _noise(self, batch: MiniBatch, log: Any, progress: EpochProgress) -> None:
        """Measure how much noise compression adds to the gradient, once in a while, and say so where it is much."""
        state = self.state
        apart = min(_NOISE_EVERY, max(_NOISE_SOON, state.steps // 2))
        if not (self.compressed and self.world.first) or (state.noise and state.unmeasured < apart):
            return
        state.unmeasured = 0
        found = self.task.noise(self.model, batch, self.scaler)
        if found is None:
            return
        state.noise.append((state.epoch, found))
        log.add_scalar("gradient/noise", found, state.epoch)
        if found > _NOISY and not state.warned:
            state.warned = True
            progress.say(
                f"{self.name}, epoch {state.epoch}: the gradient's noise is {found:.1f} times its own square, which "
                f"may slow training down; {self._quieter()}, --bits 8 rounds less, and --recipe none shows what "
                "compression costs."
            )

    def _quieter(self) -> str:
        """What to try first against noise."""
        compression = self.settings.compression
        if compression.recipe in UNBOUNDED:
            return "--recipe default bounds it"
        bound = 0.5 if compression.noise is None else compression.noise
        return f"--noise {bound / 5:g} keeps more rows"

    def _out_of_patience(self) -> bool:
        patience = self.settings.optimisation.patience
        return patience is not None and self.state.since_best >= patience

    def _save(self) -> None:
        """Write best.pt, if it is new, and then the checkpoint, which holds the best weights too."""
        processes = self.world.gathered(
            {
                **generators.state(self.task.device),
                "scores": dibit.scores(self.model).state_dict() if self.compressed else {},
            }
        )
        if not self.world.first:
            return
        if not self.best_is_written:
            checkpoint.save(
                self.folder / BEST,
                {
                    "state_dict": self.best,
                    "settings": {**self.settings.flat(), "recipe": self.name, "seed": self.seed},
                    "in_channels": self.task.x.shape[1],
                    "num_classes": self.task.graph.num_classes,
                    "epoch": self.state.best_epoch,
                    "val": self.state.val,
                    "test": self.state.test,
                },
            )
            self.best_is_written = True
        checkpoint.save(
            self.folder / CHECKPOINT,
            {
                "format": checkpoint.FORMAT,
                **self.identity,
                "state": asdict(self.state),
                "measured": asdict(self.measured),
                "measured_last": asdict(self.measured_last),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "processes": processes,
            },
        )

    def _restore(self, loaded: dict[str, Any]) -> None:
        self.state = TrainingProgress(**loaded["state"])
        self.best = loaded["best"]
        # A kill between the two writes leaves a newer best.pt than the checkpoint knows: the same epochs
        # follow again.
        self.best_is_written = False
        load_weights(self.folder / CHECKPOINT, loaded, self.model)
        self.optimizer.load_state_dict(loaded["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(loaded["scaler"])
        own = loaded["processes"][self.world.rank % len(loaded["processes"])]
        if self.compressed:
            scores = {k: v.to(self.task.device) for k, v in own["scores"].items()}
            dibit.scores(self.model).load_state_dict(scores)
        if len(loaded["processes"]) != self.world.size:  # another number of processes goes on: with draws of their own
            torch.manual_seed(own_seed(self.seed, self.world.rank, self.state.epoch))
            return
        generators.restore(own, self.task.device)

    def _log(self) -> events.Events | events.NoEvents:
        """For TensorBoard; what an interrupted run logged after its checkpoint is hidden."""
        if not (self.logs and self.world.first):
            return events.NoEvents()
        path = self.folder / events.name(self.folder)
        self.note(path)
        return events.Events(path, self.state.epoch + 1)

    def _how_to_go_on(self) -> str:
        assert self.settings.run.out is not None  # the folder is in the settings by now
        return (
            f"interrupted after epoch {self.state.epoch} of {self.settings.optimisation.epochs} "
            f"({self.name}, seed {self.seed}); {how_to_go_on(self.settings.run.out)}"
        )

    def _result(self) -> Result:
        state, measured = self.state, self.measured.largest(self.measured_last)
        return Result(
            recipe=self.name,
            seed=self.seed,
            test=state.test,
            val=state.val,
            best_epoch=state.best_epoch,
            epochs=state.epoch,
            saved_bytes=measured.saved,
            plain_bytes=measured.plain,
            peak_bytes=measured.peak,
            seconds_per_epoch=statistics.median(state.seconds),
            loss=state.loss,
            noise=[(epoch, value) for epoch, value in state.noise],
            curve=[(epoch, value) for epoch, value in state.curve],
        )
