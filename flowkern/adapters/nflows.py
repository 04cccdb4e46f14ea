"""nflows: a Glow as a transform (images to latents, nflows' direction) or as a distribution of images.

    flow = nflows.flows.Flow(Transform(glow), nflows.distributions.StandardNormal([C * H * W]))
"""

import torch
from nflows import distributions, transforms
from nflows.utils import torchutils
from torch import Tensor

from flowkern.glow import Glow


class Transform(transforms.Transform):
    """Images (N, C, H, W) to latents (N, C*H*W)."""

    def __init__(self, glow: Glow):
        super().__init__()
        self.glow = glow

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.glow(inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.glow.inverse(inputs, return_logdet=True, context=context)


class Distribution(distributions.Distribution):
    """The Glow's distribution of images; samples have its temperature 1."""

    def __init__(self, glow: Glow):
        super().__init__()
        self.glow = glow

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        return self.glow.log_prob(inputs, context)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        rows = None if context is None else torchutils.repeat_rows(context, num_samples)
        n = num_samples if rows is None else len(rows)
        with torch.no_grad():
            x = self.glow.sample(n, temperature=1.0, context=rows)
        return x if rows is None else torchutils.split_leading_dim(x, [-1, num_samples])
