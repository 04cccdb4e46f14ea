"""What runs on a GPU beside the standard Glow: contexts, networks of one's own, other libraries' checkpoints."""

import pytest
import torch
from gpu_device import DEVICE
from helpers import MODES, relative
from oracles import openai, rosinality
from torch import nn

import flowkern
from flowkern import ReversibleSequence
from flowkern.distributions import GlowDistribution
from flowkern.layers import AffineCoupling

LEAN = [mode for mode in MODES if mode[0] != "store"]


def network(i, o):
    return nn.Sequential(
        nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(0.5), nn.Conv2d(8, o, 1)
    )


def gradients(model, x):
    torch.manual_seed(5)
    y, logdet = model(x)
    found = torch.autograd.grad(y.square().sum() + logdet.sum(), list(model.parameters()))
    return [torch.cat([g.flatten() for g in found]), torch.rand(3, device=DEVICE), *model.state_dict().values()]


@pytest.mark.parametrize("memory, anchor_every", LEAN)
def test_dropout_and_batch_norm_are_replayed(memory, anchor_every):
    """The device's generator goes on as if nothing had been replayed, and statistics are updated once."""
    x = torch.rand(4, 4, 8, 8, device=DEVICE, dtype=torch.float64)

    def sequence(mode, every):
        torch.manual_seed(0)
        return ReversibleSequence([AffineCoupling(network(2, 4)) for _ in range(3)], mode, every).double().to(DEVICE)

    def glow(mode, every):
        torch.manual_seed(0)
        made = flowkern.Glow((4, 8, 8), levels=2, depth=2, network=network, memory=mode, anchor_every=every)
        made = made.double().to(DEVICE)
        made.initialize(x)
        return made

    for make in (sequence, glow):
        lean, stored = gradients(make(memory, anchor_every), x), gradients(make("store", None), x)
        for a, b in zip(lean, stored, strict=True):
            assert relative(a.double(), b.double()) < 1e-7


@pytest.mark.parametrize("oracle", [rosinality, openai], ids=["rosinality", "openai"])
def test_a_checkpoint_scores_and_reconstructs(oracle):
    weights, x = oracle.weights(3, 4), torch.rand(3, 3, 16, 16, dtype=torch.float64) - 0.5
    glow = flowkern.Glow.from_checkpoint(weights, size=16, shift=0.0).float().to(DEVICE)
    wanted, x = oracle.log_prob(weights, x), x.float().to(DEVICE)
    found = glow.log_prob(x)
    assert ((found.double().cpu() - wanted) / wanted).abs().max() < 1e-4  # convolutions may run in tf32
    with torch.no_grad():
        torch.testing.assert_close(glow.inverse(glow(x)[0]), x, rtol=0, atol=1e-2)


@pytest.mark.parametrize("memory, anchor_every", LEAN)
def test_gradients_reach_the_context(memory, anchor_every):
    x, context = (torch.rand(2, *shape, dtype=torch.float64).to(DEVICE) for shape in ((2, 8, 8), (3,)))
    context.requires_grad_()

    def gradient(mode, every):
        torch.manual_seed(0)
        glow = flowkern.Glow(
            (2, 8, 8), levels=2, depth=2, hidden=6, context_channels=3, memory=mode, anchor_every=every
        )
        with torch.no_grad():
            for p in glow.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        return torch.autograd.grad(glow.double().to(DEVICE).eval().log_prob(x, context).sum(), context)[0]

    wanted = gradient("store", None)
    assert relative(gradient(memory, anchor_every), wanted) < 1e-7 and wanted.abs().sum() > 0


def test_distribution_samples_on_the_device():
    glow = flowkern.Glow((2, 8, 8), levels=2, depth=2, hidden=6).to(DEVICE).eval()
    images = GlowDistribution(glow)
    x = images.rsample((3,))
    assert x.device.type == DEVICE.type
    torch.testing.assert_close(images.log_prob(x), glow.log_prob(x))
