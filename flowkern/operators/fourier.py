"""Fourier transforms of images, for any batch and precision."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def spectral(x: Tensor) -> Tensor:
    """x in a dtype that every FFT has: half precisions become fp32, as under autocast."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def filtered(x: Tensor, spectrally: Callable[[Tensor], Tensor]) -> Tensor:
    """x with its Fourier coefficients changed by `spectrally`; an empty batch, which FFTs refuse, as it is."""
    return torch.fft.irfft2(spectrally(torch.fft.rfft2(x)), s=x.shape[-2:]) if len(x) else x


def transfer(kernel: Tensor, x: Tensor) -> Tensor:
    """The Fourier coefficients (1 or N, 1, H, W // 2 + 1) of kernels (1 or N, 1, kh, kw) on the grid of x (N, C, H, W),
    their centres at the origin.
    """
    (height, width), size = kernel.shape[-2:], x.shape[-2:]
    grid = F.pad(kernel, (0, size[1] - width, 0, size[0] - height))
    return torch.fft.rfft2(grid.roll((-(height // 2), -(width // 2)), dims=(-2, -1)))


def power(coefficients: Tensor) -> Tensor:
    """Squared modulus, which unlike `abs` has all derivatives at zero."""
    return coefficients.real.square() + coefficients.imag.square()


def hartley(x: Tensor) -> Tensor:
    """The orthonormal Hartley transform over C, H and W: real, symmetric, its own inverse."""
    if not len(x):
        return x
    coefficients = torch.fft.fftn(spectral(x), dim=(1, 2, 3), norm="ortho")
    return (coefficients.real - coefficients.imag).to(x.dtype)
