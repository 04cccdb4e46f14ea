"""A training step never waits for the device: on meta tensors, which have no data, reading a value is an error."""

import pytest
import torch
from helpers import VARIANTS, small_glow

from flowkern import backend as backends
from flowkern import chain, layers, mix, network

META = torch.device("meta")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory", chain.MEMORY_MODES)
def test_no_step_reads_the_device(variant, memory):
    glow = small_glow((3, 8, 8), levels=1, depth=3, dtype=torch.float32, **VARIANTS[variant]).to(META)
    steps, table = glow.levels[0].steps, backends.table(META, "reference")
    glow.requires_grad_(False)
    fixed = [torch.stack([getattr(s.conv, n) for s in steps]) for n in ("sign", "permutation")]
    stacked = mix.stacked([p for s in steps for p in (
        s.conv.lower, s.conv.upper, s.conv.log_s, s.actnorm.log_scale, s.actnorm.bias)])
    parameters = [p for s in steps for p in s.coupling.net.flat_parameters()]
    matrix, offset, inverse, _ = mix.mixes(*stacked, *fixed)
    nets = network.StandardNets(parameters, torch.bfloat16, table)
    x = layers.squeeze(torch.empty(2, 3, 8, 8, device=META)).contiguous(memory_format=torch.channels_last)
    for reverse in (False, True):
        settings = (reverse, steps[0].coupling.scale, 1.0, table, memory)
        out, logdet, kept = chain._run(x, matrix, offset, inverse, nets, *settings, 2)
        need = [True] * len(parameters)
        dx, dmatrix, doffset, *_ = chain._vjp(
            x, out, torch.empty_like(out), logdet, kept, matrix, offset, inverse, nets, need, *settings)
        assert dx.shape == x.shape
        mix.mixes_vjp(*stacked, *fixed, dmatrix, doffset, logdet.sum())


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.tolist()])
def test_the_check_sees_a_read(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(3, device=META))
