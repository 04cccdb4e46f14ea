"""Compiles the .cu files as ordinary C++ against the emulation in emulation/, and puts the backend on top of that."""

import contextlib
import subprocess
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

import ninja
import pybind11

from flowkern import cuda

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).resolve().parent / "emulation"
PLAIN = "-O2"
SANITIZED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


def compile_emulated(folder, units, flags, link, output):
    """Compile and link `units`, (source, extra flags) pairs, with ninja, which rebuilds only what changed."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = sysconfig.get_config_var("CXX") or "c++"
    common = f"-std=c++17 -fPIC -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing -I{EMULATION} {flags}"
    lines = ["rule compile", f"  command = {compiler} {common} $extra -MMD -MF $out.d -x c++ -c $in -o $out",
             "  depfile = $out.d", "  deps = gcc", "rule link", f"  command = {compiler} {flags} {link} $in -o $out"]
    for source, extra in units:
        lines += [f"build {source.stem}.o: compile {source}", f"  extra = {extra}"]
    lines += [f"build {output}: link {' '.join(f'{source.stem}.o' for source, _ in units)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    result = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    return folder / output


def kernels():
    return [(source, "") for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


def python_flags():
    return f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']} -fvisibility=hidden"


def load_emulated():
    """The extension's submodule for GPUs, running on the CPU."""
    units = [*kernels(), (EMULATION / "runtime.cpp", ""), (EMULATION / "module.cpp", python_flags()),
             (ROOT / "csrc" / "cuda" / "bindings.cpp", python_flags())]
    path = compile_emulated(ROOT / "build" / "emulated", units, PLAIN, "-shared",
                            "emulated" + sysconfig.get_config_var("EXT_SUFFIX"))
    spec = spec_from_file_location("emulated", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated_backend(native=None):
    """Within, flowkern.cuda takes CPU tensors and runs on the emulation, which is the value."""
    native = native or load_emulated()
    with mock.patch.multiple(cuda, _native=lambda: native, _guard=lambda x: contextlib.nullcontext(),
                             _device_and_stream=lambda x: (0, 0)):
        yield native
