"""The composition of the channel mixes and its derivative against plain PyTorch in fp64."""

import pytest
import torch

from flowkern import backend as backends
from flowkern.layers import StepOfFlow
from flowkern.mix import compose, mixes, mixes_vjp, stacked

KERNELS = backends.table(torch.device("cpu"), "triton")


def parameters(steps, channels):
    """The stacked parameters of steps of flow moved away from their start, with numbers where the triangles are not."""
    generator = torch.Generator().manual_seed(channels)
    made = [StepOfFlow(channels, hidden=2) for _ in range(steps)]
    lists = [p for s in made for p in (s.conv.lower, s.conv.upper, s.conv.log_s, s.actnorm.log_scale, s.actnorm.bias)]
    moved = [p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for p in lists]
    sign, permutation = (torch.stack([getattr(s.conv, name) for s in made]) for name in ("sign", "permutation"))
    return *stacked(moved), sign, permutation


def doubles(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("steps,channels", [(1, 2), (3, 4), (2, 6), (2, 12), (1, 34)])
def test_compose_and_its_derivative_are_exact_to_rounding(steps, channels):
    tensors = parameters(steps, channels)
    exact = mixes(*doubles(tensors))
    for got, wanted in zip(KERNELS.compose(*tensors), exact, strict=True):
        assert got.dtype == torch.float32 and got.is_contiguous()
        torch.testing.assert_close(got, wanted.float(), rtol=2e-7, atol=1e-7)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(t.shape, generator=generator) for t in (exact[0], exact[1], exact[3])]
    wanted = mixes_vjp(*doubles(tensors), *doubles(cotangents))
    for got, w in zip(KERNELS.compose_vjp(*tensors, *cotangents), wanted, strict=True):
        torch.testing.assert_close(got, w.float(), rtol=2e-7, atol=1e-6)


def test_more_channels_than_registers_hold():
    tensors = parameters(1, 194)
    cotangents = torch.ones(1, 194, 194), torch.ones(1, 194), torch.ones(())
    torch.testing.assert_close(KERNELS.compose(*tensors), mixes(*tensors), rtol=0, atol=0)
    wanted = mixes_vjp(*tensors, *cotangents)
    torch.testing.assert_close(KERNELS.compose_vjp(*tensors, *cotangents), wanted, rtol=0, atol=0)


def test_operands_in_any_memory_order():
    tensors = parameters(2, 4)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(s, generator=generator) for s in ((2, 4, 4), (2, 4), ())]
    strided = [t.mT.contiguous().mT for t in (*tensors, *cotangents[:2])]
    given, like = strided[:7], (*strided, cotangents[2])
    assert not (given[0].is_contiguous() or given[2].is_contiguous())
    torch.testing.assert_close(KERNELS.compose(*given), KERNELS.compose(*tensors), rtol=0, atol=0)
    wanted = KERNELS.compose_vjp(*tensors, *cotangents)
    torch.testing.assert_close(KERNELS.compose_vjp(*like), wanted, rtol=0, atol=0)


def test_wrong_operands():
    tensors = list(parameters(1, 4))
    with pytest.raises(ValueError, match="compose: the permutation must be int64 on cpu, got torch.int32 on cpu"):
        KERNELS.compose(*tensors[:-1], tensors[-1].int())
    with pytest.raises(ValueError, match="compose_vjp: expected torch.float32 on cpu throughout, got torch.float64"):
        KERNELS.compose_vjp(*tensors, torch.zeros(1, 4, 4).double(), torch.zeros(1, 4), torch.zeros(()))


def test_the_model_uses_it():
    steps = [StepOfFlow(4, hidden=2) for _ in range(2)]
    matrix, offset, inverse, logdet = compose(steps, "triton")
    torch.testing.assert_close(inverse @ matrix, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-6)
    (matrix.sum() + offset.sum() + logdet).backward()
    found = [p.grad.clone() for s in steps for p in (*s.conv.parameters(), *s.actnorm.parameters())]
    for s in steps:
        s.zero_grad()
    matrix, offset, inverse, logdet = compose(steps, "reference")
    (matrix.sum() + offset.sum() + logdet).backward()
    wanted = [p.grad for s in steps for p in (*s.conv.parameters(), *s.actnorm.parameters())]
    torch.testing.assert_close(found, wanted)
