"""Footprints of what is not the standard Glow, measured in a process of their own."""

import torch
from torch import nn

from bench import memory
from flowkern import Glow, ReversibleSequence
from flowkern.layers import AffineCoupling


def network(channels: int, out: int) -> nn.Module:
    """With dropout and batch norm."""
    first, last = nn.Conv2d(channels, 32, 3, padding=1), nn.Conv2d(32, out, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1), last)


def sequences(cases) -> list[dict]:
    """Bytes held between forward and backward and at the peak, gradients left out, of (mode, depth) in turn."""
    found = []
    for mode, depth in cases:
        torch.manual_seed(0)
        flow = ReversibleSequence([AffineCoupling(network(8, 16)) for _ in range(depth)], mode)
        x = torch.randn(4, 16, 32, 32)
        flow(x)[0].square().sum().backward()
        flow.zero_grad()
        with memory.record() as events:
            y, logdet = flow(x)
            loss = y.square().sum() - logdet.sum()
            del y, logdet
            events.mark("forward")
            loss.backward()
            del loss
        found.append({"held": events.held("forward"), "peak": events.peak(without=events.alive())})
    return found


def glows(cases) -> list[dict]:
    """The same of a training step of Glows with (options, depth) in turn; a context is given to those that want one."""
    found = []
    for options, depth in cases:
        torch.manual_seed(0)
        glow = Glow((3, 32, 32), levels=2, depth=depth, hidden=64, **options)
        x = torch.rand(8, 3, 32, 32)
        context = torch.rand(8, glow.context_channels, 16, 16) if glow.context_channels else None
        glow.log_prob(x, context).sum().backward()
        glow.zero_grad()
        with memory.record() as events:
            loss = -glow.log_prob(x, context).mean()
            events.mark("forward")
            loss.backward()
            del loss
        mixes = events.of_size([depth * c * c * 4 for c in (12, 24)], at="forward")
        found.append(
            {"held": events.held("forward", without=mixes), "peak": events.peak(without=events.alive() | mixes)}
        )
    return found
