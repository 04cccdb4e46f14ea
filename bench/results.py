"""Result files: figures with the machine, versions and commit that they were measured with."""

import json
import math
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import flowkern
from flowkern import cpp

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
CHANGED = " with changes"       # after a commit, where files were not as they are in it


def environment() -> dict:
    """What a figure depends on beside the code."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "normflows", "FrEIA", "nflows", "memcnn", "triton", "numpy", "pytest-benchmark"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"processor": _processor(), "threads": torch.get_num_threads(),
            "instruction set": torch.backends.cpu.get_cpu_capability(), "machine": machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "backends": flowkern.backends(), "versions": versions, "commit": _commit(),
            "date": datetime.now(timezone.utc).date().isoformat()}


def same(found: dict, figures: dict) -> bool:
    """Whether stored figures were measured as these are: on the same code, with the same versions, to the same end. Of
    code with changes nobody knows.
    """
    kept, now = found.get("environment", {}), _readable(environment())
    alike = all(kept.get(k) == v for k, v in now.items() if k != "date")
    return alike and not now["commit"].endswith(CHANGED) and found.get("full") == figures.get("full")


def write(name: str, figures: dict, folder: Path = RESULTS) -> Path:
    """Write <name>.json into a folder and return its path. Numbers keep six digits; what is not finite becomes null."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(_readable({"environment": environment(), **figures}), indent=1, allow_nan=False)
    # A list of numbers on one line.
    text = re.sub(r"\[\s+([-+\d.,\se]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text + "\n")
    partial.replace(path)   # what was there is lost only when all is written
    return path


def _readable(value):
    if isinstance(value, dict):
        return {key: _readable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def machine() -> str:
    """A short name of this machine for its result files: processor (with AMD's family, where it has no other name),
    threads in use, its widest instruction set unless that is AVX-512 (processors of one name differ, and hosts keep
    tiles from their guests), and the one chosen instead.
    """
    words = re.sub(r"\((R|TM)\)|Processor|CPU|@.*", "", _processor().split(" x ")[-1])
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "unknown"
    if slug == "amd-epyc":      # what virtual machines are told of all of them
        slug += _amd_family()
    widest = cpp.build_config()["isa_supported"][0] if cpp.probe() is None else "unbuilt"
    held = os.environ.get("FLOWKERN_CPU_ISA")
    return (f"{slug}-{torch.get_num_threads()}" + ("" if widest.startswith("avx512") else f"-{widest}")
            + (f"-as-{held}" if held else ""))


def _amd_family() -> str:
    """The generation as AMD writes it, -19h of Zen 3 and 4, -1ah of Zen 5, where Linux tells."""
    families = _cpuinfo("cpu family")
    return f"-{int(families[0]):x}h" if families else ""


def _processor() -> str:
    names = _cpuinfo("model name")
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def _cpuinfo(key: str) -> list[str]:
    """What Linux says of each processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key]


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    measured = "flowkern", "csrc", "bench", "setup.py", ":!bench/results"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *measured)
    return git("rev-parse", "--short=12", "HEAD") + (CHANGED if changed else "") or "unknown"
