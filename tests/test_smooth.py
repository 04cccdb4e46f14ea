"""The smoothest image that fits a measurement, against dense least squares, that of least total variation, against its
conditions, and both as starts of an unfolded network.
"""

import math

import pytest
import torch
from test_operators import CASES, Halve, dense, make
from unfolded_cases import make_glow

import flowkern
from flowkern.operators import Downsample, Identity, Inpainting, least_variation, smoothest


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


@pytest.mark.parametrize("name", ["identity", "mask of images, channels", "reflect of images", "box 3", "composition"])
def test_least_variation_is_where_the_gradient_vanishes(name):
    operator, x = make(name)
    y = operator.forward(x)
    found = least_variation(operator, y, 0.05, rounds=40, iterations=60).requires_grad_()
    down, across = jumps_of(found)
    lengths = (down.square() + across.square()).sum(1).add(1e-4).sqrt()
    fit = (operator.forward(found) - y).square().sum() / 2
    (gradient,) = torch.autograd.grad(fit + 0.05 * lengths.sum(), found)
    assert gradient.abs().max() < 1e-3


def jumps_of(x):
    """The jumps of each pixel down and across, 0 beyond the border."""
    down, across = torch.zeros_like(x), torch.zeros_like(x)
    down[:, :, :-1], across[..., :-1] = x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]
    return down, across


def test_least_variation_shortens_the_jump_of_all_channels_together():
    jump = torch.tensor([0.6, -0.2, 0.3], dtype=torch.float64)  # 0.7 long
    y = torch.stack([torch.zeros(3), jump], 1).reshape(1, 3, 1, 2).double()
    for weight, left in ((0.07, 0.56), (0.175, 0.35), (0.5, 0.0)):
        found = least_variation(Identity(), y, weight, rounds=60)
        torch.testing.assert_close(found.diff(dim=3).flatten(), left / 0.7 * jump, atol=0.012, rtol=0)
        torch.testing.assert_close(found.sum(3), y.sum(3))


def test_least_variation_goes_on_with_an_edge_where_the_smoothest_image_blurs_it():
    x = torch.zeros(1, 3, 32, 32)
    x[..., 14:] = torch.tensor([0.9, 0.5, 0.2]).reshape(3, 1, 1)
    hole = torch.ones(32, 32)
    hole[10:22, 6:18] = 0
    operator = Inpainting(hole)
    y = operator.forward(x)
    blurred = (smoothest(operator, y) - x).square().mean()
    assert (least_variation(operator, y) - x).square().mean() < blurred / 2
    assert (least_variation(operator, y, rounds=12, iterations=30) - x).square().mean() < blurred / 3


def test_fills_a_hole_from_around_it():
    x = torch.linspace(0, 1, 32, dtype=torch.float64).expand(2, 3, 32, 32).contiguous()
    hole = torch.ones(2, 1, 32, 32)
    hole[0, :, 8:20, 8:20], hole[1, :, 15:25, 3:15] = 0, 0
    operator = Inpainting(hole)
    found = smoothest(operator, operator.forward(x), weight=1e-4)
    assert (found - x).abs().max() < 0.02
    assert (operator.forward(x) - x).abs().max() > 0.3


@pytest.mark.parametrize("fit", [smoothest, least_variation])
def test_a_users_own_operator_precisions_and_no_images(fit):
    y = torch.rand(2, 3, 8, 8)
    assert fit(Halve(), y).dtype == torch.float32
    torch.testing.assert_close(fit(Halve(), y, weight=1e-9), 2 * y, rtol=1e-4, atol=1e-4)
    assert fit(Halve(), y[:0]).shape == (0, 3, 8, 8)
    black = fit(Downsample(2), torch.zeros(1, 3, 4, 4))
    assert torch.equal(black, torch.zeros(1, 3, 8, 8))


def test_gradient_in_the_measurement():
    operator = Inpainting(torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0]]))
    y = operator.forward(torch.rand(2, 1, 3, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: smoothest(operator, y, 0.5, 8), (y,))
    assert torch.autograd.gradcheck(lambda y: least_variation(operator, y, 0.5, 2, 4), (y,))


@pytest.mark.parametrize("init, fit", [("smooth", smoothest), ("tv", least_variation)])
def test_an_unfolded_network_starts_from_it(init, fit, tmp_path):
    torch.manual_seed(0)
    operator = Downsample(2)
    prox = flowkern.GlowProx(make_glow(dtype=torch.float32))
    net = flowkern.Unfolded(prox, 1, operator, init=init, final="consistency", mu=1e-12)
    y = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(net(y), fit(operator, y), rtol=1e-4, atol=1e-5)
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
    for fit in (smoothest, least_variation):
        with pytest.raises(error, match=message.replace("iterations", "iterations" if fit is smoothest else "rounds")):
            fit(*arguments)
    with pytest.raises(ValueError, match="weight must be positive, got nan"):
        least_variation(Halve(), torch.zeros(1, 1, 2, 2), math.nan)
    with pytest.raises(ValueError, match="iterations must be a positive integer, got True"):
        least_variation(Halve(), torch.zeros(1, 1, 2, 2), 1.0, 3, True)
