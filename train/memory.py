"""The memory that one step of training takes, counted allocation by allocation."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile


def peak_mib(step: Callable[[], object], device: torch.device) -> float:
    """The most MiB that `step` has allocated at any moment, beyond what was there when it began.

    As PyTorch's allocator counts them: activations, gradients and what operators return; on a GPU also the scratch
    memory that libraries ask it for, on a CPU not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent():
        recorded.start()
    try:
        with uncollected():
            step()
    finally:
        with _silent():
            recorded.stop()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected inside: what is measured would be charged with it, or have what earlier steps left in
    cycles counted off.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Some builds of PyTorch's profiler say on the process's stderr that they start and stop."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
