"""Unfolded networks that keep few of the images between folds: the same values, gradients and statistics as all."""

import copy
import itertools
import math

import pytest
import torch
from helpers import small_glow
from torch import nn
from torch.utils.checkpoint import checkpoint
from unfolded_cases import MEASUREMENTS, make_glow, make_net, measured

import flowkern
from flowkern import folds
from flowkern.operators import Blur, Compose


def graded(net, y, kept, **options):
    """Loss and the gradients of y and of all parameters."""
    net.kept_images = kept
    out = net(y, **options)
    out, log_prob = out if isinstance(out, tuple) else (out, out.new_zeros(1))
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    loss = (out * weights).sum() + 0.01 * log_prob.sum()
    return loss, *torch.autograd.grad(loss, [y, *net.parameters()], materialize_grads=True, allow_unused=True)


def check_same(net, y, kept=(1, 2, 8), **options):
    y = y.detach().requires_grad_()
    wanted = graded(net, y, None, **options)
    for number in kept:
        for got, want in zip(graded(net, y, number, **options), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_values_and_gradients_are_those_of_all_images(name):
    net = make_net(folds=4, operator=MEASUREMENTS[name]())
    check_same(net, measured(net.operator))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "options", [{}, {"consistency": "exact", "init": "adjoint"}, {"final": "consistency"}, {"noise_aware": True}]
)
def test_values_and_gradients_of_every_kind_and_number_of_folds(options, count):
    net = make_net(folds=count, operator=MEASUREMENTS["mask"](), **options)
    called = {"sigma": torch.tensor([0.1, 0.3])} if net.noise_aware else {}
    check_same(net, measured(net.operator), return_log_prob=True, **called)


def test_tied_folds():
    net = flowkern.Unfolded(flowkern.GlowProx(make_glow()), 5, tied=True).double()
    check_same(net, torch.rand(2, 3, 8, 8, dtype=torch.float64))


def test_the_gradient_of_log_prob_alone():
    net = make_net(folds=3)
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    found = []
    for net.kept_images in (None, 1):
        second = net(y, return_log_prob=True)[1][1].sum()
        found.append(torch.autograd.grad(second, net.parameters(), materialize_grads=True, allow_unused=True))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


class Noisy(nn.Module):
    """A prox with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("make", [Noisy, lambda: flowkern.ResNetProx(3, 4, 1), lambda: flowkern.UNetProx(3, 2)])
def test_batch_norm_is_updated_once_and_dropout_the_same(make):
    torch.manual_seed(0)
    nets = [flowkern.Unfolded(make(), 4).double().train()]
    nets.append(copy.deepcopy(nets[0]))
    nets[1].kept_images = 1
    results = []
    for net in nets:
        torch.manual_seed(1)
        for _ in range(2):
            net(torch.rand(2, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
        results.append([*(p.grad for p in net.parameters()), *net.buffers(), torch.rand(1)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


class Shifted(nn.Module):
    """A prox with two parameters whose gradients are one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(2, 3, 8, 8, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return x + (self.a + self.b)


def test_gradients_that_are_one_tensor():
    net = flowkern.Unfolded(Shifted(), 4, tied=True).double()
    check_same(net, torch.rand(2, 3, 8, 8, dtype=torch.float64))


def test_hooks_of_parameters_run_once():
    net = make_net(folds=3)
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    plain = graded(net, y, 1)[2:]
    for p in net.parameters():
        p.register_hook(lambda g: 2 * g)
    for got, want in zip(graded(net, y, 1)[2:], plain, strict=True):
        torch.testing.assert_close(got, 2 * want)


def test_a_frozen_flow_and_a_measurement_without_gradient():
    net = make_net(folds=3).requires_grad_(False)
    net.mu.requires_grad_()
    y, found = torch.rand(2, 3, 8, 8, dtype=torch.float64), []
    for net.kept_images in (None, 1):
        found.append(torch.autograd.grad(net(y).square().sum(), net.mu)[0])
    torch.testing.assert_close(*found)


def test_autocast_is_that_of_forward():
    net = flowkern.Unfolded(flowkern.GlowProx(make_glow(dtype=torch.float32)), 3)
    y = torch.rand(2, 3, 8, 8)
    found = []
    for net.kept_images in (None, 1):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(y).square().sum()
        loss.backward()
        found.append([loss, *(p.grad for p in net.parameters())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_backward_twice_through_a_retained_graph():
    net = make_net(folds=3, kept_images=1)
    loss = net(torch.rand(2, 3, 8, 8, dtype=torch.float64)).square().sum()
    first = torch.autograd.grad(loss, net.parameters(), retain_graph=True)
    for got, want in zip(torch.autograd.grad(loss, net.parameters()), first, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kept", [None, 1])
@pytest.mark.parametrize("init", ["mode", "adjoint"])
def test_the_first_training_step_initialises_the_flows(init, kept):
    """Also those of the fold whose mode is the start, before its graph is made."""
    torch.manual_seed(0)
    prox = flowkern.GlowProx(flowkern.Glow((3, 8, 8), levels=2, depth=2, hidden=8))
    net = flowkern.Unfolded(prox, 3, init=init, kept_images=kept).train()
    net(torch.rand(4, 3, 8, 8)).square().mean().backward()
    assert all(p.glow.is_initialized for p in net.proxes)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_number_of_evaluations():
    """What is promised is what runs, and the least that there is: the formula of Griewank and Walther (2000)."""
    runs = []

    class Counted(nn.Conv2d):
        def forward(self, x):
            runs.append(1)
            return super().forward(x)

    for count, kept in itertools.product((1, 2, 5, 8), (1, 2, 3, 8)):
        net = flowkern.Unfolded(Counted(3, 3, 1), count, kept_images=kept)
        runs.clear()
        net(torch.rand(1, 3, 4, 4)).sum().backward()
        assert len(runs) == count + folds.evaluated_again(count, kept)
    assert [folds.evaluated_again(8, kept) for kept in (1, 2, 3, 7, 9)] == [28, 14, 11, 7, 7]
    for count, kept in itertools.product((2, 5, 8, 16, 30), (1, 2, 3, 5)):
        times = next(r for r in itertools.count(1) if math.comb(kept + r, kept) >= count)
        least = times * count - math.comb(kept + times, times - 1)
        assert folds.evaluated_again(count, kept) == least


def test_a_parameter_changed_before_backward_is_an_error():
    net = make_net(folds=3, kept_images=1)
    loss = net(torch.rand(2, 3, 8, 8, dtype=torch.float64)).sum()
    with torch.no_grad():
        net.mu += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_operators_buffers_are_those_of_forward_and_get_gradients():
    """A kernel that something else makes, and masks that are changed between two forwards and their backward."""

    def found(kept, init):
        torch.manual_seed(0)
        kernel = torch.full((3, 3), 1 / 9, dtype=torch.float64, requires_grad=True)
        net = make_net(folds=3, operator=Blur(kernel), kept_images=kept, init=init)
        net(torch.rand(2, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
        return kernel.grad

    for init in ("mode", "adjoint"):
        torch.testing.assert_close(found(1, init), found(None, init), rtol=1e-10, atol=1e-12)

    def of_two_masks(kept):
        net, y = make_net(folds=3, operator=MEASUREMENTS["mask"](), kept_images=kept), torch.rand(2, 3, 8, 8).double()
        loss = net(y).square().sum()
        net.operator.mask = torch.rand(net.operator.mask.shape).round().to(net.operator.mask.dtype)
        (loss + net(y).square().sum()).backward()
        return [p.grad for p in net.parameters()]

    torch.manual_seed(1)
    wanted = of_two_masks(None)
    torch.manual_seed(1)
    for a, b in zip(of_two_masks(1), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("memory", ["recompute", "checkpoint", "store"])
@pytest.mark.parametrize(
    "options", [{"variant": {"leaky": 0.1}}, {"network": lambda i, o: nn.Conv2d(i, o, 3, padding=1)}, {}],
    ids=["variant", "own network", "hooked"],
)
def test_glows_whose_networks_are_evaluated_by_pytorch(options, memory):
    glow = make_glow(memory=memory, **options)
    if not options:
        glow.levels[0].steps[0].coupling.net.register_forward_hook(lambda *_: None)
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=3)
    check_same(net, torch.rand(2, 3, 8, 8, dtype=torch.float64), kept=(1, 2))


class Counting(nn.Module):
    """An operator of one's own that writes its buffers: how often it was used, and statistics."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.batch_norm = nn.BatchNorm2d(3).double()

    def forward(self, x):
        self.calls += 1
        return self.batch_norm(x) * self.gain / (1 + 0.1 * self.calls)

    def adjoint(self, y):
        return y * self.gain


def test_an_operator_that_writes_its_buffers_is_replayed():
    y, found = torch.rand(2, 3, 8, 8, dtype=torch.float64), []
    for kept in (None, 1, 2):
        net = make_net(folds=3, operator=Counting(), kept_images=kept, init=lambda y: y)
        net(y).square().sum().backward()
        found.append([*(p.grad for p in net.parameters()), *net.operator.buffers()])
    for others in found[1:]:
        for a, b in zip(others, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_operator_with_weight_norm_is_trained():
    operator = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 3, 3, padding=1).double()))
    operator.adjoint = lambda y: y
    net = make_net(folds=2, operator=operator, init=lambda y: y)
    check_same(net, torch.rand(2, 3, 8, 8, dtype=torch.float64), kept=(1,))


def test_within_checkpointing():
    net, y = make_net(folds=3, kept_images=1), torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(net(y).square().sum(), [y, *net.parameters()])
    found = torch.autograd.grad(checkpoint(net, y, use_reentrant=False).square().sum(), [y, *net.parameters()])
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_what_it_can_t_do_is_said():
    net = make_net(folds=2, kept_images=1)
    y = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"second derivative was asked for .* use kept_images=None"):
        torch.autograd.grad(net(y).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=r"batch of gradients was asked for .* use kept_images=None"):
        torch.autograd.grad(net(y), y, torch.rand(2, 1, 3, 8, 8, dtype=torch.float64), is_grads_batched=True)
    operator = MEASUREMENTS["own"]()
    operator.gain = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="must be a parameter of an nn.Module; Bands has a gain that requires"):
        net(operator.forward(y), operator=operator)
    buffered = nn.Module()
    buffered.register_buffer("gain", torch.ones((), requires_grad=True))
    buffered.forward, buffered.adjoint = operator.forward, operator.adjoint
    with pytest.raises(ValueError, match="must be a parameter of an nn.Module; Module has a gain that requires"):
        net(operator.forward(y), operator=buffered)
    for hidden in (Compose(operator), Compose(operator, Blur(torch.ones(1, 1)))):
        with pytest.raises(ValueError, match="must be a parameter of an nn.Module; Bands has a gain that requires"):
            net(operator.forward(y), operator=hidden)
    for wrong in (0, True, 1.0, "all"):
        with pytest.raises(ValueError, match="kept_images must be an int >= 1 or None, got"):
            net.kept_images = wrong


def test_it_is_an_option_of_loading_and_not_saved(tmp_path):
    flowkern.Unfolded(flowkern.GlowProx(make_glow(dtype=torch.float32)), 2, kept_images=1).save_pretrained(tmp_path)
    assert flowkern.Unfolded.from_pretrained(tmp_path).kept_images is None
    assert flowkern.Unfolded.from_pretrained(tmp_path, kept_images=2).kept_images == 2


def test_without_gradients_and_compiled_it_is_as_without():
    net = flowkern.Unfolded(nn.Conv2d(3, 3, 1), 3, init=lambda y: y / 2)
    y = torch.rand(1, 3, 4, 4)
    wanted = net(y)
    net.kept_images = 1
    with torch.no_grad():
        assert torch.equal(net(y), wanted)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)(y)
    torch.testing.assert_close(compiled, wanted)


@pytest.mark.parametrize("at", [2, 3, 5])
def test_an_error_on_the_way_leaves_the_network_its_parameters(at):
    class Fails(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == at:
                raise MemoryError
            return x

        def adjoint(self, y):
            return y

    operator = Fails()
    net = flowkern.Unfolded(flowkern.GlowProx(small_glow()), folds=3, operator=operator, kept_images=1, mu=0.5)
    own = dict(net.named_parameters())
    with pytest.raises(MemoryError):
        net(torch.rand(2, 2, 8, 8, dtype=net.mu.dtype)).sum().backward()
    assert all(p is own[name] for name, p in net.named_parameters()) and operator.calls == at
