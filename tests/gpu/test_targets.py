"""Every kernel, in every configuration used, compiled for GPUs that need not be there, and what it takes of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dibit.codec.backends.triton.launch import options  # noqa: E402
from tests.gpu.recorded import Configuration, configurations  # noqa: E402

pytestmark = pytest.mark.slow

SHARED = {"sm_80": 163, "sm_90": 227, "gfx942": 64}  # KiB that a program may have
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = (
    "add_scaled",
    "add_signed",
    "add_winners",
    "apply_mask",
    "column_sums",
    "count_scores",
    "dequantize",
    "dropout",
    "edge_extremes",
    "edge_products",
    "edge_signs",
    "ends",
    "find_winners",
    "finite",
    "keep_probabilities",
    "norm_gradient",
    "norm_relu_dropout",
    "pack_mask",
    "pack_winners",
    "pick_rows",
    "quantize",
    "relu_dropout_gradient",
    "row_scores",
    "scale_masked",
    "share_gradient",
    "signs",
    "sum_probabilities",
    "weight_gradient",
)


@pytest.fixture(scope="module")
def known() -> dict[str, list[Configuration]]:
    found: dict[str, list[Configuration]] = {}
    for own in configurations():
        found.setdefault(own.kernel.__name__, []).append(own)
    return found


def test_every_kernel_is_launched(known: dict[str, list[Configuration]]) -> None:
    from dibit.codec.backends.triton.kernels import blocks, edges, elementwise, products, sampling, winners

    written = {
        name
        for module in (blocks, edges, elementwise, products, sampling, winners)
        for name, value in vars(module).items()
        if hasattr(value, "arg_names") and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert set(known) == written == set(KERNELS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spills(
    known: dict[str, list[Configuration]], kernel: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    hip = target.startswith("gfx")
    for own in known[kernel][:: 1 if target == "sm_90" else 3]:  # the others' compilers are nearly the same
        built = compiled(own, target)
        assert len(built.asm["hsaco" if hip else "cubin"]) > 1000
        assert built.metadata.shared <= SHARED[target] << 10, own
        used = amd_resources(built) if hip else nvidia_resources(built, tmp_path)
        assert used["spilled"] == 0, f"{own}: {used}"
        assert 0 < used["registers"] <= (512 if hip else 255), f"{own}: {used}"
        if kernel == "weight_gradient" and not hip:
            assert re.search(r"\b(wgmma|mma)\.", built.asm["ptx"]), f"{own}: no tensor cores"
        fused = built.asm.get("ptx", "").count("fma.rn.f32")  # a contraction rounds once where others round twice
        assert fused == 0 or (kernel == "quantize" and fused % 4 == 0), f"{own}: {fused}"


def compiled(own: Configuration, target: str) -> Any:
    constants = dict(own.constants)
    if constants.get("PRECISION") == "tf32x3" and target.startswith("gfx"):
        constants["PRECISION"] = "ieee"
    source = ASTSource(
        own.kernel,
        dict(own.signature),
        {name: constants[name] for name, kind in own.signature if kind == "constexpr"},
        {(i,): [["tt.divisibility", 16]] for i in own.aligned},
    )
    chosen = options(own.warps, own.registers, hip=target.startswith("gfx"))
    return triton.compile(source, target=TARGETS[target], options=chosen)


def nvidia_resources(built: Any, folder: Path) -> dict[str, int]:
    """By NVIDIA's own tool, which comes with Triton: a spilled register lies in the stack's frame."""
    path = folder / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}


def amd_resources(built: Any) -> dict[str, int]:
    """From the metadata that the assembler writes."""
    used = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", built.asm["amdgcn"]))
    return {
        "registers": int(used["vgpr_count"]),
        "spilled": int(used["vgpr_spill_count"]) + int(used["sgpr_spill_count"]),
    }
