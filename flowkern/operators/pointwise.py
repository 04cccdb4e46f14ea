"""Operators that leave each pixel where it is: denoising and inpainting."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern.operators.base import Operator, check_images, for_batch, per_image_rho


class Identity(Operator):
    """A = I: denoising (Wei et al., equation 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> x."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """y of any shape -> y."""
        return y

    def norm(self, size: Sequence[int] | None = None) -> float:
        """1."""
        return 1.0

    def normal_inverse(self, b: Tensor, rho: float | Tensor) -> Tensor:
        """b / (1 + rho)."""
        return b / (1 + per_image_rho(rho, b))


class Inpainting(Operator):
    """A x = mask * x: pixels where the mask is 0 are lost, and are 0 in the measurement, which has the image's shape.

    mask: 1 where a pixel is measured, else 0; bool or any dtype of zeros and ones, (H, W), (C, H, W) or (1, H, W) for
    all images, or (N, C, H, W) or (N, 1, H, W) for each its own.

    Raises TypeError for a mask that is no tensor, ValueError for one of another shape, with other values than 0 and 1,
    or all zeros for some image; when used, ValueError where mask and images don't fit.
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        if mask.ndim not in (2, 3, 4) or not mask.numel():
            raise ValueError(f"mask must be (H, W), (C, H, W) or (N, C, H, W), and not empty, got {tuple(mask.shape)}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must hold only zeros and ones (or be bool)")
        mask = mask.reshape([1] * (4 - mask.ndim) + list(mask.shape))
        if not bool(mask.flatten(1).any(dim=1).all()):
            raise ValueError("mask measures nothing: it is all zeros" + (" for some image" if len(mask) > 1 else ""))
        self.register_buffer("mask", mask if mask.is_floating_point() else mask.to(torch.get_default_dtype()))

    @property
    def size(self) -> tuple[int, int, int]:
        return tuple(self.mask.shape[1:])

    @property
    def images(self) -> int:
        return len(self.mask)

    @property
    def config(self) -> dict:
        return super().config | {"mask": list(self.mask.shape)}

    @classmethod
    def from_config(cls, config: dict) -> "Inpainting":
        return cls(torch.ones(config["mask"]))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> mask * x (N, C, H, W)."""
        return x * self._mask_for(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """y (N, C, H, W) -> mask * y (N, C, H, W): A is symmetric."""
        return self.forward(y)

    def norm(self, size: Sequence[int] | None = None) -> float:
        """1."""
        return 1.0

    def normal_inverse(self, b: Tensor, rho: float | Tensor) -> Tensor:
        """b / (mask + rho): a mask of zeros and ones is its own square."""
        return b / (self._mask_for(b) + per_image_rho(rho, b))

    def _mask_for(self, x: Tensor) -> Tensor:
        check_images(x, "Inpainting")
        channels, *size = self.mask.shape[1:]
        if channels not in (1, x.shape[1]) or tuple(size) != tuple(x.shape[2:]):
            raise ValueError(f"a mask of size {(channels, *size)} does not fit images of size {tuple(x.shape[1:])}")
        return for_batch(self.mask, x, "mask")
