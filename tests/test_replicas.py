"""nn.DataParallel's replicas, whose parameters can't be listed: what needs them says so instead of losing gradients."""

import pytest
import torch
from torch import nn

import flowkern
from flowkern import ReversibleSequence
from flowkern.layers import StepOfFlow

X = torch.rand(2, 3, 8, 8)


def glow(**options):
    made = flowkern.Glow((3, 8, 8), levels=1, depth=2, hidden=4, **options)
    made.initialize(X)
    return made


def replica(net: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes it on a GPU, parameters plain tensors with a graph to the original's."""
    made = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, copy in made.items():
        for name, child in module._modules.items():
            setattr(copy, name, made[child])
        for name, parameter in module._parameters.items():
            setattr(copy, name, None if parameter is None else parameter * 1)
    return made[net]


@pytest.mark.parametrize(
    ("net", "run", "who"),
    [
        (glow(), lambda net: net.log_prob(X), "Glow"),
        (glow(), lambda net: net.inverse(X.flatten(1)), "Glow"),
        (glow(network=lambda a, b: nn.Conv2d(a, b, 1)), lambda net: net(X), "Glow"),
        (flowkern.Unfolded(flowkern.GlowProx(glow()), folds=2), lambda net: net(X), "Glow"),
        (flowkern.Unfolded(flowkern.ResNetProx(3, 4), folds=2, kept_images=1), lambda net: net(X), "ResNetProx"),
        (ReversibleSequence([StepOfFlow(4, hidden=4)]), lambda net: net(torch.rand(2, 4, 4, 4)), "StepOfFlow"),
        (StepOfFlow(4, network=lambda a, b: nn.Conv2d(a, b, 1)), lambda net: net(torch.rand(2, 4, 4, 4)), "Conv2d"),
    ],
)
def test_replicas_are_refused(net, run, who):
    with pytest.raises(RuntimeError, match=f"^{who} does not run under nn.DataParallel.*DistributedDataParallel$"):
        run(replica(net))


def test_a_prox_of_plain_convolutions_still_runs():
    net = flowkern.Unfolded(flowkern.ResNetProx(3, 4), folds=2)
    replica(net)(X).sum().backward()
    assert all(p.grad is not None for p in net.proxes[0].parameters())
