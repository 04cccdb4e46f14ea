"""normflows' multi-scale Glow (Stimper et al. 2023, arXiv:2302.12014)."""

import torch
from torch import Tensor, nn

import flowkern
from bench.rivals.base import Rival, require_plain, steps_and_channels


class NormFlows(Rival):
    """Its MultiscaleFlow of GlowBlocks, the whole of it the library's own.

    It has no exp(3 logs) on the network's last layer; that factor goes into the layer's weights. Raises ImportError
    when normflows is not installed.
    """

    def __init__(self, glow: flowkern.Glow, channels_last: bool = False):
        import normflows

        super().__init__()
        require_plain(glow, "normflows")
        self.shift = glow.shift
        c, h, w = glow.size
        config = glow.config
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
        self.differs = {"no logs of the network's last layer": -sum(k * c for k, c in steps_and_channels(glow))}
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        return self.model.inverse_and_log_det(x - self.shift)

    def inverse(self, z: list[Tensor]) -> Tensor:
        return self.model.forward_and_log_det(z)[0] + self.shift

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
