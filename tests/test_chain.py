"""The reversible chain: the same gradients in every memory mode, in both directions, however autograd is used."""

import copy
import weakref

import pytest
import torch
import torch.nn.utils.prune as prune
from helpers import MODES, VARIANTS, gradients, random_steps, relative, small_glow

from flowkern import ops, reference
from flowkern.layers import CouplingNet, StepOfFlow, run_steps


class ConvNet(torch.nn.Module):
    """A user's own coupling network."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.first = torch.nn.Conv2d(in_channels, 6, 3, padding=1)
        self.last = torch.nn.Conv2d(6, out_channels, 1)
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, a):
        return 0.1 * self.last(torch.nn.functional.silu(self.first(a)))


@pytest.mark.parametrize("network", [None, ConvNet], ids=["standard", "own network"])
@pytest.mark.parametrize("memory,anchor_every", MODES)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_of_the_chain(network, memory, anchor_every, reverse):
    steps, parameters = random_steps(3, 4, network=network)
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        return run_steps(steps, x, reverse=reverse, memory=memory, anchor_every=anchor_every)

    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("variant", VARIANTS)
def test_glow_gradients_equal_the_reference_in_every_mode(backend, variant):
    glow = small_glow(size=(3, 8, 12), backend=backend, **VARIANTS[variant])
    x = torch.rand(3, 3, 8, 12, dtype=torch.float64)
    z, _ = reference.glow_forward(glow, x)
    z = z.detach()
    parameters = list(glow.parameters())
    forward = gradients(lambda x: reference.glow_forward(glow, x), x, parameters)

    def inverse_of_z(z):
        return glow.inverse(z, size=(8, 12), return_logdet=True)

    with torch.no_grad():
        x_back, _ = inverse_of_z(z)
    torch.testing.assert_close(x_back, x, rtol=0, atol=1e-8)
    glow.memory = "store"
    inverse = gradients(inverse_of_z, z, parameters)
    for memory, anchor_every in MODES:
        glow.memory, glow.anchor_every = memory, anchor_every
        for found, wanted in zip(gradients(glow, x, parameters), forward, strict=True):
            assert relative(found, wanted) < 1e-9
        for found, wanted in zip(gradients(inverse_of_z, z, parameters), inverse, strict=True):
            assert relative(found, wanted) < 1e-7


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_through_the_inverse_equal_the_reference(variant):
    glow = small_glow(**VARIANTS[variant])
    z = torch.randn(3, 128, dtype=torch.float64)
    parameters = list(glow.parameters())
    wanted = gradients(lambda z: reference.glow_inverse(glow, z), z, parameters)
    found = gradients(lambda z: glow.inverse(z, return_logdet=True), z, parameters)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < 1e-7


@pytest.mark.parametrize("memory,anchor_every", MODES)
def test_gradcheck_of_glow_both_directions(memory, anchor_every):
    glow = small_glow(
        (1, 4, 4), levels=2, depth=2, hidden=2, memory=memory, anchor_every=anchor_every, split_prior="learned"
    )
    parameters = tuple(glow.parameters())
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(1, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: glow(x), (x, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(lambda z, *_: glow.inverse(z, return_logdet=True), (z, *parameters), fast_mode=True)


@pytest.mark.parametrize("network", [None, ConvNet], ids=["standard", "own network"])
@pytest.mark.parametrize("reverse", [False, True])
def test_second_derivative_in_store_mode(network, reverse):
    steps, parameters = random_steps(2, 2, hidden=2, network=network, std=0.5)
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, *_: run_steps(steps, x, reverse=reverse, memory="store"), (x, *parameters), atol=1e-4, fast_mode=True
    )


@pytest.mark.parametrize("network", [None, ConvNet], ids=["standard", "own network"])
def test_second_derivative_of_chains_one_after_the_other_with_the_same_parameters(network):
    """The second chain's gradients stop at its own input, which came from the same parameters."""
    steps, parameters = random_steps(2, 2, hidden=2, network=network, std=0.5)
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def there_and_on(x, *_):
        z, logdet = run_steps(steps, x, memory="store")
        x, d = run_steps(steps, 0.5 * z, reverse=True, memory="store")
        return x, logdet + d

    out, logdet = there_and_on(x)
    loss = out.square().sum() + logdet.sum()
    first = torch.autograd.grad(loss, [x, *parameters], retain_graph=True)
    again = torch.autograd.grad(loss, [x, *parameters], create_graph=True)
    assert all(relative(a, b) < 1e-12 for a, b in zip(again, first, strict=True))
    assert torch.autograd.gradgradcheck(there_and_on, (x, *parameters), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("network", [None, ConvNet], ids=["standard", "own network"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_batch_of_gradients_in_store_mode_and_elsewhere_a_clear_error(network, reverse):
    steps, parameters = random_steps(2, 4, network=network)
    x, directions = torch.randn(1, 4, 2, 2, dtype=torch.float64), torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    inputs = [x.requires_grad_(), *parameters]

    def out(memory):
        return run_steps(steps, x, reverse=reverse, memory=memory)[0]

    found = torch.autograd.grad(out("store"), inputs, directions, is_grads_batched=True)
    for i, direction in enumerate(directions):
        wanted = torch.autograd.grad(out("store"), inputs, direction)
        assert all(relative(a[i], b) < 1e-12 for a, b in zip(found, wanted, strict=True))
    for memory in ("recompute", "checkpoint"):
        with pytest.raises(RuntimeError, match=f"batch of gradients was asked for .* memory='{memory}'.*'store'"):
            torch.autograd.grad(out(memory), inputs, directions, is_grads_batched=True)


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
def test_a_network_whose_output_is_a_constant(memory):
    class Constant(torch.nn.Module):
        def __init__(self, _, out_channels):
            super().__init__()
            self.out_channels = out_channels

        def forward(self, a):
            return a.new_full((len(a), self.out_channels, *a.shape[2:]), 0.5)

    glow, x = small_glow(memory=memory, network=Constant), torch.rand(2, 2, 8, 8, dtype=torch.float64)
    x.requires_grad_()
    found = torch.autograd.grad(glow.log_prob(x).sum(), [x, *glow.parameters()])
    z, logdet = reference.glow_forward(glow, x)
    wanted = torch.autograd.grad((logdet - 0.5 * z.square().sum(dim=1)).sum(), [x, *glow.parameters()])
    assert all(relative(a, b) < 1e-9 for a, b in zip(found, wanted, strict=True))
    if memory == "store":
        again = torch.autograd.grad(glow.log_prob(x).sum(), x, create_graph=True)[0]
        assert relative(again, wanted[0]) < 1e-9
        # With a parameter that nothing is made of, there is a backward pass of nothing.
        unused = glow.requires_grad_(False).levels[0].steps[0].coupling.net.unused = torch.nn.Parameter(torch.ones(1))
        out = glow.log_prob(x.detach()).sum()
        assert torch.autograd.grad(out, unused, create_graph=True, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"memory": "low"}, ValueError, "unknown memory 'low'; choose one of 'recompute', 'store', 'checkpoint'"),
        ({"anchor_every": -1}, ValueError, "anchor_every wants an int >= 1, got -1"),
        ({"anchor_every": 1.5}, TypeError, "anchor_every wants an int, got 1.5"),
        ({"kept_steps": 2}, ValueError, "kept_steps wants an int from 0 to 1, got 2"),
    ],
)
def test_options_of_a_step_alone_that_are_none(options, error, message):
    with pytest.raises(error, match=message):
        StepOfFlow(4, hidden=3).eval()(torch.zeros(1, 4, 2, 2), **options)


@pytest.mark.parametrize("network", [None, ConvNet], ids=["standard", "own network"])
def test_steps_that_share_a_network_have_the_same_gradient_under_create_graph(network):
    steps = torch.nn.ModuleList(StepOfFlow(4, hidden=3, network=network).double() for _ in range(3))
    steps[2].coupling.net = steps[0].coupling.net
    parameters = [p for name, p in steps.named_parameters() if "unused" not in name]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.3)
    out, logdet = run_steps(steps, torch.randn(2, 4, 4, 4, dtype=torch.float64), memory="store")
    loss = out.square().sum() + logdet.sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters, create_graph=True)
    assert all(relative(a, b) < 1e-12 for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("network", [None, ConvNet], ids=["standard", "own network"])
@pytest.mark.parametrize("memory", ["recompute", "checkpoint"])
def test_second_derivative_elsewhere_is_a_clear_error(network, memory):
    glow = small_glow(memory=memory, network=network)
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"memory='{memory}'.*use memory='store'"):
        torch.autograd.grad(glow.log_prob(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
def test_backward_fills_grad_and_fires_each_hook_once(memory):
    glow = small_glow(memory=memory)
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    wanted = torch.autograd.grad(glow.log_prob(x).sum(), list(glow.parameters()))
    calls = []
    for name, p in glow.named_parameters():
        p.register_hook(lambda g, name=name: calls.append(name))
    glow.log_prob(x).sum().backward()
    assert sorted(calls) == sorted(name for name, _ in glow.named_parameters())
    for p, g in zip(glow.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)
        assert p.grad.stride() == p.stride()


@pytest.mark.parametrize("network", [None, ConvNet], ids=["standard", "own network"])
@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
def test_frozen_parameters_get_no_gradient_and_change_no_other(network, memory):
    glow = small_glow(memory=memory, network=network)
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    every = dict(
        zip(
            [n for n, _ in glow.named_parameters()],
            torch.autograd.grad(glow.log_prob(x).sum(), list(glow.parameters()), allow_unused=True),
            strict=True,
        )
    )
    for i, p in enumerate(glow.parameters()):
        p.requires_grad_(i % 3 == 0)
    glow.log_prob(x).sum().backward()
    for name, p in glow.named_parameters():
        if p.requires_grad and every[name] is not None:
            torch.testing.assert_close(p.grad, every[name])
        else:
            assert p.grad is None
    glow.requires_grad_(False)
    assert not glow.log_prob(x).requires_grad
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(glow.log_prob(x).sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
def test_only_one_output_used(memory):
    glow = small_glow(memory=memory)
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    for pick in (0, 1):
        found = torch.autograd.grad(glow(x)[pick].square().sum(), list(glow.parameters()), allow_unused=True)
        wanted = torch.autograd.grad(
            reference.glow_forward(glow, x)[pick].square().sum(), list(glow.parameters()), allow_unused=True
        )
        for a, b in zip(found, wanted, strict=True):
            assert relative(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b) < 1e-9


@pytest.mark.parametrize("memory", ["recompute", "store"])
def test_backward_twice_over_a_retained_graph(memory):
    for network in (None, ConvNet):
        glow = small_glow(memory=memory, network=network)
        loss = glow.log_prob(torch.rand(2, 2, 8, 8, dtype=torch.float64)).sum()
        first = torch.autograd.grad(loss, list(glow.parameters()), retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(loss, list(glow.parameters()), allow_unused=True)
        for a, b in zip(first, second, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_own_network_is_evaluated_once_per_step_in_backward():
    evaluations = []
    glow = small_glow(network=ConvNet)
    for module in glow.modules():
        if isinstance(module, ConvNet):
            module.register_forward_hook(lambda *_: evaluations.append(1))
    loss = glow.log_prob(torch.rand(2, 2, 8, 8, dtype=torch.float64)).sum()
    assert len(evaluations) == 6
    loss.backward()
    assert len(evaluations) == 12


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
@pytest.mark.parametrize("grad", [True, False])
def test_own_network_that_overwrites_its_input_is_refused(memory, grad):
    def network(in_channels, out_channels):
        return torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Conv2d(in_channels, out_channels, 1))

    steps = torch.nn.ModuleList([StepOfFlow(4, network=network)])
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="in.place"):
        run_steps(steps, torch.randn(2, 4, 4, 4), memory=memory)


def test_full_precision_of_own_networks_brings_no_warning(recwarn):
    glow = small_glow(network=ConvNet, dtype=torch.float32, compute_dtype=torch.float32)
    glow.log_prob(torch.rand(2, 2, 8, 8)).sum().backward()
    assert not [str(w.message) for w in recwarn if "autocast" in str(w.message)]


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
def test_glows_own_network_is_called_where_something_hooks_into_it(memory):
    """A hook that watches, and pruning, which makes the weight anew before each call."""
    x, plain, pruned = torch.rand(2, 2, 8, 8, dtype=torch.float64), small_glow(memory=memory), small_glow(memory=memory)
    net, watched = (pruned.levels[0].steps[k].coupling.net for k in (0, 1))
    weight = plain.levels[0].steps[0].coupling.net.weight1
    prune.l1_unstructured(net, "weight1", 0.5)
    seen = []
    watched.register_forward_hook(lambda *_: seen.append(1))
    for factor in (1.0, 1.5):       # the second time with another weight
        with torch.no_grad():
            net.weight1_orig.mul_(factor)
            weight.copy_(net.weight1_orig * net.weight1_mask)
        for glow in (plain, pruned):
            glow.zero_grad()
            glow.log_prob(x).sum().backward()
        weight.grad.mul_(net.weight1_mask)
        for name, p in pruned.named_parameters():
            assert relative(p.grad, plain.get_parameter(name.removesuffix("_orig")).grad) < 1e-9, name
    assert seen


def _flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


class PlainNet(CouplingNet):
    """The standard network as if it were a user's own: ordinary autograd differentiates it."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, hidden=16)

    def forward(self, a):
        return super().forward(a)


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
def test_autocast_sets_the_networks_precision_alone(memory):
    x = torch.rand(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    glow = small_glow((4, 8, 8), dtype=torch.float32, memory=memory, hidden=16)
    own = small_glow((4, 8, 8), dtype=torch.float32, memory="store", network=PlainNet)
    own.load_state_dict(glow.state_dict())

    def under_autocast(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, logdet = model(x)
            loss = -model.log_prob(x).mean()
        assert z.dtype == logdet.dtype == torch.float32
        # Outside autocast, as training loops call it.
        return torch.autograd.grad(loss, list(model.parameters()))

    exact = torch.autograd.grad(-glow.log_prob(x).mean(), list(glow.parameters()))
    found, budget = under_autocast(glow), under_autocast(own)
    error, allowed = (relative(_flat(g), _flat(exact)) for g in (found, budget))
    assert 1e-4 < error <= 2 * allowed

    glow.compute_dtype = torch.bfloat16
    explicit = torch.autograd.grad(-glow.log_prob(x).mean(), list(glow.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(explicit, found, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        glow.compute_dtype = torch.float32
        kept = torch.autograd.grad(-glow.log_prob(x).mean(), list(glow.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, exact, strict=True))


def test_anchors_bound_the_drift():
    """On weights moved so far that plain recomputation loses the gradient, anchors bring it back to the stored
    one's error.
    """
    glow = small_glow((3, 16, 16), levels=1, depth=24, hidden=8, dtype=torch.float32, moved=0.03)
    x = torch.rand(4, 3, 16, 16)
    exact_glow = copy.deepcopy(glow).double()
    exact_glow.memory = "store"
    exact = _flat(gradients(exact_glow, x.double(), list(exact_glow.parameters())))

    def error(memory, anchor_every):
        glow.memory, glow.anchor_every = memory, anchor_every
        return relative(_flat(gradients(glow, x, list(glow.parameters()))).double(), exact)

    drifting, anchored, stored = error("recompute", None), error("recompute", 2), error("store", None)
    assert drifting > 100 * anchored
    assert anchored < 2 * stored


def test_store_and_recompute_agree_bitwise_when_repeated():
    glow = small_glow(dtype=torch.float32)
    x = torch.rand(4, 2, 8, 8)
    for glow.memory in ("recompute", "store", "checkpoint"):
        first, second = (torch.autograd.grad(glow.log_prob(x).sum(), list(glow.parameters())) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("memory", ["recompute", "store"])
def test_compiled_whole_gives_the_same_numbers(memory):
    glow = small_glow(dtype=torch.float32, memory=memory, levels=1, depth=2)
    x = torch.rand(4, 2, 8, 8)
    compiled = torch.compile(glow.log_prob, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).sum(), list(glow.parameters()))
    wanted = torch.autograd.grad(glow.log_prob(x).sum(), list(glow.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        z, _ = glow(x)
        torch.testing.assert_close(torch.compile(glow.inverse, fullgraph=True, backend="aot_eager")(z), glow.inverse(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_leaves_priors_and_double_precision_alone(dtype):
    """What `compute_dtype` does not lower, autocast does not either."""
    glow = small_glow((2, 8, 8), dtype=dtype, split_prior="learned", top_prior="learned")
    glow.compute_dtype = torch.float32 if dtype == torch.float32 else None
    x = torch.rand(3, 2, 8, 8, dtype=dtype)
    wanted = [*glow(x), glow.inverse(glow(x)[0])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [*glow(x), glow.inverse(glow(x)[0])]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_mix_under_autocast_is_in_full_precision(backend, inverse):
    x, matrix, offset = torch.randn(2, 4, 3, 3), torch.eye(4) + 0.1 * torch.randn(4, 4), torch.randn(4)
    operands = [t.requires_grad_() for t in (x, matrix, offset)]
    wanted = ops.channel_mix(*operands, inverse, backend)
    gradient = torch.autograd.grad(wanted.square().sum(), operands)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.channel_mix(*operands, inverse, backend)
        inside = torch.autograd.grad(found.square().sum(), operands)
    assert torch.equal(found, wanted) and all(torch.equal(a, b) for a, b in zip(inside, gradient, strict=True))


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_own_networks_activations_do_not_outlive_backward(memory):
    """The loss does, in a training loop, until the next one."""
    glow = small_glow((2, 8, 8), network=ConvNet, memory=memory)
    seen = []
    for level in glow.levels:
        for step in level.steps:
            step.coupling.net.first.register_forward_hook(lambda net, given, h: seen.append(weakref.ref(h)))
    loss = -glow.log_prob(torch.rand(2, 2, 8, 8, dtype=torch.float64)).mean()
    loss.backward()
    assert seen and not any(ref() is not None for ref in seen) and loss.isfinite()


def test_a_second_derivative_of_swapped_parameters_is_refused():
    glow = small_glow((2, 8, 8), network=ConvNet, memory="store")
    others = {name: (p + 0.01).detach().requires_grad_() for name, p in glow.named_parameters()}
    loss = torch.func.functional_call(glow, others, (torch.rand(2, 2, 8, 8, dtype=torch.float64),))[1].sum()
    with pytest.raises(RuntimeError, match="parameters are not those of forward"):
        torch.autograd.grad(loss, list(others.values()), create_graph=True, allow_unused=True)


def test_torch_func_grad_with_own_networks():
    glow = small_glow((2, 8, 8), network=ConvNet, memory="store")
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    wanted = torch.autograd.grad(glow.log_prob(x.requires_grad_()).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: glow.log_prob(x).sum())(x.detach()), wanted)
    glow.memory = "recompute"
    with pytest.raises(RuntimeError, match="torch.func.grad wants memory='store', got memory='recompute'"):
        torch.func.grad(lambda x: glow.log_prob(x).sum())(x.detach())
