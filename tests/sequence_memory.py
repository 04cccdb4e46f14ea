"""The footprint of a ReversibleSequence, measured in a process of its own."""

import torch
from torch import nn

from bench import memory
from flowkern import ReversibleSequence
from flowkern.layers import AffineCoupling


def network() -> nn.Module:
    """With dropout and batch norm."""
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(32, 16, 3, padding=1)
    )


def footprint(cases) -> list[dict]:
    """Bytes held between forward and backward and at the peak, gradients left out, of (mode, depth) in turn."""
    found = []
    for mode, depth in cases:
        torch.manual_seed(0)
        flow = ReversibleSequence([AffineCoupling(network()) for _ in range(depth)], mode)
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
