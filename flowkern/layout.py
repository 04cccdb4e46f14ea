"""What the op layer and every backend rely on: memory layouts, and tensors of one dtype on one device."""

import torch
from torch import Tensor

from flowkern import transforms

# What coupling networks may compute h in, beside the dtype of a state.
NETWORK_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64,),
}


def channels_last(x: Tensor) -> Tensor:
    """x itself if its channels are dense per pixel (NHWC memory), else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def channels_last_outside_vmap(x: Tensor) -> Tensor:
    """`channels_last`, or x itself under vmap, where there are no layouts."""
    return x if transforms.batched_or_forward() else channels_last(x)


def empty_channels_last(x: Tensor) -> Tensor:
    """An empty tensor of x's shape and dtype, dense channels-last: what a pixel op returns for a state."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def in_order_of(x: Tensor, dense: Tensor) -> Tensor:
    """x in the memory order of a dense tensor, so that an elementwise op may walk both as flat arrays; x itself under
    vmap, where there are no layouts.
    """
    as_it_is = x.stride() == dense.stride() or transforms.batched_or_forward()
    return x if as_it_is else torch.empty_like(dense).copy_(x)


def check_alike(op: str, state: Tensor, *others: Tensor, h: Tensor | None = None) -> None:
    """Raises ValueError unless all are on the state's device and of its dtype, fp32 or fp64, and h is of one that goes
    with it: kernels read memory by its address, and would take one number for another.
    """
    dtype, device = state.dtype, state.device
    if dtype not in NETWORK_DTYPES:
        raise ValueError(f"{op}: a state must be float32 or float64, got {dtype}")
    for t in others:
        if t.dtype != dtype or t.device != device:
            raise ValueError(f"{op}: expected {dtype} on {device} throughout, got {t.dtype} on {t.device}")
    if h is not None and (h.dtype not in NETWORK_DTYPES[dtype] or h.device != device):
        wanted = " or ".join(map(str, NETWORK_DTYPES[dtype]))
        raise ValueError(
            f"{op}: h must be {wanted} on {device}, got {h.dtype} on {h.device}; the coupling network's precision is "
            f"compute_dtype, and backend='reference' takes any"
        )


def sums_of_mix(state: Tensor, into: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Where `mix_vjp` writes dM and dm: `into`, or new tensors. Raises ValueError unless they are dense."""
    channels = state.shape[1]
    dmatrix, doffset = into or (state.new_empty((channels, channels)), state.new_empty(channels))
    if not (dmatrix.is_contiguous() and doffset.is_contiguous()):
        raise ValueError("mix_vjp: `into` must be dense tensors")
    return dmatrix, doffset


def check_permutation(op: str, permutation: Tensor, state: Tensor) -> None:
    """Raises ValueError unless a permutation of channels is int64 and where the state is."""
    if permutation.dtype != torch.int64 or permutation.device != state.device:
        raise ValueError(f"{op}: the permutation must be int64 on {state.device}, got {permutation.dtype} on "
                         f"{permutation.device}")
