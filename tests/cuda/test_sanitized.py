"""The kernels under the address and undefined-behaviour sanitizers, and mistakes that are planted in copies of them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from emulation_build import EMULATION, ROOT, SANITIZED, compile_emulated, kernels

PROGRAM = Path(__file__).resolve().parent / "sanitized.cpp"


@pytest.fixture(scope="module")
def sanitized():
    units = [*kernels(), (EMULATION / "runtime.cpp", ""), (PROGRAM, "")]
    return compile_emulated(ROOT / "build" / "emulated-sanitized", units, SANITIZED, "", "program")


def run(program, part="", order="forward"):
    environment = {**os.environ, "FLOWKERN_EMULATE": order, "UBSAN_OPTIONS": "print_stacktrace=0"}
    return subprocess.run([program, *([part] if part else [])], env=environment, capture_output=True, text=True)


def test_no_access_out_of_bounds(sanitized):
    result = run(sanitized)
    assert result.returncode == 0 and " launches" in result.stdout, result.stderr[-4000:]


# Per mistake: the file, what stands there, what is planted, the part of the program to run, what must be said.
BROKEN = {
    "write past an array": (
        "pointwise.cu", "first + part < packs ? first + part : packs", "first + part",
        "pointwise", "heap-buffer-overflow"),
    "access past shared memory": (
        "outer.cu", "? Base::SCRATCH : PANELS)", "? Base::SCRATCH : PANELS - 4)",
        "mixes", "use-after-poison"),
    "vector at an address that doesn't suit it": (
        "pointwise.cu", "vector_width(m.size, 4, arrays) == 4", "m.size % 4 == 0",
        "pointwise", "misaligned address"),
    "barrier that some threads miss": (
        "outer.cu", "products.add(w_panel", "if (threadIdx.x < 9) __syncthreads();\n        products.add(w_panel",
        "mixes", "CUDA emulation: divergent barrier: thread 0 waits at"),
    "shuffle with half of the warp": (
        "compose_vjp.cu", "0xFFFFFFFFu", "0x0000FFFFu",
        "compositions", "is not in its own mask 0000ffff"),
    "more shared memory than there is": (
        "outer.cu", "DEPTH = 32", "DEPTH = 1024",
        "mixes", "cudaErrorInvalidValue"),
}
RACES = {
    "sum over pixels": ("outer.cu", "        __syncthreads();\n        products.add(w_panel", "mixes"),
    "product of squares": ("compose_vjp.cu", "                __syncthreads();\n                multiply(a, b, sum);\n"
                           "            }\n            for (int i", "compositions"),
}


@pytest.fixture
def planted(sanitized, tmp_path):
    """Builds the program with one file changed."""

    def build(file, right, wrong):
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        source = tmp_path / "csrc" / "cuda" / file
        text = source.read_text()
        assert text.count(right) == 1, f"{file} no longer holds {right!r} once"
        source.write_text(text.replace(right, wrong))
        program = compile_emulated(tmp_path / "build", [(source, "")], SANITIZED, " ".join(
            str(o) for o in sanitized.parent.glob("*.o") if o.stem != source.stem), "program")
        return program

    return build


@pytest.mark.parametrize("mistake", BROKEN)
def test_planted_mistake_is_caught(planted, mistake):
    file, right, wrong, part, said = BROKEN[mistake]
    result = run(planted(file, right, wrong), part)
    assert result.returncode != 0 and said in result.stderr + result.stdout, result.stderr[-2000:]


@pytest.mark.parametrize("race", RACES)
def test_planted_race_changes_results(planted, race):
    """A missing barrier: threads that run in another order compute something else."""
    file, barrier, part = RACES[race]
    program = planted(file, barrier, barrier.replace("__syncthreads();", ""))
    forward, reverse = (run(program, part, order) for order in ("forward", "reverse"))
    assert forward.returncode == reverse.returncode == 0
    assert forward.stdout != reverse.stdout


def test_orders_agree_without_a_race(sanitized):
    """What the tests above take as the sign of a race is not there without one."""
    forward, reverse = (run(sanitized, "compositions", order) for order in ("forward", "reverse"))
    assert forward.returncode == 0 and forward.stdout == reverse.stdout
