"""Parameters of composed mixes, and the judgement of a backend's results: one rounding of fp64 ones."""

import torch

SIZES = [(1, 1), (3, 2), (2, 12), (2, 31), (1, 33), (2, 48), (1, 96), (1, 97), (1, 192)]


def parameters(steps, channels, dtype):
    """Stacked parameters of steps whose L and U are well conditioned, noise in the halves that don't count."""
    generator = torch.Generator().manual_seed(channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lower, upper = (0.5 * normal(steps, channels, channels) / channels**0.5 for _ in range(2))
    sign = torch.where(normal(steps, channels) > 0, 1, -1).to(dtype)
    permutation = torch.stack([torch.randperm(channels, generator=generator) for _ in range(steps)])
    vectors = (0.3 * normal(steps, channels) for _ in range(3))
    return lower, upper, *vectors, sign, permutation


def cotangents(steps, channels, dtype):
    generator = torch.Generator().manual_seed(channels + 1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in [(steps, channels, channels), (steps, channels), ()]]


def within_rounding(got, expected, channels):
    """fp32 results come from fp64 and are rounded once; in fp64 sums are taken in another order."""
    terms = 1 if got.dtype == torch.float32 else channels
    return (got - expected).abs().max() <= 2 * torch.finfo(got.dtype).eps * terms * max(1, expected.abs().max())
