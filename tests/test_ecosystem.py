"""A Glow among PyTorch's tools: compile, export, ONNX, functional transforms, copies, saving, optimizers."""

import copy
import io
import json
import pickle

import onnx.reference
import pytest
import torch
from helpers import relative, small_glow
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import flowkern
from flowkern import export, ops
from flowkern.adapters.hub import HubGlow
from flowkern.groups import parameter_groups
from flowkern.layers import ActNorm, AffineCoupling, InvertibleConv1x1
from flowkern.operators import Blur, Compose

SIZE = (2, 8, 8)


def images(n=3, dtype=torch.float32):
    return torch.rand(n, *SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def glow_of(**options):
    return small_glow(SIZE, dtype=options.pop("dtype", torch.float32), levels=2, depth=2, **options).eval()


VARIANTS = {
    "standard": {},
    "learned": {"split_prior": "learned", "top_prior": "learned", "scale": "sigmoid", "shift": 0.5},
    "additive": {"coupling": "additive"},
    "variant": {
        "scale": "sigmoid",
        "variant": {"edge": "indicator", "shift_after": True, "keeps": "second", "squeeze": ["pixels", "contiguous"]},
    },
}


def test_exported_programs_give_the_same_numbers():
    """With every kind of option; ONNX below has the standard networks."""
    glow, x = glow_of(**VARIANTS["variant"], split_prior="learned"), images()
    dynamic = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(export.LogProb(glow), (x,), dynamic_shapes=(dynamic,))
    back = torch.export.export(export.Inverse(glow), (x.flatten(1),), dynamic_shapes=(dynamic,))
    assert not any("flowkern" in str(node.target) for p in (program, back) for node in p.graph.nodes)
    z = torch.randn(7, 128)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(7)), glow.log_prob(images(7)), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(back.module()(z), glow.inverse(z), rtol=1e-4, atol=1e-4)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), program.module()(x))


def test_onnx_gives_the_same_numbers(tmp_path):
    """For another batch size than the one it was exported with."""
    glow = small_glow(SIZE, dtype=torch.float32, levels=2, depth=1, **VARIANTS["learned"]).eval()
    z = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    path, dynamic = tmp_path / "model.onnx", ({0: torch.export.Dim("batch", min=1, max=64)},)
    for module, given, run in (
        (export.LogProb(glow), images(), glow.log_prob),
        (export.Inverse(glow), z, glow.inverse),
    ):
        torch.onnx.export(module, (given,), path, dynamo=True, verbose=False, dynamic_shapes=dynamic)
        model = onnx.load(path)
        onnx.checker.check_model(model)
        given = torch.cat([given, 0.5 * given])
        (found,) = onnx.reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: given.numpy()})
        torch.testing.assert_close(torch.tensor(found), run(given).detach(), rtol=1e-4, atol=1e-3)


def test_exporting_a_conditioned_and_an_uninitialised_glow():
    glow = flowkern.Glow(SIZE, levels=2, depth=2, hidden=4, context_channels=3)
    with pytest.raises(ValueError, match="call glow.initialize.* before exporting it"):
        export.LogProb(glow)
    x, context = images(), torch.randn(3, 3)
    glow.initialize(x, context)
    program = torch.export.export(export.LogProb(glow), (x, context))
    torch.testing.assert_close(program.module()(x, context), glow.log_prob(x, context), rtol=1e-5, atol=1e-3)


def test_exported_weights_are_copies():
    glow, x = glow_of(), images()
    module = export.LogProb(glow)
    before = module(x)
    with torch.no_grad():
        for p in glow.parameters():
            p.add_(1)
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("method", ["log_prob", "inverse"])
def test_compiled_whole_with_every_kind_of_prior(method):
    glow = small_glow(SIZE, dtype=torch.float32, levels=2, depth=1, **VARIANTS["learned"]).eval()
    given = images() if method == "log_prob" else images().flatten(1)
    function = getattr(glow, method)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given), function(given))
    found = torch.autograd.grad(compiled(given).sum(), list(glow.parameters()))
    for a, b in zip(found, torch.autograd.grad(function(given).sum(), list(glow.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_are_initialised_where_there_are_no_values_to_look_at():
    """Compiled whole, and on the meta device."""
    x = torch.randn(2, 4, 3, 3)
    for layer in (ActNorm(4), InvertibleConv1x1(4)):
        plain = copy.deepcopy(layer)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), plain(x))
    assert ActNorm(4).to("meta").initialize(x.to("meta")).shape == x.shape


def test_compiled_around_networks_of_ones_own():
    """Those of a conditioned Glow stay outside of the graph; numbers and gradients are the same."""
    glow, x = flowkern.Glow(SIZE, levels=1, depth=2, hidden=4, context_channels=3), images()
    context = torch.randn(3, 3)
    glow.initialize(x, context)
    compiled = torch.compile(glow.log_prob, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), glow.log_prob(x, context))
    found = torch.autograd.grad(compiled(x, context).sum(), list(glow.parameters()))
    for a, b in zip(found, torch.autograd.grad(glow.log_prob(x, context).sum(), list(glow.parameters())), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(Exception, match="networks of one's own runs outside of the graph"):
        torch.compile(glow.log_prob, fullgraph=True, backend="eager")(x, context)


@pytest.fixture
def plain():
    return glow_of(dtype=torch.float64, memory="store", backend="reference", split_prior="learned")


def test_vmap_gives_each_images_own_gradients(plain):
    x, parameters = images(dtype=torch.float64), dict(plain.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(plain, parameters, (image[None],))[1].sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        wanted = torch.autograd.grad(plain(x[i : i + 1])[1].sum(), list(parameters.values()), allow_unused=True)
        for name, w in zip(parameters, wanted, strict=True):
            assert relative(found[name][i], torch.zeros(()) if w is None else w) < 1e-8 or found[name][i].norm() < 1e-12
    batched = torch.func.vmap(plain.log_prob)(x[:, None])
    torch.testing.assert_close(batched[:, 0], plain.log_prob(x))
    z = plain(x)[0]
    torch.testing.assert_close(torch.func.vmap(plain.inverse)(z[:, None])[:, 0], x)


def test_jvp_is_the_directional_derivative(plain):
    x, v = images(dtype=torch.float64), torch.randn(3, *SIZE, dtype=torch.float64)
    value, slope = torch.func.jvp(plain.log_prob, (x,), (v,))
    torch.testing.assert_close(value, plain.log_prob(x))
    torch.testing.assert_close(
        slope, (plain.log_prob(x + 1e-6 * v) - plain.log_prob(x - 1e-6 * v)) / 2e-6, rtol=1e-5, atol=1e-4
    )
    z = plain(x)[0].detach()
    u = torch.randn_like(z)
    _, slope = torch.func.jvp(plain.inverse, (z,), (u,))
    torch.testing.assert_close(
        slope, (plain.inverse(z + 1e-6 * u) - plain.inverse(z - 1e-6 * u)) / 2e-6, rtol=1e-5, atol=1e-6
    )
    jacobian = torch.func.jacfwd(lambda x: plain(x)[0])(x[:1]).reshape(128, 128)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, plain(x[:1])[1][0])


@pytest.mark.parametrize("options", [{}, {"memory": "store"}, {"memory": "checkpoint", "backend": "reference"}])
def test_elsewhere_functional_transforms_say_what_they_want(options):
    glow, x = glow_of(**options), images()
    for run in (lambda: torch.func.vmap(glow.log_prob)(x[:, None]), lambda: torch.func.jvp(glow.log_prob, (x,), (x,))):
        with pytest.raises(RuntimeError, match="want memory='store' and backend='reference', got memory='") as error:
            run()
        assert "\n" not in str(error.value)


def test_gradients_by_torch_func():
    """They want what a second derivative wants, and serve every backend."""
    glow, x = glow_of(dtype=torch.float64, memory="store"), images(dtype=torch.float64)
    (wanted,) = torch.autograd.grad(glow.log_prob(x.requires_grad_()).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: glow.log_prob(x).sum())(x.detach()), wanted)
    for glow.memory in ("recompute", "checkpoint"):
        with pytest.raises(RuntimeError, match="torch.func.grad wants memory='store', got memory="):
            torch.func.grad(lambda x: glow.log_prob(x).sum())(x.detach())


def tanh_network(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.Tanh())


def own_maps():
    """Each map of images (N, 2, 8, 8) that the package differentiates."""
    glow = glow_of(dtype=torch.float64, memory="store", split_prior="learned")
    own = glow_of(dtype=torch.float64, memory="store", network=tanh_network)
    generator = torch.Generator().manual_seed(5)
    rotation, coupling = InvertibleConv1x1(2).double(), AffineCoupling(tanh_network(1, 2)).double()
    sequence = flowkern.ReversibleSequence([ActNorm(2).double().eval(), rotation, coupling], memory="store")
    level, y = images(dtype=torch.float64), torch.rand(1, *SIZE, generator=generator, dtype=torch.float64)
    blurred = {"operator": Blur(torch.full((3, 3), 1 / 9)), "init": "adjoint"}
    return {
        "log_prob": glow.log_prob,
        "own network": own.log_prob,
        "inverse": lambda x: glow.inverse(x.flatten(1)),
        "prox": flowkern.GlowProx(glow),
        "prox of own networks": flowkern.GlowProx(own),
        "unfolded": flowkern.Unfolded(flowkern.GlowProx(glow), folds=2),
        "unfolded, tied, exact": flowkern.Unfolded(
            flowkern.GlowProx(own), folds=2, tied=True, consistency="exact", **blurred
        ),
        "rotation": lambda x: rotation(x)[0],
        "rotation back": rotation.inverse,
        "coupling": lambda x: coupling(x)[1],
        "coupling back": coupling.inverse,
        "sequence": lambda x: sequence(x)[0],
        "couple_mix": lambda x: ops.couple_mix(x, 0.5 * level[:1], level[0, 0, :2, :2], level[0, 1, 0, :2])[0],
        "mix_couple": lambda x: ops.mix_couple(x, 0.5 * level[:1], level[0, 0, :2, :2], level[0, 1, 0, :2])[0],
        "consistency": lambda x: ops.data_consistency(x, x.flip(3) * y, x.mean()),
    }


@pytest.mark.parametrize("name", own_maps())
def test_second_derivatives_and_batches_of_gradients(name):
    f, x = own_maps()[name], images(1, dtype=torch.float64).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def slope(of):
        return (of(x + 1e-6 * direction) - of(x - 1e-6 * direction)).detach() / 2e-6

    out, along = f(x), slope(f).flatten()
    rows = torch.eye(out.numel(), dtype=out.dtype).reshape(-1, *out.shape)
    for found in (
        torch.autograd.grad(out, x, rows, is_grads_batched=True)[0],
        torch.func.jacrev(f)(x.detach()),
        torch.autograd.functional.jacobian(f, x, vectorize=True),
    ):
        assert relative(found.reshape(len(along), -1) @ direction.flatten(), along) < 1e-6

    def gradient(x):
        return torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]

    (found,) = torch.autograd.grad((gradient(x) * direction).sum(), x)
    assert relative(found, slope(gradient)) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_pickles_and_states_are_the_model(variant):
    glow, x = glow_of(**VARIANTS[variant]), images()
    wanted = glow.log_prob(x)
    twin = flowkern.Glow(**{k: v for k, v in glow.config.items() if k != "network"}, memory="store").eval()
    twin.load_state_dict(glow.state_dict())
    for other in (copy.deepcopy(glow), pickle.loads(pickle.dumps(glow)), twin):
        assert torch.equal(other.log_prob(x), wanted) and other.is_initialized and other.config == glow.config
        other.train().log_prob(10 * x)
        assert torch.equal(other.eval().log_prob(x), wanted), "it initialised itself again"
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert torch.equal(glow.log_prob(x), wanted)


def test_moves_between_precisions_and_devices():
    glow, x = glow_of(**VARIANTS["learned"]), images()
    single = glow.log_prob(x)
    double = copy.deepcopy(glow).to(torch.float64)
    assert {t.dtype for t in double.state_dict().values()} <= {torch.float64, torch.bool, torch.int64}
    torch.testing.assert_close(double.log_prob(x.double()).float(), single, rtol=1e-5, atol=1e-3)
    assert double.is_initialized
    meta = copy.deepcopy(glow).to("meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}
    with pytest.raises(ValueError, match="images are on cpu and the Glow is on meta; move one of them"):
        meta(x)
    back = meta.to_empty(device="cpu")
    back.load_state_dict(glow.state_dict())
    assert torch.equal(back.log_prob(x), single)


@pytest.mark.parametrize("memory", ["recompute", "store"])
def test_parametrizations(memory):
    glow, x = glow_of(dtype=torch.float64, memory=memory), images(dtype=torch.float64)
    wanted = glow.log_prob(x)
    for module in glow.modules():
        if isinstance(module, flowkern.layers.CouplingNet):
            parametrizations.weight_norm(module, "weight1", dim=0)
    torch.testing.assert_close(glow.log_prob(x), wanted)
    net = glow.levels[0].steps[0].coupling.net
    assert parametrize.is_parametrized(net, "weight1")
    glow.log_prob(x).sum().backward()
    scale = net.parametrizations.weight1.original0
    numeric = []
    with torch.no_grad():
        for sign in (1, -1):
            scale[0] += sign * 1e-6
            numeric.append(glow.log_prob(x).sum())
            scale[0] -= sign * 1e-6
    torch.testing.assert_close(scale.grad[0].sum(), (numeric[0] - numeric[1]) / 2e-6, rtol=1e-4, atol=1e-4)


def test_weight_decay_groups():
    glow = glow_of(split_prior="learned")
    decayed, others = parameter_groups(glow, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    names = {id(p): n for n, p in glow.named_parameters()}
    kernels = {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]}
    assert kernels == {"weight1", "weight2", "weight3", "weight"}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    own = small_glow(
        SIZE,
        levels=1,
        depth=1,
        network=lambda i, o: nn.Sequential(nn.Conv2d(i, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, o, 1)),
    )
    assert len(parameter_groups(own, 0.1)[0]["params"]) == 2
    torch.optim.AdamW(parameter_groups(glow, 0.1), lr=1e-3).step()


def test_weight_does_not_decay_where_a_constant_has_a_meaning():
    """A prior's constants per pixel say where latents lie, a kernel that is learnt how images were blurred."""
    glow = flowkern.Glow(SIZE, levels=2, depth=1, hidden=4, variant={"prior_map": "pixels"})
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2, operator=Blur(torch.ones(3, 3) / 9), init="adjoint")
    own = nn.Conv2d(2, 2, 3, padding=1)
    own.adjoint = own.forward
    net.operator.add_module("inside", nn.Conv2d(2, 2, 3))
    for operator in (net.operator, own, Compose(own)):
        net.operator = operator
        decayed, others = parameter_groups(net, weight_decay=0.1)
        names = {id(p): n for n, p in net.named_parameters()}
        assert {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]} == {"weight1", "weight2", "weight3"}
        assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_safetensors(tmp_path):
    glow, x = glow_of(), images()
    save_file(glow.state_dict(), tmp_path / "weights.safetensors")
    other = glow_of(seed=7)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other.log_prob(x), glow.log_prob(x))


class MixedGlow(PyTorchModelHubMixin, flowkern.Glow):
    """A Glow with `push_to_hub` as one would write it oneself."""


@pytest.mark.parametrize("kind", [MixedGlow, HubGlow])
def test_hugging_faces_mixin_and_ours_read_each_others_folders(kind, tmp_path):
    x = images()
    torch.manual_seed(0)
    theirs = kind(SIZE, levels=2, depth=[2, 1], hidden=4, scale="sigmoid", shift=0.5, split_prior="learned")
    theirs.initialize(x)
    theirs.save_pretrained(tmp_path / "theirs")
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir() if p.suffix != ".md") == [
        "config.json",
        "model.safetensors",
    ]
    for cls in (flowkern.Glow, kind):
        loaded = cls.from_pretrained(tmp_path / "theirs")
        assert torch.equal(loaded.log_prob(x), theirs.log_prob(x)) and loaded.is_initialized
    ours = glow_of(**VARIANTS["variant"])
    ours.save_pretrained(tmp_path / "ours")
    loaded = kind.from_pretrained(tmp_path / "ours", memory="store")
    assert torch.equal(loaded.log_prob(x), ours.log_prob(x)) and loaded.memory == "store"
    assert loaded.config == ours.config
    assert flowkern.Glow.from_pretrained(tmp_path / "theirs", memory="store").memory == "store"
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["variant"]["keeps"] == "second"


def test_what_the_hub_loads_is_the_same_model(tmp_path):
    """Or it is refused: nothing is filled as far as names agree."""

    def network(inputs, outputs):
        return torch.nn.Conv2d(inputs, outputs, 3, padding=1)

    x = images().double()
    own = HubGlow(SIZE, levels=2, depth=1, network=network).double()
    own.initialize(x)
    own.save_pretrained(tmp_path / "own")
    loaded = HubGlow.from_pretrained(tmp_path / "own", network=network, anchor_every=1)
    assert isinstance(loaded, HubGlow) and loaded.anchor_every == 1
    assert loaded.log_prob(x).dtype == torch.float64 and torch.equal(loaded.log_prob(x), own.log_prob(x))
    with pytest.raises(ValueError, match="was made with its own coupling network; pass the same network="):
        HubGlow.from_pretrained(tmp_path / "own")
    standard = HubGlow(SIZE, levels=1, depth=1, hidden=4, memory_budget=1 << 20)
    standard.save_pretrained(tmp_path / "standard")
    assert "memory_budget" not in json.loads((tmp_path / "standard" / "config.json").read_text())
    parametrizations.weight_norm(standard.levels[0].steps[0].coupling.net, "weight1")
    with pytest.raises(ValueError, match="is parametrized, which a saved configuration can't say"):
        standard.save_pretrained(tmp_path / "standard")


def test_a_repository_is_fetched_by_its_name(tmp_path, monkeypatch):
    glow, x, asked = glow_of(), images(), {}
    glow.save_pretrained(tmp_path)

    def fetch(name, **how):
        asked.update(how, name=name)
        return str(tmp_path)

    monkeypatch.setattr("flowkern.adapters.hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **_: str(tmp_path / "config.json"))
    loaded = HubGlow.from_pretrained("someone/glow", revision="main")
    assert torch.equal(loaded.log_prob(x), glow.log_prob(x))
    assert asked["name"] == "someone/glow" and asked["revision"] == "main"
    assert asked["allow_patterns"] == ["model.safetensors", "config.json"]


@pytest.mark.parametrize("of", ["norm1", "conv", "actnorm"])
def test_what_is_read_and_not_called_is_not_pruned(of):
    """Its mask would be applied by a call, and what was there before would be used in silence."""
    glow, x = glow_of(memory="store", backend="reference"), images()
    step = glow.levels[0].steps[0]
    part, name = step.coupling.net.norm1 if of == "norm1" else getattr(step, of), "lower" if of == "conv" else "bias"
    prune.l1_unstructured(part, name, 0.5)
    refusal = r"of an \w+ is pruned, which is read and not called: make it final"
    with pytest.raises(ValueError, match=refusal):
        glow.log_prob(x)
    with pytest.raises(ValueError, match=refusal):
        torch.func.vmap(lambda image: glow.log_prob(image[None])[0])(x)
    glow.set_options(memory="recompute", backend="auto")
    with pytest.raises(ValueError, match=refusal):
        glow.log_prob(x)
    prune.remove(part, name)
    assert glow.log_prob(x).isfinite().all()


def test_averages_of_weights_keep_the_map_s_permutations():
    glow, x = glow_of(), images()
    average = AveragedModel(glow, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(20):
        average.update_parameters(glow)
    torch.testing.assert_close(average.module.log_prob(x), glow.log_prob(x))
