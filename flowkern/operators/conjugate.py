"""Conjugate gradients, a system of equations for each image of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor


def solve(matrix: Callable[[Tensor], Tensor], b: Tensor, x: Tensor | None, iterations: int) -> Tensor:
    """`matrix(x) = b` for x (N, C, H, W) after so many iterations from x, or from 0 for None.

    matrix: symmetric and positive definite in each image.
    """
    residual = b if x is None else b - matrix(x)
    x = torch.zeros_like(b) if x is None else x
    direction, size = residual, _inner(residual, residual)
    tiny = torch.finfo(b.dtype).tiny  # an image that is solved exactly stays as it is
    for _ in range(iterations):
        image = matrix(direction)
        step = size / _inner(direction, image).clamp_min(tiny)
        x, residual = x + step * direction, residual - step * image
        last, size = size, _inner(residual, residual)
        direction = residual + size / last.clamp_min(tiny) * direction
    return x


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)
