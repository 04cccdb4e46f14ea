"""Glow in plain PyTorch: the specification itself, and what a user makes of it when it is too slow or too large."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flowkern
from bench.rivals.base import Rival
from flowkern import reference


class Reference(Rival):
    """`flowkern.reference` in eager PyTorch, which keeps states in channels-last memory.

    network_dtype: run the coupling networks under autocast, the rest in full precision. checkpointed: each step of flow
    under `torch.utils.checkpoint`. channels_last: weights in that memory format, too.
    """

    def __init__(self, glow: flowkern.Glow, network_dtype: torch.dtype | None = None, checkpointed: bool = False,
                 channels_last: bool = False):
        super().__init__()
        self.glow = copy.deepcopy(glow)
        self.checkpointed = checkpointed
        if network_dtype is not None:
            for level in self.glow.levels:
                for step in level.steps:
                    step.coupling.net = _LowPrecision(step.coupling.net, network_dtype)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def step(self, x: Tensor, step: nn.Module, logdet: Tensor) -> tuple[Tensor, Tensor]:
        """One step of flow: the new state and `logdet` with its part added."""
        if self.checkpointed and torch.is_grad_enabled():
            # Nothing random happens inside: without that state a CUDA graph can capture it.
            x, d = checkpoint(reference.step_of_flow, x, step, use_reentrant=False, preserve_rng_state=False)
        else:
            x, d = reference.step_of_flow(x, step)
        return x, logdet + d

    def unstep(self, y: Tensor, step: nn.Module) -> Tensor:
        return reference.step_of_flow(y, step, inverse=True)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet, parts = x - self.glow.shift, x.new_zeros(x.shape[0]), []
        for level in self.glow.levels:
            x = reference.squeeze(x)
            for step in level.steps:
                x, logdet = self.step(x, step, logdet)
            if level.split is not None:
                x, part = self.split(x)
                parts.append(part)
        return torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in (*parts, x)], dim=1), logdet

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.chunk(2, dim=1)

    def inverse(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        *parts, x = self.glow.split_latent(z, size)
        for level in reversed(self.glow.levels):
            if level.split is not None:
                x = torch.cat([x, parts.pop()], dim=1)
            for step in reversed(level.steps):
                x = self.unstep(x, step)
            x = reference.unsqueeze(x)
        return x + self.glow.shift


class _LowPrecision(nn.Module):
    """A coupling network under autocast; without the attributes by which the reference knows the standard network."""

    def __init__(self, net: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, a: Tensor) -> Tensor:
        with torch.autocast(a.device.type, dtype=self.dtype):
            return reference.coupling_network(a, self.net)


class Contiguous(Reference):
    """The same in PyTorch's default memory format throughout."""

    def step(self, x, step, logdet):
        y, d = contiguous_step(x, step)
        return y, logdet + d

    def unstep(self, y, step):
        return contiguous_step(y, step, inverse=True)[0]


def contiguous_step(x: Tensor, step: nn.Module, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """`flowkern.reference.step_of_flow` with convolutions that keep the memory format."""
    weight, coupling = reference.conv1x1_weight(step.conv), step.coupling
    logdet = x.shape[2] * x.shape[3] * (step.actnorm.log_scale.sum() + step.conv.log_s.sum())
    if not inverse:
        x = F.conv2d(reference.actnorm(x, step.actnorm), weight[:, :, None, None])
    a, b = x.chunk(2, dim=1)
    raw, t = reference.coupling_network(a, coupling.net).chunk(2, dim=1)
    log_s = reference.log_scale(raw, coupling.scale, coupling.alpha)
    coupled = log_s.sum(dim=(1, 2, 3))
    if not inverse:
        return torch.cat([a, (b + t) * torch.exp(log_s)], dim=1), logdet + coupled
    x = torch.cat([a, b * torch.exp(-log_s) - t], dim=1)
    x = F.conv2d(x, torch.linalg.inv(weight)[:, :, None, None])
    return reference.actnorm(x, step.actnorm, inverse=True), -logdet - coupled


class Compiled(Reference):
    """The reference with every step of flow under torch.compile: one compilation serves a level's steps."""

    def __init__(self, glow: flowkern.Glow, network_dtype: torch.dtype | None = None, channels_last: bool = False):
        super().__init__(glow, network_dtype, channels_last=channels_last)
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64  # a level each, in training and without gradients, and both ways
        for level in self.glow.levels:
            for i, step in enumerate(level.steps):
                level.steps[i] = CompiledStep(step)

    def step(self, x, step, logdet):
        x, d = step(x)
        return x, logdet + d

    def unstep(self, y, step):
        return step.inverse(y)[0]


class CompiledWhole(Reference):
    """The reference's likelihood as one program of torch.compile, however long that takes; its inverse is eager."""

    def __init__(self, glow: flowkern.Glow):
        super().__init__(glow)
        torch._dynamo.reset()
        self._compiled = torch.compile(super().forward, dynamic=False)

    def forward(self, x):
        return self._compiled(x)


class CompiledStep(nn.Module):
    """A `StepOfFlow` by the reference's formulas under torch.compile."""

    def __init__(self, step: nn.Module):
        super().__init__()
        self.step = step
        self._forward = torch.compile(self._plain, dynamic=False)
        self.inverse = torch.compile(self._plain_inverse, dynamic=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._forward(x)

    def _plain(self, x: Tensor):
        return reference.step_of_flow(x, self.step)

    def _plain_inverse(self, y: Tensor):
        return reference.step_of_flow(y, self.step, inverse=True)


class Unfolded(nn.Module):
    """A `flowkern.Unfolded` denoiser of untied `GlowProx` in eager PyTorch (Wei et al., equations 7-10)."""

    def __init__(self, net: flowkern.Unfolded, kind: type[Reference] = Reference, **options):
        super().__init__()
        self.mu = nn.Parameter(net.mu.detach().clone())
        self.raw_lam = nn.ParameterList([nn.Parameter(prox.raw_lam.detach().clone()) for prox in net.proxes])
        self.glows = nn.ModuleList(kind(prox.glow, **options) for prox in net.proxes)

    def forward(self, y: Tensor) -> Tensor:
        x = self.glows[0].inverse(y.new_zeros(1, y[0].numel()), y.shape[2:])
        for mu, raw_lam, glow in zip(self.mu, self.raw_lam, self.glows, strict=True):
            z, _ = glow(reference.data_consistency(x, y, mu))
            x = glow.inverse(reference.shrink(z, F.softplus(raw_lam)), y.shape[2:])
        return x

    def flat_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """By name, in the order of the denoiser's own."""
        found = [("mu", self.mu)]
        for raw_lam, glow in zip(self.raw_lam, self.glows, strict=True):
            found += [("raw_lam", raw_lam), *glow.named_parameters()]
        return found
