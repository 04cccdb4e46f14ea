"""What nvcc made of the kernels in the installed extension; docs/cuda.md says the same."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bench import cuda_resources, cuda_sanitizer
from flowkern import cpp

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that a block may have


@pytest.fixture(scope="module")
def kernels():
    """Every kernel; that each of them is reached by an op in the emulation is checked on the way."""
    built = cpp.build_config()
    if built["cuda"] is None:
        nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
        assert not nvcc, f"nvcc is here and the kernels are not: {built['cuda_missing']}"
        pytest.skip("there is no nvcc on this machine, so there is nothing of its making to look at")
    return cuda_resources.kernels()


def test_compiled_for_both_targets_without_spills(kernels):
    assert len(kernels) > 50
    for name, kernel in kernels.items():
        assert {"sm_80", "sm_90"} <= set(kernel.registers), name
        assert not any(kernel.stack.values()), f"{name} keeps {kernel.stack} bytes of its registers in memory"


def test_every_block_fits(kernels):
    for name, kernel in kernels.items():
        for target, limit in SHARED.items():
            assert kernel.shared <= limit and kernel.blocks(target) >= 1, name


def test_report_is_of_these_kernels(kernels):
    """With the compiler that the report was made with, figure for figure; with another, the same kernels."""
    report = cuda_resources.REPORT.read_text().split(cuda_resources.MARK)[1]
    table = cuda_resources.table(kernels)
    if cpp.build_config()["cuda_compiler"] in report:
        assert table in report, "docs/cuda.md is out of date: make cuda-report"
    else:
        named = {line.split("`")[1] for line in report.splitlines() if line.startswith("| `")}
        assert named == set(kernels)


def test_names_are_read_right():
    place = "flowkern::cuda::_GLOBAL__N__e54aa6a2_6_mix_cu_0b014886::"
    device = f"void {place}mix_kernel<{place}Tiling<12, 192, 4, 4>, __half>(flowkern::Couple)"
    assert cuda_resources.short(device) == "mix_kernel<Tiling<12, 192, 4, 4>, __half>"
    emulated = "void flowkern::cuda::(anonymous namespace)::reduce_kernel<float>(float const*, long, float*)"
    assert cuda_resources.short(emulated) == "reduce_kernel<float>"


def test_program_for_compute_sanitizer_builds(kernels, tmp_path):
    """It runs where a GPU is; elsewhere it says what is missing."""
    if not cuda_sanitizer.compiled_kernels():
        pytest.skip("the installation's build folder is elsewhere")
    result = subprocess.run([cuda_sanitizer.build(tmp_path), "pointwise"], capture_output=True, text=True)
    assert " launches" in result.stdout or "launch 0: cudaError" in result.stdout
