"""Result files: figures with the machine, versions and commit that they were measured with."""

import json
import math
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import flowkern

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")


def environment() -> dict:
    """What a figure depends on beside the code."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "normflows", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"processor": _processor(), "threads": torch.get_num_threads(),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "backends": flowkern.backends(), "versions": versions, "commit": _commit()}


def write(name: str, figures: dict, folder: Path = RESULTS) -> Path:
    """Write <name>.json into a folder and return its path. What is not finite becomes null."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_finite({"environment": environment(), **figures}), indent=1, allow_nan=False) + "\n")
    return path


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def matmul_peak(size: int = 1536, repeats: int = 8, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a square matrix product: what this machine gives, in this run, to code that does nothing else."""
    from torch.utils.benchmark import Timer

    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    timer.timeit(2)
    return 2 * size**3 / min(timer.timeit(1).median for _ in range(repeats))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "flowkern", "csrc", "bench", "setup.py")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "") or "unknown"
