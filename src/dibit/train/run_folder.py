"""The folder of a run: whose it is, what may be written there, where to go on."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from types import TracebackType

from dibit.tools import lock
from dibit.tools.errors import UserError
from dibit.tools.files import check_out, refused, write_atomically
from dibit.tools.lock import Lock
from dibit.tools.manifest import Manifest
from dibit.train import checkpoint
from dibit.train.arguments import read_yaml, to_yaml
from dibit.train.settings import Settings

SETTINGS = "settings.yaml"
MANIFEST = "manifest.json"
CHECKPOINT, BEST = "checkpoint.pt", "best.pt"  # of each training


class RunFolder:
    """The folder of one command; a context manager, at the end of which its lock is given back.

    `check` only looks, so that nothing is written before all input is known to be good; `open` writes.
    """

    def __init__(self, settings: Settings) -> None:
        out = settings.run.out
        self.path = Path(out) if out is not None else _fresh(settings)
        # settings.yaml says where it lies, and can be passed back as it is.
        self.settings = settings.updated(out=str(self.path), resume=False, overwrite=False)
        self.resume, self.overwrite = settings.run.resume, settings.run.overwrite
        self.lock = Lock(self.path)
        self.manifest = Manifest(self.path, MANIFEST, "dibit train")

    def check(self) -> None:
        """Raise `UserError` if the folder holds something that this run must not touch, or another run is in it,
        above it or below it.

        A folder that is there is locked from now on.
        """
        check_out(self.path)
        self.lock.look()
        found = self._content()
        is_run = SETTINGS in found
        if self.resume:
            if not is_run:
                raise UserError(f"The folder {self.path} holds no run to go on with; leave out --resume to start one.")
            self._lock()
            self._check_same()
            self.manifest.adopt(*self._files())
            self._look()
        elif found and not is_run:
            raise UserError(
                f"The folder {self.path} holds something else ({found[0]}); give another --out, or empty it."
            )
        elif found:
            self._lock()  # before all else: another run may be at it
            if not self.overwrite:
                raise UserError(
                    f"The folder {self.path} holds a run already; go on with it (--resume), replace it "
                    "(--overwrite), or give another --out."
                )
            self.manifest.read()
            self._look()

    def open(self) -> None:
        """Create the folder, or empty it of the run that is to be replaced, and write settings.yaml.

        Raises:
            UserError: It cannot be written, or another run has come in since `check`.
            OSError: There is no room.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            self.check()
            if self.overwrite and SETTINGS in self._content():
                self.manifest.remove(keep=(SETTINGS,))  # a kill from here on leaves a run to replace
            self.note(self.path / SETTINGS)
            write_atomically(self.path / SETTINGS, to_yaml(self.settings).encode(), alone=True)
        except OSError as error:
            raise refused(self.path, error) from error

    def note(self, file: Path) -> None:
        """A file is about to be written."""
        self.manifest.add(file)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()

    def _files(self) -> list[Path]:
        """What the run will write, but for the event files, whose names are new."""
        folders = [self.path_for(recipe, seed) for recipe, seed in trainings(self.settings)]
        return [self.path / SETTINGS, *(folder / name for folder in folders for name in (CHECKPOINT, BEST))]

    def _look(self) -> None:
        try:
            self.manifest.check(*self._files())
        except OSError as error:
            raise refused(self.path, error) from error

    def _lock(self) -> None:
        try:
            self.lock.acquire()
        except OSError as error:
            raise refused(self.path, error) from error

    def _content(self) -> list[str]:
        """What is in the folder, but for what a command has left that was killed before it wrote its settings."""
        found = sorted(p.name for p in self.path.iterdir() if p.name != lock.NAME) if self.path.is_dir() else []
        return [] if found == [MANIFEST] else found

    def path_for(self, recipe: str, seed: int) -> Path:
        """Return the folder of one training: the folder itself, or one below it if there are several."""
        run = self.settings.run
        if not run.compare and run.seeds == 1:
            return self.path
        return self.path / recipe / f"seed{seed}"

    def _check_same(self) -> None:
        before = Settings.from_flat(read_yaml(self.path / SETTINGS)).flat()
        now = self.settings.flat()
        found = checkpoint.difference(before, now, checkpoint.FREE)
        if found is not None:
            raise UserError(
                f"The run in {self.path} was started with {found[0]}, and cannot go on with {found[1]}; leave the flag "
                "out, or start anew with another --out."
            )
        if now["epochs"] < before["epochs"]:
            raise UserError(
                f"The run in {self.path} was started with --epochs {before['epochs']}; expected at least as "
                f"many, not {now['epochs']}."
            )


def recipes(settings: Settings) -> list[str]:
    """The names of the ways of compression that a run compares."""
    recipe = settings.compression.recipe
    return ["none", recipe] if settings.run.compare else [recipe]


def trainings(settings: Settings) -> list[tuple[str, int]]:
    """Name and seed of each training of a run, in their order."""
    seeds = range(settings.run.seed, settings.run.seed + settings.run.seeds)
    return [(name, seed) for seed in seeds for name in recipes(settings)]


def how_to_go_on(path: Path | str) -> str:
    """Return the command that goes on with a run, as part of a sentence."""
    return f"go on with: dibit train --resume --out {shlex.quote(str(path))}"


def _fresh(settings: Settings) -> Path:
    """Return a folder in runs/ that does not exist yet, named by data set, model, recipe and time."""
    dataset = Path(settings.data.dataset).stem.replace(":", "")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = f"{dataset}-{settings.model.model}-{settings.compression.recipe}-{stamp}"
    names = (f"{base}-{i}" if i else base for i in range(1000))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())
