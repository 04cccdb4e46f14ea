"""A level's first mix reads the image that the level squeezes, natively."""

import pytest
import torch
from helpers import in_different_memory, relative, small_glow

from flowkern import backend as backends
from flowkern import chain, cpp, layers, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 6, 10), (3, 6, 4, 2), (2, 18, 2, 6), (0, 3, 4, 4)])
def test_squeeze_mix_is_squeeze_then_mix(shape, dtype):
    c = 4 * shape[1]
    matrix, offset = torch.randn(c, c, dtype=dtype).mT, torch.randn(c, dtype=dtype)
    for name, x in in_different_memory(*shape, dtype=dtype):
        got = cpp.squeeze_mix(layers.blocks(x), matrix, offset)
        wanted = reference.channel_mix(layers.squeeze(x).double(), matrix.double(), offset.double())
        assert got.shape == wanted.shape and got.is_contiguous(memory_format=torch.channels_last), name
        assert not x.numel() or relative(got.double(), wanted) < 10 * torch.finfo(dtype).eps, name
        assert torch.equal(cpp.squeeze_mix(layers.blocks(x), torch.eye(c, dtype=dtype), 0 * offset), layers.squeeze(x))


def test_other_numbers_are_refused():
    with pytest.raises(ValueError, match="float32 or float64"):
        cpp.squeeze_mix(layers.blocks(torch.ones(1, 1, 2, 2, dtype=torch.int32)), torch.eye(4), torch.zeros(4))


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_glow_on_blocks_is_the_glow_on_squeezed_images(memory, dtype, monkeypatch):
    glow = small_glow((3, 8, 12), levels=2, depth=2, hidden=40, dtype=dtype, memory=memory, backend="cpp")
    found = []
    for blocks in (True, False):
        if not blocks:
            monkeypatch.setattr(layers, "reads_blocks", lambda *_: False)
        x = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        value = glow.log_prob(x).sum()
        found.append([value.detach(), *torch.autograd.grad(value, [x, *glow.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_level_squeezes_no_image_itself(monkeypatch):
    assert backends.table(torch.device("cpu"), "auto").squeeze_mix is cpp.squeeze_mix
    glow = small_glow((1, 8, 8), levels=2, depth=1, hidden=3, dtype=torch.float32)
    for module in (layers, chain):
        monkeypatch.setattr(module, "as_state", None)
    with torch.no_grad():
        assert glow.log_prob(torch.rand(2, 1, 8, 8)).isfinite().all()
