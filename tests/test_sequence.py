"""Layers alone and ReversibleSequence: a user's own invertible steps, dropout and batch norm included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dropin_memory import network, sequences
from helpers import relative
from torch import nn

from bench import memory
from flowkern import ReversibleSequence
from flowkern.layers import ActNorm, AffineCoupling, CouplingNet, InvertibleConv1x1, StepOfFlow
from flowkern.replay import Replay

MODES = [("recompute", None), ("recompute", 2), ("checkpoint", None)]


class TanhShift(nn.Module):
    """A user's step on vectors: half the numbers move the others; its own parameters, its own networks inside."""

    def __init__(self, width, *inside):
        super().__init__()
        half = width // 2
        self.net = nn.Sequential(nn.Linear(half, 16), *(make() for make in inside), nn.Tanh(), nn.Linear(16, width))
        self.flipped = nn.Parameter(torch.randn(width))

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        log_s, t = self.net(a).mul(0.3).chunk(2, dim=1)
        y = torch.cat([b * log_s.exp() + t, a], dim=1) * self.flipped.exp()
        return y, log_s.sum(dim=1) + self.flipped.sum()

    def inverse(self, y):
        b, a = (y * (-self.flipped).exp()).chunk(2, dim=1)
        log_s, t = self.net(a).mul(0.3).chunk(2, dim=1)
        return torch.cat([a, (b - t) * (-log_s).exp()], dim=1)


def steps(*inside, n=5, width=6):
    torch.manual_seed(0)
    return [TanhShift(width, *inside).double() for _ in range(n)]


def batch(n=7, width=6):
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(flow, x, reverse=False, seed=2):
    """Outputs and gradients of a functional that uses both."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y, logdet = flow.inverse(x, return_logdet=True) if reverse else flow(x)
    after = torch.rand(1)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + (
        logdet * logdet.detach().cos()
    ).sum()
    return [y, logdet, *torch.autograd.grad(loss, [x, *flow.parameters()]), after, torch.rand(1)]


def same(found, wanted, tolerance=1e-9):
    """Each to the size of the largest: the gradient of a bias before batch norm is zero, but for rounding."""
    size = max(b.norm() for b in wanted).double()
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b.double()).norm() < tolerance * max(size, 1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode, every", MODES)
def test_gradients_are_those_of_storing(mode, every, reverse):
    made = steps()
    same(
        run(ReversibleSequence(made, mode, every), batch(), reverse),
        run(ReversibleSequence(made, "store"), batch(), reverse),
    )


@pytest.mark.parametrize("mode, every", MODES)
def test_gradcheck_and_inverse(mode, every):
    flow = ReversibleSequence(steps(n=3), mode, every)
    x = batch(2).requires_grad_()
    parameters = tuple(flow.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: flow(x), (x, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, *_: flow.inverse(x, return_logdet=True), (x, *parameters), fast_mode=True)
    y, logdet = flow(x)
    back, inverse_logdet = flow.inverse(y, return_logdet=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(flow.inverse(y), x)
    torch.testing.assert_close(inverse_logdet, -logdet)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v)[0], x[i : i + 1]).reshape(6, 6)  # noqa: B023
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode, every", MODES)
def test_dropout_is_replayed(mode, every, reverse):
    """The gradient is that of the forward that was run, and the generator goes on as if nothing had been replayed."""
    made = steps(lambda: nn.Dropout(0.5))
    stored = run(ReversibleSequence(made, "store"), batch(), reverse)
    same(run(ReversibleSequence(made, mode, every), batch(), reverse), stored)
    other = run(ReversibleSequence(made, "store"), batch(), reverse, seed=3)
    assert relative(stored[2], other[2]) > 0.01, "dropout does nothing here"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode, every", MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_in_a_coupling_of_images_whatever_their_layout(mode, every, reverse, layout):
    """The mask is drawn in memory order, so the order has to be that of the forward pass."""
    torch.manual_seed(0)
    made = [AffineCoupling(network(2, 4)).double() for _ in range(3)]
    x = torch.rand(3, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=layout)
    stored = run(ReversibleSequence(made, "store"), x, reverse)
    same(run(ReversibleSequence(made, mode, every), x, reverse), stored, 1e-7)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode, every", MODES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_updates_its_statistics_once(mode, every, reverse, momentum):
    made = steps(lambda: nn.BatchNorm1d(16, momentum=momentum))
    reference = ReversibleSequence(copy.deepcopy(made), "store")
    flow = ReversibleSequence(copy.deepcopy(made), mode, every)
    for _ in range(2):
        same(run(flow, batch(), reverse), run(reference, batch(), reverse), 1e-7)
        for (name, a), b in zip(flow.named_buffers(), reference.buffers(), strict=True):
            assert torch.equal(a, b) or relative(a, b) < 1e-9, name
    assert {int(b) for name, b in flow.named_buffers() if "tracked" in name} == {2}
    flow.eval(), reference.eval()
    same(run(flow, batch(), reverse), run(reference, batch(), reverse))


@pytest.mark.parametrize(
    "make",
    [lambda: nn.InstanceNorm1d(6, track_running_stats=True), lambda: _Counting()],
    ids=["instance norm", "buffer assigned anew"],
)
def test_any_buffer_that_a_step_changes_is_put_back(make):
    module = make()
    replay, x = Replay(module, torch.device("cpu")), torch.randn(2, 6, 5)
    with replay.recorded():
        first = module(x)
    after = [b.clone() for b in module.buffers()]
    with replay.restored():
        assert torch.equal(module(x), first)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), after, strict=True))


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x * self.calls


def test_a_replay_keeps_nothing_that_was_not_used():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    replay, x = Replay(module, torch.device("cpu")), torch.randn(3, 4)
    with replay.recorded():
        module(x)
    assert replay._states is None and replay._buffers == []
    module.train()
    with replay.recorded():
        module(x)
    assert replay._states is not None and len(replay._buffers) == 3


@pytest.mark.parametrize("mode", ["recompute", "checkpoint"])
def test_glows_layers_as_steps(mode):
    """Layers alone, a whole step, a change of shape, and one step used twice."""
    torch.manual_seed(0)
    whole = StepOfFlow(4, hidden=6)
    apart = [ActNorm(4), InvertibleConv1x1(4), AffineCoupling(CouplingNet(2, 4, 6))]
    made = [whole, *apart, whole, Squeeze(), StepOfFlow(16, hidden=6)]
    flow = ReversibleSequence(made, mode).double()
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    flow(x)  # initialises the ActNorms
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    stored = ReversibleSequence(made, "store")
    same(run(flow, x), run(stored, x), 1e-8)
    z = flow(x)[0].detach()
    same(run(flow, z, reverse=True), run(stored, z, reverse=True), 1e-8)


class Squeeze(nn.Module):
    def forward(self, x):
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, y):
        return F.pixel_shuffle(y, 2)


def test_frozen_parameters_unused_outputs_and_no_gradients():
    flow = ReversibleSequence(steps(n=3))
    next(flow.parameters()).requires_grad_(False)
    y, logdet = flow(batch())
    logdet.sum().backward()
    assert [p.grad is None for p in flow.parameters()][0]
    assert all(torch.isfinite(p.grad).all() for p in list(flow.parameters())[1:] if p.grad is not None)
    with torch.no_grad():
        assert not flow(batch())[0].requires_grad
    flow.requires_grad_(False)
    x = batch().requires_grad_()
    assert torch.autograd.grad(flow(x)[0].sum(), x)[0].abs().sum() > 0


def test_autocast_is_that_of_forward():
    made = [step.float() for step in steps()]
    x, found = batch().float(), {}
    for mode in ("store", "checkpoint"):
        flow = ReversibleSequence(made, mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = flow(x)[0].float().square().sum()
        found[mode] = torch.autograd.grad(loss, list(flow.parameters()))
    same(found["checkpoint"], found["store"], 1e-2)
    exact = torch.autograd.grad(ReversibleSequence(made)(x)[0].square().sum(), list(flow.parameters()))
    assert relative(found["checkpoint"][0], exact[0]) > 1e-4, "nothing was in low precision"


def test_parameters_changed_before_backward_are_noticed():
    flow = ReversibleSequence(steps())
    loss = flow(batch())[0].sum()
    with torch.no_grad():
        next(flow.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_batch_of_gradients():
    flow = ReversibleSequence([InvertibleConv1x1(4), AffineCoupling(CouplingNet(2, 4, 3))]).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    tensors, directions = [x, *flow.parameters()], torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    found = torch.autograd.grad(flow(x)[0], tensors, directions, is_grads_batched=True)
    for i, direction in enumerate(directions):
        wanted = torch.autograd.grad(flow(x)[0], tensors, direction)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a[i], b)


def test_errors():
    with pytest.raises(ValueError, match="at least one step"):
        ReversibleSequence([])
    with pytest.raises(TypeError, match=r"step 1 wants to be an nn.Module with inverse\(y\) -> x, got Linear"):
        ReversibleSequence([TanhShift(4), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="unknown memory 'low'; choose one of 'recompute'"):
        ReversibleSequence([TanhShift(4)], memory="low")
    with pytest.raises(ValueError, match="anchor_every wants an int >= 1, got 0"):
        ReversibleSequence([TanhShift(4)], anchor_every=0)
    flow = ReversibleSequence(steps())
    with pytest.raises(ValueError, match="unknown memory 'low'; choose one of 'recompute'"):
        flow.memory = "low"
    with pytest.raises(TypeError, match="anchor_every wants an int, got 1.5"):
        flow.anchor_every = 1.5
    with pytest.raises(RuntimeError, match="torch.func wants memory='store', got memory='recompute'"):
        torch.func.grad(lambda x: flow(x)[0].sum())(batch())
    x = batch().requires_grad_()
    with pytest.raises(RuntimeError, match="memory='recompute'.*use memory='store'"):
        torch.autograd.grad(ReversibleSequence(steps())(x)[0].sum(), x, create_graph=True)
    assert torch.autograd.grad(ReversibleSequence(steps(), "store")(x)[0].sum(), x, create_graph=True)[0].requires_grad


def test_memory_does_not_grow_with_depth():
    cases = [("store", 16), ("checkpoint", 16), ("recompute", 4), ("recompute", 16)]
    store, checkpoint, shallow, deep = memory.measure(sequences, cases=cases)
    state = 4 * 16 * 32 * 32 * 4
    assert deep["held"] <= store["held"] / 20 and deep["peak"] <= store["peak"] / 5
    assert deep["peak"] <= 1.1 * shallow["peak"]
    assert 15 * state <= checkpoint["held"] <= 18 * state


def test_expanded_inputs_go_backward():
    torch.manual_seed(0)
    flow = ReversibleSequence([ActNorm(4), StepOfFlow(4, hidden=6)])
    x = torch.rand(1, 4, 6, 6)
    flow(x.repeat(3, 1, 1, 1))
    for run in (lambda x: flow(x)[0], flow.inverse):
        found = []
        for several in (x.expand(3, -1, -1, -1), x.repeat(3, 1, 1, 1)):
            flow.zero_grad()
            run(several).square().sum().backward()
            found.append([p.grad.clone() for p in flow.parameters()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_layers_alone_keep_their_state_s_precision_under_autocast():
    torch.manual_seed(0)
    flow = ReversibleSequence([ActNorm(4), InvertibleConv1x1(4)])
    x = torch.rand(3, 4, 6, 6)
    wanted, logdet = flow(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, d = flow(x)
        torch.testing.assert_close(flow.inverse(z), x)
    assert z.dtype == torch.float32
    torch.testing.assert_close((z, d), (wanted, logdet))


@pytest.mark.parametrize("memory", ["recompute", "checkpoint", "store"])
def test_functional_call_says_what_it_needs(memory):
    flow = ReversibleSequence(steps(n=2), memory)
    others = {name: (p + 0.01).detach().requires_grad_() for name, p in flow.named_parameters()}
    loss = torch.func.functional_call(flow, others, (batch().requires_grad_(),))[0].square().sum()
    if memory == "store":
        loss.backward()
        assert all(p.grad.norm() > 0 for p in others.values())
    else:
        with pytest.raises(RuntimeError, match="parameters are not those of forward, .* needs memory='store'"):
            loss.backward()


def test_log_determinants_of_layers_add_up_in_place():
    x = torch.randn(3, 4, 2, 2)
    total = torch.zeros(3)
    for layer in (ActNorm(4), InvertibleConv1x1(4)):
        x, logdet = layer(x)
        logdet += total
        total = logdet
        layer.inverse(x, return_logdet=True)[1].mul_(2)
    assert total.shape == (3,)


@pytest.mark.parametrize("layer", [ActNorm(4), StepOfFlow(4, hidden=4)], ids=["ActNorm", "StepOfFlow"])
def test_nothing_initialises_itself_among_several_processes(layer, monkeypatch):
    """Each would from its own images, and what DDP then averages are gradients of different models."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    x, layer = torch.randn(8, 4, 4, 4), copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="is not initialised, and several processes train: call initialize"):
        layer(x)
    layer.initialize(x)
    layer(x)


class WithDropout(nn.Module):
    """Its inverse lays images out in its own way."""

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([a, b + F.dropout(a, 0.5, True)], 1), x.new_zeros(len(x))

    def inverse(self, y):
        a, b = y.chunk(2, 1)
        return torch.cat([a, b - F.dropout(a, 0.5, True)], 1).contiguous()


def test_a_rebuilt_input_is_laid_out_as_the_one_of_forward():
    """Random numbers are drawn in the order of memory."""
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found = []
    for mode in ("store", "recompute"):
        torch.manual_seed(1)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y, _ = ReversibleSequence([WithDropout(), WithDropout()], memory=mode)(leaf)
        (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_buffers_are_put_back_after_an_exception():
    norm = nn.BatchNorm1d(2)
    replay, x = Replay(norm, torch.device("cpu")), torch.randn(4, 2)
    with replay.recorded():
        norm(x)
    own, value = norm.running_mean, norm.running_mean.clone()
    with pytest.raises(MemoryError), replay.restored():
        norm(x)
        raise MemoryError
    assert norm.running_mean is own and torch.equal(own, value)
