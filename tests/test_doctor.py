"""`dibit doctor`: what it prints, and what counts as lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dibit
from dibit import doctor
from dibit._torch.private import APIS, WITHOUT
from dibit.cli import main
from dibit.codec import dispatch
from dibit.codec.backends import reference


def test_all_that_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "doctor.json"
    status = main(["doctor", "--json", str(file)])
    text, content = capsys.readouterr().out, json.loads(file.read_text())
    assert status == bool(content["lost"])
    assert content["versions"]["torch"] == torch.__version__
    for words in (dibit.__version__, torch.__version__, "torch has", "backends.cpu", "can be written", *APIS):
        assert words in text
    assert {api["name"] for api in content["private"] if not api["found"]} == {
        name for name, api in APIS.items() if api.younger and not api.found
    }
    assert content["kernels"]["cpu"] == {"by": "dibit.codec.backends.cpu", "plain": []}
    assert Path(content["cache"]["folder"]).is_absolute()
    if not torch.cuda.is_available():
        assert content["gpus"] == {}
        assert "was not tried" in text


@pytest.mark.slow
def test_a_missing_api_and_no_extra() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("rich", "yaml", "tensorboard", "torchmetrics", "matplotlib", "markdown_it")))
from dibit.cli import main
sys.exit(main(["doctor"]))
"""
    environment = {**os.environ, WITHOUT: "torch._assert_async"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    assert "MISSING  torch._assert_async " in done.stdout
    assert "torch._assert_async is missing. What is lost: time: the device is waited for." in done.stdout
    assert done.stdout.count("MISSING") == 1 + sum(not api.found for api in APIS.values())


def test_an_unknown_name_in_the_switch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(WITHOUT, "torch._asert_async")
    assert main(["doctor"]) == 2
    assert "Did you mean 'torch._assert_async'" in capsys.readouterr().err


def lost() -> list[str]:
    sentences: list[str] = doctor.examine()["lost"]
    return sentences


def test_no_compiler() -> None:
    with dispatch.using_backend("cpu", reference), dispatch.using_backend("cuda", reference):
        sentences = lost()
    assert "Time: plain torch runs the codec for 'cpu' tensors; install numba." in sentences
    assert ("install triton" in str(sentences)) == torch.cuda.is_available()


def test_kernels_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_kernels.py").write_text("raise ImportError('no kernels for xpu\\nat all')")
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[dibit.backends]\nxpu = broken_kernels\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = doctor.examine()
    assert "The kernels for 'xpu' tensors cannot be loaded: ImportError: no kernels for xpu" in content["lost"]
    assert "xpu               cannot be loaded" in doctor.printed(content)


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    content = doctor.examine()
    assert "set NUMBA_CACHE_DIR" in str(content["lost"])
    assert "cannot be written" in doctor.printed(content)


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert "Time: torch has 4096 threads on" in str(lost())


@pytest.mark.parametrize("problem", [None, "the codes of 2 bits are not those of the CPU"])
def test_a_gpu(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(doctor, "trial", lambda device: problem if device == torch.device("cuda", 0) else "which?")
    content = doctor.examine()
    assert content["gpus"] == {"cuda:0, Some GPU": problem or "works"}
    assert (f"Kernels fail on cuda:0, Some GPU: {problem}" in content["lost"]) == (problem is not None)


def test_the_trial_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.trial(torch.device("cpu")) is None
    seeds = iter(range(8))
    encode = dibit.encode
    monkeypatch.setattr(dibit, "encode", lambda x, config, seed: encode(x, config, next(seeds)))
    assert doctor.trial(torch.device("cpu")) == "the codes of 1 bits are not those of the CPU"
    monkeypatch.setattr(dibit, "encode", None)
    assert str(doctor.trial(torch.device("cpu"))).startswith("TypeError: ")
