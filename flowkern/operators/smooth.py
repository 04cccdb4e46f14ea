"""The smoothest image that fits a measurement: least squares with a quadratic penalty on differences of neighbours."""

import torch
from torch import Tensor

from flowkern.operators.base import check_operator

WEIGHT = 0.03
ITERATIONS = 60


def smoothest(operator, y: Tensor, weight: float = WEIGHT, iterations: int = ITERATIONS) -> Tensor:
    """The images (N, C, H, W) that minimise `||A x - y||^2 + weight ||D x||^2`, D x the jumps between neighbours.

    Tikhonov regularisation, by conjugate gradients on `(A^T A + weight D^T D) x = A^T y`: it asks of the operator no
    more than `forward` and `adjoint`, and is linear and differentiable in y. What A does not see is filled in from
    around it: a hole s pixels wide takes about 2 s iterations. The default weight suits noise of a few percent of the
    range in y; the best one grows with the square of the noise.

    Raises TypeError for what is no operator, ValueError for a weight or number of iterations that is not positive.
    """
    check_operator(operator)
    if not weight > 0:
        raise ValueError(f"weight must be positive, got {weight!r}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a positive integer, got {iterations!r}")
    residual = operator.adjoint(y)
    x, direction = torch.zeros_like(residual), residual
    size = _inner(residual, residual)
    tiny = torch.finfo(residual.dtype).tiny  # an image that is solved exactly stays as it is
    for _ in range(iterations):
        image = operator.adjoint(operator.forward(direction)) + weight * _roughness(direction)
        step = size / _inner(direction, image).clamp_min(tiny)
        x, residual = x + step * direction, residual - step * image
        last, size = size, _inner(residual, residual)
        direction = residual + size / last.clamp_min(tiny) * direction
    return x


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)


def _roughness(x: Tensor) -> Tensor:
    """D^T D x: what the Laplacian is with nothing beyond the border."""
    total = torch.zeros_like(x)
    for dim in (2, 3):
        jumps = x.diff(dim=dim)
        edge = torch.zeros_like(x.narrow(dim, 0, 1))
        total = total + torch.cat([edge, jumps], dim) - torch.cat([jumps, edge], dim)
    return total
