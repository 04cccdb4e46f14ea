"""The unfolded network against a literal transcription of the paper's equations 7-11, for denoising and for other
measurements, and its choices and errors.
"""

import copy
import math
from functools import partial

import pytest
import torch
from helpers import kept_bytes
from torch import nn
from unfolded_cases import EXACT, MEASUREMENTS, Bands, Mask, kernel, make_glow, make_net, measured, pixels

import flowkern
from flowkern import reference
from flowkern.operators import (
    Blur,
    Downsample,
    Identity,
    Inpainting,
    Operator,
    RandomProjection,
    gaussian_kernel,
)
from train.stages import is_step_size


def literal(net, y, final="prox", operator=None, scale=1.0):
    """Equations 7-11 as they are printed (equation 7 with mu negated), by the reference's formulas. Exact consistency
    by a dense solve; scale: of the lambdas, () or (N, 1).
    """
    operator = operator or Identity()
    shape = operator.adjoint(y).shape
    zeros = net.proxes[0].raw_lam.new_zeros(shape[0], math.prod(shape[1:]))
    x = reference.glow_inverse(net.proxes[0].glow, zeros)[0]
    for k, prox in enumerate(net.proxes):
        if net.consistency == "exact":
            x_tilde = solved(operator, x, y, torch.log1p(torch.exp(net.raw_rho[k])), shape)
        else:
            minus_mu = -net.mu[k]
            x_tilde = x - minus_mu * operator.adjoint(y - operator.forward(x))  # (7)
        z_tilde, _ = reference.glow_forward(prox.glow, x_tilde)  # (8)
        if final == "consistency" and k == len(net.proxes) - 1:
            return reference.glow_inverse(prox.glow, z_tilde)[0]  # (11)
        z = z_tilde / (1 + torch.log1p(torch.exp(prox.raw_lam)) * scale)  # (9)
        x = reference.glow_inverse(prox.glow, z)[0]  # (10)
    return x


def solved(operator, x, y, rho, shape):
    """The minimiser v of ||A v - y||^2 + rho ||v - x||^2, image by image, with A as a matrix."""
    n, *size = shape
    basis = torch.eye(math.prod(size), dtype=x.dtype)
    a = torch.stack([operator.forward(e.reshape(1, *size).expand(n, *size)).flatten(1) for e in basis], dim=2)
    right = (a.mT @ y.flatten(1)[..., None])[..., 0] + rho * x.flatten(1)
    return torch.linalg.solve(a.mT @ a + rho * basis, right).reshape(shape)


def check_against_literal(net, y, operator=None, final="prox", scale=1.0, **options):
    """That the values, and the gradients of y and all parameters, are the literal ones. Returns the names of those
    without a gradient.
    """
    y = y.detach().requires_grad_()
    expected, got = literal(net, y, final, operator, scale), net(y, **options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    weights = torch.randn_like(got)
    names, inputs = zip(("y", y), *net.named_parameters(), strict=True)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs, materialize_grads=True, allow_unused=True)
    found = torch.autograd.grad((got * weights).sum(), inputs, materialize_grads=True, allow_unused=True)
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    return [name for name, g in zip(names, found, strict=True) if not g.any()]


@pytest.mark.parametrize("operator", [None, Mask()])
@pytest.mark.parametrize("final", ["prox", "consistency"])
def test_equations_and_gradients(final, operator):
    net = make_net(final=final, operator=operator)
    unused = check_against_literal(net, torch.rand(2, 3, 8, 8, dtype=torch.float64), operator, final)
    names = ["y", *dict(net.named_parameters())]
    cancelled = [name for name in names if name.startswith("proxes.2.")] if final == "consistency" else []
    assert set(cancelled) <= set(unused)
    assert "mu" not in unused and "proxes.0.raw_lam" not in unused and "y" not in unused


@pytest.mark.parametrize(
    ("name", "consistency"), [(n, "gradient") for n in MEASUREMENTS] + [(n, "exact") for n in EXACT]
)
def test_equations_and_gradients_of_every_measurement(name, consistency):
    net = make_net(folds=2, operator=MEASUREMENTS[name](), consistency=consistency)
    steps = "mu" if consistency == "gradient" else "raw_rho"
    assert [n for n, p in net.named_parameters() if p.shape == (2,)] == [steps]
    unused = check_against_literal(net, measured(net.operator), net.operator)
    assert not {steps, "y", "proxes.0.raw_lam", "operator.kernel"} & set(unused)


def test_the_transcription_can_fail():
    net, other = (make_net(folds=1, operator=MEASUREMENTS[name]()) for name in ("blur", "blur, reflect"))
    with pytest.raises(AssertionError):
        check_against_literal(net, measured(net.operator), other.operator)


def test_the_own_operator_here_is_one():
    x, y = (torch.rand(*shape, dtype=torch.float64) for shape in ((2, 3, 8, 8), (2, 11, 2)))
    torch.testing.assert_close((Bands().forward(x) * y).sum(), (x * Bands().adjoint(y)).sum())


@pytest.mark.parametrize("name", EXACT)
def test_exact_consistency_halves_the_residual_where_the_gradient_step_does(name):
    """Both start so that A's strongest direction goes half way to the measurement, and no other goes further."""
    operator = MEASUREMENTS[name]().double()
    y = measured(operator)
    left = {}
    for consistency in ("gradient", "exact"):
        net = flowkern.Unfolded(
            nn.Identity(), 1, operator, init=lambda y: torch.zeros_like(operator.adjoint(y)), consistency=consistency
        ).double()
        left[consistency] = ((operator.forward(net(y)) - y).norm() / y.norm()).item()
        assert 0.5 - 1e-6 <= left[consistency] < 1
    gain = operator.norm((3, 8, 8)) ** 2
    torch.testing.assert_close(net.rho, torch.full((1,), gain, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    if name in ("identity", "mask", "projection", "downsample"):  # all of A's directions are as strong
        assert left == pytest.approx({"gradient": 0.5, "exact": 0.5}, abs=1e-5)


def test_many_exact_folds_fit_the_measurement():
    operator = MEASUREMENTS["downsample, kernel"]()
    y = measured(operator, dtype=torch.float32)
    before, after = (
        operator.forward(flowkern.Unfolded(nn.Identity(), folds, operator, consistency="exact")(y)) - y
        for folds in (1, 10)
    )
    assert after.norm() < 0.1 * before.norm()


def test_step_sizes_start_at_half_the_inverse_of_the_squared_norm():
    prox = flowkern.GlowProx(make_glow(dtype=torch.float32))

    def start(operator, prox=prox, **options):
        return flowkern.Unfolded(prox, 1, operator, **options).mu.item()

    assert start(None) == start(Identity()) == start(Mask()) == start(Inpainting(pixels(8, 8))) == 0.5
    assert start(Downsample(4)) == pytest.approx(8) and start(Downsample(4), nn.Identity()) == pytest.approx(8)
    assert start(Downsample(4), mu=0.5) == 0.5 and start(None, mu=2) == 2
    asked = []

    class Sized(Mask):
        def norm(self, size=None):
            asked.append(size)
            if size == (3, 8, 8):
                raise ValueError("for images of another size")
            return 2.0

    assert start(Sized()) == 0.125 and asked == [(3, 8, 8), None]
    assert start(Sized(), nn.Identity()) == 0.125 and asked[2:] == [None]
    assert start(Sized(), mu=1) == 1 and len(asked) == 3
    Sized.norm = lambda self, size: 0.0
    assert start(Sized()) == 0.5
    # A Glow takes images of other sizes than it was made for, and so must not stand in the way of its operator.
    assert start(Downsample(3)) == pytest.approx(4.5)


@pytest.mark.parametrize("consistency", ["gradient", "exact"])
def test_learnt_steps_are_step_sizes_to_the_training_layer(consistency):
    net = flowkern.Unfolded(flowkern.GlowProx(make_glow()), 2, Downsample(2), consistency=consistency)
    steps = {name for name, _ in net.named_parameters() if is_step_size(name)}
    own = {"gradient": "mu", "exact": "raw_rho"}[consistency]
    assert steps == {own, "proxes.0.raw_lam", "proxes.1.raw_lam"}
    assert (net.mu is None, net.raw_rho is None, net.rho is None) == ((own != "mu",) + (own == "mu",) * 2)


def test_complex_measurements():
    """As in magnetic resonance: a real image, of which Fourier coefficients are measured."""

    class Fourier:
        def forward(self, x):
            return torch.fft.fft2(x, norm="ortho")[..., ::2, :]

        def adjoint(self, y):
            full = torch.zeros(*y.shape[:2], 2 * y.shape[2], y.shape[3], dtype=y.dtype)
            full[..., ::2, :] = y
            return torch.fft.ifft2(full, norm="ortho").real

    net = make_net(folds=2, operator=Fourier())
    y = measured(net.operator)
    torch.testing.assert_close(net(y), literal(net, y, operator=net.operator), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_operators_move_with_the_network(name):
    net = flowkern.Unfolded(flowkern.GlowProx(make_glow(dtype=torch.float32)), 1, MEASUREMENTS[name]())
    tensors = {n: t for n, t in net.state_dict().items() if n.startswith("operator.")}
    assert bool(tensors) == (name not in ("identity", "own"))
    net = net.double()
    assert net(measured(net.operator)).dtype == torch.float64
    assert all(t.is_meta for n, t in net.to("meta").state_dict().items() if n in tensors)


@pytest.mark.parametrize("consistency", ["gradient", "exact"])
def test_an_operator_given_with_the_measurement_takes_the_place_of_the_network_s(consistency):
    """As for a mask for each image, and for images of another size."""
    net = make_net(operator=Inpainting(torch.ones(1, 8, 8)), consistency=consistency)
    masks = torch.stack([torch.eye(8), 1 - torch.eye(8)])[:, None]
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64) * masks
    found = net(y, operator=Inpainting(masks))
    for i in range(2):
        net.operator = Inpainting(masks[i])
        torch.testing.assert_close(found[i : i + 1], net(y[i : i + 1]))
    projection = RandomProjection((3, 16, 8), 0.25)
    y = torch.rand(2, 96, dtype=torch.float64)
    found = net(y, operator=projection)
    for prox in net.proxes:
        prox.glow.size = (3, 16, 8)
    torch.testing.assert_close(found, literal(net, y, operator=projection), rtol=1e-9, atol=1e-11)
    with pytest.raises(TypeError, match="operator must have the methods forward and adjoint, got int"):
        net(y, operator=3)


def test_noise_level_scales_lambda():
    net = make_net(folds=2, noise_aware=True)
    plain = make_net(folds=2)
    plain.load_state_dict(net.state_dict())
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(net(y, sigma=0.2), plain(y))
    assert torch.equal(net(y, sigma=torch.tensor(0.3)), net(y, sigma=torch.tensor(0.3, dtype=torch.float64).float()))
    levels = torch.tensor([0.1, 0.4], dtype=torch.float64)
    together = net(y, sigma=levels)
    for i, level in enumerate(levels):
        torch.testing.assert_close(together[i : i + 1], net(y[i : i + 1], sigma=level.item()))
    assert not torch.allclose(together[0], plain(y)[0])
    torch.testing.assert_close(net(y, sigma=0), literal(net, y, scale=0.0), rtol=1e-9, atol=1e-11)
    assert net(y[:0], sigma=levels[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.5])])
def test_equations_and_gradients_with_a_noise_level(sigma):
    net = make_net(folds=2, operator=MEASUREMENTS["blur"](), noise_aware=True, sigma_ref=0.25)
    scale = (torch.as_tensor(sigma, dtype=torch.float64) / 0.25) ** 2
    scale = scale[:, None] if scale.ndim else scale
    unused = check_against_literal(net, measured(net.operator), net.operator, scale=scale, sigma=sigma)
    assert not {"proxes.0.raw_lam", "proxes.1.raw_lam"} & set(unused)


def test_gradient_in_the_noise_level():
    net, sigma = make_net(folds=1, noise_aware=True), torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: net(y, sigma=s).mean(), sigma)


@pytest.mark.parametrize("final", ["prox", "consistency"])
def test_log_prob_is_that_of_each_fold_s_image_and_changes_nothing_else(final):
    net, y = make_net(final=final), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    seen = []
    hooks = [prox.register_forward_pre_hook(lambda prox, args: seen.append((prox, args[0]))) for prox in net.proxes]
    x, log_prob = net(y, return_log_prob=True)
    for hook in hooks:
        hook.remove()
    assert torch.equal(x, net(y)) and log_prob.shape == (3 if final == "prox" else 2, 2)
    torch.testing.assert_close(log_prob, torch.stack([prox.glow.log_prob(image) for prox, image in seen]))

    def objective(weight, y):
        x, log_prob = net(y, return_log_prob=True)
        return x.square().sum() + weight * log_prob.sum()

    assert torch.autograd.gradcheck(lambda y: objective(0.01, y), y.requires_grad_(), fast_mode=True)
    one = flowkern.Unfolded(net.proxes[0], 1, final="consistency")
    assert one(y, return_log_prob=True)[1].shape == (0, 2)


def test_log_prob_is_refused_where_there_is_no_density():
    net = flowkern.Unfolded(flowkern.ResNetProx(3, 4), 2)
    with pytest.raises(TypeError, match="wants proxes with a density, as GlowProx; ResNetProx has none"):
        net(torch.rand(1, 3, 8, 8), return_log_prob=True)


def test_step_size_one_is_the_measurement():
    """With mu = 1 the data-consistency step ends at y, so the sign of equation 7 is the gradient's."""
    net = flowkern.Unfolded(flowkern.GlowProx(make_glow()), folds=1, final="consistency", mu=1.0).double()
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net(y), y)


def test_gradients_agree_between_memory_modes():
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    found = {}
    for memory in ("recompute", "store", "checkpoint"):
        net = make_net()
        for prox in net.proxes:
            prox.glow.memory = memory
        net(y).square().sum().backward()
        found[memory] = [p.grad for p in net.parameters()]
    for memory in ("store", "checkpoint"):
        for a, b in zip(found["recompute"], found[memory], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_single_prox_is_copied_untied():
    prox = flowkern.GlowProx(make_glow(dtype=torch.float32))
    before = copy.deepcopy(prox.state_dict())
    net = flowkern.Unfolded(prox, folds=3)
    assert len({id(p) for p in net.parameters()}) == 3 * len(list(prox.parameters())) + 1
    net(torch.rand(2, 3, 8, 8)).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert all(torch.equal(before[k], v) for k, v in prox.state_dict().items())
    weights = [fold.glow.levels[0].steps[0].conv.lower for fold in net.proxes]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_sequence_is_used_as_given():
    proxes = [flowkern.GlowProx(make_glow(dtype=torch.float32)) for _ in range(2)]
    net = flowkern.Unfolded(proxes, folds=2)
    assert all(a is b for a, b in zip(net.proxes, proxes, strict=True))


def test_start_values():
    net = flowkern.Unfolded(flowkern.GlowProx(make_glow(), lam=0.05))
    assert len(net.proxes) == 4
    assert torch.equal(net.mu, torch.full((4,), 0.5))
    assert all(abs(prox.lam.item() - 0.05) < 1e-6 for prox in net.proxes)


def test_starts_at_the_latent_mode_computed_once_per_batch(monkeypatch):
    net = make_net(folds=2)
    sizes = []
    inverse = flowkern.Glow.inverse
    monkeypatch.setattr(
        flowkern.Glow, "inverse", lambda self, z, *a, **k: sizes.append(len(z)) or inverse(self, z, *a, **k)
    )
    net(torch.rand(5, 3, 8, 8, dtype=torch.float64))
    assert sizes.count(1) == 1


def test_init_overrides():
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    seen = []

    def halved(measured):
        seen.append(measured)
        return measured / 2

    net = make_net(folds=1, final="consistency", mu=0.25, init=halved)
    with torch.no_grad():
        net.mu.fill_(0.25)
    torch.testing.assert_close(net(y), y / 2 + 0.25 * (y - y / 2))
    assert len(seen) == 1
    net = make_net(folds=1, final="consistency", init="adjoint", operator=Mask())
    assert torch.equal(net(y), Mask().adjoint(y))


def test_prox_without_a_mode_starts_from_the_adjoint():
    net = flowkern.Unfolded(nn.Conv2d(3, 3, 1), folds=2)
    assert net.init == "adjoint"
    with pytest.raises(ValueError, match="most likely image; Conv2d has none"):
        flowkern.Unfolded(nn.Conv2d(3, 3, 1), init="mode")
    assert flowkern.Unfolded(nn.Sequential(nn.Conv2d(3, 3, 1)), folds=2)(torch.rand(1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_final_may_be_changed_after_training():
    net = make_net()
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    net.final = "consistency"
    torch.testing.assert_close(net(y), literal(net, y, "consistency"), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="final must be 'prox' or 'consistency', got 'last'"):
        net.final = "last"


def test_other_sizes_and_empty_batches():
    net = make_net()
    made_for_it = copy.deepcopy(net)
    for prox in made_for_it.proxes:
        prox.glow.size = (3, 12, 4)
    y = torch.rand(2, 3, 12, 4, dtype=torch.float64)
    torch.testing.assert_close(net(y), literal(made_for_it, y), rtol=1e-9, atol=1e-11)
    assert net(y[:0]).shape == (0, 3, 12, 4)


def test_memory_does_not_grow_with_depth():
    y = torch.rand(37, 3, 8, 8)  # 37 divides no other size here

    def net(memory, depth):
        return flowkern.Unfolded(flowkern.GlowProx(make_glow(depth=depth, dtype=torch.float32, memory=memory)), folds=2)

    kept = {
        (memory, depth): kept_bytes(partial(net(memory, depth), y), len(y))
        for memory in ("recompute", "store")
        for depth in (2, 8)
    }
    assert kept["recompute", 2] == kept["recompute", 8]
    # Fold boundaries, latents and the levels' outputs in both directions: a dozen images a fold at most.
    assert 0 < kept["recompute", 8] <= 2 * 12 * y.nbytes
    assert kept["store", 8] > 3 * kept["store", 2] > kept["recompute", 2]


def aware(prox, sigma):
    return flowkern.Unfolded(prox, noise_aware=True)(torch.zeros(2, 3, 8, 8), sigma=sigma)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: flowkern.Unfolded([p, p], 3), ValueError, "got 2 prox modules for 3 folds"),
        (
            lambda p: flowkern.Unfolded("glow"),
            TypeError,
            "prox must be a module, or a sequence of one module a fold, got str",
        ),
        (lambda p: flowkern.Unfolded([p, 1], 2), TypeError, "prox must be a module, or a sequence"),
        (lambda p: flowkern.Unfolded(p, 0), ValueError, "folds must be a positive integer, got 0"),
        (lambda p: flowkern.Unfolded(p, True), ValueError, "folds must be a positive integer, got True"),
        (
            lambda p: flowkern.Unfolded(p, operator=3),
            TypeError,
            "operator must have the methods forward and adjoint, got int",
        ),
        (
            lambda p: flowkern.Unfolded(p, init="zero"),
            ValueError,
            "init must be 'mode', 'adjoint', 'smooth', 'tv' or a function of y, got 'zero'",
        ),
        (lambda p: flowkern.Unfolded(p, final="z"), ValueError, "final must be 'prox' or 'consistency', got 'z'"),
        (lambda p: flowkern.Unfolded(p, mu=math.nan), ValueError, "mu must be a finite number, got nan"),
        (
            lambda p: flowkern.Unfolded(p)(torch.zeros(3, 8, 8)),
            ValueError,
            r"y must be .* \(N, C, H, W\), got \(3, 8, 8\)",
        ),
        (lambda p: flowkern.Unfolded(p)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), ValueError, "of torch.uint8"),
        (lambda p: flowkern.Unfolded(p)([1]), ValueError, "got list"),
        (lambda p: flowkern.Unfolded(p, mu="x"), ValueError, "mu must be a finite number, got 'x'"),
        (
            lambda p: flowkern.Unfolded(p, consistency="proximal"),
            ValueError,
            "consistency must be 'gradient' or 'exact', got 'proximal'",
        ),
        (
            lambda p: flowkern.Unfolded(p, operator=Mask(), consistency="exact"),
            TypeError,
            "exact consistency needs an operator with normal_inverse or prox, not Mask",
        ),
        (
            lambda p: flowkern.Unfolded(p, operator=Blur(kernel(3, 3), "reflect"), consistency="exact"),
            TypeError,
            "exact consistency needs an operator with normal_inverse or prox, not Blur",
        ),
        (
            lambda p: flowkern.Unfolded(p, consistency="exact", mu=0.5),
            ValueError,
            "exact consistency learns rho and has no step size mu, got mu=0.5",
        ),
        (lambda p: flowkern.Unfolded(p, operator=Bands())("y"), ValueError, "must be a floating-point tensor, got str"),
        (
            lambda p: flowkern.Unfolded(p, operator=Mask())(torch.zeros(1, 3, 8, 8, dtype=torch.int64)),
            ValueError,
            r"must be a floating-point tensor, got \(1, 3, 8, 8\) of torch.int64",
        ),
        (
            lambda p: flowkern.Unfolded(p)(torch.zeros(1, 3, 8, 8, dtype=torch.complex64)),
            ValueError,
            "of torch.complex64",
        ),
        (
            lambda p: flowkern.Unfolded(p, 1, Mask(), init=lambda y: y.mean(1, keepdim=True))(torch.zeros(1, 3, 8, 8)),
            ValueError,
            r"expected y of shape \(1, 1, 8, 8\) by its operator, got \(1, 3, 8, 8\)",
        ),
        (
            lambda p: flowkern.Unfolded(p, operator=RandomProjection((3, 8, 8), 0.5))(torch.zeros(1, 3, 8, 8)),
            ValueError,
            r"RandomProjection wants measurements \(N, 96\), got",
        ),
        (
            lambda p: flowkern.Unfolded(nn.Identity(), noise_aware=True),
            TypeError,
            "noise_aware=True scales the lambda of a prox; Identity has none",
        ),
        (lambda p: flowkern.Unfolded(p, sigma_ref=0), ValueError, "sigma_ref must be a positive number, got 0"),
        (
            lambda p: flowkern.Unfolded(p)(torch.zeros(1, 3, 8, 8), sigma=0.2),
            ValueError,
            "sigma is for a network made with noise_aware=True, and this one was not",
        ),
        (lambda p: aware(p, None), ValueError, "made with noise_aware=True and wants the noise level"),
        (lambda p: aware(p, -0.1), ValueError, "sigma must be a number >= 0, .* got -0.1"),
        (lambda p: aware(p, "low"), ValueError, "sigma must be a number >= 0, .* got 'low'"),
        (lambda p: aware(p, math.inf), ValueError, "sigma must be a number >= 0, .* got inf"),
        (lambda p: aware(p, torch.ones(3)), ValueError, r"one for each of the 2 images, got \(3,\)"),
        (lambda p: aware(p, torch.tensor([0.1, -1])), ValueError, "sigma must be >= 0, got a tensor"),
        (lambda p: aware(p, torch.tensor(math.nan)), ValueError, "sigma must be >= 0, got a tensor"),
        (lambda p: flowkern.GlowProx(nn.Identity()), TypeError, "glow must be a flowkern.Glow, got Identity"),
        (
            lambda p: flowkern.GlowProx(flowkern.Glow((3, 8, 8), levels=1, depth=1, hidden=4, context_channels=2)),
            ValueError,
            "GlowProx wants an unconditioned Glow; this one has context_channels",
        ),
        (
            lambda p: flowkern.Unfolded(p)(torch.zeros(2, 1, 8, 8)),
            ValueError,
            r"expected images of shape \(N, 3, H, W\), got \(2, 1, 8, 8\)",
        ),
        (lambda p: flowkern.GlowProx(p.glow, lam=0), ValueError, "lam must be a positive number, got 0"),
        (lambda p: flowkern.GlowProx(p.glow, lam="x"), ValueError, "lam must be a positive number, got 'x'"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make(flowkern.GlowProx(make_glow(dtype=torch.float32)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("consistency", ["gradient", "exact"])
def test_steps_and_shrinkages_are_of_the_flow_s_dtype_and_on_its_device(consistency):
    """So that a Glow that was moved first makes a network that works."""
    net = flowkern.Unfolded(flowkern.GlowProx(make_glow()), folds=2, consistency=consistency)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net(y), literal(net, y))
    with torch.device("meta"):
        glow = flowkern.Glow((3, 8, 8), levels=2, depth=1, hidden=4)
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2, consistency=consistency)
    assert {p.device.type for p in net.parameters()} == {"meta"}


@pytest.mark.parametrize("init", ["mode", "adjoint"])
@pytest.mark.parametrize(("own", "given"), [("float64", "float32"), ("float32", "bfloat16"), ("float32", "float16")])
def test_a_measurement_of_less_precision_is_taken_up_to_the_network_s(own, given, init):
    net = make_net(dtype=getattr(torch, own), init=init)
    y = torch.rand(3, 3, 8, 8).to(getattr(torch, given))
    found = net(y)
    assert found.dtype == getattr(torch, own)
    # From y itself the first step computes in y's own precision.
    torch.testing.assert_close(found, net(y.to(found)), atol=0 if init == "mode" else 0.02, rtol=1e-5)


@pytest.mark.parametrize("init", ["mode", "adjoint"])
def test_a_measurement_of_more_precision_is_refused(init):
    with pytest.raises(TypeError, match="the images are torch.float64 and the Glow is torch.float32; call glow.double"):
        make_net(dtype=torch.float32, init=init)(torch.rand(2, 3, 8, 8, dtype=torch.float64))


def test_a_noise_level_and_a_weight_may_be_a_tensor_of_one():
    net = make_net(folds=2, noise_aware=True)
    y = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(net(y, sigma=torch.tensor([0.25])), net(y, sigma=0.25))
    blur, rho = Blur(gaussian_kernel(1.0)), torch.tensor([0.3])
    assert torch.equal(blur.normal_inverse(y, rho), blur.normal_inverse(y, torch.tensor(0.3)))


def test_an_operator_that_fails_on_other_sizes_is_taken_to_have_norm_one():
    class Weighted(Operator):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.rand(5, 16, 16))

        def forward(self, x):
            return self.weight * x

        adjoint = forward

    net = flowkern.Unfolded(flowkern.ResNetProx(5, 4), folds=1, operator=Weighted())
    assert net.mu.tolist() == [0.5] and net(torch.rand(1, 5, 16, 16)).shape == (1, 5, 16, 16)
