"""Networks captured by torch.cuda.make_graphed_callables, as training captures a Glow's steps."""

import pytest
import torch
from gpu_device import DEVICE
from helpers import MODES, small_glow

from flowkern import GlowProx, Unfolded


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
