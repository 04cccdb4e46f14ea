"""Proximal maps: the part of a fold that pulls the image towards what is likely (Wei et al., section 2.3).

A prox is a module that maps an image (N, C, H, W) to an image of the same shape. One that knows its most likely image
offers it as `mode(x)`; the unfolded network then starts there. One that wants heights and widths divisible by a number
says so with `multiple`. `GlowProx` is the paper's; the other two are the networks that it is compared with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkern import ops, shrinkage
from flowkern.checks import per_image, positive_int
from flowkern.glow import Glow, standard_log_prob


class GlowProx(nn.Module):
    """The proximal map of a flow prior: `g(f(x) / (1 + lambda))` (Wei et al., equations 8-10).

    glow: the flow, used as it is (`Unfolded` copies it for each fold). lam: where the learnt lambda starts, > 0;
    lambda = softplus(raw_lam) stays positive. In recompute mode only the result is kept for backward, which rebuilds
    the latent and then the levels of f from it (`flowkern.shrinkage`); so the drift of g is added to that of f. A Glow
    with anchors, a budget, learned priors, networks of its own, or another memory mode keeps also the latent and each
    level's output, where drift starts anew. A `memory_budget` of the Glow is for each of f and g alone: both keep
    activations at the same time, and so do all folds.

    Raises TypeError when `glow` is no `flowkern.Glow`, ValueError for a conditioned one and when `lam` is not positive
    and finite.
    """

    def __init__(self, glow: Glow, lam: float = 0.05):
        super().__init__()
        if not isinstance(glow, Glow):
            raise TypeError(f"glow must be a flowkern.Glow, got {type(glow).__name__}")
        if not (isinstance(lam, int | float) and 0 < lam < math.inf):
            raise ValueError(f"lam must be a positive number, got {lam!r}")
        if glow.context_channels:
            raise ValueError("GlowProx wants an unconditioned Glow; this one has context_channels")
        self.glow = glow
        like = next(glow.parameters())
        self.raw_lam = nn.Parameter(torch.tensor(inverse_softplus(lam), dtype=like.dtype, device=like.device))

    @property
    def lam(self) -> Tensor:
        """The shrinkage parameter lambda, a scalar tensor."""
        return F.softplus(self.raw_lam)

    @property
    def multiple(self) -> int:
        """Heights and widths must be divisible by this."""
        return 2**self.glow.levels_count

    @property
    def config(self) -> dict | None:
        """What a saved network needs to make this prox again, beside its weights; None where the Glow's coupling
        networks are the user's own.
        """
        return {"glow": self.glow.config} if self.glow.config["network"] == "standard" else None

    @classmethod
    def from_config(cls, config: dict) -> "GlowProx":
        """The prox described by `config`, its weights still to be loaded."""
        glow = dict(config["glow"])
        if glow.pop("network") != "standard":
            raise ValueError("a GlowProx whose Glow has its own coupling network can't be made from its configuration")
        return cls(Glow(**glow))

    def set_options(self, **options) -> None:
        """Set how the Glow runs, see `Glow.set_options`."""
        self.glow.set_options(**options)

    def forward(self, x: Tensor, scale: float | Tensor | None = None, return_log_prob: bool = False):
        """x (N, C, H, W) -> (N, C, H, W). scale: a factor of lambda, >= 0: a number or a tensor of one, or one an image
        (N,). return_log_prob: return log p(x) (N,) in nats under the flow as well, which f has found on the way.

        Raises ValueError for an invalid scale, and what the Glow raises for invalid images.
        """
        lam = self.lam
        if scale is not None:
            scale = per_image(scale, "scale", len(x))
            lam = lam * (scale.to(lam) if isinstance(scale, Tensor) else scale)
        if shrinkage.is_reversible(self.glow):
            x, log_prob = shrinkage.shrunk(self.glow, self.glow.ready(x), lam)
            return (x, log_prob) if return_log_prob else x
        z, logdet = self.glow(x)
        log_prob = standard_log_prob(z, logdet) if return_log_prob else None
        # The op and its kernels know one lambda for all; this keeps the same for backward, the latent.
        z = z / (1 + lam[:, None]) if lam.ndim else ops.shrink(z, lam, self.glow.backend)
        x = self.glow.inverse(z, x.shape[2:])
        return (x, log_prob) if return_log_prob else x

    def mode(self, x: Tensor) -> Tensor:
        """The image of the latent mode, g(0), (1, C, H, W) of the size of x (N, C, H, W); differentiable. In training
        mode x initialises the ActNorms that are not yet. Raises for what the Glow does not take as images.
        """
        x = self.glow.ready(x)  # initialised later, under the graph of this image, they would spoil it
        return self.glow.inverse(x.new_zeros(1, math.prod(x.shape[1:])), x.shape[2:])


def inverse_softplus(value: float) -> float:
    """The number whose softplus is `value` > 0."""
    return value + math.log(-math.expm1(-value))


class _NetworkProx(nn.Module):
    """A prox that is one convolutional network: it checks its input and describes itself by its arguments."""

    multiple = 1
    smallest = 1

    def __init__(self, channels: int, **sizes: int):
        super().__init__()
        self.config = {"channels": channels, **sizes}
        for name, value in self.config.items():
            positive_int(value, name)

    @classmethod
    def from_config(cls, config: dict):
        """The prox described by `config`, its weights still to be loaded."""
        return cls(**config)

    def set_options(self, **options) -> None:
        """Raises TypeError for any option: there are none."""
        if options:
            raise TypeError(f"{type(self).__name__} has no options, got {', '.join(map(repr, options))}")

    def check(self, x: Tensor) -> None:
        """Raise ValueError for what the network can't take."""
        channels, side = self.config["channels"], self.smallest
        if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < side:
            raise ValueError(
                f"expected images of shape (N, {channels}, H, W) with H and W at least {side}, got {tuple(x.shape)}"
            )


class ResNetProx(_NetworkProx):
    """The residual network of Mardani et al. 2018 (arXiv:1806.03963) as a prox.

    channels: of the images. `blocks` residual blocks of two 3x3 convolutions with `features` maps, batch norm and ReLU,
    then three 1x1 convolutions, the first two with ReLU. Images of any size, (N, channels, H, W) -> the same shape.
    """

    def __init__(self, channels: int, features: int = 128, blocks: int = 2):
        super().__init__(channels, features=features, blocks=blocks)
        widths = [channels, *[features] * blocks]
        self.blocks = nn.ModuleList(_Residual(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Sequential(
            nn.Conv2d(features, features, 1),
            nn.ReLU(),
            nn.Conv2d(features, features, 1),
            nn.ReLU(),
            nn.Conv2d(features, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W)."""
        self.check(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class _Residual(nn.Module):
    """ReLU(x + norm(conv(ReLU(norm(conv(x)))))), with x through a 1x1 convolution where the number of maps changes."""

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.skip = nn.Identity() if channels == features else nn.Conv2d(channels, features, 1, bias=False)
        self.first = nn.Conv2d(channels, features, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.second = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.first(x)))
        return F.relu(self.skip(x) + self.norm2(self.second(hidden)))


class UNetProx(_NetworkProx):
    """The U-Net of Ronneberger et al. 2015 (arXiv:1505.04597) as a prox, padded so that the size stays.

    channels: of the images. width: maps at full resolution, doubled at each of the four poolings (64-128-256-512-1024).
    Two 3x3 convolutions with batch norm and ReLU at each scale, max-pooling down, transposed convolutions up. Images of
    any size from 16x16, (N, channels, H, W) -> the same shape.
    """

    POOLINGS = 4
    smallest = 2**POOLINGS

    def __init__(self, channels: int, width: int = 64):
        super().__init__(channels, width=width)
        widths = [width * 2**i for i in range(self.POOLINGS + 1)]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([channels, *widths[:-1]], widths, strict=True))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.merge = nn.ModuleList(_double(a, b) for a, b in pairs)
        self.head = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W)."""
        self.check(x)
        kept = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            skip, x = kept.pop(), up(x)
            # Pooling rounds odd sizes down.
            x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            x = merge(torch.cat([skip, x], dim=1))
        return self.head(x)


def _double(channels: int, features: int) -> nn.Sequential:
    """Twice 3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, features, 3, padding=1, bias=False),
        nn.BatchNorm2d(features),
        nn.ReLU(),
        nn.Conv2d(features, features, 3, padding=1, bias=False),
        nn.BatchNorm2d(features),
        nn.ReLU(),
    )


PROXES = {prox.__name__: prox for prox in (GlowProx, ResNetProx, UNetProx)}
