"""Builds with nvcc, without it, and with one that fails.

A script that compiles against the emulation takes nvcc's place, so that every machine can run these tests, and what was
built runs on its CPU. What the real one makes is looked at in test_resources.py.
"""

import os
import subprocess
import sys

import pytest
from emulation_build import EMULATION
from test_install import python, report, run, sources

BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
NVCC = f"""#!{sys.executable}
import os, subprocess, sys

arguments = iter(sys.argv[1:])
if "--version" in sys.argv:
    print("Cuda compilation tools, release 99.9")
    sys.exit()
if os.environ.get("BROKEN_NVCC"):
    sys.exit("nvcc fatal error: broken on purpose")
kept = []
for argument in arguments:
    if argument in ("-gencode", "-Xcompiler", "-cudart", "-ccbin"):
        next(arguments)
    else:
        kept.append(argument)
compiler = ["c++", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-I{EMULATION}"]
if "-c" in kept:
    with open(os.environ["NVCC_LOG"], "a") as log:
        log.write(os.path.basename(kept[kept.index("-c") + 1]) + "\\n")
    sys.exit(subprocess.call([*compiler, "-x", "c++", *kept, "-O0"]))
sys.exit(subprocess.call([*compiler, "-std=c++17", *kept, "{EMULATION}/runtime.cpp"]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, built without CUDA; what is compiled once serves every test."""
    folder = sources(tmp_path_factory.mktemp("build"))
    (folder / "nvcc").write_text(NVCC)
    (folder / "nvcc").chmod(0o755)
    run(BUILD, folder, FLOWKERN_CUDA="0")
    return folder


def build(tree, **environment):
    """Build with the nvcc of the tree. Returns the units that it compiled."""
    log = tree / "nvcc.log"
    log.write_text("")
    (tree / "flowkern" / "_build_error.txt").unlink(missing_ok=True)
    for module in (tree / "flowkern").glob("_C.*"):
        module.unlink()
    run(BUILD, tree, **{"FLOWKERN_CUDA": "", "CUDACXX": str(tree / "nvcc"), "NVCC_LOG": str(log), **environment})
    return log.read_text().split()


def test_left_out_by_choice(tree):
    said = report(tree)
    assert "cpp        runs" in said
    assert "cuda       does not run: the native extension was built without CUDA: FLOWKERN_CUDA=0 was set" in said
    assert "CUDA       none: FLOWKERN_CUDA=0 was set" in said


def test_nvcc_missing(tree, tmp_path):
    for tool in ("c++", "g++", "gcc", "ar", "ld", "as"):  # a PATH with a compiler and no nvcc
        if found := subprocess.run(["which", tool], capture_output=True, text=True).stdout.strip():
            (tmp_path / tool).symlink_to(found)
    build(tree, CUDACXX="", CUDA_HOME=str(tmp_path / "none"), PATH=str(tmp_path))
    said = report(tree)
    assert "cpp        runs" in said
    assert "cuda       does not run: the native extension was built without CUDA: nvcc was not found" in said


def test_nvcc_fails(tree):
    build(tree, BROKEN_NVCC="1")
    said = report(tree)
    assert "cpp        runs" in said
    assert "CUDA       none: compiling the extension failed: nvcc fatal error: broken on purpose" in said


def test_failure_is_an_error_where_cuda_is_required(tree):
    with pytest.raises(AssertionError, match="broken on purpose"):
        build(tree, BROKEN_NVCC="1", FLOWKERN_CUDA="1")
    assert not list((tree / "flowkern").glob("_C.*"))
    with pytest.raises(AssertionError, match="FLOWKERN_CUDA_ARCHS lists compute capabilities such as '80 90', got"):
        build(tree, FLOWKERN_CUDA="1", FLOWKERN_CUDA_ARCHS="new")


def test_built_and_rebuilt(tree):
    units = build(tree, FLOWKERN_CUDA_ARCHS="80,90a")
    assert sorted(units) == sorted(p.name for p in (tree / "csrc" / "cuda").glob("*.c*"))
    said = report(tree)
    assert "CUDA       kernels for sm_80, sm_90a and later, by nvcc 99.9" in said
    assert "cuda       does not run: torch finds no NVIDIA GPU" in said or "cuda       runs" in said
    # The kernels are in the extension, and beside the CPU's: on this one's runtime, they run.
    call = """
import torch, flowkern
from flowkern import _C
z, lam, result = torch.arange(5.0), torch.tensor(1.0), torch.empty(5)
_C.cuda.shrink(0, 0, 0, 5, z.data_ptr(), 0, lam.data_ptr(), result.data_ptr(), 0, 0)
print((result * 2 - z).abs().max().item())
"""
    assert python(tree, "-c", call).split()[-1] == "0.0"
    assert build(tree, FLOWKERN_CUDA_ARCHS="80,90a") == []
    os.utime(tree / "csrc" / "cuda" / "outer.cu")
    assert build(tree, FLOWKERN_CUDA_ARCHS="80,90a") == ["outer.cu"]
    os.utime(tree / "csrc" / "cuda" / "compose.h")
    assert sorted(build(tree, FLOWKERN_CUDA_ARCHS="80,90a")) == ["compose.cu", "compose_vjp.cu"]
