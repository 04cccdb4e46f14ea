"""flowkern.Glow as users meet it: shapes, errors, initialisation, saving."""

import copy
import json
import math
import re

import pytest
import torch
from helpers import small_glow
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import flowkern
from flowkern import reference
from flowkern.layers import ActNorm, AffineCoupling, CouplingNet, InvertibleConv1x1, Split, StepOfFlow
from flowkern.prior import Prior


@pytest.fixture
def glow():
    return small_glow(dtype=torch.float32)


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 4)])
def test_any_divisible_size(glow, size):
    x = torch.rand(3, 2, *size)
    z, logdet = glow(x)
    assert z.shape == (3, 2 * size[0] * size[1]) and logdet.shape == (3,)
    back, inverse_logdet = glow.inverse(z, size=size, return_logdet=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-4, atol=1e-2)


def test_latents_split_into_views_in_the_order_of_the_levels(glow):
    z, _ = glow(torch.rand(3, 2, 8, 8))
    parts = glow.split_latent(z)
    assert [tuple(p.shape) for p in parts] == [(3, 4, 4, 4), (3, 16, 2, 2)]
    assert all(p.data_ptr() >= z.data_ptr() and p._base is not None for p in parts)
    z.zero_()
    assert all(p.abs().sum() == 0 for p in parts)


def test_log_prob_and_bits_per_dim(glow):
    x = torch.rand(3, 2, 8, 8)
    z, logdet = reference.glow_forward(glow, x)
    normal = torch.distributions.Normal(0, 1).log_prob(z).sum(dim=1)
    torch.testing.assert_close(glow.log_prob(x), normal + logdet, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(glow.bits_per_dim(x, bits=5), -glow.log_prob(x) / (128 * math.log(2)) + 5)


def test_density_integrates_to_one():
    """A two-dimensional check that needs no Jacobian: the density summed over a grid."""
    glow = small_glow((1, 2, 2), levels=1, depth=2, hidden=3, split_prior="standard")
    with torch.no_grad():
        line = torch.linspace(-1.2, 2.2, 35, dtype=torch.float64)
        grid = torch.cartesian_prod(line, line, line, line).view(-1, 1, 2, 2)
        total = sum(glow.log_prob(part).exp().sum() for part in grid.split(200_000)) * (line[1] - line[0]) ** 4
    assert abs(total - 1) < 0.02


def test_sample(glow):
    samples = glow.sample(5, temperature=0.5)
    assert samples.shape == (5, 2, 8, 8) and torch.isfinite(samples).all() and not samples.requires_grad
    assert glow.sample(2, size=(4, 8)).shape == (2, 2, 4, 8)
    assert glow.sample(0).shape == (0, 2, 8, 8)
    mode = glow.sample(2, temperature=0)
    torch.testing.assert_close(mode[0], mode[1])
    with torch.random.fork_rng():
        first, second = (glow.sample(2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_empty_batch(glow):
    x = torch.rand(0, 2, 8, 8, requires_grad=True)
    z, logdet = glow(x)
    assert z.shape == (0, 128) and logdet.shape == (0,)
    assert glow.inverse(z).shape == x.shape and glow.log_prob(x).shape == (0,)
    z.sum().backward()
    assert x.grad.shape == x.shape
    with pytest.raises(ValueError, match="at least one image"):
        glow.initialize(x)


def test_strided_input_and_shift():
    glow = small_glow(dtype=torch.float32, shift=0.5)
    plain = small_glow(dtype=torch.float32)
    plain.load_state_dict(glow.state_dict())
    x = torch.rand(3, 4, 8, 16)[:, ::2, :, ::2]
    assert not x.is_contiguous()
    torch.testing.assert_close(glow(x)[0], plain(x - 0.5)[0])
    torch.testing.assert_close(glow.inverse(glow(x)[0]), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(size=(3, 8)), r"size wants \(C, H, W\)"),
        (dict(size=8), r"size wants \(C, H, W\), got 8"),
        (dict(size=(3, 6, 8), levels=2), r"divisible by 2\^levels = 4, got 6x8"),
        (dict(depth=[1]), r"one per level \(2\), got 1"),
        (dict(depth=0), "depth wants an int >= 1, got 0"),
        (dict(depth=1.5), "depth wants an int, got 1.5"),
        (dict(levels="2"), "levels wants an int, got '2'"),
        (dict(hidden=True), "hidden wants an int, got True"),
        (dict(coupling="affin"), "unknown coupling 'affin'; choose one of 'affine', 'additive'"),
        (dict(scale="exp"), "unknown scale 'exp'"),
        (dict(split_prior="none"), "unknown split_prior 'none'"),
        (dict(memory="low"), "unknown memory 'low'; choose one of 'recompute', 'store', 'checkpoint'"),
        (dict(backend="fast"), "unknown backend 'fast'; choose one of 'auto', 'reference'"),
        (dict(anchor_every=0), "anchor_every wants an int >= 1, got 0"),
        (dict(compute_dtype=torch.int8), "compute_dtype wants a floating torch.dtype or None, got torch.int8"),
        (dict(alpha=0.0), "alpha > 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        flowkern.Glow(**{"size": (2, 8, 8), "levels": 2, "depth": 1, "hidden": 2, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "x,message",
    [
        (torch.rand(2, 3, 8, 8), r"images of shape \(N, 2, H, W\), got \(2, 3, 8, 8\)"),
        (torch.rand(2, 8, 8), r"images of shape \(N, 2, H, W\), got \(2, 8, 8\)"),
        (torch.rand(2, 2, 8, 6), r"divisible by 2\^levels = 4, got 8x6"),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), "floating-point images, got torch.uint8"),
        (torch.rand(2, 2, 8, 8).double(), "torch.float64 and the Glow is torch.float32"),
        (torch.full((2, 2, 8, 8), math.nan), "NaN or infinite"),
        (torch.full((2, 2, 8, 8), math.inf), "NaN or infinite"),
        (torch.zeros(2, 2, 8, 8, device="meta"), "images are on meta and the Glow is on cpu"),
        ([[1.0]], "torch.Tensor, got list"),
        (torch.rand(2, 2, 8, 8).to_sparse(), "images as a dense tensor, got torch.sparse_coo"),
    ],
)
def test_bad_images(glow, x, message):
    for method in (glow, glow.log_prob, glow.initialize):
        with pytest.raises((ValueError, TypeError), match=message) as error:
            method(x)
        assert "\n" not in str(error.value)


def test_bad_latents_and_sample_arguments(glow):
    for z, message in (
        (torch.rand(2, 100), r"latents of shape \(N, 128\), got \(2, 100\); .*pass size=\(H, W\)"),
        (torch.full((2, 128), math.nan), "latents contain NaN"),
        (torch.zeros(2, 128, dtype=torch.long), "floating-point latents, got torch.int64"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            glow.inverse(z)
    with pytest.raises(ValueError, match="n wants an int >= 0, got -1"):
        glow.sample(-1)
    with pytest.raises(ValueError, match="temperature wants a finite number"):
        glow.sample(1, temperature=math.nan)
    for size in ((2, 8, 8), 8, (8,)):
        with pytest.raises(ValueError, match=rf"size wants \(H, W\), got {re.escape(repr(size))}"):
            glow.sample(1, size=size)


def test_finiteness_is_checked_on_request_only_when_told_so(glow):
    glow.check_finite = False
    assert torch.isnan(glow.log_prob(torch.full((2, 2, 8, 8), math.nan))).all()
    with pytest.raises(ValueError, match="NaN"):
        glow.initialize(torch.full((2, 2, 8, 8), math.nan))


def test_half_precision_images_are_taken_up_to_the_parameters_precision(glow):
    x = torch.rand(2, 2, 8, 8).bfloat16()
    z, _ = glow(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, glow(x.float())[0])


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_latents_are_taken_up_to_the_parameters_precision_too(own, given, glow):
    z = torch.randn(3, 128).to(given)
    glow = glow.to(own)
    x = glow.inverse(z)
    assert x.dtype == own
    torch.testing.assert_close(x, glow.inverse(z.to(own)))


def test_how_a_saved_glow_runs_is_chosen_when_it_is_loaded(glow, tmp_path):
    glow.save_pretrained(tmp_path)
    options = {"memory_budget": 1000, "backend": "reference", "compute_dtype": torch.bfloat16, "check_finite": False}
    loaded = flowkern.Glow.from_pretrained(tmp_path, **options)
    assert {name: getattr(loaded, name) for name in options} == options
    for wrong, error, message in (
        ({"memori": "store"}, TypeError, "'memori' is not how a Glow runs; the options are memory, anchor_every"),
        ({"memory": "stored"}, ValueError, "stored"),
        ({"compute_dtype": "bfloat16"}, TypeError, "wants a floating torch.dtype or None, got 'bfloat16'"),
        ({"memory_budget": 2e9}, TypeError, "memory_budget wants an int, in bytes, or None, got 2000000000.0"),
    ):
        with pytest.raises(error, match=message):
            flowkern.Glow.from_pretrained(tmp_path, **wrong)
    with pytest.raises(TypeError, match="'levels' is not how a Glow runs"):
        loaded.set_options(levels=3)
    loaded.set_options(memory="store", memory_budget=None)
    assert (loaded.memory, loaded.memory_budget) == ("store", None)


def test_first_training_forward_initialises_and_only_that():
    torch.manual_seed(0)
    glow = flowkern.Glow((2, 8, 8), levels=2, depth=2, hidden=4)
    x = 3 * torch.rand(16, 2, 8, 8) + 1
    assert not glow.is_initialized
    glow.eval()(x)
    assert not glow.is_initialized
    glow.train()
    z, _ = glow(x)
    assert glow.is_initialized
    for part in glow.split_latent(z):
        assert part.mean().abs() < 0.1 and abs(part.std() - 1) < 0.1
    before = {k: v.clone() for k, v in glow.state_dict().items()}
    glow(5 * x)
    assert all(torch.equal(v, before[k]) for k, v in glow.state_dict().items())


@pytest.mark.parametrize("how", ["buffers copied", "average of models"])
def test_what_was_initialised_elsewhere_is_not_initialised_again(how, glow):
    """DDP and averages of models copy parameters and buffers, not what Python knows of them."""
    torch.manual_seed(0)
    other = flowkern.Glow((2, 8, 8), levels=2, depth=3, hidden=5)
    assert not other.is_initialized
    if how == "buffers copied":
        for mine, theirs in ((other.parameters(), glow.parameters()), (other.buffers(), glow.buffers())):
            for a, b in zip(mine, theirs, strict=True):
                a.data.copy_(b.data)
    else:
        average = torch.optim.swa_utils.AveragedModel(other)
        other.initialize(torch.rand(8, 2, 8, 8))
        average.update_parameters(other)
        other = average.module
    before = {name: value.clone() for name, value in other.state_dict().items()}
    assert other.is_initialized
    other.train()(5 * torch.rand(4, 2, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_autocast_does_not_reach_the_initialisation():
    torch.manual_seed(0)
    glow, x = flowkern.Glow((2, 8, 8), levels=2, depth=2, hidden=4, split_prior="learned"), torch.rand(8, 2, 8, 8)
    other = copy.deepcopy(glow)
    glow.initialize(x)
    with torch.autocast("cpu", torch.bfloat16):
        other(x)
    for name, value in glow.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_constant_channel_does_not_explode():
    glow = flowkern.Glow((2, 8, 8), levels=2, depth=2, hidden=4)
    glow.initialize(torch.full((4, 2, 8, 8), 0.7))
    z, logdet = glow(torch.rand(4, 2, 8, 8))
    assert torch.isfinite(z).all() and torch.isfinite(logdet).all()


def test_compiling_an_uninitialised_glow_says_what_to_call():
    glow = flowkern.Glow((2, 8, 8), levels=1, depth=1, hidden=4)
    with pytest.raises(Exception, match="call glow.initialize"):
        torch.compile(glow.log_prob, fullgraph=True, backend="eager")(torch.rand(2, 2, 8, 8))


def test_state_dict_is_the_same_in_every_mode_and_stays_initialised():
    glow = small_glow(dtype=torch.float32)
    x = torch.rand(2, 2, 8, 8)
    wanted = glow.log_prob(x)
    for memory in ("recompute", "store", "checkpoint"):
        other = flowkern.Glow((2, 8, 8), levels=2, depth=3, hidden=5, memory=memory)
        other.load_state_dict(glow.state_dict())
        assert other.is_initialized
        torch.testing.assert_close(other.train().log_prob(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"split_prior": "learned", "scale": "sigmoid", "shift": 0.5}, {"coupling": "additive"}]
)
def test_saved_and_loaded_is_bitwise_the_same(tmp_path, options):
    glow = small_glow(dtype=torch.float32, **options)
    x = torch.rand(4, 2, 8, 8)
    glow.save_pretrained(tmp_path / "glow")
    loaded = flowkern.Glow.from_pretrained(tmp_path / "glow", memory="store").train()
    assert loaded.memory == "store" and loaded.config == glow.config
    assert torch.equal(loaded.log_prob(x), glow.log_prob(x))
    assert torch.equal(loaded.log_prob(4 * x), glow.log_prob(4 * x)), "it initialised itself again"
    assert sorted(p.name for p in (tmp_path / "glow").iterdir()) == ["config.json", "model.safetensors"]


def test_saved_double_stays_double(tmp_path):
    glow = small_glow()
    glow.save_pretrained(tmp_path)
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    assert torch.equal(flowkern.Glow.from_pretrained(tmp_path).log_prob(x), glow.log_prob(x))


def test_broken_checkpoints(tmp_path, glow):
    with pytest.raises(FileNotFoundError, match="is not a saved Glow: it has no config.json"):
        flowkern.Glow.from_pretrained(tmp_path / "nothing")
    glow.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        flowkern.Glow.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    for change, message in (
        ({"depth": [3, 4]}, r"9 missing|missing \(levels.1.steps.3"),
        ({"hidden": 7}, r"of another shape \(.* instead of "),
        ({"split_prior": "learned"}, r"3 missing \(levels.0.split.weight"),
        ({"depth": [3, 1]}, r"unknown \(levels.1.steps.1"),
        ({"colour": 1}, "configuration of a Glow"),
    ):
        config.write_text(json.dumps(glow.config | change))
        with pytest.raises(ValueError, match=message) as error:
            flowkern.Glow.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    config.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        flowkern.Glow.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="it has no model.safetensors"):
        flowkern.Glow.from_pretrained(tmp_path)


def test_what_a_configuration_can_t_say_is_not_saved(tmp_path, glow):
    """A folder that nobody could load."""
    net = glow.levels[0].steps[0].coupling.net
    parametrizations.weight_norm(net, "weight1")
    with pytest.raises(ValueError, match=r"levels.0.steps.0.coupling.net is parametrized, .*remove_parametrizations"):
        glow.save_pretrained(tmp_path / "glow")
    parametrize.remove_parametrizations(net, "weight1")
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2)
    glow = net.proxes[0].glow
    prune.l1_unstructured(glow.levels[0].steps[0].coupling.net, "weight2", amount=0.5)
    with pytest.raises(ValueError, match=r"proxes.0.glow.levels.0.steps.0.coupling.net is pruned, .*prune.remove"):
        net.save_pretrained(tmp_path / "glow")
    assert not (tmp_path / "glow").exists()
    prune.remove(glow.levels[0].steps[0].coupling.net, "weight2")
    glow.save_pretrained(tmp_path / "glow")
    x = torch.rand(2, *glow.size)
    assert torch.equal(flowkern.Glow.from_pretrained(tmp_path / "glow").log_prob(x), glow.log_prob(x))


def test_own_networks_are_saved_with_their_parametrizations(tmp_path):
    def network(i, o):
        return parametrizations.weight_norm(nn.Conv2d(i, o, 3, padding=1))

    glow, x = small_glow(network=network, dtype=torch.float32), torch.rand(2, 2, 8, 8)
    glow.save_pretrained(tmp_path)
    assert torch.equal(flowkern.Glow.from_pretrained(tmp_path, network=network).log_prob(x), glow.log_prob(x))


def test_own_network_is_asked_for_again(tmp_path):
    def network(in_channels, out_channels):
        return torch.nn.Conv2d(in_channels, out_channels, 1)

    glow = small_glow(dtype=torch.float32, network=network)
    glow.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass the same network="):
        flowkern.Glow.from_pretrained(tmp_path)
    x = torch.rand(2, 2, 8, 8)
    assert torch.equal(flowkern.Glow.from_pretrained(tmp_path, network=network).log_prob(x), glow.log_prob(x))


@pytest.mark.parametrize(
    "layer",
    [
        ActNorm(4),
        InvertibleConv1x1(4),
        AffineCoupling(CouplingNet(2, 4, 6)),
        AffineCoupling(CouplingNet(2, 4, 6), "sigmoid"),
        AffineCoupling(CouplingNet(2, 2, 6), "additive"),
        StepOfFlow(4, hidden=6),
    ],
    ids=lambda layer: re.sub(r"\W.*", "", repr(layer)),
)
def test_layers_alone(layer):
    torch.manual_seed(0)
    layer = layer.double()
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    layer.train()(x)
    for p in layer.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    y, logdet = layer(x)
    back, inverse_logdet = layer.inverse(y, return_logdet=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(layer.inverse(y), x)
    torch.testing.assert_close(inverse_logdet, -logdet)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v)[0], x[i : i + 1]).reshape(16, 16)
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet)
    with pytest.raises(ValueError, match=r"got \(2, 5, 2, 2\)"):
        layer(torch.randn(2, 5, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layer", [ActNorm(4), InvertibleConv1x1(4), AffineCoupling(CouplingNet(2, 4, 6)), StepOfFlow(4, hidden=6)],
    ids=["ActNorm", "InvertibleConv1x1", "AffineCoupling", "StepOfFlow"],
)
def test_layers_alone_take_what_autocast_leaves(layer, half):
    """As plain PyTorch's layers do: a model's other parts hand over lower precision."""
    layer, x = copy.deepcopy(layer), torch.randn(2, 4, 2, 2).to(half)
    with torch.autocast("cpu", half):
        y, logdet = layer(x)
        back = layer.inverse(y.to(half))
        assert y.dtype == back.dtype == torch.float32
        wanted, wanted_logdet = layer(x.float())
    torch.testing.assert_close(y, wanted, rtol=0, atol=0)
    torch.testing.assert_close(logdet, wanted_logdet, rtol=0, atol=0)
    torch.testing.assert_close(back, x.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layer", [ActNorm(4), StepOfFlow(4, hidden=6)], ids=["ActNorm", "StepOfFlow"])
def test_layers_alone_are_not_initialised_from_what_is_no_number(layer):
    x = torch.randn(2, 4, 2, 2)
    x[0, 1, 0, 1] = math.inf
    with pytest.raises(ValueError, match="ActNorm is initialised from contain NaN or infinite values"):
        layer(x)
    assert not layer.is_initialized and all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("learned", [False, True])
def test_split_alone(learned):
    torch.manual_seed(0)
    split = Split(4, learned).double()
    for p in split.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    kept, emitted, logdet = split(x)
    back, inverse_logdet = split.inverse(kept, emitted)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)
    assert learned == bool((emitted - x[:, 2:]).abs().max() > 1e-3)


def test_a_deeper_glow_that_starts_from_trained_steps_keeps_them():
    """Only the steps that are new are initialised."""
    torch.manual_seed(0)
    x = torch.rand(8, 2, 8, 8)
    trained = flowkern.Glow((2, 8, 8), levels=2, depth=2, hidden=4)
    trained.initialize(3 * x)
    deeper = flowkern.Glow((2, 8, 8), levels=2, depth=3, hidden=4)
    deeper.load_state_dict(trained.state_dict(), strict=False)
    assert not deeper.is_initialized
    deeper.train()(x)
    assert deeper.is_initialized
    found, wanted = deeper.state_dict(), trained.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    new = deeper.levels[1].steps[2]
    assert new.actnorm.log_scale.abs().sum() > 0


@pytest.mark.parametrize("permutation", [[0, 1, 2, 4], [0, 1, 2, 2], [-1, 0, 1, 2]])
def test_a_loaded_permutation_is_one(permutation):
    step = StepOfFlow(4, hidden=6)
    weights = {name: value.clone() for name, value in step.state_dict().items()}
    kept = step.conv.permutation.clone()
    weights["conv.permutation"].copy_(torch.tensor(permutation))
    with pytest.raises(RuntimeError, match=r"conv.permutation must hold each of 0 ... 3 once"):
        step.load_state_dict(weights)
    assert torch.equal(step.conv.permutation, kept)
    weights["conv.permutation"].copy_(torch.tensor([3, 0, 2, 1]))
    step.load_state_dict(weights)
    assert step.conv.permutation.tolist() == [3, 0, 2, 1]


def test_a_glow_does_not_initialise_itself_among_several_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    glow = flowkern.Glow((2, 8, 8), levels=2, depth=1, hidden=4)
    with pytest.raises(RuntimeError, match="this Glow is not initialised, and several processes train"):
        glow(torch.rand(2, 2, 8, 8))


def test_a_learned_prior_s_moments_keep_their_precision_under_autocast():
    torch.manual_seed(0)
    prior = Prior(4, kept=4, learned=True)
    for p in prior.parameters():
        nn.init.normal_(p, std=0.3)
    x, kept = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    z, logdet = prior(x, kept)
    with torch.autocast("cpu", torch.bfloat16):
        found = prior(x, kept)
    assert torch.equal(found[0], z) and torch.equal(found[1], logdet)


def test_parameters_that_are_loaded_without_the_flag_are_not_initialised_again():
    """As averages of weights and optimizers' copies are, which hold no buffers."""
    trained, fresh = (small_glow(seed=seed, dtype=torch.float32) for seed in (0, 1))
    for net in (fresh, flowkern.Glow((2, 8, 8), levels=2, depth=3, hidden=5)):
        net.load_state_dict(dict(trained.named_parameters()), strict=False)
        assert net.is_initialized
        net.log_prob(torch.rand(4, 2, 8, 8))
        for p, q in zip(net.parameters(), trained.parameters(), strict=True):
            assert torch.equal(p, q)
    untouched = flowkern.Glow((2, 8, 8), levels=1, depth=1, hidden=4)
    untouched.load_state_dict(dict(untouched.named_parameters()), strict=False)
    assert not untouched.is_initialized
