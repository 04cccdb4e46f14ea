"""Which implementation of the pixel ops runs: registration, availability with reasons, and the resolution of "auto".

A backend is a set of functions with the names and signatures of the pixel ops in `flowkern.reference`. It registers
itself once, with a probe that says whether it can run here and, if not, why; nothing else in the package names it.

Two liberties that a backend's functions have, and one duty: the log-determinant may come as partial sums (N, parts)
instead of (N,), and the caller adds them up; `mix_vjp` writes its two reductions into the dense pair `into`, if given.
Beyond the pixel ops a backend may bring its own composition of the mixes, its own coupling network (and whether that
one's working memory is a tile), a first mix that reads an unsqueezed image and the loop over a level's steps
(`OPTIONAL`), for which plain PyTorch serves otherwise.
"""

import contextlib
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from flowkern import reference

OPS = (
    "channel_mix",
    "couple",
    "couple_mix",
    "mix_couple",
    "couple_vjp",
    "mix_vjp",
    "shrink",
    "shrink_vjp",
    "data_consistency",
    "data_consistency_vjp",
)
OPTIONAL = (
    "compose",
    "compose_vjp",
    "network_fold",
    "network_trace",
    "network_vjp",
    "network_tiled",
    "squeeze_mix",
    "chain",
    "chain_vjp",
)


@dataclass(frozen=True)
class Backend:
    """One implementation: `probe()` returns None when it can run, else one sentence that says why not."""

    name: str
    devices: tuple[str, ...]  # torch device types; empty means any
    probe: Callable[[], str | None]
    load: Callable[[], object]  # returns an object with one attribute per op
    preferred: dict[str, tuple[str, ...]] = field(default_factory=dict)  # device type -> ops for which "auto" picks it
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)  # of the states that it serves


_registry: dict[str, Backend] = {}
_tables: dict[tuple[str, str, torch.dtype], SimpleNamespace] = {}
_defaults: dict[str, Callable | None] = {"squeeze_mix": None}  # without one, an image is squeezed before it is mixed
_context: ContextVar[str | None] = ContextVar("flowkern_backend", default=None)


def register(backend: Backend) -> None:
    """Add a backend. A later registration is preferred by "auto" over an earlier one, for the ops it prefers."""
    _registry[backend.name] = backend
    _tables.clear()


def register_defaults(**functions: Callable) -> None:
    """The plain PyTorch forms of `OPTIONAL` ops, for backends that leave them out."""
    _defaults.update(functions)
    _tables.clear()


def default(op: str) -> Callable:
    """The plain PyTorch form of an `OPTIONAL` op."""
    return _defaults[op]


def backends() -> dict[str, bool | str]:
    """Every registered backend: True where it can run on this machine, else the reason why it can't."""
    return {name: (True if (why := b.probe()) is None else why) for name, b in _registry.items()}


@contextlib.contextmanager
def use_backend(name: str):
    """Run everything inside the block on one backend ("auto" restores the automatic choice).

    Raises ValueError for an unknown name, RuntimeError (with the reason) for a backend that can't run here.
    """
    check(name)
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def check(name: str) -> None:
    """Raise unless `name` is "auto" or a registered backend that can run here."""
    if name == "auto":
        return
    if name not in _registry:
        known = ", ".join(repr(n) for n in ("auto", *_registry))
        raise ValueError(f"unknown backend {name!r}; choose one of {known}")
    if (why := _registry[name].probe()) is not None:
        raise RuntimeError(f"backend {name!r} can't run here: {why}")


@torch.compiler.assume_constant_result
def resolve(device: torch.device, requested: str = "auto") -> str:
    """The backend that serves tensors on `device`: argument, then `use_backend`, then FLOWKERN_BACKEND, then "auto".

    An explicit choice never falls back: it raises when it can't run, or does not serve that kind of device. Within
    "auto" a single op may still come from another backend (see `table`). A compiled function keeps the backend that was
    chosen when it was compiled.
    """
    name = requested if requested != "auto" else (_context.get() or os.environ.get("FLOWKERN_BACKEND") or "auto")
    if name == "auto":
        return "auto"
    check(name)
    devices = _registry[name].devices
    if devices and device.type not in devices:
        raise RuntimeError(f"backend {name!r} runs on {' and '.join(devices)} tensors, got one on {device}")
    return name


def table(device: torch.device, name: str, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """Every op for states of `dtype` on `device` under the resolved backend `name`, as attributes. Cached: no work per
    call. Raises RuntimeError where an explicitly chosen backend does not serve that dtype.
    """
    key = (device.type, name, dtype)
    if key not in _tables:
        if name != "auto" and not _serves(name, dtype):
            wanted = " and ".join(str(d).removeprefix("torch.") for d in _registry[name].dtypes)
            raise RuntimeError(
                f"backend {name!r} computes states in {wanted}, got {str(dtype).removeprefix('torch.')}"
            )
        ops = (*OPS, *OPTIONAL)
        _tables[key] = SimpleNamespace(**{op: _implementation(op, device.type, name, dtype) for op in ops})
    return _tables[key]


def _serves(name: str, dtype: torch.dtype) -> bool:
    return name == "reference" or dtype in _registry[name].dtypes


def _implementation(op: str, device_type: str, name: str, dtype: torch.dtype) -> Callable:
    if name == "auto":
        name = _automatic(op, device_type, dtype)
    functions = _registry[name].load()
    return getattr(functions, op, _defaults[op]) if op in OPTIONAL else getattr(functions, op)


def _automatic(op: str, device_type: str, dtype: torch.dtype) -> str:
    for name, backend in reversed(_registry.items()):
        if op in backend.preferred.get(device_type, ()) and _serves(name, dtype) and backend.probe() is None:
            return name
    return "reference"


register(Backend("reference", devices=(), probe=lambda: None, load=lambda: reference))
