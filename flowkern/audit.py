"""How exact a Glow is on a batch: invertibility, conditioning, and the error of the gradient that recomputation gives.

Recomputing activations by inversion is exact in exact arithmetic; in floating point it drifts, by how much depends on
the weights (Behrmann et al. 2021, arXiv:2006.09347). So it is measured: against a copy in double precision, and beside
the same model with nothing recomputed, whose error is that of the precision alone.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkern import ops, reference
from flowkern.backend import use_backend
from flowkern.glow import Glow
from flowkern.layers import run_steps
from flowkern.mix import compose
from flowkern.replay import evaluating

# Beyond these a level is worth a word. A gradient off by 1 % is still far below the noise of a minibatch.
DRIFT_LIMIT = 1e-2
GRADIENT_LIMIT = 1e-2

# A grey level: what is nothing but zeros, as a black image is, has no size that an error could be compared with.
LEAST_SIZE = 1 / 256


@dataclass(frozen=True)
class LevelAudit:
    """One level, counted from 1 at the image's side. Errors are inf where something was not finite.

    reconstruction: largest deviation of inverse(forward(x)) from the level's input x, over the root mean square of x,
        or over LEAST_SIZE if that is larger.
    smallest_scale: the smallest coupling scale s that occurred (1 for additive couplings).
    condition: largest cond(M) of the level's channel mixes, in the 2-norm.
    gradient, stored_gradient: |g - g64| / |g64| over the level's parameters, g recomputed by inversion or not.
    """

    level: int
    steps: int
    channels: int
    reconstruction: float
    smallest_scale: float
    condition: float
    gradient: float
    stored_gradient: float


@dataclass(frozen=True)
class Audit:
    """`levels`, and over the whole model: the largest error of inverse(forward(x)) in the image's units, gradients."""

    levels: tuple[LevelAudit, ...]
    reconstruction: float
    gradient: float
    stored_gradient: float

    @property
    def concerns(self) -> list[str]:
        """One sentence for each level that drifts beyond DRIFT_LIMIT, or whose recomputed gradient is off by more than
        GRADIENT_LIMIT and twice the stored one's error; empty when all is well."""
        sentences = []
        for level in self.levels:
            if level.gradient > max(2 * level.stored_gradient, GRADIENT_LIMIT):
                sentences.append(
                    f"level {level.level}: the recomputed gradient is off by {level.gradient:.1e}, the stored one by "
                    f"{level.stored_gradient:.1e}; train with anchor_every or memory='checkpoint'")
            elif level.reconstruction > DRIFT_LIMIT:
                sentences.append(f"level {level.level}: inverse(forward(x)) is off by {level.reconstruction:.1e} of x")
        return sentences


def audit(glow: Glow, x: Tensor) -> Audit:
    """Measure a Glow on a batch x (N, C, H, W), in its own precision, backend and anchors; the Glow is left as it is.

    What is measured is the Glow in evaluation mode. The gradients are those of the mean negative log-likelihood. Takes
    three backward passes (one in double precision) and the memory of `memory="checkpoint"`. Raises ValueError for an
    empty batch, wrong images, an uninitialised Glow.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _audit(glow, _check(glow, x).clone())


def _audit(glow: Glow, x: Tensor) -> Audit:
    own = copy.deepcopy(glow).eval().requires_grad_(True)
    own.check_finite = False    # what overflows on the way is a finding
    with torch.no_grad():
        back = own.inverse(own(x)[0], size=x.shape[2:])
    own.memory = "recompute"
    recomputed = _gradients(own, x)
    own.memory_budget, own.memory = None, "checkpoint"
    stored = _gradients(own, x)
    with evaluating(glow):
        states = [(level, x, _drift(glow, level, x), _smallest_scale(level.steps, x, glow.backend))
                  for level, x in _states(glow, x)]
    own.compute_dtype, own.backend = None, "auto"   # not every backend computes in double precision
    with use_backend("auto"):
        exact = _gradients(own.double(), x.double())
    levels = []
    for i, (level, state, off, smallest) in enumerate(states):
        levels.append(LevelAudit(
            level=i + 1, steps=len(level.steps), channels=state.shape[1], reconstruction=off,
            smallest_scale=smallest, condition=_condition(level.steps, glow.backend),
            gradient=_error(recomputed[i], exact[i]), stored_gradient=_error(stored[i], exact[i])))
    return Audit(tuple(levels), _finite((back - x).abs().amax()),
                 _error(sum(recomputed, []), sum(exact, [])), _error(sum(stored, []), sum(exact, [])))


@torch.no_grad()
def drift(glow: Glow, x: Tensor) -> list[float]:
    """`LevelAudit.reconstruction` of each level alone: one forward and one inverse pass, cheap enough for training.

    x (N, C, H, W). What a level rebuilds in backward drifts by this much when `anchor_every` is None.
    """
    x = _check(glow, x)
    with evaluating(glow):
        return [_drift(glow, level, state) for level, state in _states(glow, x)]


def smooth_fields(n: int, size: tuple[int, int, int], seed: int = 0) -> Tensor:
    """n images (n, C, H, W) in [0, 1]: random fields smooth over several scales, the same for the same seed."""
    c, h, w = size
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, c, h, w)
    for cells in (4, 16, 64):
        noise = torch.rand(n, c, cells, cells, generator=generator)
        x += F.interpolate(noise, (h, w), mode="bilinear", align_corners=False) / cells
    return x * (64 / 21)    # the sum of the weights is 1/4 + 1/16 + 1/64 = 21/64


def _check(glow: Glow, x: Tensor) -> Tensor:
    if not glow.is_initialized:
        raise ValueError("this Glow is not initialised, so there is nothing to measure; call glow.initialize(x) first")
    if glow.context_channels:
        raise ValueError("audit and drift measure unconditioned Glows; this one has context_channels")
    x = glow._check_image(x)
    if x.shape[0] == 0:
        raise ValueError(f"expected at least one image, got a batch of shape {tuple(x.shape)}")
    return x


@torch.no_grad()
def _states(glow: Glow, x: Tensor) -> Iterator[tuple]:
    """Each level with the state that enters its steps."""
    x = x - glow.shift
    for level in glow.levels:
        x = level.squeeze(x)
        yield level, x
        x, _ = run_steps(level.steps, x, **glow._options())
        if level.split is not None:
            x = level.split(x)[0]


def _drift(glow: Glow, level, x: Tensor) -> float:
    y, _ = run_steps(level.steps, x, **glow._options())
    back, _ = run_steps(level.steps, y, reverse=True, **glow._options())
    return _finite((back - x).abs().amax() / x.square().mean().sqrt().clamp_min(LEAST_SIZE))


@torch.no_grad()
def _smallest_scale(steps, x: Tensor, backend: str) -> float:
    smallest = 0.0      # of log s
    matrix, offset, _, _ = compose(steps, backend)
    for k, step in enumerate(steps):
        coupling = step.coupling
        x = ops.channel_mix(x, matrix[k], offset[k], backend=backend)
        h = coupling.net(x[:, : x.shape[1] // 2])
        if coupling.scale != "additive":
            log_s = reference.log_scale(h.chunk(2, dim=1)[0], coupling.scale, coupling.alpha).amin().item()
            smallest = log_s if k == 0 else min(smallest, log_s)
        x, _ = ops.couple(x, h, coupling.scale, coupling.alpha, backend=backend)
    return math.exp(smallest)


@torch.no_grad()
def _condition(steps, backend: str) -> float:
    return _finite(torch.linalg.cond(compose(steps, backend)[0].double()).amax())


def _gradients(glow: Glow, x: Tensor) -> list[list[Tensor]]:
    """Of the mean negative log-likelihood, per level."""
    parameters = [list(level.parameters()) for level in glow.levels]
    every = [p for level in parameters for p in level]
    found = torch.autograd.grad(-glow.log_prob(x).mean(), every, allow_unused=True)
    found = (torch.zeros_like(p) if g is None else g for g, p in zip(found, every, strict=True))
    return [[next(found) for _ in level] for level in parameters]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Norm of the difference over the norm of what is exact."""
    wrong = sum((a.double() - b).square().sum() for a, b in zip(found, exact, strict=True))
    right = sum(b.square().sum() for b in exact)
    return _finite((wrong / right.clamp_min(torch.finfo(right.dtype).tiny)).sqrt())


def _finite(error: Tensor) -> float:
    return error.item() if bool(torch.isfinite(error)) else math.inf
