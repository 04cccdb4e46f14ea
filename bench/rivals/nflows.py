"""A Glow of nflows' parts (Durkan et al. 2020, github.com/bayesiains/nflows)."""

import copy

import torch
from torch import Tensor, nn

import flowkern
from bench.rivals.base import AffineNetwork, Rival, require_plain, steps_and_channels


class NFlows(Rival):
    """CompositeTransforms of SqueezeTransform, ActNorm, OneByOneConvolution and AffineCouplingTransform.

    Its convolution permutes before multiplying by L U, and its U has a positive diagonal; ours permutes afterwards, so
    the permutation is a transform behind it. The coupling's sigmoid(raw + 2) + 1e-3 loses its constant in a subclass.
    Raises ImportError when nflows is not installed, ValueError for a Glow with a negative sign in its U.
    """

    def __init__(self, glow: flowkern.Glow, channels_last: bool = False):
        from nflows import transforms
        from nflows.transforms.permutations import Permutation
        from nflows.transforms.standard import IdentityTransform

        super().__init__()
        require_plain(glow, "nflows")
        self.shift = glow.shift
        coupling = _coupling(transforms.AffineCouplingTransform)
        levels = []
        for (_, channels), level in zip(steps_and_channels(glow), glow.levels, strict=True):
            parts: list[nn.Module] = [transforms.SqueezeTransform()]
            for step in level.steps:
                if (step.conv.sign < 0).any():
                    raise ValueError("nflows' triangular factors have no signs")
                norm, conv = transforms.ActNorm(channels), transforms.OneByOneConvolution(channels)
                conv.permutation = IdentityTransform()
                _copy_actnorm(step.actnorm, norm)
                _copy_conv(step.conv, conv)
                net = AffineNetwork(copy.deepcopy(step.coupling.net))
                mask = [0] * (channels // 2) + [1] * (channels // 2)
                parts += [norm, conv, Permutation(step.conv.permutation.clone()), coupling(mask, lambda *_, n=net: n)]
            levels.append(transforms.CompositeTransform(parts))
        self.levels = nn.ModuleList(levels)
        self.differs = {
            "packed triangles": -sum(k * c * (c + 1) for k, c in steps_and_channels(glow)),
            "a bias in the 1x1 convolution": sum(k * c for k, c in steps_and_channels(glow)),
        }
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x, logdet, parts = x - self.shift, 0.0, []
        for i, level in enumerate(self.levels):
            x, d = level(x)
            logdet = logdet + d
            if i < len(self.levels) - 1:
                x, part = x.chunk(2, dim=1)
                parts.append(part)
        return [*parts, x], logdet

    def inverse(self, z: list[Tensor]) -> Tensor:
        *parts, x = z
        for i, level in reversed(list(enumerate(self.levels))):
            if i < len(self.levels) - 1:
                x = torch.cat([x, parts.pop()], dim=1)
            x, _ = level.inverse(x)
        return x + self.shift


@torch.no_grad()
def _copy_actnorm(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.log_scale.copy_(ours.log_scale)
    theirs.shift.copy_(ours.log_scale.exp() * ours.bias)
    theirs.initialized.fill_(True)


@torch.no_grad()
def _copy_conv(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.lower_entries.copy_(ours.lower[theirs.lower_indices])
    theirs.upper_entries.copy_(ours.upper[theirs.upper_indices])
    theirs.unconstrained_upper_diag.copy_((ours.log_s.double().exp() - theirs.eps).expm1().log())


def _coupling(base: type) -> type:
    """The affine coupling of Glow: nflows' with the scale that its own docstring's source leaves at 0.001 more."""

    class Coupling(base):
        def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
            raw, shift = transform_params.chunk(2, dim=1)
            return torch.sigmoid(raw + 2), shift

    return Coupling
