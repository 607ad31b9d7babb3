"""The folder of a run: whose it is, what may be written there, where to go on."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path

from dibit.train.checkpoint import write_atomically
from dibit.train.errors import UserError
from dibit.train.parser import read_yaml, to_yaml
from dibit.train.settings import Settings

SETTINGS = "settings.yaml"
# What may differ between a run and its continuation: it does not change the result, or only makes it longer.
_FREE = ("root", "trust", "epochs", "json", "resume", "overwrite", "checkpoint_every", "quiet", "out")


class RunFolder:
    """The folder of one command.

    `check` only looks, so that nothing is written before all input is known to be good; `open` writes.
    """

    def __init__(self, settings: Settings) -> None:
        out = settings.run.out
        self.path = Path(out) if out is not None else _fresh(settings)
        # settings.yaml says where it lies, and can be passed back as it is.
        self.settings = settings.updated(out=str(self.path), resume=False, overwrite=False)
        self.resume, self.overwrite = settings.run.resume, settings.run.overwrite

    def check(self) -> None:
        """Raise `UserError` if the folder holds something that this run must not touch."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file, expected a folder.")
        content = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        is_run = SETTINGS in content
        if self.resume:
            if not is_run:
                raise UserError(f"The folder {self.path} holds no run to go on with; leave out --resume to start one.")
            self._check_same()
        elif content and not is_run:
            raise UserError(
                f"The folder {self.path} holds something else ({content[0]}); give another --out, or empty it."
            )
        elif content and not self.overwrite:
            raise UserError(
                f"The folder {self.path} holds a run already; go on with it (--resume), replace it "
                "(--overwrite), or give another --out."
            )

    def open(self) -> None:
        """Create the folder, or empty it of the run that is to be replaced, and write settings.yaml."""
        try:
            if self.overwrite and self.path.is_dir():
                _remove_run(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / SETTINGS, to_yaml(self.settings).encode())
        except OSError as error:
            raise UserError(f"The folder --out {self.path} cannot be written: {error.strerror}.") from error

    def of(self, recipe: str, seed: int) -> Path:
        """Return the folder of one training: the folder itself, or one below it if there are several."""
        run = self.settings.run
        if not run.compare and run.seeds == 1:
            return self.path
        return self.path / recipe / f"seed{seed}"

    def _check_same(self) -> None:
        before = Settings.from_flat(read_yaml(self.path / SETTINGS)).flat()
        now = self.settings.flat()
        for name, value in before.items():
            if name not in _FREE and now[name] != value:
                raise UserError(
                    f"The run in {self.path} was started with {_flag(name, value)}, and cannot go on with "
                    f"{_flag(name, now[name])}; leave the flag out, or start anew with another --out."
                )
        if now["epochs"] < before["epochs"]:
            raise UserError(
                f"The run in {self.path} was started with --epochs {before['epochs']}; expected at least as "
                f"many, not {now['epochs']}."
            )


def how_to_go_on(path: Path | str) -> str:
    """Return the command that goes on with a run, as part of a sentence."""
    return f"go on with: dibit train --resume --out {shlex.quote(str(path))}"


def _flag(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"no {flag}"
    return f"no {flag}" if value is None else f"{flag} {value}"


def _fresh(settings: Settings) -> Path:
    """Return a folder in runs/ that does not exist yet, named by data set, model, recipe and time."""
    dataset = Path(settings.data.dataset).stem.replace(":", "")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = f"{dataset}-{settings.model.model}-{settings.compression.recipe}-{stamp}"
    names = (f"{base}-{i}" if i else base for i in range(1000))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def _remove_run(path: Path) -> None:
    """Remove what a run writes, nothing else; settings.yaml last, so that a kill leaves a run to replace."""
    for pattern in ("checkpoint.pt", "best.pt", "events.out.tfevents.*", ".*-*"):
        for file in path.glob(pattern):
            if file.is_file():
                file.unlink()
    for below in path.glob("*/seed*"):
        shutil.rmtree(below)
        if not any(below.parent.iterdir()):
            below.parent.rmdir()
    (path / SETTINGS).unlink(missing_ok=True)
