"""Which kernels serve: those of a type of device, of another package where one offers some, else the definition."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import dibit
from dibit.codec import dispatch, ops, seed_tensor
from dibit.codec.backends import cpu, reference
from dibit.codec.dispatch import kernel

pytestmark = pytest.mark.slow

THEIRS = """
import torch
from dibit.codec.dispatch import kernel

called = []

def signs(seed, count):
    called.append("signs")
    return torch.full((count,), 1.0)

@kernel(x=torch.float64)
def dropout(x, seed, p):
    called.append("dropout")
    return x.clone()
"""


@pytest.fixture(autouse=True)
def _looked_up_anew() -> Iterator[None]:
    dispatch.backend.cache_clear()
    yield
    dispatch.backend.cache_clear()
    sys.modules.pop("their_kernels", None)


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Installs a package that offers kernels for a type of device."""

    def install(package: str, device: str) -> None:
        (tmp_path / "their_kernels.py").write_text(THEIRS)
        about = tmp_path / f"{package}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[dibit.backends]\n{device} = their_kernels\n")
        monkeypatch.syspath_prepend(tmp_path)
        dispatch.backend.cache_clear()

    return install


def loaded() -> ModuleType | None:
    return sys.modules.get("their_kernels")


def test_a_package_brings_kernels_of_its_own(offer: Callable[[str, str], None]) -> None:
    offer("their-package", "cpu")
    assert loaded() is None, "nothing is loaded before the first tensor arrives"
    assert ops.signs(seed_tensor(1), 3).tolist() == [1, 1, 1]
    theirs = loaded()
    assert theirs is not None
    x = torch.randn(100)
    ops.dropout(x.double(), seed_tensor(1), 0.5)
    assert theirs.called == ["signs", "dropout"]
    assert torch.equal(ops.dropout(x, seed_tensor(1), 0.5), reference.dropout(x, seed_tensor(1), 0.5))
    assert torch.equal(ops.pack_mask(x), reference.pack_mask(x)), "what a backend lacks, the definition does"
    assert theirs.called == ["signs", "dropout"]


def test_another_type_of_device(offer: Callable[[str, str], None]) -> None:
    assert dispatch.backend("xpu") is reference
    offer("their-package", "xpu")
    assert dispatch.backend("cpu") is cpu
    assert loaded() is None
    assert dispatch.backend("xpu") is loaded() is not None


def test_two_packages_for_one_type_of_device(offer: Callable[[str, str], None]) -> None:
    offer("first-package", "cpu")
    offer("second-package", "cpu")
    with pytest.raises(RuntimeError, match=r"2 packages offer .*'cpu'.*their_kernels.* uninstall all but one") as error:
        ops.signs(seed_tensor(1), 3)
    assert all(f"{name}-package (their_kernels)" in str(error.value) for name in ("first", "second"))


def test_without_its_compiler_the_definition_serves_and_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"numba is not installed, so the CPU runs the plain-torch codec"):
        signs = ops.signs(seed_tensor(1), 9)
    assert torch.equal(signs, reference.signs(seed_tensor(1), 9))
    assert dispatch.backend("cpu") is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.signs(seed_tensor(1), 9)


def test_another_backend_serves_for_a_while() -> None:
    first, second = (SimpleNamespace(signs=lambda seed, count, v=v: torch.full((count,), v)) for v in (2.0, 3.0))
    with dispatch.using_backend("cpu", first):
        with dispatch.using_backend("cpu", second):
            assert ops.signs(seed_tensor(1), 1) == 3
        assert ops.signs(seed_tensor(1), 1) == 2
        assert dispatch.serving("cpu") is first
    assert dispatch.serving("cpu") is cpu
    assert ops.signs(seed_tensor(1), 1).abs() == 1


def test_which_operators_have_a_kernel() -> None:
    assert dispatch.has_kernel("cpu", "edge_winners")
    assert not dispatch.has_kernel("cpu", "no_operator")
    assert not dispatch.has_kernel("xpu", "edge_winners"), "the definition is none"
    with dispatch.using_backend("xpu", SimpleNamespace(edge_winners=reference.edge_winners)):
        assert dispatch.has_kernel("xpu", "edge_winners")
        assert not dispatch.has_kernel("xpu", "edge_extremes")


def test_kernels_are_loaded_with_the_first_tensor() -> None:
    code = (
        "import sys, torch, dibit\n"
        "assert not any(name.startswith('dibit.codec.backends.cpu') for name in sys.modules)\n"
        "dibit.encode(torch.randn(9), dibit.Config(), 1)\n"
        "assert 'dibit.codec.backends.cpu.kernels.blocks' in sys.modules\n"
        "assert not any(name.startswith('dibit.codec.backends.triton') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_names_what_has_no_kernel_on_a_gpu() -> None:
    """Of docs/gpu.md, the paragraph from "operators have none" to "Random numbers"."""
    pytest.importorskip("triton")
    from dibit.codec.backends import triton

    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    paragraph = page.partition("operators have none")[2].partition("Random numbers")[0]
    said = re.findall(r"`([a-z_]+)`", paragraph)
    operators = [name for name in vars(ops) if name in reference.__all__]
    assert "fingerprint" in operators
    assert sorted(said) == sorted(name for name in operators if not hasattr(triton, name))


class TestKernel:
    """What the decorator hands to the definition. The functions double what the definition gives."""

    x = torch.randn(50)

    def given(self, function: Callable[..., Tensor], x: Tensor) -> bool:
        """Whether the function itself has served."""
        found, plain = function(x, seed_tensor(3), 0.5), reference.dropout(x, seed_tensor(3), 0.5)
        assert torch.equal(found, plain) or torch.equal(found, 2 * plain)
        return not torch.equal(found, plain)

    def test_dtypes(self) -> None:
        @kernel(x=(torch.float32, torch.bfloat16))
        def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
            return 2 * reference.dropout(x, seed, p)

        assert self.given(dropout, self.x)
        assert self.given(dropout, self.x.bfloat16())
        assert not self.given(dropout, self.x.double())
        assert dropout.__name__ == "dropout"

    def test_not_implemented(self) -> None:
        @kernel()
        def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
            return 2 * reference.dropout(x, seed, p) if x.is_contiguous() else NotImplemented

        assert self.given(dropout, self.x)
        assert not self.given(dropout, self.x[::2])

    def test_arguments_that_are_none_or_a_dtype(self) -> None:
        calls = []

        @kernel(shift=torch.float32)
        def quantize_rows(x: Tensor, index: Tensor | None, shift: Tensor | None, *rest: object) -> str:
            calls.append(shift)
            return "served"

        @kernel(dtype=torch.float32)
        def dequantize(*args: object) -> str:
            return "served"

        x, seed = torch.randn(4, 3), seed_tensor(1)
        rest = seed, 2, 16, [], torch.float32, 0
        assert quantize_rows(x, None, None, None, *rest) == "served"
        assert quantize_rows(x, None, x[0], x[1], *rest) == "served"
        assert quantize_rows(x, None, x[0].double(), x[1].double(), *rest) != "served"
        kept = reference.quantize(x.view(-1), seed, 2, 16, [], torch.float32, 0)[:2]
        assert dequantize(*kept, seed, 12, 2, 16, [], 0.0, torch.float32) == "served"
        assert isinstance(dequantize(*kept, seed, 12, 2, 16, [], 0.0, torch.float64), Tensor)

    def test_only_operators_and_their_arguments(self) -> None:
        def dropout(x: Tensor) -> Tensor:
            return x

        def mine(x: Tensor) -> Tensor:
            return x

        with pytest.raises(TypeError, match=r"mine is no operator of the codec"):
            kernel(x=torch.float32)(mine)
        with pytest.raises(TypeError, match=r"dropout has no argument 'y'; it has x, seed, p"):
            kernel(y=torch.float32)(dropout)


def test_kernels_follow_what_they_inline(tmp_path: Path) -> None:
    """Numba's cache on the disk looks at a kernel's own file, not at the file of the random numbers."""
    shutil.copytree(Path(dibit.__file__).parent, tmp_path / "dibit", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from dibit.codec import ops, seed_tensor; print(*ops.signs(seed_tensor(1), 64).tolist())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def signs() -> str:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    before = signs()
    shared = tmp_path / "dibit" / "codec" / "backends" / "cpu" / "kernels" / "numbers.py"
    text = shared.read_text()
    assert "x = u32(low + key0)" in text
    shared.write_text(text.replace("x = u32(low + key0)", "x = u32(low + key1)"))
    assert signs() != before
    shared.write_text(text)
    assert signs() == before
