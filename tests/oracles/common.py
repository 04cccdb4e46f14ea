"""Random weights, and the formulas on which all implementations agree."""

import math

import torch


class Draw:
    """Random tensors in double precision."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, std=1.0, mean=0.0):
        return mean + std * torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def sign(self, *shape):
        return torch.randint(0, 2, shape, generator=self.generator).double() * 2 - 1

    def permutation(self, n):
        return torch.randperm(n, generator=self.generator)

    def matrix(self, n):
        """Invertible, neither orthogonal nor badly conditioned."""
        near_one = torch.eye(n, dtype=torch.float64) + self.normal(n, n, std=0.1 / n**0.5)
        return torch.linalg.qr(self.normal(n, n))[0] @ near_one

    def convolution(self, out, channels, size, gain=0.5):
        return self.normal(out, channels, size, size, std=gain / (channels * size * size) ** 0.5)


def space_to_depth(x):
    """Channel 4c + 2i + j of the result is pixel (2y + i, 2x + j) of channel c."""
    n, c, h, w = x.shape
    parts = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(parts, dim=2).reshape(n, 4 * c, h // 2, w // 2)


def gaussian(x, mean=0.0, log_std=0.0):
    """Log density of independent normals, summed over all but the first dimension."""
    log_std = torch.as_tensor(log_std, dtype=x.dtype)
    each = -0.5 * math.log(2 * math.pi) - log_std - 0.5 * (x - mean) ** 2 * torch.exp(-2 * log_std)
    return each.flatten(1).sum(dim=1)


def pixelwise(x, matrix):
    """The matrix times the channels of each pixel."""
    return torch.einsum("oc,nchw->nohw", matrix, x)


def pixels(x):
    return x.shape[2] * x.shape[3]
