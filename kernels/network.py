"""Glow's coupling network on a GPU: the functions `network_fold`, `network_trace` and `network_vjp` of a backend.

Their meaning is that of `flowkern.network`'s PyTorch forms, which also serve fp64. The folded weights are PyTorch's
channels-last ones, so that those forms can run on them too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern import network
from flowkern.kernels.convolution import multiply, sum_taps
from flowkern.kernels.folding import fold, unfold
from flowkern.kernels.fused_network import fused_blocks, fused_trace
from flowkern.kernels.launch import generation
from flowkern.kernels.rounding import products_of
from flowkern.kernels.weight_gradient import weight_gradient
from flowkern.layout import channels_last


class Spendable(list):
    """Hidden activations that `network_trace` just made. Handed on in this very list they are nobody else's, so that
    `network_vjp` writes gradients over them; what is kept from forward to backward arrives in another list.
    """


def network_fold(parameters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As `flowkern.network.fold`, in one launch."""
    return network.fold(parameters, dtype) if dtype == torch.float64 else fold(parameters, dtype)


def network_trace(folded: Sequence[Tensor], a: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """As `flowkern.network.trace`: a (N, C/2, H, W) -> h and, to `keep`, the hidden activations."""
    w1, b1, w2, b2, w3, b3 = folded
    if w1.dtype == torch.float64:
        return network.trace(folded, a, keep)
    hidden, few_in = w1.shape[:2]
    few_out = len(w3)
    h = _pixels(a, few_out, w1.dtype)
    if not a.numel():
        return h, [_pixels(a, hidden, w1.dtype) for _ in range(2)] if keep else []
    a, stride = _strided(a)
    n, _, height, width = a.shape
    planes = _planes(a, few_out, w1.dtype)
    shape = few_in, hidden, few_out, n * height * width
    if sizes := fused_blocks(*shape, w1.dtype, products_of(w1.dtype), generation(a.device)):
        kept = Spendable(_pixels(a, hidden, w1.dtype) for _ in range(2 * keep))
        fused_trace(folded, a, stride, kept, planes, sizes)
    else:
        h1 = _pixels(a, hidden, w1.dtype)
        multiply("widen", False, a, stride, w1, b1, h1, few_in, hidden)
        h2 = torch.empty_like(h1)
        multiply("pointwise", False, h1, hidden, w2, b2, h2, few_in, hidden)
        kept = Spendable([h1, h2] if keep else [])
        del h1
        multiply("taps", False, h2, hidden, w3, None, planes, few_out, hidden)
    sum_taps(planes, b3, h, few_out)
    return h, kept


def network_vjp(
    parameters: Sequence[Tensor],
    folded: Sequence[Tensor],
    a: Tensor,
    hidden: list[Tensor],
    dh: Tensor,
    need: Sequence[bool],
    da: Tensor,
) -> list[Tensor | None]:
    """As `flowkern.network.vjp`: gradients of the nine parameters where `need` says so, and of a, added to `da`."""
    w1, _, w2, _, w3, _ = folded
    if w1.dtype == torch.float64:
        return network.vjp(parameters, folded, a, hidden, dh, need, da)
    wanted = [any(need[i : i + 3]) for i in (0, 3, 6)]
    if not a.numel():
        hidden.clear()
        return [torch.zeros_like(p) if needed else None for p, needed in zip(parameters, need, strict=True)]
    width, few_in = w1.shape[:2]
    few_out = len(w3)
    dh, (a, stride) = channels_last(dh), _strided(a)
    parts: list[tuple[Tensor, Tensor] | None] = [None] * 3

    own = isinstance(hidden, Spendable)
    h2 = hidden.pop()
    if wanted[2]:
        parts[2] = weight_gradient(dh, h2, 9 * few_out, width, "left", few_out)
    g2 = h2 if own else torch.empty_like(h2)
    multiply("widen", True, dh, few_out, w3, h2, g2, few_out, width)
    del h2
    h1 = hidden.pop()
    if wanted[1]:
        parts[1] = weight_gradient(g2, h1, width, width, None, width)
    g1 = h1 if own else torch.empty_like(h1)
    multiply("pointwise", True, g2, width, w2, h1, g1, few_in, width)
    del h1, g2
    if wanted[0]:
        parts[0] = weight_gradient(g1, a, width, 9 * few_in, "right", stride)
    planes = _planes(a, few_in, w1.dtype)
    multiply("taps", True, g1, width, w1, None, planes, few_in, width)
    del g1
    if (found := _pixel_stride(da)) is not None:
        sum_taps(planes, None, da, found)
    else:
        through = torch.zeros_like(da, memory_format=torch.channels_last)
        sum_taps(planes, None, through, few_in)
        da.add_(through)
    gradients = unfold(parameters, parts)
    return [g if needed else None for g, needed in zip(gradients, need, strict=True)]


def _pixels(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    n, _, height, width = like.shape
    return torch.empty((n, channels, height, width), dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _planes(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Room for nine taps. In bf16 where the network is: they are as wide as half its hidden activations, and rounding
    each costs what rounding their sum costs. fp16 might overflow where the sum does not.
    """
    n, _, height, width = like.shape
    dtype = dtype if dtype == torch.bfloat16 else torch.float32
    return torch.empty((9, n, height, width, channels), dtype=dtype, device=like.device)


def _strided(x: Tensor) -> tuple[Tensor, int]:
    """x, or a copy, whose pixels follow one another at a constant distance, channels contiguous; and that distance."""
    stride = _pixel_stride(x)
    return (x, stride) if stride is not None else (x.contiguous(memory_format=torch.channels_last), x.shape[1])


def _pixel_stride(x: Tensor) -> int | None:
    """The distance of neighbouring pixels in memory, where it is the same for all and channels are contiguous."""
    n, channels, height, width = x.shape
    image, channel, row, column = x.stride()
    stride = column if width > 1 else row if height > 1 else image if n > 1 else channels
    even = (
        (channels == 1 or channel == 1)
        and (width == 1 or column == stride)
        and (height == 1 or row == width * stride)
        and (n == 1 or image == height * width * stride)
    )
    return stride if even and stride >= channels else None
