"""normflows: a Glow as a flow (latents to images, normflows' direction) or as a base distribution of images.

    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(C * H * W, trainable=False), [Flow(glow)])
"""

import math

import torch
from normflows.distributions import BaseDistribution
from normflows.flows import Flow as _Flow
from torch import Tensor

from flowkern.glow import Glow


class Flow(_Flow):
    """Latents (N, C*H*W) to images (N, C, H, W)."""

    def __init__(self, glow: Glow):
        super().__init__()
        self.glow = glow

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.glow.inverse(z, return_logdet=True, context=context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.glow(z, context)


class Base(BaseDistribution):
    """The Glow's distribution of images. forward: images and their log-probabilities."""

    def __init__(self, glow: Glow):
        super().__init__()
        self.glow = glow

    def forward(self, num_samples: int = 1, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        like = next(self.glow.parameters())
        z = torch.randn(num_samples, math.prod(self.glow.size), dtype=like.dtype, device=like.device)
        x, logdet = self.glow.inverse(z, return_logdet=True, context=context)
        return x, -0.5 * (z.square().sum(dim=1) + z.shape[1] * math.log(2 * math.pi)) - logdet

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.glow.log_prob(z, context)
