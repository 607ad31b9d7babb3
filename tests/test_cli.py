"""The command: exit statuses, files, the table, stopping and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dibit
from dibit.cli import main
from dibit.tools import errors
from dibit.train import checkpoint, loop
from dibit.train.task import Task
from tests.train.conftest import command, small

pytestmark = pytest.mark.slow

__all__ = ["small"]  # a fixture

FAST = ("--hidden", "16", "--layers", "2", "--device", "cpu")


def _run(*words: object) -> subprocess.CompletedProcess[str]:
    with command(*words) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_version_and_help() -> None:
    version, usage = _run("--version"), _run("train", "--help")
    assert (version.returncode, usage.returncode) == (0, 0)
    assert version.stdout == f"dibit {dibit.__version__}\n"
    assert "--weight-decay" in usage.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'"),
        (["train", "--bits", "3"], "--bits is 3"),
        (["train", "--dataset", "coar"], "Did you mean 'cora'"),
        (["train", "--dataset", "missing.npz"], "missing.npz does not exist"),
        (["train", "--device", "gpu"], "--device is 'gpu'"),
        (["train", "--config", "arxiv-saeg"], "Did you mean 'arxiv-sage'"),
        (["train", "--block", "rwo"], "--block is 'rwo', expected a whole number or 'row'"),
        (["train", "--residual"], "--residual does not apply to --model sage"),
        (["train", "--json", "missing/x.json"], "--json missing/x.json: the folder missing does not exist"),
        (["train", "--resume", "--out", "missing"], "holds no run to go on with"),
        (["train", "--dataset", "planted:200", "--svd", "500"], "--svd is 500"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dibit: error: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = _run("train", "--layrs", "3", "--out", tmp_path / "run")
    assert result.returncode == 2
    assert "Did you mean '--layers'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_no_command_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: dibit" in capsys.readouterr().out


def test_help_needs_no_extra() -> None:
    """Nor does it load PyTorch Geometric."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("rich", "yaml", "tensorboard", "torchmetrics", "matplotlib", "markdown_it")))
from dibit.cli import COMMANDS, main
from dibit.bench.command import KINDS
for words in [[], *([name] for name in COMMANDS), *(["bench", kind] for kind in KINDS)]:
    assert main([*words, "--help"]) == 0
print("torch_geometric" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("--weight-decay", "usage: dibit bench codec", "usage: dibit reproduce", "dibit train --help"):
        assert text in done.stdout
    assert done.stdout.endswith("False\n")


def test_how_an_extra_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "lib" / "site-packages" / "dibit" / "tools" / "errors.py"))
    installed = tmp_path / "dibit-9.dist-info"  # as pip writes it for a folder, but for -e
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: dibit\nVersion: 9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for noted, expected in (
        (None, "pip install 'dibit[train]'"),
        ('{"url": "https://example.org/dibit.whl"}', "pip install 'dibit[train]'"),
        ('{"url": "file:///not/here"}', "pip install 'dibit[train]'"),
        (f'{{"url": "{clone.as_uri()}"}}', f"pip install '{clone}[train]'"),
    ):
        if noted is not None:
            (installed / "direct_url.json").write_text(noted)
        assert errors.install("train") == expected
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(errors, "__file__", str(clone / "src" / "dibit" / "tools" / "errors.py"))
    assert errors.install("train") == f"pip install -e '{clone}[train]'"
    monkeypatch.chdir(clone)
    assert errors.install("train") == "pip install -e '.[train]'"


@pytest.mark.parametrize("package", ["yaml", "rich", "tensorboard"])
def test_a_missing_extra(
    package: str, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", "--dataset", str(small), "--out", str(small.parent / "run"), "--epochs", "1"]) == 2
    assert capsys.readouterr().err == (
        f"dibit: error: This needs {package}, which is not installed: {errors.install('train')}\n"
    )
    assert not (small.parent / "run").exists()


def test_compare_ends_in_a_table_and_json(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "run", tmp_path / "result.json"
    words = [
        "train",
        "--dataset",
        str(small),
        *FAST,
        "--epochs",
        "8",
        "--compare",
        "--seeds",
        "3",
        "--seed",
        "5",
    ]
    assert main([*words, "--recipe", "iexact", "--out", str(out), "--json", str(file), "--bits", "4"]) == 0
    captured = capsys.readouterr()
    for text in (
        "recipe",
        "test accuracy %",
        "saved MB",
        "peak MB",
        "s/epoch",
        "none",
        "iexact",
        "x less",
        " ± ",
    ):
        assert text in captured.out
    assert "recipe minus none, 3 seeds" in captured.out
    assert "95 % confidence interval" in captured.out
    assert "iexact  seed 7  epoch 8/8" in captured.err
    content = json.loads(file.read_text())
    assert content["settings"]["bits"] == 4
    assert content["graph"]["nodes"] == 60
    assert {"dibit", "torch", "torch_geometric"} <= set(content["versions"])
    assert content["machine"]["device"] == "cpu"
    assert [(r["recipe"], r["seed"]) for r in content["runs"]] == [
        (recipe, seed) for recipe in ("none", "iexact") for seed in (5, 6, 7)
    ]
    plain, packed = content["runs"][0], content["runs"][3]
    assert plain["saved_bytes"] == plain["plain_bytes"] == packed["plain_bytes"] > packed["saved_bytes"] > 0
    assert all(len(r["loss"]) == 8 and r["seconds_per_epoch"] > 0 and r["peak_bytes"] > 0 for r in content["runs"])
    ratio = content["summary"]["ratios"]["saved"]
    assert ratio == pytest.approx(plain["saved_bytes"] / packed["saved_bytes"])
    low, mean, high = (content["summary"]["difference"][k] for k in ("low", "mean", "high"))
    assert low <= mean <= high
    assert {p.name for p in out.iterdir()} == {"settings.yaml", "manifest.json", "none", "iexact"}
    assert (out / "iexact" / "seed6" / "best.pt").is_file()


def test_the_papers_settings_with_other_levels(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their name, on a file found by its name in --root; what was changed holds on resume."""
    out, file = tmp_path / "run", tmp_path / "result.json"
    words = ["train", "--config", "flickr-sage", "--dataset", "Small", "--root", str(small.parent), *FAST, "--quiet"]
    words += ["--recipe", "default", "--levels", "normal", "--block", "row", "--compare", "--out", str(out)]
    configs: list[Any] = []

    def spy(task: Task, name: str, config: dibit.Config | None, *rest: Any, **more: Any) -> loop.Result:
        configs.append(config)
        return train_one(task, name, config, *rest, **more)

    train_one = loop.train_one
    monkeypatch.setattr(loop, "train_one", spy)
    assert main([*words, "--epochs", "2", "--json", str(file)]) == 0
    plain, packed = configs
    assert plain is None
    assert (packed.block, packed.levels, packed.norm.block, packed.norm.levels) == ("row", "normal", "row", "normal")
    content = json.loads(file.read_text())
    assert {k: content["settings"][k] for k in ("levels", "block", "clip", "epochs")} == {
        "levels": "normal",
        "block": "row",
        "clip": 0.5,
        "epochs": 2,
    }
    assert content["graph"]["nodes"] == 60
    assert [r["recipe"] for r in content["runs"]] == ["none", "default"]
    assert content["summary"]["ratios"]["saved"] > 2
    assert main(["train", "--resume", "--out", str(out), "--epochs", "3", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out), "--block", "64"]) == 2
    assert "was started with --block row, and cannot go on with --block 64" in capsys.readouterr().err


def test_a_config_that_is_impossible_is_said_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = dibit.Config(bits=1, levels=(0.0, 1.0))
    monkeypatch.setattr(dibit, "recipe", lambda name: own)
    out = tmp_path / "run"
    assert main(["train", "--dataset", str(small), *FAST, "--bits", "2", "--compare", "--out", str(out)]) == 2
    assert "--recipe default cannot be changed so: levels = " in capsys.readouterr().err
    assert not out.exists()


def test_settings_can_be_passed_back(small: Path, tmp_path: Path) -> None:
    words = ["train", "--dataset", str(small), *FAST, "--epochs", "3", "--recipe", "none", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert main(["train", "--config", str(tmp_path / "a" / "settings.yaml"), "--out", str(tmp_path / "b")]) == 0
    a, b = (checkpoint.load(tmp_path / n / "best.pt")["state_dict"] for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_quiet_prints_the_table_alone(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--dataset", str(small), *FAST, "--epochs", "2", "--recipe", "none", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "test accuracy %" in captured.out


def test_whose_folder_it_is(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = [
        "train",
        "--dataset",
        str(small),
        *FAST,
        "--recipe",
        "none",
        "--quiet",
        "--out",
        str(out),
        "--epochs",
    ]

    def error(*more: str) -> str:
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
        assert main([*words, *more]) == 2
        assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
        return capsys.readouterr().err

    assert main([*words, "2"]) == 0
    assert "holds a run already" in error("2")
    assert "started with --lr 0.01, and cannot go on with --lr 0.1" in error("2", "--resume", "--lr", "0.1")
    assert "started with --epochs 2; expected at least as many, not 1" in error("1", "--resume")
    assert main([*words, "4", "--resume"]) == 0  # longer is fine
    assert checkpoint.load(out / "checkpoint.pt")["state"]["epoch"] == 4
    (out / "notes.txt").write_text("mine")
    assert main([*words, "1", "--overwrite"]) == 0
    assert checkpoint.load(out / "checkpoint.pt")["state"]["epoch"] == 1
    assert (out / "notes.txt").read_text() == "mine"
    (out / "settings.yaml").unlink()
    assert "holds something else" in error("1", "--overwrite")
    words[words.index(str(out))] = str(small)
    assert "is a file, expected a folder" in error("1")


@pytest.mark.parametrize("recipe", ["none", "default"])
def test_killed_and_resumed_is_the_same_as_uninterrupted(small: Path, tmp_path: Path, recipe: str) -> None:
    words = [
        "train",
        "--dataset",
        small,
        *FAST,
        "--recipe",
        recipe,
        "--epochs",
        300,
        "--checkpoint-every",
        7,
        "--quiet",
    ]
    results: list[Any] = []
    for name in ("whole", "killed"):
        out, file = tmp_path / name, tmp_path / f"{name}.json"
        if name == "killed":
            with command(*words, "--out", out) as process:
                _wait_for(out / "checkpoint.pt", process)
                process.kill()
                process.communicate()
            assert process.returncode == -signal.SIGKILL
            assert 0 < checkpoint.load(out / "checkpoint.pt")["state"]["epoch"] < 300
            finished = _run("train", "--resume", "--out", out, "--json", file)
        else:
            finished = _run(*words, "--out", out, "--json", file)
        assert finished.returncode == 0, finished.stderr
        run = json.loads(file.read_text())["runs"][0]
        state = checkpoint.load(out / "checkpoint.pt")
        results.append(({k: v for k, v in run.items() if k != "seconds_per_epoch"}, state["model"], state["best"]))
    assert results[0][0] == results[1][0]
    for whole, killed in zip(results[0][1:], results[1][1:], strict=True):
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[k], killed[k]) for k in whole)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [
        "train",
        "--dataset",
        small,
        *FAST,
        "--recipe",
        "none",
        "--epochs",
        100_000,
        "--checkpoint-every",
        5,
    ]
    with command(*words, "--out", out) as process:
        _wait_for(out / "checkpoint.pt", process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("dibit: interrupted after epoch ")
    assert last.endswith(f"; go on with: dibit train --resume --out {out}")
    state = checkpoint.load(out / "checkpoint.pt")["state"]
    assert f"after epoch {state['epoch']} of" in last
    assert len(state["loss"]) == state["epoch"]
