"""Installs flowkern and builds its native extension, flowkern._C.

The build needs a C++17 compiler, pybind11 and ninja, and never torch. Without a working compiler the package installs
all the same; the reason is kept in flowkern/_build_error.txt, where `python -m flowkern` finds it.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

VERSION = "0.1.0"
ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Units that are compiled once per instruction set, and the flags of each set; the machine chooses at run time.
VECTORISED = ("mix", "couple", "pointwise")
X86 = {
    "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma",
}
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"


class NativeBuild(build_ext):
    """Compiles with ninja, which rebuilds only what changed, and keeps the reason where that fails."""

    def run(self):
        self.used_in_place = bool(self.inplace)   # setuptools clears `inplace` while it builds, and copies afterwards
        super().run()

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folders = {output.parent} | ({ROOT / "flowkern"} if self.used_in_place else set())
        # A failed build must not leave an older extension behind.
        for stale in (p for f in folders for p in (*f.glob("_C.*"), f / "_build_error.txt")):
            stale.unlink(missing_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            compile_native(output)
        except (CompileError, OSError) as error:
            for folder in folders:
                (folder / "_build_error.txt").write_text(f"{error}\n")
            raise CompileError(str(error)) from error


def compile_native(output: Path) -> None:
    """Write build.ninja and run it. Raises CompileError with one line that says why."""
    try:
        import ninja
        import pybind11
    except ImportError as error:
        raise CompileError(f"the build needs {error.name}, which is not installed") from error
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    _run([*compiler, "--version"], "the C++ compiler does not run")
    # OpenMP's runtime is never linked: its symbols come from the one that torch has loaded.
    threads = "-fopenmp" if _compiles(compiler, "-fopenmp", folder) else ""

    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    version = _run([*compiler, "--version"], "").splitlines()[0]
    about = shlex.join([f'-DFLOWKERN_VERSION="{VERSION}"', f'-DFLOWKERN_COMPILER="{version}"'])
    x86 = platform.machine() in ("x86_64", "AMD64")
    units = [(CSRC / "bindings.cpp", "bindings", f"{includes} {about}"),
             (CSRC / "cpu" / "parallel.cpp", "parallel", threads),
             (CSRC / "cpu" / "dispatch.cpp", "dispatch", "-DFLOWKERN_X86" if x86 else "")]
    for isa, flags in {"baseline": "", **(X86 if x86 else {})}.items():
        units += [(CSRC / "cpu" / f"{unit}.cpp", f"{unit}.{isa}", f"-fopenmp-simd -DFLOWKERN_ISA={isa} {flags}")
                  for unit in VECTORISED]
    link = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = [f"cxx = {shlex.join(compiler)}",
             "rule compile",
             f"  command = $cxx {FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
             "  depfile = $out.d",
             "  deps = gcc",
             "rule link",
             f"  command = $cxx {link} $in -o $out"]
    for source, name, flags in units:
        lines += [f"build {name}.o: compile {_escape(source)}", f"  flags = {flags.replace('$', '$$')}"]
    lines += [f"build {_escape(output)}: link {' '.join(f'{name}.o' for _, name, _ in units)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    _run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], "compiling the extension failed")


def _compiles(compiler: list[str], flag: str, folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [*compiler, flag, "-c", str(probe), "-o", str(folder / "probe.o")]
    # clang's OpenMP calls another runtime than the one that torch's wheels carry.
    macros = subprocess.run([*compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    return "__clang__" not in macros.stdout and subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list[str], failure: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{failure}: {command[0]}: {error.strerror}") from error
    if result.returncode:
        told = [line for line in (result.stdout + result.stderr).splitlines() if "error" in line.lower()]
        detail = told[0].strip() if told else f"{shlex.join(command)} ended with {result.returncode}"
        raise CompileError(f"{failure}: {detail}")
    return result.stdout


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob(pattern))


setup(
    name="flowkern",
    version=VERSION,
    description="Glow normalizing flows that train in constant memory, and the deep-unfolded denoiser built on them",
    license="MIT",
    python_requires=">=3.10",
    packages=["flowkern", "flowkern.dialects", "flowkern.kernels"],
    package_dir={"flowkern.kernels": "kernels"},
    ext_modules=[Extension("flowkern._C", sources=_relative("*.cpp"), depends=_relative("*.h"), optional=True)],
    cmdclass={"build_ext": NativeBuild},
    install_requires=["torch>=2.6", "triton; platform_system == 'Linux' and platform_machine == 'x86_64'", "numpy",
                      "safetensors", "ninja", "pybind11"],
    extras_require={
        "train": ["lightning>=2.4", "jsonargparse[signatures]>=4.32", "torchmetrics>=1.4", "scikit-image>=0.23",
                  "matplotlib>=3.8", "pillow>=10", "rich>=13", "tensorboard"],
        "test": ["pytest>=8", "pytest-benchmark>=4", "ruff"],
        "bench": ["pytest>=8", "pytest-benchmark>=4", "tqdm", "scipy"],
    },
)
