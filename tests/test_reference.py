"""The specification itself: log-determinants against dense Jacobians, inverses, the composed mix."""

import pytest
import torch
from helpers import VARIANTS, relative, small_glow

from flowkern import reference
from flowkern.layers import StepOfFlow, squeeze, unsqueeze
from flowkern.mix import compose


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_logdet_equals_the_dense_jacobian(variant, direction):
    glow = small_glow((1, 8, 8), **VARIANTS[variant])
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    z, _ = reference.glow_forward(glow, x)
    start, function = (x, reference.glow_forward) if direction == "forward" else (z, reference.glow_inverse)
    _, logdet = function(glow, start)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: function(glow, v)[0], start[i : i + 1])
        dense = torch.linalg.slogdet(jacobian.reshape(64, 64)).logabsdet
        torch.testing.assert_close(logdet[i], dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inverse_undoes_forward(variant):
    glow = small_glow(**VARIANTS[variant])
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    z, logdet = reference.glow_forward(glow, x)
    back, inverse_logdet = reference.glow_inverse(glow, z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-8, atol=1e-7)


def test_squeeze_is_pixel_unshuffle():
    x = torch.randn(2, 3, 4, 6)
    for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(2, 6, 4, 6)[:, ::2]):
        torch.testing.assert_close(squeeze(given), reference.squeeze(given), rtol=0, atol=0)
        assert squeeze(given).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(unsqueeze(squeeze(given)), given, rtol=0, atol=0)
    assert reference.squeeze(torch.arange(4.0).view(1, 1, 2, 2)).flatten().tolist() == [0, 1, 2, 3]


def test_composed_mix_is_actnorm_then_conv():
    torch.manual_seed(0)
    steps = [StepOfFlow(6, hidden=4).double() for _ in range(3)]
    for step in steps:
        for p in (*step.actnorm.parameters(), *step.conv.parameters()):
            torch.nn.init.normal_(p, std=0.3)
    matrix, offset, inverse, logdet = compose(steps)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    for k, step in enumerate(steps):
        literal = reference.channel_mix(reference.actnorm(x, step.actnorm), step.conv.weight(), torch.zeros(6).double())
        torch.testing.assert_close(reference.channel_mix(x, matrix[k], offset[k]), literal)
        torch.testing.assert_close(inverse[k] @ matrix[k], torch.eye(6).double())
    torch.testing.assert_close(logdet, torch.linalg.slogdet(matrix).logabsdet.sum())


def test_gradient_of_the_composition():
    torch.manual_seed(0)
    steps = [StepOfFlow(4, hidden=4).double() for _ in range(2)]
    parameters = [
        p for s in steps for p in (s.conv.lower, s.conv.upper, s.conv.log_s, s.actnorm.log_scale, s.actnorm.bias)
    ]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.3)

    def composed(*_):
        matrix, offset, _, logdet = compose(steps)
        return matrix, offset, logdet

    assert torch.autograd.gradcheck(composed, parameters)
    assert torch.autograd.gradgradcheck(composed, parameters)


def test_composed_inverse_of_a_float_model_is_exact_to_rounding():
    torch.manual_seed(0)
    steps = [StepOfFlow(48, hidden=4) for _ in range(4)]
    matrix, _, inverse, _ = compose(steps)
    error = (inverse.double() @ matrix.double() - torch.eye(48)).abs().max()
    general = (torch.linalg.inv(matrix).double() @ matrix.double() - torch.eye(48)).abs().max()
    assert error <= general and error < 1e-6
    assert matrix.is_contiguous() and inverse.is_contiguous()


def test_relative_sees_a_difference():
    assert relative(torch.ones(3), torch.ones(3)) == 0
    assert relative(torch.ones(3) + 1e-3, torch.ones(3)) > 1e-4
