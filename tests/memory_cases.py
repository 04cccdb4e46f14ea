"""Functions that tests measure in a process of their own, whose allocations are counted."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.memory import record

MIB = 1 << 20


def known_tensors() -> dict:
    """One tensor kept, one released before the mark, one after it."""
    with record() as events:
        kept = torch.empty(3 * MIB, dtype=torch.uint8)
        released = torch.empty(5 * MIB, dtype=torch.uint8)
        del released
        late = torch.empty(7 * MIB, dtype=torch.uint8)
        events.mark("middle")
        del late
    mine = events.storages([kept])
    return {"middle": events.held("middle"), "end": events.held(), "peak": events.peak(),
            "peak after": events.peak(after="middle"), "peak before": events.peak(before="middle"),
            "peak without kept": events.peak(without=mine), "kept": events.size(mine),
            "of its size": events.size(events.of_size([3 * MIB]))}


def leak(bytes_: int) -> int:
    """What is held after C code has lost a block for which PyTorch never saw a request."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    with record() as events:
        libc.malloc(bytes_)
    return events.held()


def every_entrance(bytes_: int) -> dict:
    """Bytes counted, and left after release, for each of the C allocator's entrances."""
    libc = ctypes.CDLL(None)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    for name in ("malloc", "calloc", "realloc", "reallocarray", "memalign", "aligned_alloc", "valloc"):
        getattr(libc, name).restype = pointer
    calls = {"malloc": lambda: libc.malloc(size(bytes_)),
             "calloc": lambda: libc.calloc(size(1), size(bytes_)),
             "realloc": lambda: libc.realloc(pointer(libc.malloc(size(bytes_ // 2))), size(bytes_)),
             "reallocarray": lambda: libc.reallocarray(None, size(2), size(bytes_ // 2)),
             "memalign": lambda: libc.memalign(size(64), size(bytes_)),
             "aligned_alloc": lambda: libc.aligned_alloc(size(64), size(bytes_)),
             "valloc": lambda: libc.valloc(size(bytes_)),
             "posix_memalign": lambda: _posix_memalign(libc, bytes_)}
    counted = {}
    for name, call in calls.items():
        with record() as events:
            address = call()
            events.mark("allocated")
            libc.free(pointer(address))
        counted[name] = [events.held("allocated"), events.held()]
    return counted


def _posix_memalign(libc, bytes_: int) -> int:
    address = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(address), ctypes.c_size_t(64), ctypes.c_size_t(bytes_)) == 0
    return address.value


def convolution(native: bool) -> dict:
    """Peak of one convolution: beyond its result, oneDNN's scratch (with `native`) or PyTorch's own column buffer."""
    x, w = torch.randn(4, 48, 40, 40), torch.randn(40, 48, 3, 3)
    with torch.backends.mkldnn.flags(enabled=native), torch.no_grad():
        F.conv2d(x, w, padding=1)
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            F.conv2d(x, w, padding=1)
        with record() as events:
            y = F.conv2d(x, w, padding=1)
        largest = max((e.cpu_memory_usage for e in profile.function_events), default=0)
    return {"peak": events.peak(), "result": events.size(events.storages([y])), "seen by PyTorch": largest}


class _Doubling(torch.autograd.Function):
    """y = 2 x, wasteful or not in what it keeps."""

    @staticmethod
    def forward(ctx, x: Tensor, wasteful: bool) -> Tensor:
        if wasteful:
            ctx.save_for_backward(x.clone())
        return 2 * x

    @staticmethod
    def backward(ctx, g: Tensor):
        return 2 * g, None


def doubling(wasteful: bool) -> int:
    """Held between forward and backward beyond the result, by a function that needs to keep nothing."""
    x = torch.zeros(MIB, requires_grad=True)
    with record() as events:
        y = _Doubling.apply(x, wasteful)
        events.mark("forward")
    return events.held("forward") - events.size(events.storages([y]))


def gradient_apart() -> dict:
    """A parameter's gradient of 4 MiB, and 6 MiB allocated while it is alive."""
    w = torch.zeros(MIB, requires_grad=True)
    with record() as events:
        (3 * w).sum().backward()
        rest = torch.empty(6 * MIB, dtype=torch.uint8)
    mine = events.storages([w.grad])
    assert rest is not None
    return {"gradient": events.size(mine), "peak": events.peak(), "rest": events.peak(without=mine)}


def together(bytes_: int) -> dict:
    """Every case above that ends well, in one process."""
    return {"known": known_tensors(), "leak": leak(bytes_), "entrances": every_entrance(bytes_),
            "convolution": convolution(native=True), "lean": doubling(wasteful=False),
            "wasteful": doubling(wasteful=True), "gradient": gradient_apart()}


def mapping(bytes_: int) -> int:
    """A measurement during which memory is mapped behind the allocator's back."""
    import mmap

    with record() as events:
        block = mmap.mmap(-1, bytes_)
        block.close()
    return events.held()


def overfull(entries: int) -> int:
    """A measurement with more events than the ledger has room for."""
    import bench.memory

    bench.memory.CAPACITY = entries
    with record() as events:
        [torch.empty(1) for _ in range(entries)]
    return events.held()


def fail() -> None:
    """A measured function that raises."""
    raise ValueError("a cross word")
