"""Small C libraries of the benchmarks, compiled on first use into the user's cache folder."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def not_compiled() -> str | None:
    """Why nothing can be compiled, in one sentence, or None."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        return "counting allocations and the arithmetic's peak need a C compiler: install one, or set CC"
    return None


def compiled(source: Path, *flags: str) -> Path:
    """The shared library of a C file. Raises RuntimeError when it can't be built; $CC names another compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if why := not_compiled():
        raise RuntimeError(why)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowkern"
    version = hashlib.sha256(source.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    target = cache / f"{source.stem}-{version}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / target.name
            command = [compiler, "-O2", "-shared", "-fPIC", *flags, "-o", built, source]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{compiler} could not build {source.name}: {done.stderr.strip()}")
            built.replace(target)
    return target
