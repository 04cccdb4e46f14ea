"""Networks and measurements for the tests of `Unfolded`: small, in fp64, away from where they start."""

import torch
from torch import nn

import flowkern
from flowkern.operators import (
    Blur,
    Compose,
    Downsample,
    Identity,
    Inpainting,
    RandomProjection,
    gaussian_kernel,
)


def make_glow(size=(3, 8, 8), depth=2, seed=0, dtype=torch.float64, **options):
    """A Glow away from its initialisation, where every layer does something."""
    torch.manual_seed(seed)
    glow = flowkern.Glow(size, levels=2, depth=depth, hidden=8, shift=0.5, **options).to(dtype)
    glow.initialize(torch.rand(8, *size, dtype=dtype))
    with torch.no_grad():
        for parameter in glow.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return glow


def make_net(folds=3, dtype=torch.float64, **options):
    """Three different flows, step sizes and shrinkages."""
    glows = [make_glow(seed=k, dtype=dtype) for k in range(folds)]
    proxes = [flowkern.GlowProx(glow, lam=0.05 * (k + 1)) for k, glow in enumerate(glows)]
    net = flowkern.Unfolded(proxes, folds, **options).to(dtype)
    with torch.no_grad():
        steps = net.mu if net.raw_rho is None else net.raw_rho
        steps += torch.linspace(-0.1, 0.1, folds, dtype=dtype)
    return net


class Mask:
    """Keep every other pixel."""

    def forward(self, x):
        return x * (torch.arange(x.shape[-1]) % 2)

    adjoint = forward


class Bands:
    """A user's own, whose measurements (N, 11, 2) are no image: means of rows, and weighted means of channels."""

    weights = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)

    def forward(self, x):
        rows = x.mean(3).reshape(len(x), 12, 2)[:, :8]
        return torch.cat([rows, x.mean((2, 3))[:, :, None] * self.weights], 1)

    def adjoint(self, y):
        rows = torch.cat([y[:, :8], y.new_zeros(len(y), 4, 2)], 1).reshape(len(y), 3, 8, 1).expand(-1, -1, -1, 8)
        return rows / 8 + (y[:, 8:] * self.weights).sum(2)[:, :, None, None] / 64


def kernel(*shape):
    """Without symmetry, and of sum 1."""
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1
    return weights / weights.sum(dim=(-2, -1), keepdim=True)


def pixels(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6


# Each for two images (3, 8, 8).
MEASUREMENTS = {
    "identity": Identity,
    "mask": lambda: Inpainting(pixels(8, 8)),
    "mask of images": lambda: Inpainting(pixels(2, 3, 8, 8)),
    "blur": lambda: Blur(kernel(3, 3)),
    "blur of images": lambda: Blur(kernel(2, 3, 2)),
    "blur, learnt": lambda: Blur(nn.Parameter(kernel(3, 3))),
    "blur, reflect": lambda: Blur(kernel(3, 3), "reflect"),
    "downsample": lambda: Downsample(2),
    "downsample, kernel": lambda: Downsample(4, gaussian_kernel(2.0, 6)),
    "projection": lambda: RandomProjection((3, 8, 8), 0.3, seed=1),
    "composition": lambda: Compose(Inpainting(pixels(4, 4)), Downsample(2)),
    "own": Bands,
}
EXACT = [name for name in MEASUREMENTS if hasattr(MEASUREMENTS[name](), "normal_inverse")]


def measured(operator, n=2, dtype=torch.float64):
    return operator.forward(torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=dtype))
