"""The methods that a trained network is compared with, all called the same way: denoisers, and MAP for any operator.

Images are (N, 3, H, W) float32. Noisy ones are clean pixels in [0, 1] plus white Gaussian noise of standard deviation
`sigma` on that scale, not clipped; nor are the estimates. What a baseline can be tuned by, one number, is tuned for the
highest mean PSNR (dB) after clipping, on images that are not the test's.
"""

import copy
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torch import Tensor

from flowkern import Glow
from flowkern.map import map_estimate
from flowkern.operators import Operator
from train.measurement import parts
from train.stages import psnr


class Baseline(Protocol):
    """A row of the table. `protocol` is the sentence that is printed below it."""

    key: str
    title: str
    protocol: str

    def tune(self, clean: Tensor, noisy: Tensor, sigma: float) -> float | None:
        """The setting for this sigma from validation images (N, 3, H, W); None where there is nothing to set."""

    def __call__(self, noisy: Tensor, sigma: float, setting: float | None) -> Tensor:
        """The estimate (N, 3, H, W) of the clean images."""


class TotalVariation:
    """Chambolle's total variation, of each channel by itself. Setting: its weight."""

    key, title = "tv", "Total variation"
    protocol = (
        "skimage.restoration.denoise_tv_chambolle per channel, defaults but the weight, which at each sigma maximises "
        "the mean PSNR on validation images"
    )

    def tune(self, clean: Tensor, noisy: Tensor, sigma: float) -> float:
        return highest(lambda weight: score(self(noisy, sigma, weight), clean), 0.02, 2)

    def __call__(self, noisy: Tensor, sigma: float, setting: float) -> Tensor:
        return _each(noisy, lambda image: denoise_tv_chambolle(image, weight=setting, channel_axis=-1))


class NonLocalMeans:
    """Non-local means in colour, told sigma. Setting: the filter strength h, on [0, 1] pixels."""

    key, title = "nlm", "Non-local means"
    protocol = (
        "skimage.restoration.denoise_nl_means in colour, patches of 5 within 6 pixels, told sigma, fast mode; h at "
        "each sigma maximises the mean PSNR on validation images"
    )

    def tune(self, clean: Tensor, noisy: Tensor, sigma: float) -> float:
        return highest(lambda h: score(self(noisy, sigma, h), clean), 0.1 * sigma, 2 * sigma)

    def __call__(self, noisy: Tensor, sigma: float, setting: float) -> Tensor:
        options = {"patch_size": 5, "patch_distance": 6, "fast_mode": True, "channel_axis": -1}
        return _each(noisy, lambda image: denoise_nl_means(image, h=setting, sigma=sigma, **options))


class BM3D:
    """BM3D in colour by the package of its authors (PyPI `bm3d`), told sigma; nothing is tuned.

    That package is for non-commercial use only and no dependency of this one: who wants the row installs it. Its
    variances for a 3D transform cost a second or two an image, however small it is. Raises ImportError without it.
    """

    key, title = "bm3d", "BM3D"

    def __init__(self):
        import bm3d

        class OneThread(bm3d.BM3DProfile):
            num_threads = 1  # with more, the order of its sums differs from run to run

        self._denoise, self._profile = bm3d.bm3d_rgb, OneThread
        self.protocol = f"bm3d.bm3d_rgb {version('bm3d')}, its normal profile, told sigma (Mäkinen et al. 2020)"

    def tune(self, clean: Tensor, noisy: Tensor, sigma: float) -> None:
        return None

    def __call__(self, noisy: Tensor, sigma: float, setting: None = None) -> Tensor:
        return _each(noisy, lambda image: self._denoise(image.astype(np.float64), sigma, self._profile()))


class MapPrior:
    """MAP over the latent of a flow (`flowkern.map`), without training for the measurement. Setting: gamma.

    glow: on any device. gammas: what to choose from, in units of sigma^2. steps, lr: of `map_estimate`. These flows are
    not searched to the end: the number of steps is part of the method. tuning_images: at most so many are tuned on, as
    one estimate costs hundreds of passes. batch: images at once.
    """

    key, title = "map", "MAP over z"

    def __init__(
        self,
        glow: Glow,
        gammas: Sequence[float] = (0.3, 1, 3, 10),
        steps: int = 150,
        optimizer: str = "adam",
        lr: float = 0.1,
        tuning_images: int = 8,
        batch: int = 16,
    ):
        self.glow, self.gammas, self.tuning_images, self.batch = glow, tuple(gammas), tuning_images, batch
        self.options = {"steps": steps, "optimizer": optimizer, "lr": lr}
        self.protocol = (
            f"the prior's flow, min |A g(z) - y|^2 + gamma |z|^2 from z = 0 (Asim et al. 2020), {steps} steps of "
            f"{optimizer}, rate {lr}; gamma at each sigma is the best by mean PSNR on {tuning_images} validation "
            f"images at most, of {', '.join(f'{g:g}' for g in self.gammas)} sigma^2"
        )

    def tune(self, clean: Tensor, noisy: Tensor, sigma: float, operator: Operator | None = None) -> float:
        (noisy, options), *_ = parts(noisy, operator, self.tuning_images)
        clean = clean[: self.tuning_images]
        gammas = (g * sigma**2 for g in self.gammas)
        return max(gammas, key=lambda gamma: score(self(noisy, sigma, gamma, **options), clean))

    def __call__(self, noisy: Tensor, sigma: float, setting: float, operator: Operator | None = None) -> Tensor:
        device = next(self.glow.parameters()).device
        there = None if operator is None else copy.deepcopy(operator).to(device)
        batches = parts(noisy.to(device), there, self.batch)
        return torch.cat([map_estimate(self.glow, y, setting, **self.options, **own).to(noisy) for y, own in batches])


def bm3d_available() -> bool:
    """Whether BM3D can run here: the package is installed and its binary loads."""
    try:
        import bm3d  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def reference_denoiser() -> Baseline:
    """The strongest denoiser here that learns nothing: BM3D, or non-local means without it. Its title says which."""
    return BM3D() if bm3d_available() else NonLocalMeans()


def _each(images: Tensor, denoise: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Each image (3, H, W) by itself, as the (H, W, 3) that libraries of image processing want."""
    done = [torch.from_numpy(np.asarray(denoise(image.permute(1, 2, 0).numpy()))) for image in images.cpu()]
    return torch.stack(done).permute(0, 3, 1, 2).to(images)


def score(estimate: Tensor, clean: Tensor) -> float:
    return psnr(estimate.clamp(0, 1), clean).mean().item()


def highest(scored: Callable[[float], float], low: float, high: float) -> float:
    """The best of [low, high] among 13 points evenly spaced in the logarithm and those of a search around the best one.

    A search alone would end on a bump: Chambolle's iteration stops by a rule that makes the score of a weight jump.
    """
    tried = {}

    def loss(log_setting: float) -> float:
        setting = math.exp(log_setting)
        tried[setting] = scored(setting)
        return -tried[setting]

    grid = np.linspace(math.log(low), math.log(high), 13)
    best = int(np.argmin([loss(x) for x in grid]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 0.05})
    return max(tried, key=tried.get)
