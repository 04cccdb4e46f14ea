"""How strong noise is: which networks are told, and what a picture alone tells of it."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

ROOT = math.sqrt(3)
# Daubechies' high-pass filter with two vanishing moments, of norm 1: it takes no notice of slopes.
HIGH_PASS = [(1 - ROOT) / 32**0.5, (ROOT - 3) / 32**0.5, (3 + ROOT) / 32**0.5, -(1 + ROOT) / 32**0.5]
# The median of |n| for a standard normal n.
MEDIAN = 0.6744897501960817
SMALLEST = len(HIGH_PASS)
ROUNDING = 1e-6


def is_told(net: nn.Module) -> bool:
    """Whether a network wants to know the noise level: an `Unfolded` made with noise_aware=True."""
    return getattr(net, "noise_aware", False)


def told(net: nn.Module, sigma: float | Tensor) -> dict:
    """What a network is told of the noise level, by name, if it wants to know."""
    return {"sigma": sigma} if is_told(net) else {}


def estimate(image: Tensor) -> float:
    """The standard deviation of white Gaussian noise in an image (C, H, W), in its units; the mean over its channels.

    The median of the finest diagonal wavelet coefficients, where most of a photograph is smooth (Donoho and Johnstone,
    "Ideal spatial adaptation by wavelet shrinkage", 1994, section 6.1.1). Coefficients of 0, as in saturated areas, do
    not count. A picture full of fine texture seems noisier than it is.

    Raises ValueError for an image smaller than 4x4.
    """
    if min(image.shape[1:]) < SMALLEST:
        raise ValueError(f"the noise of a picture smaller than {SMALLEST}x{SMALLEST} can't be estimated")
    line = image.new_tensor(HIGH_PASS)
    found = []
    for channel in image:
        details = F.conv2d(channel[None, None], line.outer(line)[None, None], stride=2).abs()
        details = details[details > ROUNDING * channel.abs().max()]
        found.append(details.median().item() / MEDIAN if len(details) else 0.0)
    return sum(found) / len(found)
