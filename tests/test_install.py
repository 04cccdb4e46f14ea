"""Builds as pip makes them, in temporary folders: with a compiler and without, and never with torch."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("CXX", "CXXFLAGS", "CUDACXX", "PYTHONPATH", "FLOWKERN_CPU_ISA", "FLOWKERN_BACKEND", "FLOWKERN_CUDA_ARCHS")
FAST = "-O0"  # to compile: a quarter of the time that optimised kernels take, which all other tests run


def run(command, folder, **environment):
    """Output of a command in `folder`; fails the test with that output if the command fails."""
    outside = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    outside["FLOWKERN_CUDA"] = "0"  # tests/cuda is about builds with it
    result = subprocess.run([str(c) for c in command], cwd=folder, env={**outside, **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout
    return result.stdout


def python(folder, *arguments, **environment):
    """Output of Python with the package in `folder`, without `site`: it would add the checkout's editable install."""
    paths = os.pathsep.join([str(folder), sysconfig.get_path("platlib"), sysconfig.get_path("purelib")])
    return run([sys.executable, "-S", *arguments], folder, PYTHONPATH=paths, **environment)


def report(folder, **environment):
    return python(folder, "-m", "flowkern", **environment)


def sources(folder):
    """What a source distribution holds, copied, beside folders that must not be installed."""
    left_out = shutil.ignore_patterns("_C.*", "_build_error.txt", "__pycache__")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "csrc", "flowkern", "kernels", "tests", "train"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def installed(source, **environment):
    """The folder into which a wheel built from `source` was installed. The build finds a torch that fails on import."""
    (source / "broken" / "torch").mkdir(parents=True)
    (source / "broken" / "torch" / "__init__.py").write_text("raise RuntimeError('the build imported torch')\n")
    run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "wheels"], source,
        PYTHONPATH=str(source / "broken"), **environment)
    (wheel,) = (source / "wheels").glob("flowkern-*.whl")
    target = source / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    tops = {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"flowkern"}, "only the package is installed"
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    source = sources(tmp_path_factory.mktemp("with_compiler"))
    # By the name under which a later build finds the compiler, which then compiles nothing anew.
    return source, installed(source, CXX="c++" if shutil.which("c++") else "", CXXFLAGS=FAST)


def test_wheel_with_a_compiler(built):
    _, target = built
    said = report(target)
    assert "cpp        runs" in said
    assert "avx512" in said or platform.machine() != "x86_64"
    call = "import flowkern, torch; x = torch.ones(1, 2, 2, 2); flowkern.ops.couple(x, x); print(flowkern.cpp.__file__)"
    assert str(target) in python(target, "-c", call, FLOWKERN_BACKEND="cpp")


def test_forced_instruction_set(built):
    _, target = built
    assert "baseline (in use)" in report(target, FLOWKERN_CPU_ISA="baseline")
    refusal = "does not run: FLOWKERN_CPU_ISA: instruction set 'mmx' is not one"
    assert refusal in report(target, FLOWKERN_CPU_ISA="mmx")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux which processor this is")
def test_the_fastest_instruction_set_is_in_use(built):
    _, target = built
    about = dict(re.findall(r"^(.+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    flags = set(about.get("flags", "").split())
    needs = {"amx": {"amx_tile", "amx_bf16"}, "avx512bf16": {"avx512_bf16"}, "avx2": {"avx2", "fma"}, "baseline": set(),
             "avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq"}}
    slow = about.get("vendor_id") == "GenuineIntel" and about["model"] != "85"      # its bf16, but for Cooper Lake's
    compiled = re.search(r"CPU +(.*)", report(target))[1].split(", ")
    fast = [isa for isa in compiled if needs[isa.split()[0]] <= flags and not (slow and isa.startswith("avx512bf16"))]
    if "amx (in use)" not in fast and "amx" in fast:
        fast.remove("amx")      # containers may refuse it
    assert fast[0].endswith(" (in use)")


def test_extension_alone_says_that_torch_comes_first(built):
    _, target = built
    (extension,) = (target / "flowkern").glob("_C.*")
    load = f"""
from importlib.util import module_from_spec, spec_from_file_location
try:
    spec = spec_from_file_location("flowkern._C", {str(extension)!r})
    spec.loader.exec_module(module_from_spec(spec))
    print("loaded")
except ImportError as error:
    print(error)
"""
    # Without OpenMP there is no runtime to wait for.
    expected = "import torch (or flowkern) first" if "OpenMP, of the runtime" in report(target) else "loaded"
    assert expected in python(target, "-c", load)


def test_install_without_a_compiler(tmp_path):
    target = installed(sources(tmp_path), CXX="false")
    said = report(target)
    assert "reference  runs" in said
    assert "cpp        does not run: the native extension was not built: the C++ compiler does not run" in said
    call = "import flowkern, torch; x = torch.ones(1, 2, 2, 2); flowkern.ops.couple(x, x)"
    python(target, "-c", call)
    with pytest.raises(AssertionError, match="backend 'cpp' can't run here"):
        python(target, "-c", call, FLOWKERN_BACKEND="cpp")


def test_flags_of_the_environment_reach_the_compiler(built):
    source, _ = built
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], source, CXXFLAGS="-no-such-flag")
    assert "no-such-flag" in report(source)


def test_failed_rebuild_leaves_no_old_extension(built):
    source, _ = built
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    # The compiler that built Python may be on another machine.
    elsewhere = "import runpy, sys, sysconfig; sysconfig.get_config_vars()['CXX'] = 'no-such-compiler -pthread'; "
    setup = f"{elsewhere} sys.argv = {build[1:]}; runpy.run_path('setup.py')"
    run([sys.executable, "-c", setup], source, CXXFLAGS=FAST)
    [made] = (source / "flowkern").glob("_C.*")
    other = made.with_name("_C.cpython-39-elsewhere.so")  # another Python's, from the same checkout
    other.touch()
    (source / "csrc" / "cpu" / "dispatch.cpp").write_text("#error broken on purpose\n")
    run(build, source, CXXFLAGS=FAST)
    assert list((source / "flowkern").glob("_C.*")) == [other]
    assert "broken on purpose" in report(source)
