"""Data consistency that is computed again in backward: ordinary autograd's gradients, with whatever happens between."""

import copy
from types import SimpleNamespace

import pytest
import torch
from unfolded_cases import EXACT, MEASUREMENTS, make_net, measured, pixels

import flowkern
from flowkern import consistency
from flowkern.operators import (
    Blur,
    Compose,
    Downsample,
    Identity,
    Inpainting,
    Operator,
    RandomProjection,
    exact_consistency,
    gaussian_kernel,
)

STEPS = [(name, "gradient") for name in MEASUREMENTS if name != "identity"] + [(name, "exact") for name in EXACT]


def images(n=2):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def step(kind, operator, x, y, weight):
    return {"gradient": consistency.gradient_step, "exact": consistency.exact_step}[kind](operator, x, y, weight)


def plain(kind, operator, x, y, weight):
    if kind == "exact":
        return exact_consistency(operator, x, y, weight)
    return x - weight * operator.adjoint(operator.forward(x) - y)


@pytest.mark.parametrize("n", [2, 0])
@pytest.mark.parametrize(("name", "kind"), STEPS)
def test_gradients_are_autograd_s_and_so_are_second_ones(name, kind, n):
    if n == 0 and name == "own":
        return
    operator, weight = MEASUREMENTS[name](), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x, y = images(n).requires_grad_(), measured(operator, n).detach().requires_grad_()
    inputs, found = [x, y, weight, *getattr(operator, "parameters", list)()], {}
    for function in (step, plain):
        out = function(kind, operator, x, y, weight)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)
        found[function] = out, *first, *second
    for a, b in zip(found[step], found[plain], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrapped", [False, True])
def test_backward_has_the_mask_of_forward(wrapped):
    """As autograd has: another one in its place does nothing to it, and one that is written over is an error."""
    inner, x = Inpainting(pixels(8, 8)), images().requires_grad_()
    operator = Compose(inner) if wrapped else inner
    y, mu = measured(operator), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    before = inner.mask
    wanted = torch.autograd.grad(plain("gradient", operator, x, y, mu).square().sum(), [x, mu])
    out = step("gradient", operator, x, y, mu).square().sum()
    inner.mask = 1 - before
    found = torch.autograd.grad(out, [x, mu])
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True)) and not torch.equal(inner.mask, before)
    out = step("gradient", operator, x, y, mu).square().sum()
    inner.mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, [x, mu])


def test_only_the_library_s_own_kinds_are_run_again(monkeypatch):
    calls = []

    class Counting(Operator):
        def forward(self, x):
            calls.append(0)
            return x

        adjoint = forward

    for operator in (Counting(), Compose(Counting(), Identity())):
        calls.clear()
        step("gradient", operator, images().requires_grad_(), images(), torch.tensor(0.3)).sum().backward()
        assert len(calls) == 2
    monkeypatch.setattr(Inpainting, "forward", lambda self, x: calls.append(0) or x * self._mask_for(x))
    calls.clear()
    out = step("gradient", Inpainting(pixels(8, 8)), images(), images(), torch.tensor(0.3, requires_grad=True))
    assert len(calls) == 2
    out.sum().backward()
    assert len(calls) > 2


@pytest.mark.parametrize("init", ["mode", "adjoint"])
@pytest.mark.parametrize("consistency", ["gradient", "exact"])
@pytest.mark.parametrize("name", ["identity", "blur"])
def test_a_network_is_compiled_whole(name, consistency, init):
    operator = {"identity": Identity, "blur": lambda: Blur(gaussian_kernel(1.0, 3))}[name]()
    net = make_net(2, torch.float32, operator=operator, consistency=consistency, init=init)
    torch.compiler.reset()  # networks compiled before count towards the limit of recompilations
    y = measured(operator, dtype=torch.float32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(y).square().sum(), list(net.parameters()))
    for a, b in zip(found, torch.autograd.grad(net(y).square().sum(), list(net.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_gradients_by_torch_func():
    operator, y = MEASUREMENTS["blur"](), images()
    net = flowkern.Unfolded(torch.nn.Identity(), 2, operator, init="adjoint").double()
    found = torch.func.grad(lambda y: net(y).square().sum())(y)
    torch.testing.assert_close(found, torch.autograd.grad(net(y.requires_grad_()).square().sum(), y)[0])


@pytest.mark.parametrize(
    "operator",
    [RandomProjection((3, 16, 16), 0.25), Downsample(2), Downsample(2, gaussian_kernel(1.0, 4)),
     Inpainting(pixels(16, 16)), Blur(gaussian_kernel(0.7))],
    ids=["projection", "box", "gaussian", "mask", "blur"],
)
@pytest.mark.parametrize("rho", [1e-1, 1e-3, 1e-4])
def test_a_small_rho_costs_no_digits_in_single_precision(operator, rho):
    """An image that nearly fits its measurement: what is divided by rho is the rounding of what cancels."""
    generator = torch.Generator().manual_seed(0)
    x, noise, weights = (torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    operator = copy.deepcopy(operator)
    y = operator.forward(x)
    y = y + 0.02 * torch.randn(y.shape, generator=generator, dtype=torch.float64)

    def found(dtype):
        weight = torch.tensor(rho, dtype=dtype, requires_grad=True)
        image = exact_consistency(operator, (x + 0.02 * noise).to(dtype), y.to(dtype), weight)
        (slope,) = torch.autograd.grad((image * weights.to(dtype)).sum(), weight)
        return image.detach().double(), slope.double()

    (image, slope), (exact, exact_slope) = found(torch.float32), found(torch.float64)
    assert (image - exact).abs().max() < (2e-6 if not isinstance(operator, Blur) or rho > 1e-3 else 1e-3)
    if type(operator) is not Blur:
        torch.testing.assert_close(slope, exact_slope, rtol=1e-3, atol=1e-4)


def test_a_subclass_with_a_solver_of_its_own_is_asked_for_it():
    class Twice(RandomProjection):
        def forward(self, x):
            return 2 * super().forward(x)

        def adjoint(self, y):
            return 2 * super().adjoint(y)

        def normal_inverse(self, b, rho):
            measured = self.adjoint(self.forward(b)) / 4
            return measured / (4 + rho) + (b - measured) / rho

    operator, x = Twice((3, 8, 8), 0.25), images()
    y = torch.rand(2, 48, dtype=torch.float64)
    v = exact_consistency(operator, x, y, 0.3)
    torch.testing.assert_close(operator.adjoint(operator.forward(v) - y), 0.3 * (x - v))


def test_a_subclass_of_the_identity_is_asked_itself():
    class Half(Identity):
        def forward(self, x):
            return x / 2

        adjoint = forward

    net, y = make_net(folds=2, operator=Half()), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    own = SimpleNamespace(forward=lambda x: x / 2, adjoint=lambda x: x / 2)
    torch.testing.assert_close(net(y), net(y, operator=own))
