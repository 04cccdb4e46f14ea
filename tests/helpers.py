"""Models and comparisons that several test files share."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch

import flowkern
from bench import memory
from flowkern.layers import StepOfFlow

VARIANTS = {
    "softclamp": {},
    "sigmoid": {"scale": "sigmoid"},
    "additive": {"coupling": "additive"},
    "learned": {"split_prior": "learned"},
}
MODES = [("recompute", None), ("recompute", 2), ("store", None), ("checkpoint", None)]


def small_glow(size=(2, 8, 8), levels=2, depth=3, hidden=5, dtype=torch.float64, seed=0, moved=0.05, **options):
    """A Glow initialised from random images, its parameters moved off their special starting values."""
    torch.manual_seed(seed)
    glow = flowkern.Glow(size, levels=levels, depth=depth, hidden=hidden, **options).to(dtype)
    glow.initialize(torch.rand(8, *size, dtype=dtype))
    with torch.no_grad():
        for p in glow.parameters():
            p.add_(moved * torch.randn_like(p))
    return glow


def random_steps(count, channels, hidden=3, network=None, std=0.3):
    """Steps of flow in double precision with random parameters, and those that have a gradient."""
    torch.manual_seed(0)
    steps = torch.nn.ModuleList(StepOfFlow(channels, hidden=hidden, network=network).double() for _ in range(count))
    parameters = [p for name, p in steps.named_parameters() if "unused" not in name]
    for p in parameters:
        torch.nn.init.normal_(p, std=std)
    return steps, parameters


@contextlib.contextmanager
def instruction_set(isa):
    """The native loops of one instruction set that this machine supports."""
    from flowkern import _C

    before = _C.build_config()["isa_active"]
    _C.select_isa(isa)
    try:
        yield
    finally:
        _C.select_isa(before)


def in_different_memory(n, c, height, width, dtype=torch.float32):
    """The same image: dense, channels-last, the half that a split keeps, a crop."""
    x = torch.randn(n, c, height, width, dtype=dtype)
    yield "dense", x
    yield "channels-last", x.contiguous(memory_format=torch.channels_last)
    yield "half", torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, :c]
    yield "crop", torch.nn.functional.pad(x, (1, 2, 3, 4))[:, :, 3 : 3 + height, 1 : 1 + width]


def relative(a, b):
    """Norm of the difference over the norm of b."""
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def gradients(function, x, parameters, seed=1):
    """Gradients of a fixed random functional of function(x) -> (out, logdet), with respect to x and the parameters."""
    generator = torch.Generator().manual_seed(seed)
    x = x.detach().requires_grad_()
    out, logdet = function(x)
    w, v = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, logdet))
    return torch.autograd.grad((out * w).sum() + (logdet * v).sum(), [x, *parameters])


def kept_bytes(evaluate, n):
    """Bytes that autograd keeps while `evaluate` runs and that grow with its batch of n, counted once per storage. n
    divides no other size.
    """
    storages = {}

    def pack(tensor):
        if tensor.numel() and tensor.untyped_storage().nbytes() % (n * tensor.element_size()) == 0:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        evaluate()
    return sum(storage.nbytes() for storage in storages.values())


def footprints_of(function, cases: dict) -> dict:
    """Name -> what `bench.memory.measure` of `function` gives for its case: in two processes at a time, for much of a
    counted step is Python.
    """
    names = list(cases)
    halves = [names[::2], names[1::2]]
    with ThreadPoolExecutor(len(halves)) as pool:
        seen = pool.map(lambda half: memory.measure(function, cases=[cases[name] for name in half]), halves)
        return {name: found for half, results in zip(halves, seen, strict=True)
                for name, found in zip(half, results, strict=True)}
