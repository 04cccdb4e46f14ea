"""Memory layouts that the op layer and every backend rely on."""

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """x itself if its channels are dense per pixel (NHWC memory), else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(x: Tensor) -> Tensor:
    """An empty tensor of x's shape and dtype, dense channels-last: what a pixel op returns for a state."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def in_order_of(x: Tensor, dense: Tensor) -> Tensor:
    """x in the memory order of a dense tensor, so that an elementwise op may walk both as flat arrays."""
    return x if x.stride() == dense.stride() else torch.empty_like(dense).copy_(x)
