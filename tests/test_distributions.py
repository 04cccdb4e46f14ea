"""A Glow as a distribution and a transform, alone and inside zuko's, nflows' and normflows' models."""

import copy
import math
import pickle
import weakref

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pytest
import torch
import zuko
from helpers import small_glow
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence, register_kl

import flowkern
from flowkern.adapters import nflows as for_nflows
from flowkern.adapters import normflows as for_normflows
from flowkern.adapters import zuko as for_zuko
from flowkern.distributions import GlowDistribution, GlowTransform

SIZE, WIDTH = (2, 4, 4), 32


@pytest.fixture
def glow():
    return small_glow(SIZE, levels=2, depth=2, hidden=4)


def latents(n=()):
    zeros = torch.zeros(WIDTH, dtype=torch.float64)
    return Independent(Normal(zeros, zeros + 1), 1)


def test_distribution(glow):
    images = GlowDistribution(glow)
    assert images.batch_shape == () and images.event_shape == SIZE and images.support.event_dim == 3
    x = images.sample((3, 2))
    assert x.shape == (3, 2, *SIZE) and not x.requires_grad
    torch.testing.assert_close(images.log_prob(x), glow.log_prob(x.flatten(0, 1)).view(3, 2))
    assert images.sample().shape == SIZE and images.log_prob(images.sample()).shape == ()
    wide = images.expand((4,))
    assert isinstance(wide, GlowDistribution) and wide.batch_shape == (4,) and wide.sample((3,)).shape == (3, 4, *SIZE)
    torch.testing.assert_close(wide.log_prob(x[0, 0]), glow.log_prob(x[0, :1]).expand(4))
    with pytest.raises(ValueError, match=r"images of shape \(..., 2, 4, 4\), got \(3, 2, 4, 8\)"):
        images.log_prob(torch.rand(3, 2, 4, 8, dtype=torch.float64))


def test_samples_are_differentiable_and_follow_the_seed(glow):
    torch.manual_seed(3)
    x = GlowDistribution(glow).rsample((4,))
    torch.manual_seed(3)
    z = torch.randn(4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(x, glow.inverse(z))
    found = torch.autograd.grad(x.square().sum(), list(glow.parameters()))
    wanted = torch.autograd.grad(glow.inverse(z).square().sum(), list(glow.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_divergence_to_it_can_be_estimated(glow):
    """What a variational model does with a prior; and torch's registry finds the class."""

    class Posterior(GlowDistribution):
        pass

    @register_kl(Posterior, GlowDistribution)
    def _(p, q):
        x = p.rsample((8,))
        return (p.log_prob(x) - q.log_prob(x)).mean(dim=0)

    torch.testing.assert_close(kl_divergence(Posterior(glow), GlowDistribution(glow)).abs().max().item(), 0.0)
    other = small_glow(SIZE, levels=2, depth=2, hidden=4, seed=5)
    assert kl_divergence(Posterior(glow), GlowDistribution(other)) > 0


@pytest.mark.parametrize("cache_size", [0, 1])
def test_transform(glow, cache_size):
    transform = GlowTransform(glow).with_cache(cache_size)
    assert transform == GlowTransform(glow) and transform.domain.event_dim == 1 and transform.codomain.event_dim == 3
    z = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    x = transform(z)
    assert x.shape == transform.forward_shape(z.shape) and z.shape == transform.inverse_shape(x.shape)
    torch.testing.assert_close(x.flatten(0, 1), glow.inverse(z.flatten(0, 1)))
    torch.testing.assert_close(transform.inv(x), z)
    wanted = -glow(x.flatten(0, 1))[1].view(3, 2)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), wanted)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(x, z), -wanted)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z.clone(), x.clone()), wanted)


def test_transform_of_a_base(glow):
    images = TransformedDistribution(latents(), [GlowTransform(glow)])
    assert images.event_shape == SIZE
    x = images.rsample((5,))
    torch.testing.assert_close(images.log_prob(x), glow.log_prob(x))


def test_scoring_runs_the_flow_once(glow):
    runs = []
    glow.register_forward_hook(lambda *_: runs.append(1))
    TransformedDistribution(latents(), [GlowTransform(glow)]).log_prob(torch.rand(3, *SIZE, dtype=torch.float64))
    assert len(runs) == 1


def parameters_get(loss, glow):
    """The gradients that a model's loss gives the Glow's parameters."""
    found = torch.autograd.grad(loss, list(glow.parameters()))
    return torch.cat([g.flatten() for g in found])


def agrees(model_log_prob, glow, x):
    torch.testing.assert_close(model_log_prob, glow.log_prob(x))
    wanted = parameters_get(glow.log_prob(x).sum(), glow)
    torch.testing.assert_close(parameters_get(model_log_prob.sum(), glow), wanted)


def test_zuko(glow):
    x = torch.rand(3, *SIZE, dtype=torch.float64)
    zeros = torch.zeros(WIDTH, dtype=torch.float64)
    base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, zeros, zeros + 1, buffer=True)
    flow = zuko.flows.Flow([for_zuko.LazyGlow(glow)], base)
    assert {id(p) for p in flow.parameters()} == {id(p) for p in glow.parameters()}
    agrees(flow().log_prob(x), glow, x)
    sample, log_prob = flow().rsample_and_log_prob((4,))
    assert sample.shape == (4, *SIZE)
    torch.testing.assert_close(log_prob, glow.log_prob(sample))

    # As a base: a learnt shift of the images above it.
    shift = zuko.lazy.UnconditionalTransform(zuko.transforms.AdditiveTransform, torch.full(SIZE, 0.25), buffer=True)
    shifted = zuko.lazy.UnconditionalTransform(zuko.transforms.DependentTransform, shift(), 3)
    flow = zuko.flows.Flow(shifted, for_zuko.LazyGlowDistribution(glow))
    torch.testing.assert_close(flow().log_prob(x), glow.log_prob(x + 0.25))
    assert flow().sample((2,)).shape == (2, *SIZE)


def test_nflows(glow):
    x = torch.rand(3, *SIZE, dtype=torch.float64)
    flow = nflows.flows.Flow(for_nflows.Transform(glow), nflows.distributions.StandardNormal([WIDTH])).double()
    agrees(flow.log_prob(x), glow, x)
    torch.testing.assert_close(flow.transform_to_noise(x), glow(x)[0])
    flow = nflows.flows.Flow(nflows.transforms.AffineTransform(shift=0.25), for_nflows.Distribution(glow))
    torch.testing.assert_close(flow.log_prob(x), glow.log_prob(x + 0.25))
    assert flow.sample(4, batch_size=3).shape == (4, *SIZE)


def test_normflows(glow):
    x = torch.rand(3, *SIZE, dtype=torch.float64)
    base = normflows.distributions.DiagGaussian(WIDTH, trainable=False).double()
    model = normflows.NormalizingFlow(base, [for_normflows.Flow(glow)])
    agrees(model.log_prob(x), glow, x)
    kld = model.forward_kld(x)  # which normflows adds up in single precision
    torch.testing.assert_close(kld.double(), -glow.log_prob(x).mean(), rtol=1e-5, atol=0)
    sample, log_prob = model.sample(4)
    torch.testing.assert_close(log_prob, glow.log_prob(sample))

    double = normflows.flows.AffineConstFlow(SIZE).double()
    torch.nn.init.constant_(double.s, math.log(2))
    model = normflows.NormalizingFlow(for_normflows.Base(glow), [double])
    torch.testing.assert_close(model.log_prob(x), glow.log_prob(x / 2) - WIDTH * math.log(2))
    sample, log_prob = model.sample(4)
    torch.testing.assert_close(log_prob, model.log_prob(sample))


def test_public_names():
    assert flowkern.distributions.GlowDistribution is GlowDistribution


@pytest.fixture
def conditioned():
    torch.manual_seed(0)
    glow = flowkern.Glow(SIZE, levels=2, depth=2, hidden=4, context_channels=3).double()
    glow.initialize(torch.rand(8, *SIZE, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64))
    with torch.no_grad():
        for p in glow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return glow


def test_what_a_transform_remembers_is_neither_copied_nor_taken_without_its_gradient(glow):
    transform, z = GlowTransform(glow), torch.randn(3, WIDTH, dtype=torch.float64)
    x = transform(z)
    again = copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))
    assert all(torch.equal(other(z), x) for other in again)
    with torch.no_grad():
        x = transform(z)
    assert transform.log_abs_det_jacobian(z, x).requires_grad


def test_a_conditioned_glow_is_one_distribution_per_context(conditioned):
    context = torch.randn(4, 3, dtype=torch.float64)
    images = GlowDistribution(conditioned, context)
    assert images.batch_shape == (4,)
    x = images.rsample((2,))
    assert x.shape == (2, 4, *SIZE)
    found = images.log_prob(x)
    for i in range(4):
        torch.testing.assert_close(found[:, i], conditioned.log_prob(x[:, i], context[i : i + 1].expand(2, 3)))
    wide = images.expand((5, 4))
    assert wide.sample().shape == (5, 4, *SIZE)
    torch.testing.assert_close(wide.log_prob(x[0]), found[0].expand(5, 4))

    transform = GlowTransform(conditioned, context)
    z = torch.randn(4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(transform(z), conditioned.inverse(z, context=context))
    torch.testing.assert_close(transform.inv(transform(z)), z)
    several = torch.randn(5, 4, WIDTH, dtype=torch.float64)  # rows of samples, a context a column
    x, logdet = transform(several), transform.log_abs_det_jacobian(several, transform(several))
    for i in range(4):
        one, d = conditioned.inverse(several[:, i], return_logdet=True, context=context[i : i + 1].expand(5, 3))
        torch.testing.assert_close(x[:, i], one)
        torch.testing.assert_close(logdet[:, i], d)
    torch.testing.assert_close(transform.inv(x), several)
    one = GlowTransform(conditioned, context[0])
    torch.testing.assert_close(one(z)[2], conditioned.inverse(z[2:3], context=context[:1])[0])
    for rows in (context.view(2, 2, 3), context):  # one for each latent, in their shape or in a row
        torch.testing.assert_close(GlowTransform(conditioned, rows)(z.view(2, 2, -1)).flatten(0, 1), transform(z))
    assert transform(several[:0]).shape == (0, 4, *SIZE)
    for rows, leading in ((context.view(2, 2, 3), (4,)), (torch.rand(2, 3, 3), (3, 2)), (context[:3], (4,))):
        with pytest.raises(ValueError, match=rf"contexts of shape \({rows.shape[0]}, .* don't go with \({leading[0]},"):
            GlowTransform(conditioned, rows)(torch.randn(*leading, WIDTH, dtype=torch.float64))


def test_contexts_reach_a_glow_inside_other_libraries(conditioned):
    x, context = torch.rand(4, *SIZE, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    wanted = conditioned.log_prob(x, context)
    zeros = torch.zeros(WIDTH, dtype=torch.float64)
    base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, zeros, zeros + 1, buffer=True)
    flow = zuko.flows.Flow([for_zuko.LazyGlow(conditioned)], base)
    torch.testing.assert_close(flow(context).log_prob(x), wanted)
    assert flow(context).sample().shape == (4, *SIZE) and flow(context).sample((7,)).shape == (7, 4, *SIZE)
    torch.testing.assert_close(flow(context).log_prob(torch.stack([x, x])), torch.stack([wanted, wanted]))
    torch.testing.assert_close(for_zuko.LazyGlowDistribution(conditioned)(context).log_prob(x), wanted)

    distribution = for_nflows.Distribution(conditioned)
    torch.testing.assert_close(distribution.log_prob(x, context), wanted)
    assert distribution.sample(3, context=context).shape == (4, 3, *SIZE)
    flow = nflows.flows.Flow(for_nflows.Transform(conditioned), nflows.distributions.StandardNormal([WIDTH])).double()
    torch.testing.assert_close(flow.log_prob(x, context), wanted)

    base = normflows.distributions.base.ConditionalDiagGaussian(WIDTH, lambda c: torch.zeros(len(c), 2 * WIDTH).to(c))
    model = normflows.ConditionalNormalizingFlow(base, [for_normflows.Flow(conditioned)])
    torch.testing.assert_close(model.log_prob(x, context), wanted)
    assert model.sample(4, context=context)[0].shape == (4, *SIZE)


def test_a_transform_keeps_no_graph_of_tensors_that_are_gone(glow):
    transform = GlowTransform(glow)
    z = torch.randn(2, WIDTH, dtype=torch.float64)
    x = transform(z)
    logdet = weakref.ref(transform._last[2])
    del x
    assert transform._last is None and logdet() is None


def test_samples_for_nflows_are_of_their_contexts_and_of_temperature_one(conditioned):
    context = torch.randn(4, 3, dtype=torch.float64)
    torch.manual_seed(1)
    found = for_nflows.Distribution(conditioned).sample(3, context=context)
    torch.manual_seed(1)
    wanted = conditioned.sample(12, temperature=1.0, context=context.repeat_interleave(3, 0))
    torch.testing.assert_close(found, wanted.unflatten(0, (4, 3)))


@pytest.mark.parametrize("checked", [True, False])
def test_an_expanded_distribution_checks_its_arguments_as_before(glow, checked):
    assert GlowDistribution(glow, validate_args=checked).expand((3,))._validate_args == checked


@pytest.mark.parametrize("changed", ["parameters", "latents"])
def test_a_log_determinant_of_what_has_changed_since_is_computed_again(glow, changed):
    transform, z = GlowTransform(glow), torch.randn(2, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        x = transform(z)
        for t in glow.parameters() if changed == "parameters" else [z]:
            t.add_(0.1)
        wanted = GlowTransform(glow).log_abs_det_jacobian(z, x)
        torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), wanted)
