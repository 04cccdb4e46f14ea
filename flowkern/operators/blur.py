"""Convolution with a kernel, by FFT."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkern.operators.base import Operator, check_images, checked_size, for_batch, per_image_rho
from flowkern.operators.fourier import filtered, power, spectral, transfer

PADDINGS = ("circular", "reflect")


class Blur(Operator):
    """A x is each channel of x convolved with a kernel; the measurement has the image's shape.

    `(A x)[i] = sum_u kernel[u] x[i - u + c]` in both directions, with the centre c = size // 2, as
    scipy.ndimage.convolve has it. It is a true convolution: F.conv2d takes the kernel flipped.

    kernel: floating point, (kh, kw) for all images or (N, kh, kw) for each its own; odd or even. A kernel that needs
    gradients gets them; an nn.Parameter is a parameter of the operator, else it is a buffer.
    padding: what lies outside the image. "circular": the image repeats; A is diagonal in Fourier space, and so
    `normal_inverse` is exact. "reflect": it is mirrored at the outermost pixels, truer to photographs, and there is no
    `normal_inverse`.

    Warns where a kernel's sum is not 1: A then changes the image's brightness.
    Raises TypeError for a kernel that is no floating-point tensor, ValueError for another shape, values that are not
    finite, or an unknown padding; when used, ValueError for a kernel larger than the image or a batch of other length.
    """

    def __init__(self, kernel: Tensor, padding: str = "circular"):
        super().__init__()
        if not isinstance(kernel, Tensor) or not kernel.is_floating_point():
            given = kernel.dtype if isinstance(kernel, Tensor) else type(kernel).__name__
            raise TypeError(f"kernel must be a floating-point tensor, got {given}")
        if kernel.ndim not in (2, 3) or not kernel.numel():
            raise ValueError(f"kernel must be (kh, kw) or (N, kh, kw), and not empty, got {tuple(kernel.shape)}")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be 'circular' or 'reflect', got {padding!r}")
        sums = kernel.detach().double().sum(dim=(-2, -1)).flatten()
        if not bool(sums.isfinite().all()):
            raise ValueError("kernel holds NaN or infinite values")
        worst = sums[(sums - 1).abs().argmax()].item()
        if abs(worst - 1) > 1e-3:
            warnings.warn(f"a kernel sums to {worst:g}, not to 1, which changes the image's brightness", stacklevel=2)
        self.padding = padding
        if isinstance(kernel, nn.Parameter):
            self.kernel = kernel
        else:
            self.register_buffer("kernel", kernel)

    @property
    def images(self) -> int:
        return len(self.kernel) if self.kernel.ndim == 3 else 1

    @property
    def config(self) -> dict:
        learnt = isinstance(self.kernel, nn.Parameter)
        return super().config | {"kernel": list(self.kernel.shape), "learnt": learnt, "padding": self.padding}

    @classmethod
    def from_config(cls, config: dict) -> "Blur":
        options = {name: value for name, value in config.items() if name not in ("kind", "learnt")}
        kernel = torch.zeros(config["kernel"])
        kernel[..., 0, 0] = 1
        return cls(**options | {"kernel": nn.Parameter(kernel) if config["learnt"] else kernel})

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> A x (N, C, H, W)."""
        kernel = self._kernel_for(x)
        (top, bottom), (left, right) = self._margins()
        padded = _reflect(_reflect(spectral(x), left, right).mT, top, bottom).mT
        blurred = filtered(padded, lambda image: image * transfer(kernel, padded))
        return blurred[..., top : top + x.shape[2], left : left + x.shape[3]].to(x.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        """y (N, C, H, W) -> A^T y (N, C, H, W)."""
        kernel = self._kernel_for(y)
        (top, bottom), (left, right) = self._margins()
        padded = F.pad(spectral(y), (left, right, top, bottom))
        image = filtered(padded, lambda image: image * transfer(kernel, padded).conj())
        image = _fold(image, left, right)
        return _fold(image.mT, top, bottom).mT.to(y.dtype)

    @torch.no_grad()
    def norm(self, size: Sequence[int] | None = None) -> float:
        """With circular padding, the exact norm on images of `size` (C, H, W): the largest |Fourier coefficient| of
        the kernel, which for kernels without negative entries is their sum whatever the size. With reflect padding,
        by power iteration, as in `Operator.norm`. Default: 64 x 64, or the kernel's size where that is larger.
        """
        size = (1, *(max(64, k) for k in self.kernel.shape[-2:])) if size is None else checked_size(size)
        return super().norm(size) if self.padding == "reflect" else self._exact_norm(size)

    @property
    def normal_inverse(self) -> Callable[[Tensor, float | Tensor], Tensor]:
        """`normal_inverse(b, rho)`, a division in Fourier space; no attribute with reflect padding."""
        if self.padding == "reflect":
            raise AttributeError("a Blur with reflect padding has no exact normal_inverse")
        return self._normal_inverse

    def _normal_inverse(self, b: Tensor, rho: float | Tensor) -> Tensor:
        kernel, rho, wide = self._kernel_for(b), per_image_rho(rho, b), spectral(b)
        return filtered(wide, lambda image: image / (power(transfer(kernel, wide)) + rho)).to(b.dtype)

    def _exact_norm(self, size: Sequence[int]) -> float:
        like = self.kernel.new_zeros(self.images, *size)
        return transfer(self._kernel_for(like), like).abs().max().item()

    def _kernel_for(self, x: Tensor) -> Tensor:
        """(1 or N, 1, kh, kw), checked against the images x."""
        check_images(x, type(self).__name__)
        height, width = self.kernel.shape[-2:]
        if height > x.shape[2] or width > x.shape[3]:
            raise ValueError(f"a kernel of size {(height, width)} is larger than the images, {tuple(x.shape[2:])}")
        return for_batch(spectral(self.kernel).reshape(-1, 1, height, width), spectral(x), "kernel")

    def _margins(self) -> list[tuple[int, int]]:
        """How far the kernel reaches over the image's border: above and below, left and right."""
        if self.padding == "circular":
            return [(0, 0), (0, 0)]
        return [((k - 1) // 2, k // 2) for k in self.kernel.shape[-2:]]


def gaussian_kernel(sigma: float, size: int | None = None) -> Tensor:
    """A Gaussian (size, size) of standard deviation sigma pixels that sums to 1.

    size: default, the odd number that reaches 3 sigma either way. The kernel is symmetric; an even one has its peak
    between pixels, half a pixel before `Blur`'s centre, which is what `Downsample` by an even factor wants.

    Raises ValueError for a sigma that is not positive and finite, or a size that is not a positive integer.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be a positive number, got {sigma!r}")
    size = 2 * math.ceil(3 * sigma) + 1 if size is None else size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive integer, got {size!r}")
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    # softmax is the normalised exponential, and survives a sigma so small that every exponential underflows.
    profile = torch.softmax(-((offsets / sigma) ** 2) / 2, dim=0)
    return torch.outer(profile, profile).to(torch.get_default_dtype())


def _reflect(x: Tensor, before: int, after: int) -> Tensor:
    """x extended by its mirror image in the last dimension. F.pad does this too, but on a GPU its gradient is added up
    in no fixed order.
    """
    last = x.shape[-1] - 1
    return torch.cat([x[..., 1 : 1 + before].flip(-1), x, x[..., last - after : last].flip(-1)], dim=-1)


def _fold(x: Tensor, before: int, after: int) -> Tensor:
    """The adjoint of `_reflect`: what came from a pixel is added to it again."""
    width = x.shape[-1] - before - after
    left, middle, right = x.split([before, width, after], dim=-1)
    if before:
        middle = middle + F.pad(left.flip(-1), (1, width - 1 - before))
    if after:
        middle = middle + F.pad(right.flip(-1), (width - 1 - after, 1))
    return middle
