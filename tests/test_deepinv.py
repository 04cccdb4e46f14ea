"""The adapter for deepinv, against a stand-in of its documented interface, and against deepinv where it imports."""

import importlib.util
import inspect
import math
import re
import sys
import warnings
from pathlib import Path

import deepinv_standin
import pytest
import torch
from helpers import small_glow

import flowkern
from flowkern import adapters, operators
from flowkern.operators import Blur, Downsample, Inpainting, RandomProjection, exact_consistency

ROOT = Path(__file__).parent.parent
SIZE = (2, 6, 8)


def adapter():
    """flowkern.adapters.deepinv, made anew from the deepinv that sys.modules has."""
    path = Path(adapters.__file__).parent / "deepinv.py"
    spec = importlib.util.spec_from_file_location("flowkern_deepinv", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def real():
    """The deepinv that is installed, or a skip."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepinv
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"deepinv does not import here: {error}")
    return deepinv


@pytest.fixture(params=["stand-in", "deepinv"])
def deepinv(request, monkeypatch):
    """The stand-in and the real package in turn, as what `import deepinv` finds."""
    if request.param == "deepinv":
        return request.getfixturevalue("real")
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepinv"]:
        monkeypatch.delitem(sys.modules, name)
    found = deepinv_standin.modules()
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found["deepinv"]


@pytest.fixture
def ours(deepinv):
    return adapter()


@pytest.fixture
def glow():
    return small_glow((2, 4, 4), levels=2, depth=2, hidden=4)


def random(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kernel(*shape):
    made = random(*shape, seed=3)
    return made / made.sum(dim=(-2, -1), keepdim=True)


def dense(function, size):
    """A linear function as a matrix, column by column."""
    basis = torch.eye(math.prod(size), dtype=torch.float64)
    return torch.stack([function(e.reshape(1, *size)).flatten() for e in basis], dim=1)


def solve(matrix, b, rho):
    """(A^T A + rho I)^-1 b, image by image."""
    solved = []
    for image, r in zip(b, torch.as_tensor(rho).expand(len(b)), strict=True):
        solved.append(torch.linalg.solve(matrix.mT @ matrix + r * torch.eye(len(matrix.mT)).to(b), image.flatten()))
    return torch.stack(solved).view_as(b)


def matrix_physics(deepinv, **options):
    """A physics made of functions: a random matrix, of norm 1."""
    matrix = torch.randn(20, math.prod(SIZE), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    matrix = matrix / torch.linalg.matrix_norm(matrix, 2)
    made = deepinv.physics.LinearPhysics(
        A=lambda x, **kwargs: x.flatten(1) @ matrix.mT, A_adjoint=lambda y, **kwargs: (y @ matrix).unflatten(1, SIZE),
        img_size=SIZE, **options,
    )
    return made.double()


def masked(deepinv, **options):
    mask = (random(*SIZE) > 0.5).double()
    return deepinv.physics.Inpainting(img_size=SIZE, mask=mask, **options).double()


# Those of the real package: how to make it, the size of the images, whether its prox_l2 is a closed form that holds.
PHYSICS = {
    "Denoising": (lambda p: p.Denoising(), SIZE, True),
    "Inpainting": (lambda p: p.Inpainting(img_size=SIZE, mask=(random(*SIZE) > 0.5).double()), SIZE, True),
    "Demosaicing": (lambda p: p.Demosaicing(img_size=(3, 6, 8)), (3, 6, 8), True),
    "BlurFFT": (lambda p: p.BlurFFT(img_size=SIZE, filter=kernel(1, 1, 3, 3)), SIZE, True),
    "MRI": (lambda p: p.MRI(mask=(random(6, 8) > 0.5).double(), img_size=SIZE), SIZE, True),
    "SinglePixelCamera": (lambda p: p.SinglePixelCamera(m=20, img_size=(1, 8, 8), fast=True), (1, 8, 8), True),
    "Downsampling": (
        lambda p: p.Downsampling(img_size=SIZE, filter=kernel(1, 1, 3, 3), factor=2, padding="circular"), SIZE, True),
    "Blur": (lambda p: p.Blur(filter=kernel(1, 1, 3, 3), padding="circular"), SIZE, False),
    "Blur, valid": (lambda p: p.Blur(filter=kernel(1, 1, 3, 3), padding="valid"), SIZE, False),
    "Downsampling, reflect": (
        lambda p: p.Downsampling(img_size=SIZE, filter=kernel(1, 1, 3, 3), factor=2, padding="reflect"), SIZE, False),
    "Decolorize": (lambda p: p.Decolorize(), (3, 6, 8), False),  # has a closed form, which forgets the colours
    "Upsampling": (
        lambda p: p.Upsampling(img_size=(2, 12, 16), filter=kernel(1, 1, 3, 3), padding="circular"), SIZE, False),
    "composition": (
        lambda p: p.Downsampling(img_size=SIZE, filter=kernel(1, 1, 3, 3), padding="circular")
        * p.Blur(filter=kernel(1, 1, 3, 3), padding="circular"), SIZE, False),
}


def check_operator(ours, physics, size, exact):
    """Everything that an operator promises, on a physics in fp64."""
    state = {name: getattr(physics, name) for name in ("max_iter", "tol", "solver")}
    operator = ours.Operator(physics, size=size)
    assert {name: getattr(physics, name) for name in state} == state  # trying it out left no trace
    x, matrix = random(2, *size, seed=1), dense(operator.forward, size)
    measured = operator.forward(x)
    torch.testing.assert_close(measured.flatten(1), x.flatten(1) @ matrix.mT)
    y = random(*measured.shape, seed=2)
    torch.testing.assert_close(operator.adjoint(y).flatten(1), y.flatten(1) @ matrix, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(operator.forward, x[:1].clone().requires_grad_())
    assert torch.autograd.gradcheck(operator.adjoint, y[:1].clone().requires_grad_())
    assert operator.norm() == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-2)
    assert hasattr(operator, "normal_inverse") == exact
    for rho in (0.7, torch.tensor(0.7), torch.tensor([0.3, 2.0], dtype=torch.float64)) if exact else ():
        torch.testing.assert_close(operator.normal_inverse(x, rho), solve(matrix, x, rho))
    if exact:
        v = exact_consistency(operator, x, y, 0.5)
        torch.testing.assert_close(v, solve(matrix, operator.adjoint(y) + 0.5 * x, 0.5))
        rho = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(operator.normal_inverse, (x[:1].clone().requires_grad_(), rho))


@pytest.mark.parametrize("name", PHYSICS)
def test_physics_of_the_real_package(real, name):
    build, size, exact = PHYSICS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deepinv's, that a composition keeps the noise of its last part
        check_operator(adapter(), build(real.physics).double(), size, exact)


def test_the_size_is_the_physics_own_or_given(real):
    ours = adapter()
    assert ours.Operator(real.physics.Demosaicing(img_size=(3, 6, 8))).size == (3, 6, 8)
    denoising = ours.Operator(real.physics.Denoising())
    assert denoising.size is None and not hasattr(denoising, "normal_inverse")  # it can't be tried out
    sampling = real.physics.CompressedSensing(m=20, img_size=SIZE)
    x = random(2, *SIZE).float()
    operator = ours.Operator(sampling)
    y = torch.randn(2, 20)
    torch.testing.assert_close((operator.forward(x) * y).sum(), (x * operator.adjoint(y)).sum())


def test_stacked_physics_are_refused(real):
    stacked = real.physics.Denoising().stack(real.physics.Denoising())
    with pytest.raises(TypeError, match="must be one tensor, and those of StackedLinearPhysics are a TensorList"):
        adapter().Operator(stacked).forward(torch.rand(1, 1, 4, 4))


def test_physics_as_operators(deepinv, ours):
    check_operator(ours, masked(deepinv), SIZE, True)
    check_operator(ours, matrix_physics(deepinv), SIZE, False)


def test_the_solver_where_it_is_asked_for(deepinv, ours):
    operator = ours.Operator(matrix_physics(deepinv, max_iter=200, tol=1e-10), iterative=True)
    x, matrix = random(2, *SIZE), dense(operator.forward, SIZE)
    rho = torch.tensor([0.3, 2.0], dtype=torch.float64)
    torch.testing.assert_close(operator.normal_inverse(x, rho), solve(matrix, x, rho), rtol=1e-5, atol=1e-5)
    one = torch.tensor(0.7)
    torch.testing.assert_close(operator.normal_inverse(x, one), solve(matrix, x, 0.7), rtol=1e-5, atol=1e-5)
    x, rho = x.requires_grad_(), rho.requires_grad_()
    weight = random(*x.shape, seed=4)
    found = torch.autograd.grad((operator.normal_inverse(x, rho) * weight).sum(), (x, rho))
    wanted = torch.autograd.grad((solve(matrix, x, rho) * weight).sum(), (x, rho))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_closed_form_that_is_wrong_is_not_offered(deepinv, ours):
    class Wrong(deepinv.physics.LinearPhysics):
        def prox_l2(self, z, y, gamma, **kwargs):
            return z if type(z) is torch.Tensor else y

    class Failing(Wrong):
        def prox_l2(self, z, y, gamma, **kwargs):
            raise AssertionError("no circular padding")

    for kind in (Wrong, Failing):
        physics = kind(A_adjoint=lambda y, **kwargs: y, img_size=SIZE)
        assert not hasattr(ours.Operator(physics), "normal_inverse")
        with pytest.raises(TypeError, match="exact consistency needs an operator with normal_inverse"):
            flowkern.Unfolded(torch.nn.Identity(), operator=ours.Operator(physics), consistency="exact")


def test_noise_is_left_out_and_offered(deepinv, ours):
    operator = ours.Operator(masked(deepinv, noise_model=deepinv.physics.GaussianNoise(sigma=0.5)))
    x = random(2, *SIZE)
    assert torch.equal(operator.forward(x), x * operator.physics.mask)
    noise = operator.measure(x) - operator.forward(x)
    assert 0.3 < noise.std() < 0.7


def test_what_operators_of_physics_refuse(deepinv, ours):
    with pytest.raises(TypeError, match="physics must be a deepinv.physics.LinearPhysics, got Identity"):
        ours.Operator(torch.nn.Identity())
    operator = ours.Operator(masked(deepinv))
    with pytest.raises(ValueError, match=r"Inpainting does not measure images of size \(1, 5, 5\)"):
        operator.norm((1, 5, 5))
    with pytest.raises(ValueError, match="size must be three positive integers"):
        ours.Operator(masked(deepinv), size=(3, 4))
    assert not hasattr(operator, "config")


@pytest.mark.parametrize("consistency", ["gradient", "exact"])
def test_training_on_a_physics(deepinv, ours, consistency):
    glow = small_glow((2, 8, 8), levels=2, depth=2, hidden=4, dtype=torch.float32)
    mask = (random(2, 8, 8) > 0.5).float()
    physics = deepinv.physics.Inpainting(img_size=(2, 8, 8), mask=mask)
    operator = ours.Operator(physics)
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2, operator=operator, consistency=consistency)
    wanted = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2, operator=Inpainting(mask), consistency=consistency)
    x = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(physics(x)), wanted(physics(x)))
    assert any(name.startswith("operator.physics.") for name in net.state_dict())
    adam, losses = torch.optim.Adam(net.parameters(), lr=3e-3), []
    for _ in range(8):
        loss = (net(operator.measure(x)) - x).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


class Solved(Blur):
    """A blur that offers the minimiser instead of the inverse that it takes."""

    normal_inverse = None

    def prox(self, x, y, rho):
        return self._normal_inverse(self.adjoint(y) + rho * x, rho if isinstance(rho, float) else rho.flatten())


OPERATORS = {
    "inpainting": lambda: Inpainting((random(2, *SIZE) > 0.5).double()),
    "blur": lambda: Blur(kernel(3, 3)),
    "downsample": lambda: Downsample(2).double(),
    "projection": lambda: RandomProjection(SIZE, 0.4),
    "own prox": lambda: Solved(kernel(3, 3)),
    "reflect": lambda: Blur(kernel(3, 3), "reflect"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_as_physics(deepinv, ours, name):
    operator = OPERATORS[name]()
    physics = ours.Physics(operator, max_iter=200, tol=1e-10).double()
    x, z = random(2, *SIZE, seed=1), random(2, *SIZE, seed=2)
    y = physics(x)
    assert torch.equal(y, operator.forward(x)) and torch.equal(physics.A_adjoint(y), operator.adjoint(y))
    assert physics.img_size == operator.size
    matrices = [dense(lambda e, i=i: operator.forward(e.expand(2, *SIZE))[i : i + 1], SIZE) for i in range(2)]
    norm = physics.compute_sqnorm(x, max_iter=300, tol=1e-7, verbose=False).sqrt().item()
    assert norm == pytest.approx(max(torch.linalg.matrix_norm(m, 2).item() for m in matrices), rel=1e-2)

    def wanted(z, gamma):
        b = operator.adjoint(y) + z / gamma
        return torch.cat([solve(m, b[i : i + 1], 1 / gamma) for i, m in enumerate(matrices)])

    tolerance = {} if name != "reflect" else {"rtol": 1e-4, "atol": 1e-4}  # there by deepinv's iteration
    for gamma in (0.7, 2, torch.tensor([0.7]), torch.tensor(0.7, dtype=torch.float64)):
        torch.testing.assert_close(physics.prox_l2(z, y, gamma), wanted(z, float(gamma)), **tolerance)
    zero = torch.zeros_like(x)
    torch.testing.assert_close(physics.prox_l2(None, y, 0.7), wanted(zero, 0.7), **tolerance)
    torch.testing.assert_close(physics.prox_l2(0.0, y, 0.7), wanted(zero, 0.7), **tolerance)
    torch.testing.assert_close(physics.prox_l2(0.5, y, 0.7), wanted(zero + 0.5, 0.7), **tolerance)
    gamma = torch.tensor([0.4, 3.0], dtype=torch.float64)
    both = torch.cat([wanted(z, g)[i : i + 1] for i, g in enumerate(gamma.tolist())])
    torch.testing.assert_close(physics.prox_l2(z[:1], y, 0.7), wanted(z[:1], 0.7), **tolerance)
    torch.testing.assert_close(physics.prox_l2(z, y, gamma.view(2, 1, 1, 1)), both, **tolerance)
    if name != "reflect":  # whose smallest singular values are out of reach
        torch.testing.assert_close(physics.A(physics.A_dagger(y)), y, rtol=1e-2, atol=1e-2)


def test_a_physics_of_an_operator_is_a_module_with_noise(deepinv, ours):
    physics = ours.Physics(Blur(torch.nn.Parameter(kernel(3, 3))), deepinv.physics.GaussianNoise(sigma=0.5))
    assert [name for name, _ in physics.named_parameters()] == ["operator.kernel"]
    x = random(2, *SIZE)
    assert 0.3 < (physics(x) - physics.A(x)).std() < 0.7
    assert torch.equal(physics.A(x, sigma=0.1), physics.A(x))  # deepinv passes what it has to the noise and to A
    again = ours.Operator(physics, size=SIZE)
    torch.testing.assert_close(again.normal_inverse(x, 0.5), physics.operator.normal_inverse(x, 0.5))
    with pytest.raises(TypeError, match="operator must have the methods forward and adjoint, got ReLU"):
        ours.Physics(torch.nn.ReLU())


@pytest.mark.parametrize("memory", ["recompute", "store"])
def test_prior(deepinv, ours, glow, memory):
    glow.memory = memory
    prior, x = ours.Prior(glow), random(3, 2, 4, 4)
    assert prior.explicit_prior and isinstance(prior, deepinv.optim.Prior)
    assert {id(p) for p in prior.parameters()} == {id(p) for p in glow.parameters()}
    value = prior(x, 0.1, reduce=False)
    torch.testing.assert_close(value, -glow.log_prob(x))
    assert value.shape == (3,)
    (value_gradient,) = torch.autograd.grad(value.sum(), next(glow.parameters()))
    assert value_gradient.abs().sum() > 0
    found, step = prior.grad(x, 0.1), 1e-6
    with torch.no_grad():
        torch.testing.assert_close(prior.grad(x), found.detach())
        for direction in (random(3, 2, 4, 4, seed=s) - 0.5 for s in range(3)):
            difference = (prior.fn(x + step * direction) - prior.fn(x - step * direction)) / (2 * step)
            torch.testing.assert_close((found * direction).flatten(1).sum(1), difference, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(prior.grad(x), found.detach())
    assert not x.requires_grad and all(p.requires_grad and p.grad is None for p in glow.parameters())


def test_training_through_the_priors_gradient_wants_a_graph(deepinv, ours, glow):
    x = random(2, 2, 4, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="use memory='store'"):
        ours.Prior(glow).grad(x)
    glow.memory = "store"
    assert torch.autograd.gradcheck(ours.Prior(glow).grad, x[:1].detach().requires_grad_())
    parameter = next(glow.parameters())
    assert torch.autograd.grad(ours.Prior(glow).grad(x.detach()).square().sum(), parameter)[0].abs().sum() > 0


def test_prior_of_a_conditioned_glow(deepinv, ours):
    torch.manual_seed(0)
    glow = flowkern.Glow((2, 4, 4), levels=2, depth=2, hidden=4, context_channels=3).double()
    x, context = random(2, 2, 4, 4), random(2, 3)
    glow.initialize(x, context)
    torch.testing.assert_close(ours.Prior(glow, context)(x), -glow.log_prob(x, context))


def test_prox_of_the_prior_is_a_minimum(deepinv, ours, glow):
    prior, x = ours.Prior(glow), random(3, 2, 4, 4)
    gamma = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)

    def objective(u):
        return gamma * prior.fn(u) + 0.5 * (u - x).square().flatten(1).sum(1)

    u = prior.prox(x, 0.1, gamma=gamma[:, None, None, None], max_iter_inter=400)
    with torch.no_grad():
        assert bool((objective(u) < objective(x)).all())
        slope = gamma[:, None, None, None] * prior.grad(u) + (u - x)  # 0 at a stationary point
        start = gamma[:, None, None, None] * prior.grad(x)
        assert bool((slope.flatten(1).norm(dim=1) < 0.1 * start.flatten(1).norm(dim=1)).all())
        torch.testing.assert_close(prior.prox(x[:1], gamma=1e-3, max_iter_inter=400), u[:1])
        assert torch.equal(prior.prox(x, gamma=0.1, max_iter_inter=0), x)
    with pytest.raises(RuntimeError, match="no gradients; call it under torch.no_grad"):
        prior.prox(x.requires_grad_())
    with pytest.raises(TypeError, match="glow must be a flowkern.Glow, got Identity"):
        ours.Prior(torch.nn.Identity())


def test_descent_lowers_its_objective(deepinv, ours, glow):
    """Gradient descent and proximal gradient descent on 1/2 ||A x - y||^2 + lambda g(x), as deepinv's loops do it."""
    prior, lam = ours.Prior(glow), 1e-3
    physics = ours.Physics(Inpainting((random(2, 4, 4, seed=7) > 0.4).double()))
    y = physics(random(2, 2, 4, 4))

    def objective(x):
        with torch.no_grad():
            return 0.5 * (physics.A(x) - y).square().flatten(1).sum(1) + lam * prior(x)

    def gradient(x):
        return physics.A_adjoint(physics.A(x) - y)

    for descend in (
        lambda x: x - 0.01 * (gradient(x) + lam * prior.grad(x)),
        lambda x: prior.prox(x - 0.5 * gradient(x), gamma=0.5 * lam),
    ):
        x, values = physics.A_adjoint(y), []
        for _ in range(6):
            values.append(objective(x))
            x = descend(x)
        values.append(objective(x))
        assert all(bool((after < before).all()) for before, after in zip(values, values[1:], strict=False))
        assert not x.requires_grad


def test_plug_and_play_draws_to_the_measurement_and_to_what_is_likely(deepinv, ours):
    """Half-quadratic splitting, x = prox_l2(D(x)), both ways with the objective that it lowers: in latents, of the
    prior; in images, of the data."""
    glow = small_glow((2, 4, 4), levels=2, depth=2, hidden=4)
    denoiser = ours.Denoiser(flowkern.GlowProx(glow).double(), sigma_ref=0.2)
    physics = ours.Physics(Inpainting((random(2, 4, 4, seed=7) > 0.4).double()))
    y = physics(random(2, 2, 4, 4))
    with torch.no_grad():
        x = torch.zeros_like(y)
        values, length = [], []
        for _ in range(4):
            denoised = denoiser(x, 0.1)
            length.append((glow(denoised)[0].norm(dim=1) / glow(x)[0].norm(dim=1)).max())
            x = physics.prox_l2(denoised, y, 3.0)
            values.append((physics.A(x) - y).square().flatten(1).sum(1))
    assert max(length) < 1 and bool((values[-1] < values[0]).all())


def test_denoisers(deepinv, ours, glow):
    x = random(3, 2, 4, 4)
    prox = flowkern.GlowProx(glow).double()
    denoiser = ours.Denoiser(prox, sigma_ref=0.1)
    assert isinstance(denoiser, deepinv.models.Denoiser) and next(denoiser.parameters()).dtype == torch.float64
    torch.testing.assert_close(denoiser(x, 0.1), prox(x))
    torch.testing.assert_close(denoiser(x), prox(x))
    levels = torch.tensor([0.05, 0.1, 0.2])
    torch.testing.assert_close(denoiser(x, levels), prox(x, (levels.double() / 0.1) ** 2))
    for same in (0.2, [0.2], torch.tensor(0.2), torch.full((1,), 0.2), torch.full((3, 1, 1, 1), 0.2)):
        torch.testing.assert_close(denoiser(x, same), prox(x, 4.0), rtol=1e-6, atol=1e-6)
    resnet = flowkern.prox.ResNetProx(2, features=4, blocks=1).double().eval()
    torch.testing.assert_close(ours.Denoiser(resnet)(x, 0.1), resnet(x))
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2).double()
    torch.testing.assert_close(ours.Denoiser(net)(x, 0.1), net(x))
    aware = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2, noise_aware=True).double()
    torch.testing.assert_close(ours.Denoiser(aware)(x, levels.view(3, 1, 1, 1)), aware(x, sigma=levels))
    with pytest.raises(ValueError, match="a denoiser's operator is the identity, not Downsample"):
        ours.Denoiser(flowkern.Unfolded(flowkern.GlowProx(glow), operator=Downsample(2)))
    with pytest.raises(TypeError, match="model must be a prox or an Unfolded, got float"):
        ours.Denoiser(0.1)
    with pytest.raises(ValueError, match="sigma_ref must be a positive number"):
        ours.Denoiser(prox, sigma_ref=0)


class Plain:
    """A user's operator, no module."""

    def forward(self, x):
        return x.flip(3)

    def adjoint(self, y):
        return y.flip(3)


@pytest.mark.parametrize("consistency", ["gradient", "exact"])
def test_reconstructor(deepinv, ours, glow, consistency):
    mask = (random(2, 4, 4, seed=7) > 0.4).double()
    operator = Inpainting(mask)
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2, operator=operator, consistency=consistency).double()
    physics = deepinv.physics.Inpainting(img_size=(2, 4, 4), mask=mask).double()
    other = deepinv.physics.Inpainting(img_size=(2, 4, 4), mask=1 - mask).double()
    y = physics(random(3, 2, 4, 4))
    model = ours.Reconstructor(net)
    assert isinstance(model, deepinv.models.Reconstructor)
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}
    for same in (physics, ours.Physics(operator), ours.Physics(Inpainting(mask))):
        torch.testing.assert_close(model(y, same), net(y))
    with pytest.raises(ValueError, match=r"other measurements, \d+% off on a test pattern; Reconstructor\(net, given"):
        model(y, other)
    given = ours.Reconstructor(net, given=True)
    wanted = flowkern.Unfolded(list(net.proxes), 2, Inpainting(1 - mask), consistency=consistency).double()
    wanted.load_state_dict(net.state_dict() | {"operator.mask": 1 - mask[None]})
    torch.testing.assert_close(given(y, other), wanted(y))
    assert net.operator is operator
    given(y, other).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_reconstructors_refuse_other_shapes(deepinv, ours, glow):
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=1, operator=Downsample(2)).double()
    y = random(2, 2, 2, 2)
    asked = (r"the network was trained to make images \(2, 2, 4, 4\) of measurements \(2, 2, 2, 2\), "
             "and the physics given, ")
    for given in (False, True):
        model = ours.Reconstructor(net, given=given)
        torch.testing.assert_close(model(y, ours.Physics(Downsample(2).double())), net(y))
        with pytest.raises(ValueError, match=asked + r"Physics, has \(2, 2, 2, 2\) and \(2, 2, 4, 4\)"):
            model(y, ours.Physics(operators.Identity()))
        with pytest.raises(ValueError, match=asked + "Physics, fails on them: factor 4|" + asked + "Physics, has"):
            model(y, ours.Physics(Downsample(4)))
        with pytest.raises(ValueError, match=asked + "ReLU, fails on them"):
            model(y, torch.nn.ReLU())
    with pytest.raises(TypeError, match="net must be a flowkern.Unfolded, got Identity"):
        ours.Reconstructor(torch.nn.Identity())
    plain = flowkern.Unfolded(flowkern.GlowProx(glow), folds=1, operator=Plain()).double()
    model = ours.Reconstructor(plain, given=True)
    y = random(2, 2, 4, 4)
    torch.testing.assert_close(model(y, ours.Physics(Plain())), plain(y))
    assert isinstance(plain.operator, Plain)


def test_reconstructors_are_told_the_noise(deepinv, ours, glow):
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=1, noise_aware=True).double()
    model, y = ours.Reconstructor(net), random(2, 2, 4, 4)
    physics = ours.Physics(operators.Identity(), deepinv.physics.GaussianNoise(sigma=0.25))
    torch.testing.assert_close(model(y, physics), net(y, sigma=0.25))
    torch.testing.assert_close(model(y, physics, sigma=torch.tensor([[0.1], [0.2]])),
                               net(y, sigma=torch.tensor([0.1, 0.2])))
    with pytest.raises(ValueError, match="wants the noise level"):
        model(y, ours.Physics(operators.Identity()))


def test_the_algorithms_of_deepinv_lower_their_objective(real):
    ours = adapter()
    glow = small_glow((2, 4, 4), levels=2, depth=2, hidden=4, dtype=torch.float32)
    prior, fidelity, lam = ours.Prior(glow), real.optim.L2(), 1e-3
    physics = ours.Physics(Inpainting((random(2, 4, 4, seed=7) > 0.4).float()))
    clean = random(2, 2, 4, 4).float()
    y = physics(clean)

    def objective(x):
        with torch.no_grad():
            return fidelity(x, y, physics) + lam * prior(x)

    start = objective(physics.A_adjoint(y))
    for name, options in [("GD", {"stepsize": 0.01}), ("GD", {"stepsize": 1.0, "backtracking": True}),
                          ("PGD", {"stepsize": 0.5}), ("FISTA", {"stepsize": 0.5}), ("ADMM", {"stepsize": 0.5})]:
        algorithm = getattr(real.optim, name)
        model = algorithm(data_fidelity=fidelity, prior=prior, lambda_reg=lam, max_iter=6, **options)
        assert bool((objective(model(y, physics)) < start).all()), name
    plug = real.optim.PnP(ours.Denoiser(flowkern.GlowProx(glow)))
    model = real.optim.PGD(data_fidelity=fidelity, prior=plug, stepsize=1.0, sigma_denoiser=0.1, max_iter=5)
    assert model(y, physics).isfinite().all()

    glow.memory = "store"
    unfolded = real.optim.GD(data_fidelity=fidelity, prior=prior, lambda_reg=lam, stepsize=0.01, max_iter=3,
                             unfold=True, trainable_params=["stepsize"])
    (unfolded(y, physics) - clean).square().mean().backward()
    assert all(p.grad is not None for p in glow.parameters())


def test_the_trainer_of_deepinv_trains_a_network(real, tmp_path):
    ours = adapter()
    glow = small_glow((2, 4, 4), levels=2, depth=2, hidden=4, dtype=torch.float32)
    mask = (random(2, 4, 4, seed=7) > 0.4).float()
    physics = real.physics.Inpainting(img_size=(2, 4, 4), mask=mask, noise_model=real.physics.GaussianNoise(0.05))
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2, operator=ours.Operator(physics), noise_aware=True)
    model = ours.Reconstructor(net)
    before = [p.detach().clone() for p in net.parameters()]
    loader = torch.utils.data.DataLoader(list(random(8, 2, 4, 4).float()), batch_size=4)
    real.Trainer(
        model=model, physics=physics, train_dataloader=loader, losses=[real.loss.SupLoss()], epochs=2,
        online_measurements=True, optimizer=torch.optim.Adam(model.parameters(), 1e-2), save_path=None,
        verbose=False, show_progress_bar=False, device="cpu", plot_images=False,
    ).train()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_what_the_page_shows(deepinv, ours, monkeypatch):
    """Its blocks run, on the stand-in those that need no algorithm of deepinv's."""
    monkeypatch.setitem(sys.modules, "flowkern.adapters.deepinv", ours)
    page = (ROOT / "docs" / "inverse-problems.md").read_text().partition("## With deepinv")[2]
    blocks = re.findall(r"^```python\n(.*?)^```", page.partition("\n## ")[0], re.M | re.S)
    assert len(blocks) == 2
    torch.manual_seed(0)
    names = {}
    for block in blocks if deepinv.__version__ != "stand-in" else blocks[:1]:
        exec(block, names)
        assert names["estimate"].shape == (2, 3, 16, 16) and names["estimate"].isfinite().all()


def test_without_deepinv_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    monkeypatch.setitem(sys.modules, "deepinv.models", None)
    with pytest.raises(ImportError, match="torchvision that was built for the installed PyTorch.*pip install deepinv"):
        adapter()


def test_a_torchvision_of_another_pytorch_is_named(monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "deepinv":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "deepinv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ImportError, match="here: operator torchvision::nms does not exist"):
        adapter()


def test_the_library_never_imports_deepinv():
    sources = (ROOT / "flowkern").rglob("*.py")
    importers = [path.name for path in sources if re.search(r"^\s*(import|from) deepinv", path.read_text(), re.M)]
    assert importers == ["deepinv.py"]


def test_the_stand_in_has_the_real_signatures(real):
    """Every method of the stand-in exists in the real package, with parameters of these names and defaults."""
    for module, classes in deepinv_standin.CLASSES.items():
        for kind in classes:
            original = getattr(getattr(real, module), kind.__name__)
            for name, method in vars(kind).items():
                if not inspect.isfunction(method):
                    continue
                theirs = inspect.signature(getattr(original, name)).parameters
                for parameter in inspect.signature(method).parameters.values():
                    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                        continue
                    if parameter.name == "noise_model" and parameter.name not in theirs:
                        continue  # goes by **kwargs to LinearPhysics
                    assert parameter.name in theirs, f"{kind.__name__}.{name} has no {parameter.name}"
                    plain = isinstance(parameter.default, int | float | str | None)
                    if plain and parameter.default is not None:
                        assert theirs[parameter.name].default == parameter.default, f"{kind.__name__}.{name}"


def test_a_search_starts_from_the_image(ours, glow):
    x = random(3, 2, 4, 4)
    assert torch.equal(ours.Prior(glow).prox(x, gamma=0.1, max_iter_inter=1), x)
