"""What every rival Glow offers, and how its parameters are compared with those of the Glow that it copies."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import flowkern
from flowkern import reference


class Rival(nn.Module):
    """`forward(x)` -> (latent, logdet) and `inverse(latent)` -> x, differentiable by ordinary autograd.

    x (N, C, H, W); the latent is a tensor or a list of tensors in the library's own order. `differs`: the numbers that
    the library has as parameters more (or fewer, negative) than `flowkern.Glow` does, with the reason for each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.differs: dict[str, int] = {}

    def log_prob(self, x: Tensor) -> Tensor:
        """(N,) in nats, for z ~ N(0, I)."""
        latent, logdet = self(x)
        return standard_normal(latent if isinstance(latent, list) else [latent]) + logdet

    def check_parameters(self, glow: flowkern.Glow) -> None:
        """Raises ValueError unless the models have equally many parameters, up to what `differs` declares."""
        ours, theirs = trainable(glow), trainable(self)
        if theirs - ours != sum(self.differs.values()):
            raise ValueError(f"{theirs} parameters against {ours}, and the declared differences are {self.differs}")


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def standard_normal(parts: Sequence[Tensor]) -> Tensor:
    """log N(z; 0, I) (N,) of z in parts (N, ...)."""
    squares = sum(part.flatten(1).square().sum(dim=1) for part in parts)
    return -0.5 * (squares + sum(part[0].numel() for part in parts) * math.log(2 * math.pi))


def steps_and_channels(glow: flowkern.Glow) -> list[tuple[int, int]]:
    """(steps, channels) of each level."""
    return [(len(level.steps), glow.size[0] * 2 ** (i + 2)) for i, level in enumerate(glow.levels)]


def require_plain(glow: flowkern.Glow, library: str) -> None:
    """Raises ValueError for a Glow that the libraries can't express."""
    config = glow.config
    if (config["coupling"], config["scale"], config["split_prior"]) != ("affine", "sigmoid", "standard"):
        raise ValueError(f"{library} has only the affine coupling with a sigmoid scale, and plain splits")


class AffineNetwork(nn.Module):
    """A coupling network for libraries whose coupling is `b s + t`: of ours, `(b + t) s`, it returns (raw, t s)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, a: Tensor, context: None = None) -> Tensor:
        raw, t = reference.coupling_network(a, self.net).chunk(2, dim=1)
        return torch.cat([raw, t * torch.sigmoid(raw + 2)], dim=1)
