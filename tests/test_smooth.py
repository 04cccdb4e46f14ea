"""The smoothest image that fits a measurement, against dense least squares, and as the start of an unfolded network."""

import pytest
import torch
from test_operators import CASES, Halve, dense, make
from unfolded_cases import make_glow

import flowkern
from flowkern.operators import Downsample, Inpainting, smoothest


def jumps(size):
    """D as a matrix: the differences of neighbours, down and across."""
    pixels = torch.eye(size[0] * size[1] * size[2], dtype=torch.float64).unflatten(1, size)
    return torch.cat([pixels.diff(dim=2).flatten(1), pixels.diff(dim=3).flatten(1)], dim=1).T


@pytest.mark.parametrize("name", CASES)
def test_solves_the_normal_equations(name):
    operator, x = make(name)
    size = tuple(x.shape[1:])
    y = operator.forward(x)
    found = smoothest(operator, y, weight=0.1, iterations=400)
    d = jumps(size)
    for a, measured, image in zip(dense(operator, size), y, found, strict=True):
        normal = a.T @ a + 0.1 * d.T @ d
        wanted = torch.linalg.lstsq(normal, a.T @ measured.flatten(), driver="gelsd").solution
        torch.testing.assert_close(image.flatten(), wanted, rtol=1e-6, atol=1e-6)


def test_fills_a_hole_from_around_it():
    x = torch.linspace(0, 1, 32, dtype=torch.float64).expand(2, 3, 32, 32).contiguous()
    hole = torch.ones(2, 1, 32, 32)
    hole[0, :, 8:20, 8:20], hole[1, :, 15:25, 3:15] = 0, 0
    operator = Inpainting(hole)
    found = smoothest(operator, operator.forward(x), weight=1e-4)
    assert (found - x).abs().max() < 0.02
    assert (operator.forward(x) - x).abs().max() > 0.3


def test_a_users_own_operator_precisions_and_no_images():
    y = torch.rand(2, 3, 8, 8)
    assert smoothest(Halve(), y).dtype == torch.float32
    torch.testing.assert_close(smoothest(Halve(), y, weight=1e-9), 2 * y, rtol=1e-4, atol=1e-4)
    assert smoothest(Halve(), y[:0]).shape == (0, 3, 8, 8)
    black = smoothest(Downsample(2), torch.zeros(1, 3, 4, 4))
    assert torch.equal(black, torch.zeros(1, 3, 8, 8))


def test_gradient_in_the_measurement():
    operator = Inpainting(torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0]]))
    y = operator.forward(torch.rand(2, 1, 3, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: smoothest(operator, y, 0.5, 8), (y,))


def test_an_unfolded_network_starts_from_it(tmp_path):
    torch.manual_seed(0)
    operator = Downsample(2)
    prox = flowkern.GlowProx(make_glow(dtype=torch.float32))
    net = flowkern.Unfolded(prox, 1, operator, init="smooth", final="consistency", mu=1e-12)
    y = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(net(y), smoothest(operator, y), rtol=1e-4, atol=1e-5)
    net.save_pretrained(tmp_path)
    assert torch.equal(flowkern.Unfolded.from_pretrained(tmp_path)(y), net(y))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3, torch.zeros(1, 1, 2, 2)), TypeError, "must have the methods forward and adjoint, got int"),
        ((Halve(), torch.zeros(1, 1, 2, 2), 0.0), ValueError, "weight must be positive, got 0.0"),
        ((Halve(), torch.zeros(1, 1, 2, 2), 1.0, 0), ValueError, "iterations must be a positive integer, got 0"),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        smoothest(*arguments)
