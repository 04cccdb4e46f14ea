"""Reference rows where what is measured is not the image: total variation, of each channel or of all together, and the
smoothest image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkern.operators import Identity, Operator, least_variation, smooth, smoothest
from train.baselines import highest, score
from train.measurement import as_image, parts

STEPS = 600


class Smoothest:
    """The smoothest image that fits the measurement. Setting: how much smoothness weighs."""

    key, title = "smooth", "Smoothest image"
    protocol = (
        "min |A x - y|^2 + weight |D x|^2, D the differences of neighbouring pixels, by conjugate gradients; the "
        "weight at each sigma maximises the mean PSNR on 16 validation images at most"
    )
    weights = (1e-4, 10)
    solve = staticmethod(smoothest)

    def tune(self, clean: Tensor, y: Tensor, sigma: float, operator: Operator | None = None) -> float:
        (y, options), *_ = parts(y, operator, 16)
        return highest(lambda weight: score(self(y, sigma, weight, **options), clean[:16]), *self.weights)

    @torch.no_grad()
    def __call__(self, y: Tensor, sigma: float, setting: float, operator: Operator | None = None) -> Tensor:
        return self.solve(Identity() if operator is None else operator, y, setting)


class LeastVariation(Smoothest):
    """The image of least vectorial total variation that fits the measurement. Setting: its weight."""

    key, title = "vtv", "Vectorial total variation"
    protocol = (
        "min |A x - y|^2 / 2 + weight TV(x), isotropic, of all channels together, by lagged diffusivity, "
        f"{smooth.ROUNDS} rounds of {smooth.ROUND_ITERATIONS} iterations from the smoothest image; the weight at each "
        "sigma maximises the mean PSNR on 16 validation images at most"
    )
    weights = (1e-4, 1)
    solve = staticmethod(least_variation)


class MeasuredTotalVariation:
    """Total variation of each channel by itself, under a measurement. Setting: its weight. tuning_images: at most."""

    key, title = "tv", "Total variation"

    def __init__(self, steps: int = STEPS, tuning_images: int = 16):
        self.steps, self.tuning_images = steps, tuning_images
        self.protocol = (
            f"min |A x - y|^2 / 2 + weight TV(x), isotropic, per channel, {steps} steps of Condat and Vu's primal-dual "
            f"iteration, what is not measured grey at first; the weight at each sigma maximises the mean PSNR on "
            f"{tuning_images} validation images at most"
        )

    def tune(self, clean: Tensor, y: Tensor, sigma: float, operator: Operator) -> float:
        (y, options), *_ = parts(y, operator, self.tuning_images)
        clean = clean[: self.tuning_images]
        return highest(lambda weight: score(self(y, sigma, weight, **options), clean), 1e-4, 1)

    def __call__(self, y: Tensor, sigma: float, setting: float, operator: Operator) -> Tensor:
        return total_variation(operator, y, setting, self.steps)


@torch.no_grad()
def total_variation(operator: Operator, y: Tensor, weight: float, steps: int = STEPS) -> Tensor:
    """The images (N, C, H, W) that minimise `|A x - y|^2 / 2 + weight TV(x)`, TV isotropic and per channel, after so
    many steps of the primal-dual iteration of Condat (J. Optim. Theory Appl. 158, 2013, algorithm 3.1 with rho = 1),
    which asks of A no more than `forward`, `adjoint` and its norm.
    """
    grey = torch.full_like(as_image(y, operator), 0.5)
    x = grey + as_image(y - operator.forward(grey), operator)
    lipschitz = operator.norm(x.shape[1:]) ** 2
    # It converges if 1 / step - 8 dual_step >= L / 2, where 8 bounds the squared norm of the differences. Of such dual
    # steps this one gets closest in so few steps: to 1e-3 of the lowest objective, for a hole to 4e-3.
    dual_step = lipschitz / 64
    step = 1 / (lipschitz / 2 + 8 * dual_step)
    u = x.new_zeros(2, *x.shape)
    for _ in range(steps):
        gradient = operator.adjoint(operator.forward(x) - y)
        new = x - step * (gradient + differences_adjoint(u))
        u = u + dual_step * differences(2 * new - x)
        u = u / (u.square().sum(0).sqrt() / weight).clamp_min(1)
        x = new
    return x


def differences(x: Tensor) -> Tensor:
    """Forward differences down and across (2, N, C, H, W), 0 at the border."""
    return torch.stack([F.pad(x.diff(dim=-2), (0, 0, 0, 1)), F.pad(x.diff(dim=-1), (0, 1))])


def differences_adjoint(u: Tensor) -> Tensor:
    """The transpose of `differences`: (2, N, C, H, W) -> (N, C, H, W)."""
    down, across = u[0, ..., :-1, :], u[1, ..., :-1]
    return F.pad(down, (0, 0, 1, 0)) - F.pad(down, (0, 0, 0, 1)) + F.pad(across, (1, 0)) - F.pad(across, (0, 1))
