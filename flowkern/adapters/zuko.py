"""zuko: a Glow as a lazy transform (images to latents, zuko's direction) or as a lazy base distribution of images.

    flow = zuko.flows.Flow([LazyGlow(glow)], zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, ...))
"""

import zuko
from torch import Tensor

from flowkern.distributions import GlowDistribution, GlowTransform
from flowkern.glow import Glow


class LazyGlow(zuko.lazy.LazyTransform):
    """The transform from images (..., C, H, W) to latents (..., C*H*W); c is the Glow's context."""

    def __init__(self, glow: Glow):
        super().__init__()
        self.glow = glow

    def forward(self, c: Tensor | None = None):
        return GlowTransform(self.glow, c).inv


class LazyGlowDistribution(zuko.lazy.LazyDistribution):
    """The Glow's distribution of images; c is its context."""

    def __init__(self, glow: Glow):
        super().__init__()
        self.glow = glow

    def forward(self, c: Tensor | None = None):
        return GlowDistribution(self.glow, c)
