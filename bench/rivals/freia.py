"""A Glow of FrEIA's parts (Ardizzone et al., github.com/vislearn/FrEIA)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flowkern
from bench.rivals.base import AffineNetwork, Rival, require_plain
from flowkern import reference


class FrEIA(Rival):
    """A GraphINN of IRevNetDownsampling, ActNorm, a 1x1 convolution, AffineCouplingOneSided, and Split.

    FrEIA's own 1x1 convolutions don't learn, so Glow's enters as an InvertibleModule, as its documentation asks; its
    `clamp_activation` takes the log-sigmoid. Raises ImportError when FrEIA is not installed.
    """

    def __init__(self, glow: flowkern.Glow, channels_last: bool = False):
        import FrEIA.framework as graph
        import FrEIA.modules as modules

        super().__init__()
        require_plain(glow, "FrEIA")
        self.shift = glow.shift
        conv = _conv(modules.InvertibleModule)
        nodes = [graph.InputNode(*glow.size)]
        steps, ends = [], []
        for level in glow.levels:
            nodes.append(graph.Node(nodes[-1], modules.IRevNetDownsampling, {}))
            for step in level.steps:
                net = AffineNetwork(copy.deepcopy(step.coupling.net))
                coupling = {"subnet_constructor": lambda *sizes, net=net: net, "clamp": 1.0,
                            "clamp_activation": lambda raw: F.logsigmoid(raw + 2)}
                nodes.append(graph.Node(nodes[-1], modules.ActNorm, {}))
                nodes.append(graph.Node(nodes[-1], conv, {"conv": copy.deepcopy(step.conv)}))
                nodes.append(graph.Node(nodes[-1], modules.AffineCouplingOneSided, coupling))
                steps.append((step, nodes[-3]))
            if level.split is not None:
                nodes.append(graph.Node(nodes[-1], modules.Split, {}))
                ends.append(graph.OutputNode(nodes[-1].out1))
        self.graph = graph.GraphINN([*nodes, *ends, graph.OutputNode(nodes[-1])])
        for step, node in steps:
            _copy_actnorm(step.actnorm, node.module)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        z, logdet = self.graph(x - self.shift)
        return list(z) if isinstance(z, tuple) else [z], logdet

    def inverse(self, z: list[Tensor]) -> Tensor:
        return self.graph(z, rev=True, jac=False)[0] + self.shift


@torch.no_grad()
def _copy_actnorm(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.scale.copy_(ours.log_scale.view(theirs.scale.shape))
    theirs.bias.copy_((ours.log_scale.exp() * ours.bias).view(theirs.bias.shape))
    theirs.init_on_next_batch = False


def _conv(base: type) -> type:
    """Glow's 1x1 convolution as FrEIA's kind of module, whose class is known only where FrEIA is installed."""

    class Conv1x1(base):
        def __init__(self, dims_in, conv: nn.Module):
            super().__init__(dims_in)
            self.conv = conv

        def forward(self, x, rev: bool = False, jac: bool = True):
            weight, logdet = reference.conv1x1_weight(self.conv), x[0][0, 0].numel() * self.conv.log_s.sum()
            if rev:
                return (F.conv2d(x[0], torch.linalg.inv(weight)[:, :, None, None]),), -logdet
            return (F.conv2d(x[0], weight[:, :, None, None]),), logdet

        def output_dims(self, input_dims):
            return input_dims

    return Conv1x1
