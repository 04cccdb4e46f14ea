"""Maximum a posteriori over the latent of a flow: a prior used as it is, for any measurement.

M. Asim, M. Daniels, O. Leong, A. Ahmed, P. Hand, Invertible generative models for inverse problems: mitigating
representation error and dataset bias, ICML 2020, arXiv:1905.11672.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowkern.glow import Glow
from flowkern.operators import Identity
from flowkern.operators.base import check_operator, residual
from flowkern.replay import fixed


def map_estimate(
    glow: Glow,
    y: Tensor,
    gamma: float,
    *,
    operator=None,
    optimizer: str = "lbfgs",
    steps: int = 100,
    lr: float = 0.1,
    start: Tensor | None = None,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The image g(z) (N, C, H, W) whose latent minimises `||A g(z) - y||^2 + gamma ||z||^2`, for each y of the batch.

    y: measurements, N first; for denoising (N, C, H, W), pixels in [0, 1] plus noise, not clipped. The result isn't
    clipped either. gamma: a number >= 0. Both norms are sums, over as many pixels as latents, so that a gamma carries
    over to images of other sizes; white noise of standard deviation sigma makes z's posterior mode gamma = sigma^2.
    operator: A, an object with `forward` and `adjoint` (default: the identity). It sees the whole batch every time.
    optimizer: "lbfgs" or "adam". On a smooth flow L-BFGS is far ahead; the kinks of ReLU networks slow it down, so that
    on a trained Glow Adam gets as far in as many steps. steps: evaluations of the objective with its gradient, of which
    an L-BFGS iteration costs one, and one more for every step it takes back. lr: Adam's rate; for L-BFGS the root mean
    square of the first step, before there is curvature to go by. start: images (N, C, H, W) to start from (default:
    z = 0, the most likely latent). progress: called after each evaluation with its number, from 1, and the lowest
    objective so far (N,).

    Every image is its own problem with its own steps: it comes out as it would alone. Points whose objective or
    gradient is not finite are taken back like any bad step. The lowest point seen is returned. The flow is used in
    eval mode, keeps its parameters, flags and gradients, and in recompute mode memory does not grow with its depth.

    Raises TypeError for a flow, operator, tensor or callback of the wrong kind, ValueError for wrong values or shapes,
    and where the objective is not finite at the start.
    """
    if not isinstance(glow, Glow):
        raise TypeError(f"glow must be a flowkern.Glow, got {type(glow).__name__}")
    if glow.context_channels:
        raise ValueError("map_estimate wants an unconditioned Glow; this one has context_channels")
    operator = Identity() if operator is None else operator
    check_operator(operator)
    if not _number(gamma) or not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be a finite number >= 0, got {gamma!r}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(map(repr, OPTIMIZERS))}, got {optimizer!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if not _number(lr) or not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, got {lr!r}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function of the step and the objective, got {type(progress).__name__}")
    if not isinstance(y, Tensor) or not y.is_floating_point():
        given = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be a floating-point tensor, got {given}")
    # Lightning evaluates in inference mode, whose tensors autograd refuses: hence the copies.
    with torch.inference_mode(False), torch.enable_grad(), fixed(glow):
        y = y.detach().clone()
        if not bool(y.isfinite().all()):
            raise ValueError("y contains NaN or infinite values")
        with torch.no_grad():
            like = glow._check_image(operator.adjoint(y))
            z, size = _latent(glow, like, start), like.shape[2:]
            residual(operator, like, y)  # which raises for a y of another shape
        stepper = OPTIMIZERS[optimizer](z, lr)
        best, lowest = torch.zeros_like(like), torch.full_like(z[:, 0], math.inf)
        for step in range(1, steps + 1):
            x, objective, gradient = _evaluate(glow, operator, y, gamma, z, size)
            good = objective.isfinite() & gradient.isfinite().all(dim=1)
            if step == 1 and not bool(good.all()):
                raise ValueError("the objective is not finite at the start; give another start=, or audit the flow")
            better = good & (objective < lowest)
            best = torch.where(better[:, None, None, None], x, best)
            lowest = torch.where(better, objective, lowest)
            if progress is not None:
                progress(step, lowest)
            z = stepper(z, objective, gradient, good)
    return best


class _Adam:
    """Adam, with the rate of each image halved whenever its step has to be taken back."""

    def __init__(self, z: Tensor, lr: float):
        self.z, self.lr = z, torch.full_like(z[:, :1], lr)
        self.mean, self.square, self.count = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z[:, :1])

    def __call__(self, z: Tensor, objective: Tensor, gradient: Tensor, good: Tensor) -> Tensor:
        good = good[:, None]
        self.z = torch.where(good, z, self.z)
        self.lr = torch.where(good, self.lr, self.lr / 2)
        self.count = self.count + good
        self.mean = torch.where(good, 0.9 * self.mean + 0.1 * gradient, self.mean)
        self.square = torch.where(good, 0.999 * self.square + 0.001 * gradient.square(), self.square)
        mean, square = self.mean / (1 - 0.9**self.count), self.square / (1 - 0.999**self.count)
        return self.z - self.lr * mean / (square.sqrt() + 1e-8)


class _LBFGS:
    """L-BFGS with backtracking (Nocedal and Wright 2006, algorithms 7.4 and 3.1), one problem a row.

    Each image has its own history, inner products and step length, and is at its own point of its line search: one
    evaluation of the whole batch is a new iteration for some images and a shorter step for others.
    """

    PAIRS = 10
    ARMIJO = 1e-4
    SHORTEST = 2.0**-10

    def __init__(self, z: Tensor, lr: float):
        self.z, self.lr = z, lr
        self.objective, self.gradient = torch.full_like(z[:, 0], math.inf), torch.zeros_like(z)
        self.length, self.slope = torch.ones_like(z[:, :1]), torch.zeros_like(z[:, 0])
        self.s = self.y = z.new_zeros(self.PAIRS, *z.shape)
        self.rho = z.new_zeros(self.PAIRS, len(z), 1)  # 1 / s.y, and 0 in an empty place, which then does nothing

    def __call__(self, z: Tensor, objective: Tensor, gradient: Tensor, good: Tensor) -> Tensor:
        enough = self.objective + self.ARMIJO * self.length[:, 0] * self.slope
        accepted = good & (objective < self.objective) & (objective <= enough)
        self._remember(z - self.z, gradient - self.gradient, accepted)
        self.objective = torch.where(accepted, objective, self.objective)
        accepted = accepted[:, None]
        self.z, self.gradient = torch.where(accepted, z, self.z), torch.where(accepted, gradient, self.gradient)
        self.length = torch.where(accepted, 1.0, self.length / 2)
        # A direction in which no step helps comes from a history that no longer fits.
        stuck = self.length < self.SHORTEST
        self.length = torch.where(stuck, 1.0, self.length)
        self.rho = torch.where(stuck, 0.0, self.rho)
        direction = self._direction()
        self.slope = _dot(self.gradient, direction)[:, 0].clamp(max=0)
        return self.z + self.length * direction

    def _remember(self, s: Tensor, y: Tensor, accepted: Tensor) -> None:
        """Take in the pairs of accepted steps along which the objective curves upwards."""
        curvature = _dot(s, y)
        keep = accepted[:, None] & (curvature > 1e-8 * (_dot(s, s) * _dot(y, y)).sqrt())
        self.s, self.y, self.rho = (
            torch.where(keep, torch.cat([old[1:], new[None]]), old)
            for old, new in ((self.s, s), (self.y, y), (self.rho, 1 / curvature))
        )

    def _direction(self) -> Tensor:
        """-H g by the two-loop recursion, shortened to a root mean square of 1: latents are of that order."""
        q, alphas = self.gradient, []
        for s, y, rho in zip(reversed(self.s), reversed(self.y), reversed(self.rho), strict=True):
            alphas.append(rho * _dot(s, q))
            q = q - alphas[-1] * y
        newest = self.rho[-1]
        curved = 1 / (newest * _dot(self.y[-1], self.y[-1]))
        q = q * torch.where(newest > 0, curved, self.lr / _rms(q))
        for s, y, rho, alpha in zip(self.s, self.y, self.rho, reversed(alphas), strict=True):
            q = q + (alpha - rho * _dot(y, q)) * s
        return -q / _rms(q).clamp_min(1)


OPTIMIZERS = {"lbfgs": _LBFGS, "adam": _Adam}


def _evaluate(glow: Glow, operator, y: Tensor, gamma: float, z: Tensor, size) -> tuple[Tensor, Tensor, Tensor]:
    """g(z) (N, C, H, W), the objective (N,) and its gradient in z (N, D)."""
    z = z.detach().requires_grad_()
    x = glow.inverse(z, size)
    residual = operator.forward(x) - y
    objective = residual.square().flatten(1).sum(dim=1) + gamma * z.square().sum(dim=1)
    return x.detach(), objective.detach(), torch.autograd.grad(objective.sum(), z)[0]


def _latent(glow: Glow, like: Tensor, start: Tensor | None) -> Tensor:
    """Where to start: z (N, D) of the images `start`, or 0."""
    if start is None:
        return torch.zeros_like(like).flatten(1)
    if not isinstance(start, Tensor) or start.shape != like.shape:
        given = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(f"start must be images of shape {tuple(like.shape)}, got {given}")
    return glow(start.detach().clone())[0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1, keepdim=True)


def _rms(a: Tensor) -> Tensor:
    return a.square().mean(dim=1, keepdim=True).sqrt().clamp_min(torch.finfo(a.dtype).tiny)


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
