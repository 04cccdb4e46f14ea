"""What every launch shares: where kernels run, block sizes, and the device guard."""

import contextlib
import os

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALLEST_DOT = 16  # an edge of a block that a matrix product accepts


def on_device_of(x: Tensor):
    """Kernels launch on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def cover(size: int) -> int:
    """The smallest power of two that a block of a matrix product may have and that covers `size`."""
    return max(SMALLEST_DOT, triton.next_power_of_2(size))
