"""The composition of the mixes and its gradient by the CUDA kernels, executed on the CPU, against plain PyTorch."""

import pytest
import torch
from compose_cases import SIZES, cotangents, parameters, within_rounding

from flowkern import mix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps,channels", SIZES)
def test_composition(backend, order, steps, channels, dtype):
    given = parameters(steps, channels, dtype)
    got, expected = backend.compose(*given), mix.mixes(*given)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and g.dtype == e.dtype and g.is_contiguous()
        assert within_rounding(g, e, channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps,channels", [*SIZES, (1, 200)])
def test_gradient(backend, order, steps, channels, dtype):
    given = (*parameters(steps, channels, dtype), *cotangents(steps, channels, dtype))
    got, expected = backend.compose_vjp(*given), mix.mixes_vjp(*given)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and g.dtype == e.dtype
        assert within_rounding(g, e, channels)


def test_inverse_of_a_badly_conditioned_mix(backend):
    """M^-1 M - I is the drift of the whole chain: it stays at the last place of M's entries."""
    given = parameters(2, 24, torch.float32)
    given[2].mul_(6)
    matrix, _, inverse, _ = (t.double() for t in backend.compose(*given))
    expected, _, expected_inverse, _ = (t.double() for t in mix.mixes(*given))
    drift, same = ((a @ b - torch.eye(24)).abs().max() for a, b in [(inverse, matrix), (expected_inverse, expected)])
    assert drift <= 2 * same


def test_more_channels_than_a_warp_holds(backend):
    given = parameters(1, 200, torch.float32)
    for g, e in zip(backend.compose(*given), mix.mixes(*given), strict=True):
        assert torch.equal(g, e)


def test_wrong_arguments(backend):
    given = list(parameters(1, 4, torch.float32))
    with pytest.raises(ValueError, match="compose: the permutation must be int64 on cpu, got torch.int32 on cpu"):
        backend.compose(*given[:-1], given[-1].int())
    given[1] = given[1].double()
    with pytest.raises(ValueError, match="compose: expected torch.float32 on cpu throughout, got torch.float64"):
        backend.compose(*given)
