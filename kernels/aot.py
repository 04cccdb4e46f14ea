"""Ahead-of-time compilation of every kernel configuration, on a machine without a GPU.

`python -m flowkern.kernels.aot` compiles each case for sm_80 and sm_90 and prints a Markdown table of registers,
stack and shared memory. A kernel module lists what its host code can choose in a function `cases()`.
"""

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowkern.kernels.case import Case
from flowkern.kernels.overwritten import overwritten

REPORT = Path(__file__).resolve().parent.parent / "docs" / "triton-resources.md"
PREFACE = """# What the Triton kernels take

Registers a thread, stack (where registers are spilled to) and shared memory of every configuration that host code can
choose up to 384 channels, compiled without a GPU for sm_80 / sm_90 (`make triton-report` writes this page). A test
compiles them anew, allows no stack, no more shared memory than the chips have (163 and 227
KiB a block), and no copy into a buffer that a product may still read.
"""
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes that one block may use


@dataclass(frozen=True)
class Resources:
    """What one compiled case takes: registers a thread, stack for those spilled, shared memory in bytes. overwritten:
    operands in shared memory that copies may overtake, none where all is well.
    """

    case: Case = field(repr=False)
    target: int
    registers: int
    stack: int
    shared: int
    overwritten: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.target]


def cases() -> Iterator[Case]:
    """Every case of every kernel module."""
    names = sorted(info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]))
    for module in (importlib.import_module(f"flowkern.kernels.{name}") for name in names if name != "aot"):
        yield from getattr(module, "cases", tuple)()


def compile_case(case: Case, target: int) -> Resources:
    """Compile one case for compute capability `target` (80 or 90) and read what it takes from the assembler."""
    compiled = compiled_for(case, GPUTarget("cuda", target, 32))
    resources = *_registers_and_stack(compiled.asm["cubin"]), compiled.metadata.shared
    return Resources(case, target, *resources, tuple(overwritten(compiled.asm["ttgir"])))


def compiled_for(case: Case, target: GPUTarget):
    """The case as Triton compiles it for any target, GPUTarget("hip", "gfx942", 64) for one."""
    # As the launcher does: an integer 1 is a constant, one divisible by 16 is known to be, and so are addresses.
    integers = {name: value for name, value in case.integers.items() if name in case.signature}
    constants = case.constexprs | {name: 1 for name, value in integers.items() if value == 1}
    aligned = {name for name, kind in case.signature.items() if kind.startswith("*")}
    aligned |= {name for name, value in integers.items() if value % 16 == 0}
    names = case.kernel.arg_names
    source = ASTSource(
        case.kernel,
        {name: "constexpr" if name in constants else case.signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=target, options=options)


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        told = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", told).group(1)) for name in ("REG", "STACK"))


def compile_all(pattern: str = "") -> list[Resources]:
    """What every case whose name contains `pattern` takes on every target, in order; compiled in several processes."""
    tasks = [(i, t) for i, case in enumerate(_every_case()) if pattern in case.name for t in case.targets]
    context = multiprocessing.get_context("fork")  # a worker finds the kernels declared
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        found = list(pool.map(_compile_numbered, tasks, chunksize=4))
    return [Resources(_every_case()[i], *numbers) for (i, _), numbers in zip(tasks, found, strict=True)]


@functools.cache
def _every_case() -> tuple[Case, ...]:
    return tuple(cases())


def _compile_numbered(task: tuple[int, int]) -> tuple:
    """A kernel can't be sent to another process, so its number is."""
    index, target = task
    r = compile_case(_every_case()[index], target)
    return r.target, r.registers, r.stack, r.shared, r.overwritten


def table(found: list[Resources]) -> str:
    """The report, a row per case: the figures for sm_80 and sm_90, or for the one where it is chosen."""
    columns = ("kernel", "registers", "stack bytes", "shared KiB")
    lines = [f"| {' | '.join(columns)} |", "| --- | ---: | ---: | ---: |"]
    for _, group in itertools.groupby(found, key=lambda r: r.case.name):
        of_case = list(group)
        registers, stack = (" / ".join(str(getattr(r, n)) for r in of_case) for n in ("registers", "stack"))
        shared = " / ".join(f"{r.shared / 1024:.1f}" for r in of_case)
        lines.append(f"| {of_case[0].case.name} | {registers} | {stack} | {shared} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flowkern.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("pattern", nargs="?", default="", help="only cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--write", action="store_true", help="write the table of all cases to docs/triton-resources.md")
    arguments = parser.parse_args()
    found = compile_all(arguments.pattern)
    if arguments.json:
        print(json.dumps([{"name": r.case.name, "target": r.target, "stack": r.stack,
                           "registers": r.registers, "shared": r.shared, "fits": r.fits,
                           "overwritten": r.overwritten} for r in found]))  # fmt: skip
    elif arguments.write:
        REPORT.write_text(f"{PREFACE}\nTriton {triton.__version__}.\n\n{table(found)}\n")
    else:
        print(table(found))


if __name__ == "__main__":
    main()
