"""Installs flowkern and builds its native extension, flowkern._C.

The build needs a C++17 compiler, pybind11 and ninja, and never torch. Without a working compiler the package installs
all the same; the reason is kept in flowkern/_build_error.txt, where `python -m flowkern` finds it.

Where nvcc is found the extension holds the CUDA kernels too. Without it, or if it fails, they are left out, and the
extension knows why. FLOWKERN_CUDA=0 leaves them out, FLOWKERN_CUDA=1 makes their failure an error of the installation,
FLOWKERN_CUDA_ARCHS (default "80 90") lists the GPUs' compute capabilities; newer GPUs run the last one's PTX.

CXX names another compiler, CXXFLAGS adds to its flags.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

VERSION = "0.1.0"
ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Units that are compiled once per instruction set, and the flags of each set; the machine chooses at run time.
VECTORISED = ("mix", "couple", "pointwise", "compose")
WIDELY_VECTORISED = ("network",)    # where PyTorch's convolutions would be slower: not in the baseline
X86 = {
    "amx": "-mavx512vl -mavx512bw -mavx512dq -mavx512bf16 -mamx-tile -mamx-bf16 -mfma -mprefer-vector-width=512",
    "avx512bf16": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx512bf16 -mfma -mprefer-vector-width=512",
    "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma",
}
CUDA_ARCHS = "80 90"
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall"
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"


class NativeBuild(build_ext):
    """Compiles with ninja, which rebuilds only what changed, and keeps the reason where that fails."""

    def run(self):
        self.used_in_place = bool(self.inplace)   # setuptools clears `inplace` while it builds, and copies afterwards
        super().run()

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        ext.optional = not _cuda_required()
        folders = {output.parent} | ({ROOT / "flowkern"} if self.used_in_place else set())
        # A failed build must not leave an older extension behind; one of another Python's is none of its business.
        for stale in (f / name for f in folders for name in (output.name, "_build_error.txt")):
            stale.unlink(missing_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            compile_native(output)
        except (CompileError, OSError) as error:
            for folder in folders:
                (folder / "_build_error.txt").write_text(f"{error}\n")
            raise CompileError(str(error)) from error


def compile_native(output: Path) -> None:
    """Build the extension, with CUDA if possible. Raises CompileError with one line that says why it can't."""
    try:
        cuda = find_cuda()
        compile_with(output, cuda, "")
    except CompileError as error:
        if _cuda_required() or not isinstance(error, CudaError):
            raise
        compile_with(output, None, str(error))


@dataclass
class Cuda:
    nvcc: str
    version: str
    archs: list[str]

    def flags(self) -> str:
        targets = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        return " ".join([*targets, f"-gencode arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}"])


class CudaError(CompileError):
    """Only the CUDA kernels can't be built."""


def _cuda_required() -> bool:
    return os.environ.get("FLOWKERN_CUDA") == "1"


def find_cuda() -> Cuda:
    """nvcc and what it compiles for. Raises CudaError where there is none."""
    if os.environ.get("FLOWKERN_CUDA") == "0":
        raise CudaError("FLOWKERN_CUDA=0 was set")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        raise CudaError("nvcc was not found")
    archs = re.split(r"[\s,;]+", os.environ.get("FLOWKERN_CUDA_ARCHS", CUDA_ARCHS).strip())
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise CudaError(f"FLOWKERN_CUDA_ARCHS lists compute capabilities such as '80 90', got {' '.join(archs)!r}")
    version = _run([nvcc, "--version"], "nvcc does not run", CudaError)
    release = re.search(r"release ([\d.]+)", version)
    return Cuda(nvcc, f"nvcc {release[1] if release else '(unknown release)'}", archs)


def compile_with(output: Path, cuda: Cuda | None, why_no_cuda: str) -> None:
    """Write build.ninja and run it. Raises CompileError, or CudaError if only CUDA units failed, with one line."""
    try:
        import pybind11
    except ImportError as error:
        raise CompileError(f"the build needs {error.name}, which is not installed") from error
    ninja = _ninja()
    compiler = _compiler()
    folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    # pip's isolated build finds pybind11 in another folder every time: behind a link, as headers of the system, that is
    # no reason to compile anew.
    headers = folder / "headers"
    headers.unlink(missing_ok=True)
    headers.symlink_to(pybind11.get_include())
    python = shlex.quote(sysconfig.get_paths()["include"])
    includes = f"-isystem headers -DFLOWKERN_PYBIND11={pybind11.__version__} -I{python}"
    version = _run([*compiler, "--version"], "").splitlines()[0]
    macros = {"FLOWKERN_VERSION": VERSION, "FLOWKERN_COMPILER": version}
    macros |= ({"FLOWKERN_CUDA": " ".join(cuda.archs), "FLOWKERN_NVCC": cuda.version} if cuda
               else {"FLOWKERN_NO_CUDA": why_no_cuda})
    about = shlex.join(f"-D{name}={_quoted(value)}" for name, value in macros.items())
    sets = dict(X86) if platform.machine() in ("x86_64", "AMD64") else {}
    # Older compilers and assemblers know neither of these two, of which the first one is built on the second.
    if not _compiles(compiler, X86["avx512bf16"], "(void)_mm512_cvtneps_pbh(_mm512_setzero_ps());", folder):
        sets = {isa: flags for isa, flags in sets.items() if isa not in ("amx", "avx512bf16")}
    if sys.platform != "linux" or not _compiles(compiler, X86["amx"], "_tile_release();", folder):
        sets.pop("amx", None)
    given = " ".join(f"-DFLOWKERN_{name.upper()}" for name in (*(["x86"] if sets else []), *sets))
    units = [(CSRC / "about.cpp", "about", "compile", about),
             (CSRC / "bindings.cpp", "bindings", "compile", f"{includes} {'-DFLOWKERN_BIND_CUDA' if cuda else ''}"),
             (CSRC / "cpu" / "parallel.cpp", "parallel", "compile", ""),
             (CSRC / "cpu" / "chain.cpp", "chain", "compile", ""),
             (CSRC / "cpu" / "squeeze.cpp", "squeeze", "compile", ""),
             (CSRC / "cpu" / "dispatch.cpp", "dispatch", "compile", given)]
    for isa, flags in {"baseline": "", **sets}.items():
        flags = f"-fopenmp-simd -DFLOWKERN_ISA={isa} {flags}"
        vectorised = (VECTORISED if isa != "amx" else ()) + (WIDELY_VECTORISED if isa != "baseline" else ())
        units += [(CSRC / "cpu" / f"{unit}.cpp", f"{unit}.{isa}", "compile", flags) for unit in vectorised]
    if cuda:
        kernels = sorted((CSRC / "cuda").glob("*.cu"))
        units += [(CSRC / "cuda" / "bindings.cpp", "cuda.bindings", "cuda", f"{includes} {cuda.flags()}")]
        units += [(source, f"cuda.{source.stem}", "cuda", cuda.flags()) for source in kernels]
    host = f" -ccbin {shlex.join(compiler)}" if os.environ.get("CXX") and len(compiler) == 1 else ""
    link = "$cxx -bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "$cxx -shared"
    more = " ".join(os.environ.get("CXXFLAGS", "").split()).replace("$", "$$")
    lines = [f"cxx = {shlex.join(compiler)}",
             f"nvcc = {shlex.quote(cuda.nvcc) + host if cuda else ''}",
             "rule compile",
             f"  command = $cxx {FLAGS} {more} $flags -MMD -MF $out.d -c $in -o $out",
             "  depfile = $out.d",
             "  deps = gcc",
             "rule cuda",
             f"  command = $nvcc {CUDA_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
             "  depfile = $out.d",
             "  deps = gcc",
             "rule link",
             f"  command = {'$nvcc -shared -cudart static' if cuda else link} $in -o $out"]
    for source, name, rule, flags in units:
        lines += [f"build {name}.o: {rule} {_escape(source)}", f"  flags = {flags.replace('$', '$$')}"]
    for phase in ("compile", "cuda"):
        lines += [f"build all.{phase}: phony {' '.join(f'{name}.o' for _, name, rule, _ in units if rule == phase)}"]
    lines += [f"build {_escape(output)}: link {' '.join(f'{name}.o' for _, name, _, _ in units)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    # In turn, so that what fails is known to be CUDA's or not.
    for target, kind in ([("all.cuda", CudaError)] if cuda else []) + [
            ("all.compile", CompileError), (str(output), CudaError if cuda else CompileError)]:
        _run([ninja, "-C", str(folder), target], "compiling the extension failed", kind)


def _compiler() -> list[str]:
    """The C++ compiler: CXX, or else the first that runs of the one that built Python, which may be on another machine,
    and the usual names. Raises CompileError if none runs.
    """
    given = os.environ.get("CXX")
    found = [given] if given else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    candidates = [shlex.split(name) for name in found if name]
    for compiler in candidates:
        try:
            _run([*compiler, "--version"], "the C++ compiler does not run")
            return compiler
        except CompileError as error:
            if compiler is candidates[-1]:
                raise error


def _ninja() -> str:
    """The program: of the Python package, or the system's. Raises CompileError if there is neither."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError as error:
        if found := shutil.which("ninja"):
            return found
        raise CompileError("the build needs ninja, which is not installed") from error


def _quoted(text: str) -> str:
    """A C string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _compiles(compiler: list[str], flags: str, body: str, folder: Path) -> bool:
    """Whether the compiler knows the flags, and its assembler what the intrinsics in `body` become."""
    probe = folder / "probe.cpp"
    probe.write_text(f"{'#include <immintrin.h>' if body else ''}\nint main() {{ {body} return 0; }}\n")
    command = [*compiler, *flags.split(), "-c", str(probe), "-o", str(folder / "probe.o")]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list[str], failure: str, kind: type[CompileError] = CompileError) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise kind(f"{failure}: {command[0]}: {error.strerror}") from error
    if result.returncode:
        told = [line for line in (result.stdout + result.stderr).splitlines() if "error" in line.lower()]
        detail = told[0].strip() if told else f"{shlex.join(command)} ended with {result.returncode}"
        raise kind(f"{failure}: {detail}")
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
    packages=["flowkern", "flowkern.adapters", "flowkern.dialects", "flowkern.kernels", "flowkern.operators"],
    package_dir={"flowkern.kernels": "kernels"},
    ext_modules=[Extension("flowkern._C", sources=_relative("*.cpp"), depends=[*_relative("*.h"), *_relative("*.cu")],
                           optional=True)],
    cmdclass={"build_ext": NativeBuild},
    install_requires=["torch>=2.6", "triton; platform_system == 'Linux' and platform_machine == 'x86_64'", "numpy",
                      "safetensors", "ninja", "pybind11"],
    extras_require={
        "train": ["lightning>=2.6", "jsonargparse[signatures]>=4.32", "torchmetrics>=1.4", "scikit-image>=0.23",
                  "matplotlib>=3.8", "pillow>=10", "imagecodecs>=2025.3.30", "tifffile>=2024.8.30", "rich>=13",
                  "tensorboard", "filelock", "scipy"],
        "test": ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3", "ruff", "zuko", "scikit-learn", "onnx",
                 "onnxscript", "huggingface_hub"],
        # Not the rivals, which go in with --no-deps (see Makefile): memcnn would bring torchvision, and with it another
        # torch. tqdm and scipy are what they import.
        "bench": ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.8", "tqdm", "scipy"],
    },
)
