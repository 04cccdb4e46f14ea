"""Networks captured by torch.cuda.make_graphed_callables, as training captures a Glow's steps."""

import pytest
import torch
from gpu_device import DEVICE
from helpers import MODES, small_glow

from flowkern import GlowProx, Unfolded
from flowkern.operators import Blur, Inpainting, RandomProjection, gaussian_kernel


@pytest.mark.parametrize("memory,anchor_every", MODES)
def test_a_replayed_network_has_the_launched_gradients(memory, anchor_every, real_gpu):
    options = {"levels": 2, "depth": 2, "hidden": 16, "memory": memory, "anchor_every": anchor_every}
    glow = small_glow((3, 16, 16), dtype=torch.float32, **options).to(DEVICE)
    net = Unfolded(GlowProx(glow, lam=0.3), folds=2).train().to(DEVICE)
    parameters = list(net.parameters())

    def gradients(run, seed):
        y = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        return [g.clone() for g in torch.autograd.grad((run(y) - y).square().mean(), parameters)]

    launched = [gradients(net, seed) for seed in range(2)]
    replayed = torch.cuda.make_graphed_callables(net, (torch.rand(4, 3, 16, 16, device=DEVICE),))
    for seed, wanted in enumerate(launched):
        for found, w in zip(gradients(replayed, seed), wanted, strict=True):
            torch.testing.assert_close(found, w, rtol=1e-4, atol=1e-6)


OPERATORS = {
    "inpainting": lambda: Inpainting(torch.ones(1, 16, 16)),
    "blur": lambda: Blur(gaussian_kernel(1.0)),
    "projection": lambda: RandomProjection((3, 16, 16), 0.25),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_replayed_as_they_are_launched(name, real_gpu):
    glow = small_glow((3, 16, 16), dtype=torch.float32, levels=2, depth=2, hidden=16).to(DEVICE)
    net = Unfolded(GlowProx(glow, lam=0.3), 2, OPERATORS[name](), init="smooth").train().to(DEVICE)
    parameters = list(net.parameters())

    class Masked(torch.nn.Module):
        """The network, told which pixels were measured by a tensor as training tells it."""

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, y, mask):
            operator = Inpainting(torch.ones(1, 16, 16)) if name == "inpainting" else net.operator
            if name == "inpainting":
                operator.mask = mask
            return self.net(y, operator=operator)

    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        x, mask = torch.rand(4, 3, 16, 16, generator=generator), torch.rand(4, 1, 16, 16, generator=generator) < 0.5
        x, mask = x.to(DEVICE), mask.float().to(DEVICE)
        return (x * mask if name == "inpainting" else net.operator.forward(x)), mask, x

    def gradients(run, seed):
        y, mask, x = batch(seed)
        return [g.clone() for g in torch.autograd.grad((run(y, mask) - x).square().mean(), parameters)]

    launched = [gradients(Masked(), seed) for seed in range(2)]
    replayed = torch.cuda.make_graphed_callables(Masked(), batch(2)[:2], allow_unused_input=True)
    for seed, wanted in enumerate(launched):
        for found, w in zip(gradients(replayed, seed), wanted, strict=True):
            torch.testing.assert_close(found, w, rtol=1e-3, atol=1e-5)
