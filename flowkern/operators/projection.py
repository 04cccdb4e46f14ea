"""Compressed sensing with a structured random projection."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern.operators.base import Operator, check_images, checked_size, per_image_rho, residual
from flowkern.operators.fourier import hartley


class RandomProjection(Operator):
    """A x is a random subset of the Hartley coefficients of x with random signs: y is (N, M), M = ratio C H W.

    The signs make of any image something like noise, which all coefficients share; the Hartley transform (real minus
    imaginary part of the orthonormal FFT, over C, H and W) is real, symmetric and its own inverse for any size. So
    A A^T = I, and A costs an FFT and stores a sign a pixel and an index a measurement, no matrix.

    size: (C, H, W) of the images. ratio: measurements per pixel value, in (0, 1]; there is at least one. seed: of signs
    and subset, drawn on the CPU, the same for every device and dtype.

    Raises ValueError for a bad size, ratio or seed; when used, for images or measurements of another size.
    """

    def __init__(self, size: Sequence[int], ratio: float, seed: int = 0):
        super().__init__()
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(f"ratio must be a number in (0, 1], got {ratio!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        self.size, self.ratio, self.seed = checked_size(size), ratio, seed
        count = math.prod(self.size)
        generator = torch.Generator().manual_seed(seed)
        signs = 2 * torch.randint(2, self.size, generator=generator, dtype=torch.int8, device="cpu") - 1
        order = torch.randperm(count, generator=generator, device="cpu")
        self.register_buffer("signs", signs)  # integers: exact in every dtype
        self.register_buffer("indices", order[: max(1, round(ratio * count))].sort().values)

    @property
    def config(self) -> dict:
        return super().config | {"size": list(self.size), "ratio": self.ratio, "seed": self.seed}

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> A x (N, M)."""
        check_images(x, "RandomProjection")
        if tuple(x.shape[1:]) != self.size:
            raise ValueError(f"this RandomProjection is for images of size {self.size}, got {tuple(x.shape[1:])}")
        return hartley(x * self.signs).flatten(1).index_select(1, self.indices)

    def adjoint(self, y: Tensor) -> Tensor:
        """y (N, M) -> A^T y (N, C, H, W)."""
        if not isinstance(y, Tensor) or not y.is_floating_point():
            given = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"RandomProjection wants floating-point measurements (N, M), got {given}")
        if y.ndim != 2 or y.shape[1] != len(self.indices):
            raise ValueError(f"RandomProjection wants measurements (N, {len(self.indices)}), got {tuple(y.shape)}")
        coefficients = y.new_zeros(len(y), math.prod(self.size)).index_copy(1, self.indices, y)
        return hartley(coefficients.unflatten(1, self.size)) * self.signs

    def norm(self, size: Sequence[int] | None = None) -> float:
        """1, because A A^T = I."""
        return 1.0

    def normal_inverse(self, b: Tensor, rho: float | Tensor) -> Tensor:
        """What is measured of b, divided by 1 + rho, and the rest of it, divided by rho."""
        rho = per_image_rho(rho, b)
        measured = self.adjoint(self.forward(b))
        return measured / (1 + rho) + (b - measured) / rho

    def prox(self, x: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """Exact data consistency without a division by rho, as A A^T = I."""
        return x + self.adjoint(residual(self, x, y)) / (1 + rho)
