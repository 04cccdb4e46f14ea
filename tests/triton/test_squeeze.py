"""The first mix of a level reads the image that the level squeezes."""

import pytest
import torch
from helpers import in_different_memory, relative, small_glow

from flowkern import backend as backends
from flowkern import chain, layers, reference
from flowkern.audit import audit

KERNELS = backends.table(torch.device("cpu"), "triton")


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 6, 10), (3, 6, 4, 2), (2, 18, 2, 6)])
def test_squeeze_mix_is_squeeze_then_mix(shape):
    c = 4 * shape[1]
    matrix, offset = torch.randn(c, c).mT, torch.randn(c)
    for name, x in in_different_memory(*shape):
        got = KERNELS.squeeze_mix(layers.blocks(x), matrix, offset)
        wanted = reference.channel_mix(reference.squeeze(x.double()), matrix.double(), offset.double())
        assert got.is_contiguous(memory_format=torch.channels_last), name
        assert relative(got.double(), wanted) < 1e-6, name


def test_an_empty_batch():
    got = KERNELS.squeeze_mix(layers.blocks(torch.empty(0, 3, 4, 4)), torch.eye(12), torch.zeros(12))
    assert got.shape == (0, 12, 2, 2)


def test_wrong_operands():
    with pytest.raises(ValueError, match="squeeze_mix: expected torch.float32 on cpu throughout, got torch.float64"):
        KERNELS.squeeze_mix(layers.blocks(torch.zeros(1, 1, 2, 2)), torch.eye(4).double(), torch.zeros(4))


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
def test_a_glow_squeezes_an_image_only_to_keep_it(memory, monkeypatch):
    glow = small_glow((1, 8, 8), levels=2, depth=1, hidden=3, dtype=torch.float32, backend="triton", memory=memory)
    same = small_glow((1, 8, 8), levels=2, depth=1, hidden=3, dtype=torch.float32, backend="reference", memory=memory)
    monkeypatch.setattr(layers, "squeeze", None)
    squeezed, as_state = [], chain.as_state
    for module in (layers, chain):
        monkeypatch.setattr(module, "as_state", lambda x: squeezed.append(x.dim() == 6) or as_state(x))
    found = []
    for model in (glow, same):
        x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        squeezed.clear()
        value = model.log_prob(x).sum()
        assert sum(squeezed) == (0 if model is glow and memory == "recompute" else 2)  # levels
        found.append([value.detach(), *torch.autograd.grad(value, [x, *model.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
def test_a_loss_of_the_log_determinant_alone(memory):
    """The last level has no gradient of its state, and in "recompute" reads the image's blocks."""
    found = []
    for backend in ("triton", "reference"):
        glow = small_glow((1, 4, 4), levels=1, depth=2, hidden=3, dtype=torch.float32, backend=backend, memory=memory)
        x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        found.append(torch.autograd.grad(glow(x)[1].sum(), [x, *glow.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_the_audit_of_a_glow_on_a_backend_of_single_precision():
    glow = small_glow((1, 4, 4), levels=1, depth=1, hidden=3, dtype=torch.float32, backend="triton")
    assert audit(glow, torch.rand(2, 1, 4, 4)).gradient < 1e-4
