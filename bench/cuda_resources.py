"""What nvcc made of the CUDA kernels: `python -m bench.cuda_resources` prints a Markdown table, --write puts it into
docs/cuda.md.

Registers and stack come from the installed extension, by the cuobjdump that Triton's wheel carries; threads and dynamic
shared memory from launches in the emulation that CI runs the kernels in (tests/cuda).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from flowkern import cpp, cuda

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "cuda.md"
MARK = "<!-- What follows is written by `make cuda-report`. -->\n"
# Of a multiprocessor: threads, blocks, and KiB of shared memory; 64 Ki registers. A block costs 1 KiB besides its own.
LIMITS = {"sm_80": (2048, 32, 164), "sm_90": (2048, 32, 228)}


@dataclass
class Kernel:
    """registers, stack: by target. threads, shared: of its launches; shared memory is the largest, in bytes."""

    registers: dict[str, int] = field(default_factory=dict)
    stack: dict[str, int] = field(default_factory=dict)
    threads: int = 0
    shared: int = 0

    def blocks(self, target: str) -> int:
        """How many blocks a multiprocessor holds at a time."""
        threads, blocks, shared = LIMITS[target]
        registers = (self.registers[target] + 7) // 8 * 8 * 32
        warps = self.threads // 32
        return min(threads // self.threads, blocks, shared * 1024 // (self.shared + 1024), 65536 // registers // warps)


def extension() -> Path:
    """The installed native extension. Raises RuntimeError where it has no CUDA part."""
    if (missing := cpp.build_config()["cuda_missing"]) is not None:
        raise RuntimeError(f"the extension was built without CUDA: {missing}")
    from flowkern import _C

    return Path(_C.__file__)


def short(name: str) -> str:
    """A demangled kernel without namespaces and parameter list."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|flowkern::cuda::|flowkern::", "", name)
    name = re.sub(r"^void ", "", name).split(">(")[0]
    return re.sub(r"\s*>", ">", name if name.endswith(">") or "<" not in name else name + ">").split("(")[0]


def compiled(path: Path) -> dict[str, Kernel]:
    """Kernels of a file by name, with registers and stack of every target."""
    triton = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = triton if triton.exists() else shutil.which("cuobjdump")
    dump = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    dump = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
    found: dict[str, Kernel] = {}
    target = name = ""
    for line in dump.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function (.*):$", line):
            name = short(match[1])
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+)", line):
            kernel = found.setdefault(name, Kernel())
            kernel.registers[target], kernel.stack[target] = int(match[1]), int(match[2])
    return found


def launched(run) -> dict[str, Kernel]:
    """Kernels that `run(backend)` launches in the emulation, with threads and shared memory."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda"))
    from emulation_build import emulated_backend

    with tempfile.TemporaryDirectory() as folder, emulated_backend() as native:
        log = os.environ["FLOWKERN_EMULATE_LOG"] = str(Path(folder) / "log")
        try:
            run(cuda)
        finally:
            del os.environ["FLOWKERN_EMULATE_LOG"]
        launches = {tuple(line.split()) for line in Path(log).read_text().splitlines()}
    symbols = subprocess.run(["nm", "-C", native.__file__], capture_output=True, text=True, check=True).stdout
    places = (line.split(maxsplit=2) for line in symbols.splitlines() if line[0] != " ")
    names = {int(place, 16): short(name) for place, _, name in places}
    found: dict[str, Kernel] = {}
    for offset, threads, shared in launches:
        kernel = found.setdefault(names[int(offset, 16)], Kernel())
        kernel.threads, kernel.shared = int(threads), max(kernel.shared, int(shared))
    return found


def everything(backend) -> None:
    """Calls that reach every kernel."""
    sys.path.insert(0, str(ROOT / "tests"))
    from pixel_cases import PRECISIONS, arguments

    from flowkern.backend import OPS

    for op in OPS:
        for channels in (2, 4, 8, 12, 20, 24, 48, 96):
            for state, h in PRECISIONS.values():
                for _, args in arguments(op, (1, channels, 1, 1), state, h):
                    getattr(backend, op)(*args)
    for dtype in (torch.float32, torch.float64):
        for size in (1, 4):
            x, strength = torch.ones(size, dtype=dtype), torch.ones((), dtype=dtype)
            for call in (backend.shrink_vjp, backend.shrink, backend.data_consistency):
                call(*([x] * (1 if call is backend.shrink else 2)), strength)
            backend.data_consistency_vjp(x, x, x, strength)
        for channels in (2, 40, 192):
            square, row = torch.zeros(1, channels, channels, dtype=dtype), torch.ones(1, channels, dtype=dtype)
            permutation = torch.arange(channels)[None]
            backend.compose(square, square, row, row, row, row, permutation)
            backend.compose_vjp(square, square, row, row, row, row, permutation, square, row, row[0, 0])


def kernels() -> dict[str, Kernel]:
    """Every kernel of the extension, by name. Raises RuntimeError for one that no op reaches."""
    found, seen = compiled(extension()), launched(everything)
    found = {name: kernel for name, kernel in found.items() if set(LIMITS) <= set(kernel.registers)}
    if found.keys() != seen.keys():
        raise RuntimeError(f"kernels that were only compiled or only launched: {sorted(found.keys() ^ seen.keys())}")
    for name, kernel in found.items():
        kernel.threads, kernel.shared = seen[name].threads, seen[name].shared
    return dict(sorted(found.items()))


def table(found: dict[str, Kernel]) -> str:
    """The Markdown table."""
    lines = [f"Compiled by {cpp.build_config()['cuda_compiler']}. Stack, and with it spilled registers: "
             f"{sum(sum(k.stack.values()) for k in found.values())} bytes in all kernels together.", "",
             "| kernel | threads | shared, bytes | registers sm_80 / sm_90 | blocks an SM holds sm_80 / sm_90 |",
             "|---|---|---|---|---|"]
    for name, k in found.items():
        registers, blocks = (" / ".join(str(v(target)) for target in LIMITS) for v in (k.registers.get, k.blocks))
        lines.append(f"| `{name}` | {k.threads} | {k.shared:,} | {registers} | {blocks} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_resources", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/cuda.md")
    text = table(kernels())
    if parser.parse_args().write:
        REPORT.write_text(REPORT.read_text().split(MARK)[0] + MARK + "\n" + text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
