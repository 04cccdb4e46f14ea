"""A Glow conditioned on a context, and networks of one's own with dropout and batch norm."""

import copy
import math

import pytest
import torch
from dropin_memory import glows
from helpers import MODES, relative, small_glow
from torch import nn

import flowkern
from bench import memory as measuring
from flowkern.layers import StepOfFlow, plain_chain, run_steps

LEVELS = 2


def conditional(memory="recompute", anchor_every=None, context_channels=3, **options):
    torch.manual_seed(0)
    glow = flowkern.Glow(
        (2, 8, 8),
        levels=LEVELS,
        depth=3,
        hidden=5,
        context_channels=context_channels,
        memory=memory,
        anchor_every=anchor_every,
        **options,
    ).double()
    glow.initialize(torch.rand(8, 2, 8, 8, dtype=torch.float64), vectors(8, context_channels))
    with torch.no_grad():
        for p in glow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return glow


def vectors(n, channels=3):
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def maps(n, size=(8, 8), channels=3):
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def images(n=3):
    return torch.rand(n, 2, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def gradients(function, *inputs):
    inputs = [i.clone().requires_grad_() for i in inputs]
    out, logdet = function(*inputs)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + logdet.square().sum()
    return torch.autograd.grad(loss, inputs), loss


@pytest.mark.parametrize("memory", ["store", "checkpoint", "recompute"])
def test_half_precision_goes_backward_too(memory):
    """By the reference, as forward does: native kernels have states of fp32 and fp64."""
    glow, context = conditional(memory).to(torch.bfloat16), vectors(3).to(torch.bfloat16)
    loss = -glow.log_prob(images().to(torch.bfloat16), context).mean()
    loss.backward()
    exact = conditional()
    exact.load_state_dict(glow.state_dict())
    (-exact.log_prob(images().to(torch.bfloat16).double(), context.double()).mean()).backward()
    off = relative(glow.levels[0].steps[2].coupling.net.weight3.grad.double(),
                   exact.levels[0].steps[2].coupling.net.weight3.grad)  # fmt: skip
    assert off < 0.1, off


@pytest.mark.parametrize("context", [vectors(3), maps(3)], ids=["vector", "map"])
def test_contexts_that_are_not_numbers_are_refused(context):
    """They would initialise the coupling networks' ActNorms with NaN for good."""
    glow, context = flowkern.Glow((2, 8, 8), LEVELS, 1, 4, context_channels=3), context.float()
    context[1, 2] = math.nan
    for run in (glow, glow.initialize):  # the first forward in training mode initialises, too
        with pytest.raises(ValueError, match="the contexts contain NaN or infinite values"):
            run(images().float(), context)
    assert not glow.is_initialized
    glow.check_finite = False
    with pytest.raises(ValueError, match="the contexts contain NaN or infinite values"):
        glow.initialize(images().float(), context)
    glow.initialize(images().float(), context.nan_to_num())
    assert glow.eval()(images().float(), context)[1].isnan().any(), "who doesn't want them looked at, gets what comes"
    with pytest.raises(ValueError, match="the contexts are on meta and the Glow is on cpu; move one of them"):
        glow(images().float(), context.to("meta"))


@pytest.mark.parametrize("context", [vectors(3), maps(3), maps(3, (4, 4))], ids=["vector", "map", "small map"])
@pytest.mark.parametrize("memory, anchor_every", MODES)
def test_gradients_are_those_of_plain_autograd(memory, anchor_every, context, monkeypatch):
    """In both directions, with respect to the image or latent, the context and every parameter."""
    glow, x = conditional(memory, anchor_every), images()
    parameters = list(glow.parameters())

    def all_gradients():
        found = []
        for start, run in (
            (x, glow),
            (glow(x, context)[0].detach(), lambda z, c: glow.inverse(z, return_logdet=True, context=c)),
        ):
            inputs = [start.clone().requires_grad_(), context.clone().requires_grad_()]
            out, logdet = run(*inputs)
            weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
            found += torch.autograd.grad((out * weights).sum() + logdet.square().sum(), [*inputs, *parameters])
        return found

    lean = all_gradients()

    def plain(level, x, context, reverse):
        from flowkern.mix import mixes, stacked

        steps = glow.levels[level].steps
        own = [
            p for s in steps for p in (s.conv.lower, s.conv.upper, s.conv.log_s, s.actnorm.log_scale, s.actnorm.bias)
        ]
        sign, permutation = (torch.stack([getattr(s.conv, n) for s in steps]) for n in ("sign", "permutation"))
        matrix, offset, inverse, logdet = mixes(*stacked(own), sign, permutation)
        x, d = plain_chain(steps, x, matrix, offset, inverse, context, reverse)
        constant = logdet * x.shape[2] * x.shape[3]
        return x, d - constant if reverse else d + constant

    monkeypatch.setattr(glow, "_steps", plain)
    for a, b in zip(lean, all_gradients(), strict=True):
        assert relative(a, b) < 1e-7


@pytest.mark.parametrize("memory, anchor_every", MODES)
def test_gradcheck(memory, anchor_every):
    glow = flowkern.Glow(
        (1, 4, 4), levels=1, depth=2, hidden=2, context_channels=2, memory=memory, anchor_every=anchor_every
    ).double()
    torch.manual_seed(1)
    for p in glow.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    for context in (vectors(1, 2), maps(1, (4, 4), 2)):
        inputs = (x, context.requires_grad_(), *glow.eval().parameters())
        assert torch.autograd.gradcheck(lambda x, c, *_: glow(x, c), inputs, fast_mode=True)
    if memory == "store":
        assert torch.autograd.gradgradcheck(lambda x, c, *_: glow(x, c), inputs, atol=1e-4, fast_mode=True)


def test_the_context_matters_and_the_map_stays_a_bijection():
    glow, x = conditional(), images()
    assert (glow.log_prob(x, vectors(3)) - glow.log_prob(x, 1 + vectors(3))).abs().min() > 0.01
    for context in (vectors(3), maps(3)):
        z, logdet = glow(x, context)
        back, inverse_logdet = glow.inverse(z, return_logdet=True, context=context)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(inverse_logdet, -logdet)
        assert glow.bits_per_dim(x, context=context).shape == (3,)
        assert glow.sample(3, context=context).shape == x.shape
    constant = vectors(3)[:, :, None, None].expand(3, 3, 8, 8)
    torch.testing.assert_close(glow.log_prob(x, constant), glow.log_prob(x, vectors(3)))
    for i in range(3):
        torch.testing.assert_close(
            glow.log_prob(x[i : i + 1], vectors(3)[i : i + 1])[0], glow.log_prob(x, vectors(3))[i]
        )


def test_initialised_by_the_first_training_forward_saved_and_loaded(tmp_path):
    glow = flowkern.Glow((2, 8, 8), levels=2, depth=2, hidden=4, context_channels=3)
    x, context = images(16).float(), vectors(16).float()
    z, _ = glow(x, context)
    assert glow.is_initialized and abs(z.std() - 1) < 0.1
    glow.save_pretrained(tmp_path)
    again = flowkern.Glow.from_pretrained(tmp_path)
    assert again.context_channels == 3 and torch.equal(again.log_prob(x, context), glow.log_prob(x, context))


def test_wrong_contexts():
    glow, x = conditional(), images()
    for context, message in (
        (None, r"floating-point context of shape \(3, 3\) or \(3, 3, h, w\), got NoneType"),
        (torch.zeros(3, 3, dtype=torch.long), "got torch.int64"),
        (vectors(2), r"expected a context of shape \(3, 3\) or .*, got \(2, 3\)"),
        (vectors(3, 4), r"got \(3, 4\)"),
        (vectors(3)[:, :, None], r"got \(3, 3, 1\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            glow(x, context)
    with pytest.raises(ValueError, match="takes no context"):
        small_glow()(images(), vectors(3))
    with pytest.raises(ValueError, match="network= excludes context_channels"):
        flowkern.Glow((2, 8, 8), levels=1, depth=1, context_channels=1, network=lambda i, o: nn.Conv2d(i, o, 1))
    with pytest.raises(TypeError, match="context_channels wants an int, got 1.5"):
        flowkern.Glow((2, 8, 8), levels=1, depth=1, context_channels=1.5)


class Noisy(nn.Module):
    """A user's own network, with a context if it is given one."""

    def __init__(self, i, o, *layers):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(i, 6, 3, padding=1), *(make() for make in layers), nn.Tanh(), nn.Conv2d(6, o, 1)
        )

    def forward(self, a, context=None):
        return 0.2 * self.net(a if context is None else a + context.mean(dim=1, keepdim=True))


def own(memory, anchor_every, *layers):
    torch.manual_seed(0)
    return flowkern.Glow(
        (2, 8, 8),
        levels=2,
        depth=3,
        network=lambda i, o: Noisy(i, o, *layers),
        memory=memory,
        anchor_every=anchor_every,
    ).double()


def step(glow, direction, seed=5):
    torch.manual_seed(seed)
    start = images() if direction == "forward" else images().flatten(1)
    start.requires_grad_()
    run = glow if direction == "forward" else lambda z: glow.inverse(z, return_logdet=True)
    out, logdet = run(start)
    found = torch.autograd.grad(out.square().sum() + logdet.sum(), [start, *glow.parameters()])
    return [*found, torch.rand(1)]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("memory, anchor_every", [m for m in MODES if m[0] != "store"])
@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm2d(6)], ids=["dropout", "batch norm"])
def test_a_network_is_replayed_as_it_ran(memory, anchor_every, direction, layer):
    glow, stored = (own(*mode, layer) for mode in ((memory, anchor_every), ("store", None)))
    for model in (glow, stored):
        torch.manual_seed(1)
        model.initialize(images())
    for a, b in zip(step(glow, direction), step(stored, direction), strict=True):
        # The gradient of a bias before batch norm is zero, but for rounding.
        assert (a.double() - b.double()).norm() < 1e-7 * b.norm().clamp_min(1e-3)
    if isinstance(layer(), nn.Dropout):
        assert relative(step(stored, direction)[1], step(stored, direction, seed=6)[1]) > 1e-3


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("memory, anchor_every", MODES)
def test_batch_norm_in_a_coupling_network_is_updated_once(memory, anchor_every, direction):
    glow = own(memory, anchor_every, lambda: nn.BatchNorm2d(6))
    glow.initialize(images())
    frozen = copy.deepcopy(glow)
    step(glow, direction)
    with torch.no_grad():
        frozen(images()) if direction == "forward" else frozen.inverse(images().flatten(1))
    for (name, a), b in zip(glow.named_buffers(), frozen.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("memory, anchor_every", MODES)
def test_a_step_of_flow_with_a_network_of_ones_own_and_a_context(memory, anchor_every):
    steps = nn.ModuleList(StepOfFlow(4, network=Noisy) for _ in range(3)).double()
    x, context = torch.randn(2, 4, 3, 3, dtype=torch.float64), vectors(2)[:, :, None, None]
    run = {
        m: gradients(lambda x, c, m=m: run_steps(steps, x, context=c, memory=m), x, context)[0]
        for m in (memory, "store")
    }
    for a, b in zip(run[memory], run["store"], strict=True):
        assert relative(a, b) < 1e-8 and b.abs().sum() > 0


def test_memory_does_not_grow_with_depth_with_a_context_and_another_librarys_padding():
    options = {"context_channels": 5, "scale": "sigmoid", "variant": {"edge": "ones"}}
    cases = [({**options, "memory": m}, depth) for m, depth in (("store", 8), ("recompute", 2), ("recompute", 8))]
    store, shallow, deep = measuring.measure(glows, cases=cases)
    assert deep["held"] <= store["held"] / 20 and deep["peak"] <= store["peak"] / 4
    assert deep["peak"] <= 1.05 * shallow["peak"]


# Networks of one's own that are not what they should be


@pytest.mark.parametrize("network", [lambda i, o: nn.Conv2d(i, o, 3), lambda i, o: nn.Conv2d(i, o + 1, 1)])
def test_a_network_that_gives_another_shape_is_refused_before_kernels_read_it(network):
    glow = flowkern.Glow((1, 8, 8), levels=1, depth=2, network=network)
    for memory in MODES:
        glow.memory = memory[0]
        for call in (lambda: glow.sample(4), lambda: glow.eval()(torch.rand(2, 1, 8, 8)),
                     lambda: glow.eval().inverse(torch.rand(2, 64, requires_grad=True))):  # fmt: skip
            with pytest.raises(ValueError, match="wants an even number of channels and h of shape"):
                call()


def test_a_subclass_of_the_standard_network_runs_as_it_is_written():
    class Doubled(flowkern.layers.CouplingNet):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs, hidden=4)

        def forward(self, a):
            return 2 * super().forward(a)

    torch.manual_seed(0)
    glow = flowkern.Glow((1, 8, 8), levels=1, depth=1, network=Doubled)
    x = torch.rand(3, 1, 8, 8)
    glow.initialize(x)
    net = glow.levels[0].steps[0].coupling.net
    torch.nn.init.normal_(net.weight3)
    z, logdet = glow(x)
    with torch.no_grad():
        net.logs += torch.log(torch.tensor(0.5)) / 3  # halves what is doubled
        halved, _ = glow(x)
        net.__class__ = flowkern.layers.CouplingNet
        net.logs -= torch.log(torch.tensor(0.5)) / 3
        once, _ = glow(x)
    torch.testing.assert_close(halved, once)
    assert not torch.allclose(z, once)


def test_functional_call_with_a_context_says_what_it_needs():
    x, context = images(), vectors(3)
    for memory in ("recompute", "checkpoint", "store"):
        glow = conditional(memory)
        others = {name: (p + 0.01).detach().requires_grad_() for name, p in glow.named_parameters()}
        loss = torch.func.functional_call(glow, others, (x, context))[1].sum()
        if memory == "store":
            loss.backward()
            assert others["levels.0.steps.0.coupling.net.weight1"].grad.norm() > 0
        else:
            with pytest.raises(RuntimeError, match="parameters are not those of forward, .* needs memory='store'"):
                loss.backward()
