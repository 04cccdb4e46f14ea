"""What every launch shares: where kernels run, block sizes, and the device guard."""

import contextlib
import functools
import os

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED = 163 << 10  # bytes of shared memory that one block may use on both chips that block sizes were chosen for
SMALLEST_DOT = 16  # an edge of a block that a matrix product accepts


def on_device_of(x: Tensor):
    """Kernels launch on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def cover(size: int) -> int:
    """The smallest power of two that a block of a matrix product may have and that covers `size`."""
    return max(SMALLEST_DOT, triton.next_power_of_2(size))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use: 64 KiB on AMD's chips, 99 to 227 on NVIDIA's."""
    if device.type == "cpu":
        return SHARED  # interpreted
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@functools.cache
def generation(device: torch.device) -> int:
    """80 or 90 where the device is of the kind that block sizes were chosen for, else 0."""
    if device.type == "cpu":
        return 90  # interpreted: the larger blocks
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 90 if major == 9 else 80 if (major, minor) == (8, 0) else 0
