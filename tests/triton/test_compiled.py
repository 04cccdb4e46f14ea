"""Every configuration that host code can choose, compiled for sm_80 and sm_90 without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs" / "triton-resources.md"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def python(*arguments):
    """The standard output of a Python that compiles kernels instead of interpreting them."""
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled():
    return json.loads(python("-m", "flowkern.kernels.aot", "--json"))


def test_every_case_compiles_for_both_targets(compiled):
    targets = {}
    for c in compiled:
        targets.setdefault(c["name"], []).append(c["target"])
    assert len(targets) > 200
    # A configuration that is chosen on one of them only says so in its name.
    assert all(t == [80, 90] or name.endswith(f"for sm_{t[0]}") for name, t in targets.items())


def test_shared_memory_fits_the_chips(compiled):
    assert [c for c in compiled if not c["fits"]] == []


def test_nothing_spills(compiled):
    assert [c for c in compiled if c["stack"]] == []


def test_the_most_channels_fit():
    """On chips of 163, 99 and 64 KiB a block: what is chosen there fits."""
    told = python(
        "-c",
        """
import dataclasses, importlib
from triton.backends.compiler import GPUTarget
from flowkern.kernels import aot, mix
targets = {GPUTarget("cuda", 80, 32): 163, GPUTarget("cuda", 86, 32): 99, GPUTarget("hip", "gfx942", 64): 64}
for target, limit in targets.items():
    for name, products in (("couple_mix", 2), ("mix", 1), ("squeeze", 1)):
        module = importlib.import_module(f"flowkern.kernels.{name}")
        case = next(iter(module.cases()))
        most = max(c for c in (64, 128, 256, 512, 1024, 2048) if mix.fits(c, limit << 10, products))
        pixels = 16 if name == "couple_mix" else mix.block_pixels(most)
        sizes = case.constexprs | {"C": most, "OUT": most, "PIXELS": pixels}
        widest = dataclasses.replace(case, constexprs=sizes, num_warps=module.warps(most), integers={})
        print(most, aot.compiled_for(widest, target).metadata.shared <= limit << 10)
""",
    )
    chosen = [512, 1024, 1024, 256, 512, 512, 128, 256, 256]
    assert told.split() == [word for most in chosen for word in (str(most), "True")]


def test_the_networks_products_fit_consumer_gpus():
    """The largest of them, chosen for 99 KiB, for a chip that has those."""
    told = python("-c", """
import importlib
from triton.backends.compiler import GPUTarget
from flowkern.kernels import aot
from flowkern.kernels.overwritten import overwritten
for name, largest in (("convolution", ("pointwise forward bf16 first", "taps forward bf16 first")),
                      ("weight_gradient", ("weight_gradient 2 bf16 first for sm_80",))):
    module = importlib.import_module(f"flowkern.kernels.{name}")
    module.SHARED = 99 << 10
    for case in module.cases():
        if case.name in largest:
            compiled = aot.compiled_for(case, GPUTarget("cuda", 86, 32))
            print(compiled.metadata.shared <= module.SHARED and not overwritten(compiled.asm["ttgir"]))
""")
    assert told.split() == ["True"] * 3


def test_no_copy_overtakes_a_product(compiled):
    assert [c for c in compiled if c["overwritten"]] == []


def test_the_check_sees_copies_that_overtake_products():
    told = python(
        "-c",
        """
import sys
sys.path.insert(0, "tests/triton")
import pipelined
from flowkern.kernels import aot
print(*(len(aot.compile_case(case, 90).overwritten) for case in (pipelined.TOGETHER, pipelined.APART)))
""",
    )
    assert told.split() == ["1", "0"]


def test_the_committed_report_lists_these_cases(compiled):
    listed = [line.split("|")[1].strip() for line in REPORT.read_text().splitlines() if line.count("|") == 5][2:]
    assert listed == list(dict.fromkeys(c["name"] for c in compiled)), "make triton-report writes it anew"


def test_every_kernel_compiles_for_an_amd_gpu():
    told = python("-c", """
from triton.backends.compiler import GPUTarget
from flowkern.kernels import aot
first = {case.kernel: case for case in reversed(list(aot.cases()))}
for case in first.values():
    assert aot.compiled_for(case, GPUTarget("hip", "gfx942", 64)).asm["hsaco"], case.name
print(len(first))
""")
    assert int(told) >= 15


def test_integers_of_one_and_of_64_bits():
    """An argument of 1 becomes a constant of Python's, one beyond 2^31 a long: every kernel compiles with either."""
    told = python("-c", """
import dataclasses
from flowkern.kernels import aot
first = {case.kernel: case for case in reversed(list(aot.cases()))}
for case in first.values():
    integers = [name for name, kind in case.signature.items() if kind == "i32"]
    aot.compile_case(dataclasses.replace(case, integers=dict.fromkeys(integers, 1)), 90)
    long = case.signature | dict.fromkeys(integers, "i64")
    aot.compile_case(dataclasses.replace(case, signature=long, integers={}), 90)
print(len(first))
""")
    assert int(told) >= 15


def test_the_check_sees_spills_and_excessive_shared_memory():
    told = python(
        "-c",
        """
import dataclasses
from flowkern.kernels import aot, mix
case = next(c for c in mix.cases() if c.constexprs["C"] == 48)
wide = dataclasses.replace(case, constexprs=case.constexprs | {"DEPTH": 64}, num_warps=4)
edges = {"C": 1024, "OUT": 1024, "PIXELS": 16, "DEPTH": 64}
big = dataclasses.replace(case, constexprs=case.constexprs | edges, num_warps=16)
print(aot.compile_case(case, 90).stack, aot.compile_case(wide, 90).stack, aot.compile_case(big, 80).fits)
""",
    ).split()
    assert told[0] == "0" and int(told[1]) > 0 and told[2] == "False"
