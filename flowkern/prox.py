"""Proximal maps: the part of a fold that pulls the image towards what is likely (Wei et al., section 2.3).

A prox is a module that maps an image (N, C, H, W) to an image of the same shape. One that knows its most likely image
offers it as `mode(x)`; the unfolded network then starts there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkern import ops
from flowkern.glow import Glow


class GlowProx(nn.Module):
    """The proximal map of a flow prior: `g(f(x) / (1 + lambda))` (Wei et al., equations 8-10).

    glow: the flow, used as it is (`Unfolded` copies it for each fold). lam: where the learnt lambda starts, > 0;
    lambda = softplus(raw_lam) stays positive. In recompute mode only the latent and the result are kept for backward:
    the latent is what the flow's backward starts from and what the gradient of lambda needs, so keeping it costs
    nothing more and stops the drift between f and g.

    Raises TypeError when `glow` is no `flowkern.Glow`, ValueError when `lam` is not positive and finite.
    """

    def __init__(self, glow: Glow, lam: float = 0.05):
        super().__init__()
        if not isinstance(glow, Glow):
            raise TypeError(f"glow must be a flowkern.Glow, got {type(glow).__name__}")
        if not (isinstance(lam, int | float) and 0 < lam < math.inf):
            raise ValueError(f"lam must be a positive number, got {lam!r}")
        self.glow = glow
        self.raw_lam = nn.Parameter(torch.tensor(lam + math.log(-math.expm1(-lam))))  # softplus's inverse

    @property
    def lam(self) -> Tensor:
        """The shrinkage parameter lambda, a scalar tensor."""
        return F.softplus(self.raw_lam)

    @property
    def config(self) -> dict:
        """What a saved network needs to make this prox again, beside its weights."""
        return {"glow": self.glow.config}

    @classmethod
    def from_config(cls, config: dict, **options) -> "GlowProx":
        """The prox described by `config`, its weights still to be loaded. options: as in `Glow.from_pretrained`."""
        glow = dict(config["glow"])
        if glow.pop("network") != "standard":
            raise ValueError("a GlowProx whose Glow has its own coupling network can't be made from its configuration")
        return cls(Glow(**glow, **options))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W)."""
        z, _ = self.glow(x)
        return self.glow.inverse(ops.shrink(z, self.lam, self.glow.backend), x.shape[2:])

    def mode(self, x: Tensor) -> Tensor:
        """The image of the latent mode, g(0), (1, C, H, W) of the size of x (N, C, H, W); differentiable."""
        return self.glow.inverse(x.new_zeros(1, math.prod(x.shape[1:])), x.shape[2:])


PROXES = {prox.__name__: prox for prox in (GlowProx,)}
