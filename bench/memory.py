"""Allocated bytes, event by event: what a piece of code holds at a moment, what it peaks at, and which part is whose.

Every allocation between two points is written down, on the CPU by a small library preloaded in front of the C allocator
(`ledger.c`; it sees oneDNN's and our own native scratch, which PyTorch does not count), on a GPU by the history of
PyTorch's caching allocator. A replay then gives the bytes that are live at any moment, and because single allocations
can be left out of it, parameter gradients, which must exist, are told apart exactly from everything else.

    with record() as events:
        loss = model(x).sum()
        events.mark("forward")
        loss.backward()
    events.held("forward")
    events.peak(without=events.storages(p.grad for p in model.parameters()))

On the CPU the process must have been started by `measure`, which preloads the library. Linux with glibc and a C
compiler (`cc`, or $CC) are needed for that.
"""

import contextlib
import ctypes
import gc
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.native import compiled

ENTRY = np.dtype([("address", np.uint64), ("bytes", np.int64)])
CAPACITY = 1 << 24          # entries of 16 bytes; only touched pages cost memory
MAPPED_LIMIT = 1 << 20      # bytes of anonymous mappings above which a measurement would be wrong
_ROUNDING, _PAGES = 512, 8192   # by how much an allocation exceeds its request: PyTorch's on a GPU, glibc's if large
_MAPPED = 1 << 17               # bytes from which glibc may give an allocation pages of its own


class Events:
    """The allocations of one window, filled when the window closes.

    Bytes are of what was allocated since the window's start and is still alive; releasing older memory earns nothing.
    """

    def __init__(self) -> None:
        self.bytes = np.empty(0, np.int64)          # > 0 allocated, < 0 released, 0 a release of older memory
        self.address = np.empty(0, np.uint64)
        self._released = np.empty(0, np.int64)      # for an allocation, the index of its release, else past the end
        self._marks: dict[str, int] = {}
        self._set_mark = lambda name: None

    def mark(self, name: str) -> None:
        """Remember this moment under a name."""
        self._set_mark(name)

    def held(self, at: str | None = None, without: Iterable[int] = ()) -> int:
        """Live bytes at a mark, or at the end."""
        return int(self._live(without)[self._moment(at)])

    def peak(self, after: str | None = None, before: str | None = None, without: Iterable[int] = ()) -> int:
        """Most live bytes between two marks, or in the whole window."""
        start = 0 if after is None else self._moment(after)
        return int(self._live(without)[start:self._moment(before) + 1].max())

    def storages(self, tensors: Iterable[Tensor]) -> set[int]:
        """The allocations behind these tensors, alive at the window's end, as indices of events.

        Call it while the tensors exist. Memory that was allocated before the window began is not among the events.
        """
        addresses = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        return {i for i in self.alive() if int(self.address[i]) in addresses}

    def of_size(self, sizes: Iterable[int], at: str | None = None) -> set[int]:
        """The allocations alive at a mark that hold one of these numbers of bytes, up to the allocator's rounding."""
        ranges = [(size, size + (_PAGES if size >= _MAPPED else _ROUNDING)) for size in sizes]
        return {i for i in self.alive(at) if any(low <= self.bytes[i] <= high for low, high in ranges)}

    def alive(self, at: str | None = None) -> set[int]:
        """The allocations alive at a mark, or at the end."""
        moment = self._moment(at)
        return set(np.flatnonzero((self.bytes[:moment] > 0) & (self._released[:moment] >= moment)).tolist())

    def size(self, allocations: Iterable[int]) -> int:
        """Sum of the bytes of some allocations."""
        return int(self.bytes[list(allocations)].sum())

    def _moment(self, mark: str | None) -> int:
        return len(self.bytes) if mark is None else self._marks[mark]

    def _live(self, without: Iterable[int]) -> np.ndarray:
        """Live bytes before the first event, and after each."""
        bytes_ = np.append(self.bytes, 0)
        hidden = np.fromiter(without, np.int64)
        bytes_[hidden] = bytes_[self._released[hidden]] = 0
        return np.concatenate([[0], np.cumsum(bytes_[:-1])])

    def _fill(self, entries: np.ndarray, marks: dict[str, int]) -> None:
        """Keep entries without marks; `marks` counts the events before each."""
        self.address, self.bytes, self._marks = entries["address"].copy(), entries["bytes"].copy(), marks
        count = len(entries)
        order = np.argsort(self.address, kind="stable")     # by address, then by time: an allocation, then its release
        first, second = order[:-1], order[1:]
        pairs = (self.address[first] == self.address[second]) & (self.bytes[first] > 0) & (self.bytes[second] < 0)
        self._released = np.full(count, count)
        self._released[first[pairs]] = second[pairs]
        older = self.bytes < 0
        older[second[pairs]] = False
        self.bytes[older] = 0


@contextlib.contextmanager
def record(device: torch.device | str = "cpu"):
    """Write down every allocation on `device` made inside the block. Yields `Events`, complete once the block ended."""
    events = Events()
    gc.collect()
    recorder = _record_cuda if torch.device(device).type == "cuda" else _record_cpu
    with recorder(events, torch.device(device)):
        yield events


@contextlib.contextmanager
def _record_cpu(events: Events, device: torch.device):
    library = ctypes.CDLL(None)
    if not hasattr(library, "ledger_start"):
        raise RuntimeError("allocations on the CPU are counted only in a process that bench.memory.measure has started")
    library.ledger_used.restype = library.ledger_mapped.restype = ctypes.c_int64
    library.ledger_entries.restype = ctypes.c_void_p
    names: list[str] = []

    def set_mark(name: str) -> None:
        library.ledger_mark(ctypes.c_int64(len(names)))
        names.append(name)

    events._set_mark = set_mark
    if not library.ledger_start(ctypes.c_int64(CAPACITY)):
        raise RuntimeError(f"no address space for a ledger of {CAPACITY} entries")
    try:
        yield
    finally:
        library.ledger_stop()
    used, mapped = library.ledger_used(), library.ledger_mapped()
    if used > CAPACITY:
        raise RuntimeError(f"{used} allocations and releases do not fit a ledger of {CAPACITY}; measure fewer steps")
    if mapped > MAPPED_LIMIT:
        raise RuntimeError(f"{mapped} bytes were mapped without the C allocator, so the count would be too low")
    entries = np.frombuffer(ctypes.string_at(library.ledger_entries(), used * ENTRY.itemsize), ENTRY)
    is_mark = entries["bytes"] == 0
    before = np.cumsum(~is_mark)
    marks = {names[int(number)]: int(count)
             for number, count in zip(entries["address"][is_mark], before[is_mark], strict=True)}
    events._fill(entries[~is_mark], marks)


@contextlib.contextmanager
def _record_cuda(events: Events, device: torch.device):
    index = device.index if device.index is not None else torch.cuda.current_device()
    marks: dict[str, int] = {}

    def trace() -> np.ndarray:
        torch.cuda.synchronize(index)
        return cuda_entries(torch.cuda.memory._snapshot(index)["device_traces"][index])

    events._set_mark = lambda name: marks.__setitem__(name, len(trace()))
    torch.cuda.synchronize(index)
    torch.cuda.reset_peak_memory_stats(index)
    start = torch.cuda.memory_stats(index)["allocated_bytes.all.current"]
    torch.cuda.memory._record_memory_history(context=None, max_entries=CAPACITY)
    try:
        yield
        events._fill(trace(), marks)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    peak = torch.cuda.memory_stats(index)["allocated_bytes.all.peak"] - start
    if abs(events.peak() - peak) > MAPPED_LIMIT:
        raise RuntimeError(f"the allocator's history peaks at {events.peak()} bytes and its statistics at {peak}")


def cuda_entries(trace: list[dict]) -> np.ndarray:
    """A trace of PyTorch's caching allocator as ledger entries."""
    signs = {"alloc": 1, "free_completed": -1}
    return np.array([(e["addr"], signs[e["action"]] * e["size"]) for e in trace if e["action"] in signs], dtype=ENTRY)


def library() -> Path:
    """The compiled ledger. Raises RuntimeError if it can't be built."""
    if sys.platform != "linux":
        raise RuntimeError(f"counting allocations needs Linux with glibc, this is {sys.platform}")
    return compiled(Path(__file__).with_name("ledger.c"))


def measure(function: Callable, timeout: float = 300, **arguments):
    """Call a module's function in a process whose allocations are counted. Arguments and result must be JSON-able.

    The process imports the function from its file. Raises RuntimeError with the end of its error output when it fails.
    """
    # Python's small objects go through malloc too, so that nothing is served from arenas that hide it. Threads that
    # wait sleep: bytes don't depend on it, and on a busy machine spinning threads crawl.
    environment = dict(os.environ, LD_PRELOAD=str(library()), PYTHONMALLOC="malloc", OMP_WAIT_POLICY="PASSIVE")
    root = Path(__file__).resolve().parent.parent
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        call = [inspect.getsourcefile(function), function.__qualname__, json.dumps(arguments), result.name]
        done = subprocess.run([sys.executable, "-m", "bench.memory", *call], check=False, cwd=root, env=environment,
                              capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"measuring {function.__qualname__} failed:\n{done.stderr[-4000:]}")
        return json.load(result)


def _main() -> None:
    file, name, arguments, result = sys.argv[1:]
    os.environ.pop("LD_PRELOAD", None)
    spec = importlib.util.spec_from_file_location(f"measured_{Path(file).stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Path(result).write_text(json.dumps(getattr(module, name)(**json.loads(arguments))))


if __name__ == "__main__":
    _main()
