"""The proximal map of a Glow as one reversible map: the gradients of memory="store", from the result alone."""

import pytest
import torch
from helpers import VARIANTS, relative, small_glow
from test_chain import ConvNet

import flowkern
from flowkern import shrinkage

SIZE = (3, 8, 12)
ONE_LAMBDA = (None, 0.7, torch.tensor(0.7))
EACH_ITS_OWN = torch.tensor([0.2, 1.0, 3.0])
REVERSIBLE = {name: options for name, options in VARIANTS.items() if name != "learned"}


def made(dtype=torch.float64, **options):
    return flowkern.GlowProx(small_glow(SIZE, dtype=dtype, **options), 0.3).to(dtype)


def images(count=3, size=SIZE, dtype=torch.float64):
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gradients(prox, x, scale=None):
    """Of a random functional, with respect to what needs one: x, if it does, and the parameters."""
    out = prox(x, scale)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    wanted = [t for t in (x, *prox.parameters()) if t.requires_grad]
    return torch.autograd.grad((out * weights).sum(), wanted)


def stored(prox, *arguments):
    prox.glow.memory = "store"
    try:
        assert not shrinkage.is_reversible(prox.glow)
        return gradients(prox, *arguments)
    finally:
        prox.glow.memory = "recompute"


def check_against_stored(prox, x, scale=None, tolerance=1e-9):
    assert shrinkage.is_reversible(prox.glow)
    found, wanted = gradients(prox, x, scale), stored(prox, x, scale)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))
    assert all(relative(a, b) < tolerance for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("scale", [None, EACH_ITS_OWN[:2].double()], ids=["one lambda", "one an image"])
@pytest.mark.parametrize("variant", REVERSIBLE)
def test_gradcheck(variant, scale):
    prox = flowkern.GlowProx(small_glow((1, 4, 8), depth=2, hidden=3, **REVERSIBLE[variant]), 0.3).double()
    x, parameters = images(2, (1, 4, 8)).requires_grad_(), list(prox.parameters())
    assert shrinkage.is_reversible(prox.glow)
    assert torch.autograd.gradcheck(lambda x, *_: prox(x, scale), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("scale", [*ONE_LAMBDA, EACH_ITS_OWN], ids=str)
@pytest.mark.parametrize("levels", [1, 2])
def test_gradients_are_those_of_store(backend, levels, scale):
    scale = scale.double() if isinstance(scale, torch.Tensor) else scale
    check_against_stored(made(levels=levels, backend=backend, shift=0.5), images().requires_grad_(), scale)


@pytest.mark.parametrize("variant", REVERSIBLE)
def test_couplings_and_a_gradient_in_the_scale(variant):
    scale = EACH_ITS_OWN.double().requires_grad_()
    prox, x = made(**REVERSIBLE[variant]), images()
    check_against_stored(prox, x.requires_grad_(), scale)
    assert torch.autograd.gradcheck(lambda s: prox(x.detach(), s).mean(), scale)


@pytest.mark.parametrize("used", [("image", "log_prob"), ("log_prob",)], ids=str)
@pytest.mark.parametrize("scale", [None, EACH_ITS_OWN.double()], ids=["one lambda", "one an image"])
def test_the_density_and_its_gradients_are_the_glow_s(scale, used):
    prox, x, found = made(), images().requires_grad_(), {}
    inputs, weights = [x, *prox.parameters()], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for prox.glow.memory in ("recompute", "store"):
        image, log_prob = prox(x, scale, return_log_prob=True)
        torch.testing.assert_close(log_prob, prox.glow.log_prob(x))
        value = (weights * log_prob).sum() + (image.square().sum() if "image" in used else 0)
        found[prox.glow.memory] = torch.autograd.grad(value, inputs, materialize_grads=True, allow_unused=True)
    for a, b in zip(found["recompute"], found["store"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "x",
    [images(3, (3, 4, 20)), images(1), images(0), images(3, (3, 12, 8)).mT, images(6)[::2], images(1).expand(3, *SIZE)],
    ids=["another size", "one", "none", "transposed", "every other", "expanded"],
)
def test_any_batch_of_images(x):
    check_against_stored(made(), x.clone(memory_format=torch.preserve_format).requires_grad_())
    check_against_stored(made(), x)


@pytest.mark.parametrize("frozen", ["lam", "conv", "weight1", "levels.0", "coupling", "glow"])
def test_frozen_parameters_get_no_gradient_and_change_no_other(frozen):
    prox, x = made(), images().requires_grad_()
    for name, p in prox.named_parameters():
        p.requires_grad_(frozen not in name)
    check_against_stored(prox, x)


@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.float32}])
def test_autocast_sets_the_networks_precision_alone(options):
    prox, x = made(torch.float32, **options), images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = gradients(prox, x), stored(prox, x)
        out = prox(x)
    assert out.dtype == torch.float32 and relative(out, prox(x)) < 0.05
    assert torch.equal(out, prox(x)) == bool(options)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32 and relative(a, b) < (1e-4 if options else 0.05)
    out = prox(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        again = torch.autograd.grad(out, list(prox.parameters()))
    for a, b in zip(again, torch.autograd.grad(prox(x).square().sum(), list(prox.parameters())), strict=True):
        assert torch.equal(a, b)


def test_without_gradients_it_is_the_same_map():
    prox, x = made(), images()
    with torch.no_grad():
        z = prox.glow(x)[0] / (1 + prox.lam)
        torch.testing.assert_close(prox(x), prox.glow.inverse(z, SIZE[1:]))
    assert torch.equal(prox(x), prox.requires_grad_(False)(x))


def test_backward_fills_grad_twice_over_a_retained_graph_and_fires_each_hook_once():
    prox, x, fired = made(), images(), []
    for name, p in prox.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    loss = prox(x).square().sum()
    loss.backward(retain_graph=True)
    assert sorted(fired) == sorted(dict(prox.named_parameters()))
    once = [p.grad.clone() for p in prox.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(prox.parameters(), once, strict=True))


def test_a_second_derivative_is_a_clear_error():
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative was asked for .* in memory='recompute'"):
        torch.autograd.grad(made()(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("scale", [None, EACH_ITS_OWN])
def test_compiled_whole_gives_the_same_numbers(scale):
    prox, x = made(torch.float32, depth=1), images(dtype=torch.float32).requires_grad_()
    compiled = torch.compile(prox, fullgraph=True, backend="aot_eager")
    wanted = [x, *prox.parameters()]
    found = torch.autograd.grad(compiled(x, scale).square().sum(), wanted)
    for a, b in zip(found, torch.autograd.grad(prox(x, scale).square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, scale), prox(x, scale))


def test_latents_that_are_not_finite_are_refused():
    prox = made()
    with torch.no_grad():
        prox.glow.levels[1].steps[0].actnorm.log_scale += 1e4
    with pytest.raises(ValueError, match="the latents contain NaN or infinite values"):
        prox(images())
    prox.glow.check_finite = False
    assert not prox(images()).isfinite().all()


def test_the_first_images_in_training_initialise():
    torch.manual_seed(0)
    prox = flowkern.GlowProx(flowkern.Glow(SIZE, levels=2, depth=2, hidden=5)).train()
    prox(images(dtype=torch.float32))
    assert prox.glow.is_initialized
    with pytest.raises(ValueError, match="expected images of shape"):
        prox(images(3, (1, 8, 8), dtype=torch.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "checkpoint"},
        {"anchor_every": 2},
        {"memory_budget": 0},
        {"split_prior": "learned"},
        {"top_prior": "learned"},
        {"network": ConvNet},
        {"variant": {"squeeze": "contiguous"}},
        {"variant": {"keeps": "second"}},
    ],
    ids=str,
)
def test_other_glows_go_level_by_level(options):
    prox, x = made(**options), images()
    assert not shrinkage.is_reversible(prox.glow)
    found = torch.autograd.grad(prox(x).square().sum(), [p for n, p in prox.named_parameters() if "unused" not in n])
    assert all(g.isfinite().all() for g in found)


def test_a_hooked_glow_and_a_subclass_are_called():
    class Called(flowkern.Glow):
        pass

    prox, calls = made(), []
    prox.glow.register_forward_hook(lambda *_: calls.append(0))
    expected, x = made()(images()), images()
    torch.testing.assert_close(prox(x), expected)
    assert calls == [0]
    prox.glow = Called(SIZE, levels=2, depth=3, hidden=5)
    assert not shrinkage.is_reversible(prox.glow)
