"""The CPU loops under the address and undefined-behaviour sanitizers, for each instruction set of this machine.

Copies move whole vectors where that is faster, so that bounds are worth a proof of their own.
"""

import os
import re
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import RUNNABLE

from flowkern import cpp

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = "-std=c++17 -O1 -g1 -fopenmp-simd -fno-math-errno -fno-trapping-math -fsanitize=address,undefined"
SETS = cpp.build_config()["isa_supported"] if "cpp" in RUNNABLE else []


def flags_of_sets():
    """The flags that setup.py compiles each instruction set with, of those that run here, and, quick to compile, those
    that dispatch.cpp always has.
    """
    flags = dict(re.findall(r'"(a\w+)": "(-m[^"]*)"', (ROOT / "setup.py").read_text()))
    return {isa: flags.get(isa, "") + ("" if isa in SETS else " -O0 -fno-sanitize=all")
            for isa in cpp.build_config()["isa_compiled"] if isa in SETS or isa not in ("amx", "avx512bf16")}


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder, compiler = tmp_path_factory.mktemp("sanitized"), shlex.split(sysconfig.get_config_var("CXX") or "c++")
    sets = flags_of_sets()
    macros = " ".join(f"-DFLOWKERN_{name.upper()}" for name in ("x86", *sets) if len(sets) > 1)
    jobs = [("tests/sanitized.cpp", "main", ""), ("csrc/cpu/parallel.cpp", "parallel", ""),
            ("csrc/cpu/chain.cpp", "chain", ""), ("csrc/cpu/squeeze.cpp", "squeeze", ""),
            ("csrc/cpu/dispatch.cpp", "dispatch", macros)]
    jobs += [(f"csrc/cpu/{unit}.cpp", f"{unit}.{isa}", f"-DFLOWKERN_ISA={isa} {flags}")
             for isa, flags in sets.items() for unit in ("mix", "couple", "pointwise", "compose", "network")
             if unit != "network" and isa != "amx" or unit == "network" and isa != "baseline"]
    commands = [[*compiler, *SANITIZE.split(), "-fno-sanitize-recover=all", *flags.split(), "-c", ROOT / source, "-o",
                 folder / f"{name}.o"] for source, name, flags in jobs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    run([*compiler, *SANITIZE.split(), *folder.glob("*.o"), "-o", folder / "program"])
    return folder / "program"


@pytest.mark.parametrize("isa", SETS)
def test_no_access_out_of_bounds(program, isa):
    assert f"couplings on {isa}" in run([program, isa])


@pytest.mark.parametrize("isa", SETS)
def test_sanitizer_sees_one_element_too_many(program, isa):
    result = subprocess.run([program, isa, "overrun"], capture_output=True, text=True)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr
