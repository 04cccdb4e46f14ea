"""The unfolded network against a literal transcription of the paper's equations 7-11, and its choices and errors."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import flowkern
from flowkern import reference
from flowkern.operators import Identity


def make_glow(size=(3, 8, 8), depth=2, seed=0, dtype=torch.float64, **options):
    """A Glow away from its initialisation, where every layer does something."""
    torch.manual_seed(seed)
    glow = flowkern.Glow(size, levels=2, depth=depth, hidden=8, shift=0.5, **options).to(dtype)
    glow.initialize(torch.rand(8, *size, dtype=dtype))
    with torch.no_grad():
        for parameter in glow.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return glow


def make_net(folds=3, dtype=torch.float64, **options):
    """Three different flows, step sizes and shrinkages."""
    glows = [make_glow(seed=k, dtype=dtype) for k in range(folds)]
    proxes = [flowkern.GlowProx(glow, lam=0.05 * (k + 1)) for k, glow in enumerate(glows)]
    net = flowkern.Unfolded(proxes, folds, **options).to(dtype)
    with torch.no_grad():
        net.mu += torch.linspace(-0.1, 0.1, folds, dtype=dtype)
    return net


def literal(net, y, final="prox", operator=None):
    """Equations 7-11 as they are printed (equation 7 with mu negated), by the reference's formulas."""
    operator = operator or Identity()
    shape = operator.adjoint(y).shape
    x = reference.glow_inverse(net.proxes[0].glow, y.new_zeros(shape[0], math.prod(shape[1:])))[0]
    for k, prox in enumerate(net.proxes):
        minus_mu = -net.mu[k]
        x_tilde = x - minus_mu * operator.adjoint(y - operator.forward(x))  # (7)
        z_tilde, _ = reference.glow_forward(prox.glow, x_tilde)  # (8)
        if final == "consistency" and k == len(net.proxes) - 1:
            return reference.glow_inverse(prox.glow, z_tilde)[0]  # (11)
        z = z_tilde / (1 + torch.log1p(torch.exp(prox.raw_lam)))  # (9)
        x = reference.glow_inverse(prox.glow, z)[0]  # (10)
    return x


class Mask:
    """Keep every other pixel."""

    def forward(self, x):
        return x * (torch.arange(x.shape[-1]) % 2)

    adjoint = forward


@pytest.mark.parametrize("operator", [None, Mask()])
@pytest.mark.parametrize("final", ["prox", "consistency"])
def test_equations_and_gradients(final, operator):
    net = make_net(final=final, operator=operator)
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    expected, got = literal(net, y, final, operator), net(y)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    weights = torch.randn_like(y)
    names, inputs = zip(("y", y), *net.named_parameters(), strict=True)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs, materialize_grads=True, allow_unused=True)
    found = torch.autograd.grad((got * weights).sum(), inputs, materialize_grads=True, allow_unused=True)
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    unused = [name for name, g in zip(names, found, strict=True) if not g.any()]
    cancelled = [name for name in names if name.startswith("proxes.2.")] if final == "consistency" else []
    assert set(cancelled) <= set(unused)
    assert "mu" not in unused and "proxes.0.raw_lam" not in unused and "y" not in unused


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
    assert sizes == [1, 5, 5]


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


def kept_bytes(net, y):
    """Bytes that autograd keeps for backward and that grow with the batch, counted once per storage."""
    storages = {}

    def pack(tensor):
        if tensor.numel() and tensor.untyped_storage().nbytes() % (len(y) * tensor.element_size()) == 0:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(y)
    return sum(storage.nbytes() for storage in storages.values())


def test_memory_does_not_grow_with_depth():
    y = torch.rand(37, 3, 8, 8)  # 37 divides no other size here
    kept = {
        (memory, depth): kept_bytes(
            flowkern.Unfolded(flowkern.GlowProx(make_glow(depth=depth, dtype=torch.float32, memory=memory)), folds=2), y
        )
        for memory in ("recompute", "store")
        for depth in (2, 8)
    }
    assert kept["recompute", 2] == kept["recompute", 8]
    # Fold boundaries, latents and the levels' outputs in both directions: a dozen images a fold at most.
    assert 0 < kept["recompute", 8] <= 2 * 12 * y.nbytes
    assert kept["store", 8] > 3 * kept["store", 2] > kept["recompute", 2]


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
            "init must be 'mode', 'adjoint' or a function of y, got 'zero'",
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
        (lambda p: flowkern.GlowProx(nn.Identity()), TypeError, "glow must be a flowkern.Glow, got Identity"),
        (lambda p: flowkern.GlowProx(p.glow, lam=0), ValueError, "lam must be a positive number, got 0"),
        (lambda p: flowkern.GlowProx(p.glow, lam="x"), ValueError, "lam must be a positive number, got 'x'"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make(flowkern.GlowProx(make_glow(dtype=torch.float32)))
    assert "\n" not in str(caught.value)


def test_saved_and_loaded_is_bitwise_the_same(tmp_path):
    net = make_net(dtype=torch.float32, final="consistency", init="adjoint")
    net.save_pretrained(tmp_path)
    loaded = flowkern.Unfolded.from_pretrained(tmp_path, memory="checkpoint")
    y = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(y), net(y))
    assert (loaded.final, loaded.init, loaded.proxes[0].glow.memory) == ("consistency", "adjoint", "checkpoint")
    assert all(prox.glow.is_initialized for prox in loaded.proxes)
    make_net().save_pretrained(tmp_path)
    assert flowkern.Unfolded.from_pretrained(tmp_path).mu.dtype == torch.float64


def test_broken_checkpoints(tmp_path):
    net = flowkern.Unfolded(flowkern.GlowProx(make_glow(dtype=torch.float32)), folds=2)
    with pytest.raises(FileNotFoundError, match="is not a saved Unfolded: it has no config.json"):
        flowkern.Unfolded.from_pretrained(tmp_path)
    net.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    saved, content = json.loads(config.read_text()), weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        flowkern.Unfolded.from_pretrained(tmp_path)
    weights.write_bytes(content)
    config.write_text(json.dumps(saved | {"folds": 3}))
    with pytest.raises(
        ValueError, match="don't fit this configuration: .* missing .* 1 of another shape .mu .2,. instead"
    ):
        flowkern.Unfolded.from_pretrained(tmp_path)
    net.proxes[0].glow.save_pretrained(tmp_path / "glow")
    with pytest.raises(ValueError, match="does not hold the configuration of an Unfolded"):
        flowkern.Unfolded.from_pretrained(tmp_path / "glow")
    config.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        flowkern.Unfolded.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{"operator": Mask()}, {"init": lambda y: y}])
def test_what_a_configuration_cannot_name_is_not_saved(options, tmp_path):
    with pytest.raises(ValueError, match="save the state_dict of this one"):
        flowkern.Unfolded(flowkern.GlowProx(make_glow(dtype=torch.float32)), **options).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
