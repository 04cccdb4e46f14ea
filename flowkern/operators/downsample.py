"""Decimation behind a low-pass filter: the measurement of super-resolution."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkern.operators.base import check_images, per_image_rho, residual
from flowkern.operators.blur import Blur
from flowkern.operators.fourier import filtered, power, spectral, transfer


class Downsample(Blur):
    """A x is x blurred, and of each factor x factor block the pixel at ((factor - 1) // 2, (factor - 1) // 2).

    factor: a positive integer that divides H and W; the measurement is (N, C, H / factor, W / factor).
    kernel: the low-pass filter, as in `Blur`. Default: the box, so that a measured pixel is the mean of its block, as
    on a sensor with larger pixels. It needs no pixels outside the image, and A A^T = I / factor^2. A stronger low-pass,
    with less aliasing, is `gaussian_kernel(factor / 2, size)`; for an even factor of even size, to stay centred.
    padding: as in `Blur`.

    With circular padding A A^T is a convolution of the small images, with every factor-th entry of the kernel's
    autocorrelation, from which `norm` and `normal_inverse` follow exactly (Zhao et al., Fast single image
    super-resolution using a new analytical solution for l2-l2 problems, IEEE TIP 2016).

    Raises as `Blur` does, and ValueError for another factor, or when used on a size that it does not divide.
    """

    def __init__(self, factor: int, kernel: Tensor | None = None, padding: str = "circular"):
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor must be a positive integer, got {factor!r}")
        super().__init__(torch.full((factor, factor), factor**-2.0) if kernel is None else kernel, padding)
        self.factor = factor

    @property
    def config(self) -> dict:
        return super().config | {"factor": self.factor}

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> A x (N, C, H / factor, W / factor)."""
        first = (self.factor - 1) // 2
        return super().forward(x)[..., first :: self.factor, first :: self.factor]

    def adjoint(self, y: Tensor) -> Tensor:
        """y (N, C, h, w) -> A^T y (N, C, factor h, factor w)."""
        check_images(y, "Downsample")
        first = (self.factor - 1) // 2
        around = (first, self.factor - 1 - first)
        blocks = F.pad(y[..., :, None, :, None], (*around, 0, 0, *around))
        return super().adjoint(blocks.flatten(4, 5).flatten(2, 3))

    @torch.no_grad()
    def norm(self, size: Sequence[int] | None = None) -> float:
        """As in `Blur`, exact with circular padding. Default: a size of 64 or more that the factor divides."""
        if size is None:
            size = (1, *(self.factor * math.ceil(max(64, k) / self.factor) for k in self.kernel.shape[-2:]))
        return super().norm(size)

    @property
    def prox(self) -> Callable[[Tensor, Tensor, float | Tensor], Tensor]:
        """Exact data consistency without a division by rho; no attribute with reflect padding."""
        if self.padding == "reflect":
            raise AttributeError("a Downsample with reflect padding has no exact prox")
        return self._prox

    def _prox(self, x: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        wide = spectral(x)
        small = filtered(residual(self, wide, spectral(y)), lambda image: image / (self._gram(wide) + rho))
        return (wide + self.adjoint(small)).to(x.dtype)

    def _normal_inverse(self, b: Tensor, rho: float | Tensor) -> Tensor:
        rho, wide = per_image_rho(rho, b), spectral(b)
        small = self.forward(wide)
        small = filtered(small, lambda image: image / (self._gram(wide) + rho))
        return ((wide - self.adjoint(small)) / rho).to(b.dtype)

    def _exact_norm(self, size: Sequence[int]) -> float:
        like = self.kernel.new_zeros(self.images, *size)
        return math.sqrt(self._gram(like).max().item())

    def _kernel_for(self, x: Tensor) -> Tensor:
        check_images(x, "Downsample")
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"factor {self.factor} does not divide the images' size, {tuple(x.shape[2:])}")
        return super()._kernel_for(x)

    def _gram(self, x: Tensor) -> Tensor:
        """The Fourier coefficients of A A^T, (1 or N, 1, h, w // 2 + 1), for images x."""
        spectrum = power(transfer(self._kernel_for(x), x))
        correlation = torch.fft.irfft2(spectrum, s=x.shape[-2:])
        return torch.fft.rfft2(correlation[..., :: self.factor, :: self.factor]).real
