"""Images that fit a measurement and are smooth, or smooth in pieces: where an unfolded network may start."""

import math
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from flowkern.operators.base import check_operator
from flowkern.operators.conjugate import solve

WEIGHT = 0.03
ITERATIONS = 60
TV_WEIGHT = 0.015
ROUNDS, ROUND_ITERATIONS = 6, 12
SOFT_EDGE = 0.01  # jumps below it count as in `smoothest`: without it weights would be infinite where nothing changes


def smoothest(operator, y: Tensor, weight: float = WEIGHT, iterations: int = ITERATIONS) -> Tensor:
    """The images (N, C, H, W) that minimise `||A x - y||^2 + weight ||D x||^2`, D x the jumps between neighbours.

    Tikhonov regularisation, by conjugate gradients on `(A^T A + weight D^T D) x = A^T y`: it asks of the operator no
    more than `forward` and `adjoint`, and is linear and differentiable in y. What A does not see is filled in from
    around it: a hole s pixels wide takes about 2 s iterations. The default weight suits noise of a few percent of the
    range in y; the best one grows with the square of the noise.

    Raises TypeError for what is no operator, ValueError for a weight or number of iterations that is not positive.
    """
    _check(operator, weight, iterations=iterations)

    def normal(x: Tensor) -> Tensor:
        return operator.adjoint(operator.forward(x)) + weight * _jumps_adjoint(*_jumps(x))

    return solve(normal, operator.adjoint(y), None, iterations)


def least_variation(
    operator, y: Tensor, weight: float = TV_WEIGHT, rounds: int = ROUNDS, iterations: int = ROUND_ITERATIONS
) -> Tensor:
    """About the images (N, C, H, W) that minimise `||A x - y||^2 / 2 + weight TV(x)`: sharp where `smoothest` blurs.

    TV(x) is the sum over pixels of the length of all their jumps to the neighbours below and to the right, those of
    all channels together: vectorial total variation (Blomgren and Chan, IEEE Trans. Image Process. 7, 1998), by which
    edges of the channels coincide. From `smoothest`, each round solves a quadratic problem whose penalty is divided by
    the length of the last round's jumps, by so many iterations of conjugate gradients (lagged diffusivity: Vogel and
    Oman, SIAM J. Sci. Comput. 17, 1996). Few rounds are enough: more of them change the PSNR by 0.1 dB, and a
    network goes on from there. It is differentiable in y. The default weight suits pixels in [0, 1] and noise of a few
    percent of them.

    Raises TypeError for what is no operator, ValueError for a weight or number that is not positive.
    """
    _check(operator, weight, rounds=rounds, iterations=iterations)
    b, x = operator.adjoint(y), smoothest(operator, y)
    for _ in range(rounds):
        down, across = _jumps(x)
        squares = F.pad(down.square(), (0, 0, 0, 1)) + F.pad(across.square(), (0, 1))
        penalty = weight / (squares.sum(1, keepdim=True) + SOFT_EDGE**2).sqrt()
        x = solve(partial(_normal, operator, penalty), b, x, iterations)
    return x


def _check(operator, weight: float, **counts: int) -> None:
    check_operator(operator)
    if not 0 < weight < math.inf:
        raise ValueError(f"weight must be positive, got {weight!r}")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")


def _normal(operator, penalty: Tensor, x: Tensor) -> Tensor:
    """A^T A x + D^T P D x, the penalties P of each pixel's jumps (N, 1, H, W)."""
    down, across = _jumps(x)
    rough = _jumps_adjoint(penalty[..., :-1, :] * down, penalty[..., :-1] * across)
    return operator.adjoint(operator.forward(x)) + rough


def _jumps(x: Tensor) -> tuple[Tensor, Tensor]:
    """D x: from each pixel to the one below, (N, C, H-1, W), and to the right, (N, C, H, W-1)."""
    return x.diff(dim=2), x.diff(dim=3)


def _jumps_adjoint(down: Tensor, across: Tensor) -> Tensor:
    """The transpose of `_jumps`."""
    down = F.pad(down, (0, 0, 1, 0)) - F.pad(down, (0, 0, 0, 1))
    return down + F.pad(across, (1, 0)) - F.pad(across, (0, 1))
