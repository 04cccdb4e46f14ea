"""Other PyTorch Glows that compute the same function as a `flowkern.Glow`, on copies of its weights.

Each is a module with `log_prob(x)`, x (N, C, H, W) -> (N,) in nats, differentiable by ordinary autograd.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flowkern
from flowkern import reference


class Reference(nn.Module):
    """The specification, `flowkern.reference`, in eager PyTorch.

    network_dtype: run the coupling networks under autocast, the rest in full precision. checkpointed: each step of flow
    under `torch.utils.checkpoint`, which is what a user of plain PyTorch does about memory.
    """

    def __init__(self, glow: flowkern.Glow, network_dtype: torch.dtype | None = None, checkpointed: bool = False):
        super().__init__()
        self.glow = copy.deepcopy(glow)
        self.checkpointed = checkpointed
        if network_dtype is not None:
            for level in self.glow.levels:
                for step in level.steps:
                    step.coupling.net = _LowPrecision(step.coupling.net, network_dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return _log_prob(*reference.glow_forward(self.glow, x))
        x, logdet, emitted = x - self.glow.shift, x.new_zeros(x.shape[0]), []
        for level in self.glow.levels:
            x = reference.squeeze(x)
            for step in level.steps:
                x, d = checkpoint(reference.step_of_flow, x, step, use_reentrant=False)
                logdet = logdet + d
            if level.split is not None:
                x, part = x.chunk(2, dim=1)
                emitted.append(part)
        return _log_prob(torch.cat([part.flatten(1) for part in (*emitted, x)], dim=1), logdet)


class _LowPrecision(nn.Module):
    """A coupling network under autocast; without the attributes by which the reference knows the standard network."""

    def __init__(self, net: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, a: Tensor) -> Tensor:
        with torch.autocast(a.device.type, dtype=self.dtype):
            return reference.coupling_network(a, self.net)


def _log_prob(z: Tensor, logdet: Tensor) -> Tensor:
    return logdet - 0.5 * (z.square().sum(dim=1) + z.shape[1] * math.log(2 * math.pi))


class NormFlows(nn.Module):
    """normflows' multi-scale Glow (Stimper et al. 2023, arXiv:2302.12014) with the weights of a `flowkern.Glow`.

    It has no exp(3 logs) on the network's last layer; that factor goes into the layer's weights. Wants an affine Glow
    with the sigmoid scale and plain splits. Raises ImportError when normflows is not installed.
    """

    def __init__(self, glow: flowkern.Glow):
        import normflows

        super().__init__()
        config = glow.config
        if (config["coupling"], config["scale"], config["split_prior"]) != ("affine", "sigmoid", "standard"):
            raise ValueError("normflows has only the affine coupling with a sigmoid scale, and plain splits")
        self.shift = glow.shift
        c, h, w = glow.size
        levels = config["levels"]
        bases, flows, merges = [], [], []
        for i, level in reversed(list(enumerate(glow.levels))):
            channels = c * 2 ** (i + 2)
            blocks = [normflows.flows.GlowBlock(channels, config["hidden"], scale_map="sigmoid", net_actnorm=True)
                      for _ in level.steps]
            for block, step in zip(blocks, reversed(level.steps), strict=True):
                _copy_step(step, block)
            flows.append([*blocks, normflows.flows.Squeeze()])
            kept = channels if i == levels - 1 else channels // 2
            shape = (kept, h >> i + 1, w >> i + 1)
            bases.append(normflows.distributions.DiagGaussian(shape, trainable=False))
            if i < levels - 1:
                merges.append(normflows.flows.Merge())
        self.model = normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.model.log_prob(x - self.shift, None)


@torch.no_grad()
def _copy_step(step: nn.Module, block: nn.Module) -> None:
    """Weights of a `StepOfFlow` into a `GlowBlock`, whose `inverse` is the direction from image to latent."""
    coupling, conv, norm = block.flows
    norm.s.copy_(-step.actnorm.log_scale.view(norm.s.shape))
    norm.t.copy_(-step.actnorm.bias.view(norm.t.shape))
    norm.data_dep_init_done.fill_(1)
    conv.P.copy_(torch.eye(len(step.conv.permutation))[step.conv.permutation])
    conv.L.copy_(step.conv.lower)
    conv.U.copy_(step.conv.upper)
    conv.log_S.copy_(step.conv.log_s)
    conv.sign_S.copy_(step.conv.sign)
    net, ours = coupling.flows[1].param_map.net, step.coupling.net
    first, norm1, _, second, norm2, _, third = net
    first.weight.copy_(ours.weight1)
    second.weight.copy_(ours.weight2)
    for theirs, own in ((norm1.actNorm, ours.norm1), (norm2.actNorm, ours.norm2)):
        theirs.s.copy_(own.log_scale.view(theirs.s.shape))
        theirs.t.copy_((own.log_scale.exp() * own.bias).view(theirs.t.shape))
        theirs.data_dep_init_done.fill_(1)
    scale = torch.exp(3 * ours.logs)
    raw, t = (ours.weight3 * scale[:, None, None, None]).chunk(2)
    raw_bias, t_bias = (ours.bias3 * scale).chunk(2)
    # Interleaved there: shift, scale, shift, scale; and the shift is subtracted.
    third.weight[0::2], third.weight[1::2] = -t, raw
    third.bias[0::2], third.bias[1::2] = -t_bias, raw_bias
