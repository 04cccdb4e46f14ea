"""Every CUDA kernel on a GPU under compute-sanitizer: `python -m bench.cuda_sanitizer`.

The program is tests/cuda/sanitized.cpp, which CI runs in the emulation; the kernels are those of the installation.
Prints a line per tool; the exit status is 1 when one found something.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from flowkern import cpp

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PARTS = ("pointwise", "compositions", "mixes", "couplings")


def compiled_kernels() -> list[Path]:
    """The object files of the installation's kernels, if it was built in this folder."""
    folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"  # as in setup.py
    return [p for p in folder.glob("cuda.*.o") if p.name != "cuda.bindings.o"]


def build(folder: Path) -> Path:
    """Compile the program. Raises RuntimeError without nvcc or without the installation's objects."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    kernels = compiled_kernels()
    if nvcc is None or not kernels:
        raise RuntimeError("this needs nvcc, and `pip install --no-build-isolation -e .` to have compiled the kernels")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cpp.build_config()["cuda"].split()]
    program = folder / "program"
    source, main_object = ROOT / "tests" / "cuda" / "sanitized.cpp", folder / "main.o"
    subprocess.run([nvcc, "-std=c++17", "-O1", *targets, "-x", "cu", "-c", source, "-o", main_object], check=True)
    subprocess.run([nvcc, *targets, main_object, *kernels, "-o", program], check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_sanitizer", description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS[:2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=120, help="the longest that one part may take under one tool")
    arguments = parser.parse_args()
    found = False
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for tool in arguments.tools:
            for part in arguments.parts:
                command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", program, part]
                try:
                    result = subprocess.run(command, capture_output=True, text=True, timeout=arguments.seconds)
                except subprocess.TimeoutExpired:
                    print(f"{tool:<10} {part:<13} not finished after {arguments.seconds:.0f} s", flush=True)
                    found = True
                    continue
                summary = [line for line in result.stdout.splitlines() if "SUMMARY" in line or "launches" in line]
                print(f"{tool:<10} {part:<13} exit {result.returncode}: {'; '.join(summary)}", flush=True)
                if result.returncode:
                    found = True
                    print(result.stdout[-4000:], result.stderr[-1000:])
    sys.exit(int(found))


if __name__ == "__main__":
    main()
