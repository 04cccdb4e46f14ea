"""The Gaussian by which a level's emission is standardised, so that latents are N(0, I) and the map is a bijection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prior(nn.Module):
    """z = (x - mean) exp(-log_std) for an emission x (N, C, H, W), with (mean, log_std) the sum of what is asked for:

    learned: Glow's zero-initialised 3x3 convolution of the half that stays (`kept` channels; with 0 only its bias is
    left, which is Glow's learned prior of the last level), times exp(3 logs). edge: how that convolution sees the
    border, as in `flowkern.variants.Variant`. map_size: constants, (1, 1) per channel or (H, W) per pixel.
    classes: a linear function of a context vector (N, classes), of the map's size.
    """

    def __init__(
        self,
        channels: int,
        kept: int = 0,
        learned: bool = False,
        edge: str | None = None,
        map_size: tuple[int, int] | None = None,
        classes: int = 0,
    ):
        super().__init__()
        self.learned = learned
        self.tied_edge = learned and edge == "ones" and kept > 0
        self.weight = self.bias = self.logs = self.edge = self.map = self.classes = None
        if learned:
            if kept:
                self.weight = nn.Parameter(torch.zeros(2 * channels, kept, 3, 3))
            self.bias = nn.Parameter(torch.zeros(2 * channels))
            self.logs = nn.Parameter(torch.zeros(2 * channels))
            if edge and not self.tied_edge:
                self.edge = nn.Parameter(torch.zeros(2 * channels, 1, 3, 3))
        if map_size:
            self.map = nn.Parameter(torch.zeros(2 * channels, *map_size))
        if classes:
            self.classes = nn.Parameter(torch.zeros(classes, 2 * channels, *(map_size or (1, 1))))

    @property
    def is_standard(self) -> bool:
        """Whether nothing was asked for: the emission is the latent."""
        return self.bias is self.map is self.classes is None

    def forward(self, x: Tensor, kept: Tensor | None = None, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Emission to latent: z (N, C, H, W) and log|det| (N,)."""
        if self.is_standard:
            return x, x.new_zeros(x.shape[0])
        mean, log_std = self.moments(x, kept, context)
        return (x - mean) * torch.exp(-log_std), -log_std.expand_as(x).sum(dim=(1, 2, 3))

    def inverse(self, z: Tensor, kept: Tensor | None = None, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to emission: x (N, C, H, W) and log|det| (N,) of this direction."""
        if self.is_standard:
            return z, z.new_zeros(z.shape[0])
        mean, log_std = self.moments(z, kept, context)
        return z * torch.exp(log_std) + mean, log_std.expand_as(z).sum(dim=(1, 2, 3))

    def moments(self, like: Tensor, kept: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, each of a shape that broadcasts to (N, C, H, W). Of the state's precision:
        autocast is for coupling networks alone.
        """
        with torch.autocast(like.device.type, enabled=False):
            return self._moments(like, kept, context)

    def _moments(self, like: Tensor, kept: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        h = 0
        if self.learned:
            h = self.bias[None, :, None, None]
            if self.weight is not None:
                h = F.conv2d(kept, self.weight, self.bias, padding=1)
            edge = self.weight.sum(dim=1, keepdim=True) if self.tied_edge else self.edge
            if edge is not None:
                h = h + edge_term(edge, *like.shape[2:])
            h = h * torch.exp(3 * self.logs)[None, :, None, None]
        if self.map is not None:
            self._check_map(like)
            h = h + self.map[None]
        if self.classes is not None:
            h = h + torch.einsum("nk,kchw->nchw", context.to(self.classes.dtype), self.classes)
        return h.chunk(2, dim=1)

    def _check_map(self, like: Tensor) -> None:
        size = tuple(self.map.shape[1:])
        if size not in ((1, 1), tuple(like.shape[2:])):
            raise ValueError(
                f"this Glow's prior has constants for every pixel of a level of {size[0]}x{size[1]}, and the images "
                f"make it {like.shape[2]}x{like.shape[3]}; only images of the construction's size fit it"
            )


def edge_term(weight: Tensor, height: int, width: int) -> Tensor:
    """What a 3x3 convolution gets from a channel that is 1 in the padding and 0 inside.

    weight (C, 1, 3, 3) -> (1, C, H, W), zero except at the border.
    """
    inside = weight.new_zeros(1, 1, height, width)
    return F.conv2d(F.pad(inside, (1, 1, 1, 1), value=1.0), weight)
