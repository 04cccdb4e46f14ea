"""Checkpoints of other Glow implementations: the same log-likelihoods, from the same tensors."""

import json
import pickle

import normflows
import numpy as np
import pytest
import torch
from helpers import small_glow
from oracles import chaiyujin, glowip, openai, rosinality

import flowkern
from bench.rivals import NormFlows
from flowkern import reference

SHAPES = [(3, 4), (4, 8)]
SIZE = 16


def images(channels=3, n=3):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(n, channels, SIZE, SIZE, generator=generator, dtype=torch.float64) - 0.5


def one_hot(classes, n=3):
    return torch.eye(classes, dtype=torch.float64)[torch.arange(n) % classes]


def agree(glow, x, wanted, context=None):
    """Same log-likelihoods in double and single precision, and latents that give the images back, in every mode."""
    assert next(glow.parameters()).dtype == torch.float64
    for dtype in (torch.float64, torch.float32):
        glow, cast = glow.to(dtype), x.to(dtype)
        given = context if context is None else context.to(dtype)
        found = glow.log_prob(cast, given)
        assert ((found.double() - wanted) / wanted).abs().max() < (1e-10 if dtype == torch.float64 else 1e-5)
        with torch.no_grad():
            z, _ = glow(cast, given)
            back = glow.inverse(z, size=x.shape[2:], context=given)
        assert (back - cast).abs().max() < 1e-4
    glow.double()


# What each dialect's models can look like: arguments of the oracle, of its likelihood, and of `from_checkpoint`.
CASES = {
    "rosinality": (rosinality, {}, {}, {}),
    "rosinality whole matrices": (rosinality, {"lu": False}, {}, {}),
    "rosinality additive": (rosinality, {"affine": False}, {}, {}),
    "chaiyujin": (chaiyujin, {}, {}, {}),
    "chaiyujin classes": (chaiyujin, {"classes": 5}, {"one_hot": one_hot(5)}, {}),
    "chaiyujin classes alone": (chaiyujin, {"classes": 5, "learn_top": False}, {"one_hot": one_hot(5)}, {}),
    "chaiyujin additive": (chaiyujin, {"affine": False, "learn_top": False}, {}, {}),
    "chaiyujin reversed": (chaiyujin, {"invconv": False}, {}, {"permutation": "reverse"}),
    "glowip": (glowip, {}, {"last_bias": 1.0}, {}),
    "glowip no last zeros": (glowip, {}, {}, {"last_zeros": False}),
    "glowip bias, contiguous": (
        glowip,
        {},
        {"bias": 0.3, "last_bias": 1.0, "contiguous": range(9)},
        {"coupling_bias": 0.3, "squeeze_contig": True},
    ),
    "glowip first version": (glowip, {}, {"contiguous": range(9)}, {"last_zeros": False, "squeeze_contig": "all"}),
    "glowip additive": (glowip, {"affine": False}, {}, {}),
    "openai": (openai, {}, {}, {}),
    "openai classes": (openai, {"classes": 4}, {"one_hot": one_hot(4)}, {}),
    "openai plain top": (openai, {"learn_top": False}, {}, {}),
    "openai no edges": (openai, {"edge": False}, {}, {}),
    "openai shuffled": (openai, {"permutation": "shuffle"}, {}, {}),
    "openai reversed, additive": (openai, {"permutation": "reverse", "affine": False}, {}, {}),
}


@pytest.mark.parametrize("levels, depth", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_log_likelihoods_are_the_oracles(case, levels, depth):
    oracle, made, asked, told = CASES[case]
    if (levels, depth) != SHAPES[0] and case not in ("rosinality", "chaiyujin", "glowip", "openai"):
        levels, depth = 2, 1  # the variations once deep, once shallow, to save time
    weights, x = oracle.weights(levels, depth, **made), images()
    if oracle is glowip:
        asked = {"depth": depth, **asked}
        asked["contiguous"] = [
            i for i in asked.get("contiguous", ()) if i < levels - (told.get("squeeze_contig") is True)
        ]
    wanted = oracle.log_prob(weights, x, **asked)
    glow = flowkern.Glow.from_checkpoint(weights, size=SIZE, shift=0.0, **told)
    agree(glow, x, wanted, asked.get("one_hot"))


def test_grey_images_and_other_sizes():
    weights = rosinality.weights(2, 2, channels=1)
    glow = flowkern.Glow.from_checkpoint(weights, size=(8, 8), shift=0.0)
    assert glow.size == (1, 8, 8)
    agree(glow, images(1), rosinality.log_prob(weights, images(1)))


@torch.no_grad()
def moved(model):
    """Every parameter moved by 0.1, of matrices by 0.1 and of kernels by 0.4 over the root of their rows' length."""
    for p in model.parameters():
        row = p[0].numel()
        std = {2: 0.1, 4: 0.4}.get(p.dim(), 0.1) / row**0.5 if p.shape[0] > 1 else 0.1
        p.add_(std * torch.randn_like(p))
    return model


def normflows_model(levels, depth, hidden=6, base="pixels", classes=0, **block):
    """normflows' multi-scale Glow, far from its initialisation."""
    torch.manual_seed(3)
    bases, flows, merges, c = [], [], [], 3 * 2 ** (levels + 1)
    for i in range(levels):
        flows.append(
            [normflows.flows.GlowBlock(c, hidden, **block) for _ in range(depth)] + [normflows.flows.Squeeze()]
        )
        shape = (c if i == 0 else c // 2, SIZE >> (levels - i), SIZE >> (levels - i))
        bases.append(
            {
                "pixels": lambda s: normflows.distributions.DiagGaussian(s),
                "channels": lambda s: normflows.distributions.GlowBase(s, classes or None),
                "affine": lambda s: normflows.distributions.AffineGaussian(s, (s[0], 1, 1), classes or None),
                "classes": lambda s: normflows.distributions.ClassCondDiagGaussian(s, classes),
            }[base](shape)
        )
        if i:
            merges.append(normflows.flows.Merge())
        c //= 2
    model = normflows.MultiscaleFlow(bases, flows, merges, class_cond=classes > 0).double()
    moved(model)
    with torch.no_grad():
        for name, b in model.named_buffers():
            if name.endswith("data_dep_init_done"):
                b.fill_(1.0)
    return model


NORMFLOWS = {
    "": ({}, {}),
    "inner actnorm": ({"net_actnorm": True}, {}),
    "whole matrices": ({"use_lu": False}, {}),
    "exp": ({"scale_map": "exp"}, {"scale_map": "exp"}),
    "sigmoid_inv": ({"scale_map": "sigmoid_inv"}, {"scale_map": "sigmoid_inv"}),
    "additive": ({"scale": False}, {}),
    "first half, leaky": ({"split_mode": "channel_inv", "leaky": 0.1}, {"split_mode": "channel_inv", "leaky": 0.1}),
    "base per channel": ({"base": "channels"}, {}),
    "affine base": ({"base": "affine", "split_mode": "channel_inv"}, {"split_mode": "channel_inv"}),
    "class base": ({"base": "classes", "classes": 4}, {}),
    "class base per channel": ({"base": "channels", "classes": 4}, {}),
    "affine class base": ({"base": "affine", "classes": 4}, {}),
}


@pytest.mark.parametrize("levels, depth", SHAPES)
@pytest.mark.parametrize("case", NORMFLOWS)
def test_log_likelihoods_are_those_of_the_live_normflows(case, levels, depth):
    made, told = NORMFLOWS[case]
    if (levels, depth) != SHAPES[0] and case:
        levels, depth = 2, 1
    model, x = normflows_model(levels, depth, **made), images()
    context = one_hot(4) if made.get("classes") else None
    with torch.no_grad():
        wanted = model.log_prob(x, context)
    glow = flowkern.Glow.from_checkpoint(model.state_dict(), size=SIZE, **told)
    agree(glow, x, wanted, context)


@pytest.mark.parametrize("levels, depth", SHAPES)
def test_weights_to_normflows_and_back(levels, depth):
    glow = small_glow((3, SIZE, SIZE), levels=levels, depth=depth, hidden=6, scale="sigmoid", moved=0.01)
    live, x = NormFlows(glow).double(), images() + 0.5
    wanted = live.log_prob(x)
    torch.testing.assert_close(glow.log_prob(x), wanted, rtol=1e-6, atol=0)  # the rival is filled in fp32
    back = flowkern.Glow.from_checkpoint(live.model.state_dict(), size=SIZE)
    agree(back, x, wanted.detach())


@pytest.mark.parametrize("name", ["rosinality", "chaiyujin", "glowip", "openai"])
def test_a_loaded_model_trains_alike_in_every_mode_and_is_saved(name, tmp_path):
    oracle, made, asked, told = CASES[name]
    glow = flowkern.Glow.from_checkpoint(oracle.weights(3, 2, **made), size=SIZE, **told)
    x, found = images(), {}
    for glow.memory in ("store", "recompute", "checkpoint"):
        x.requires_grad_()
        found[glow.memory] = torch.autograd.grad(glow.log_prob(x).sum(), [x, *glow.parameters()])
    for memory in ("recompute", "checkpoint"):
        for a, b in zip(found[memory], found["store"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert sum(bool(g.abs().sum() > 0) for g in found["store"]) == len(found["store"])
    glow.save_pretrained(tmp_path)
    again = flowkern.Glow.from_pretrained(tmp_path)
    assert again.is_initialized and again.config == glow.config
    assert torch.equal(again.log_prob(x), glow.log_prob(x))


def test_gradients_through_a_dialects_priors_and_networks():
    """Against finite differences: the edge term, the tied one and the soft clamp's inverse have gradients too."""
    for oracle, told in ((rosinality, {}), (openai, {}), (glowip, {"coupling_bias": 0.2})):
        glow = flowkern.Glow.from_checkpoint(oracle.weights(2, 1, hidden=2, channels=1), size=4, **told)
        x = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_: glow.log_prob(x), (x, *glow.parameters()), fast_mode=True)  # noqa: B023


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"module." + k: v for k, v in w.items()},
        lambda w: {"graph": w, "global_step": 3},
        lambda w: {"state_dict": w},
    ],
)
def test_files_of_torch_save(tmp_path, wrap):
    weights = rosinality.weights(2, 1)
    torch.save(wrap(weights), tmp_path / "model.pt")
    glow = flowkern.Glow.from_checkpoint(tmp_path / "model.pt", size=SIZE)
    x = images() + 0.5
    torch.testing.assert_close(glow.log_prob(x), rosinality.log_prob(weights, x - 0.5), rtol=1e-10, atol=0)


def test_npz_with_the_optimizers_variables(tmp_path):
    weights = openai.weights(2, 1)
    arrays = {f"{name}:0" if name.startswith("model") else name: t.numpy() for name, t in weights.items()}
    arrays |= {"model/0/0/invconv/W/ExponentialMovingAverage": np.ones((12, 12)), "Variable_1": np.ones(3)}
    np.savez(tmp_path / "model.npz", **arrays)
    glow = flowkern.Glow.from_checkpoint(str(tmp_path / "model.npz"), size=SIZE)
    x = images() + 0.5
    torch.testing.assert_close(glow.log_prob(x), openai.log_prob(weights, x - 0.5), rtol=1e-10, atol=0)


def test_safetensors_and_the_sizes_that_files_tell(tmp_path):
    from safetensors.torch import save_file

    weights = chaiyujin.weights(2, 1, size=SIZE)
    save_file(weights, tmp_path / "model.safetensors")
    glow = flowkern.Glow.from_checkpoint(tmp_path / "model.safetensors")
    assert glow.size == (3, SIZE, SIZE) and glow.shift == 0.0
    glow.log_prob(images())
    with pytest.raises(ValueError, match=r"does not tell the size of its images; pass size=\(H, W\)"):
        flowkern.Glow.from_checkpoint(rosinality.weights(2, 1))
    assert flowkern.Glow.from_checkpoint(normflows_model(2, 1).state_dict()).size == (3, SIZE, SIZE)


def test_glowips_configuration_beside_the_file(tmp_path):
    weights = {k: v.float() for k, v in glowip.weights(2, 2).items()}
    torch.save(weights, tmp_path / "glowmodel.pt")
    configuration = {
        "K": 2,
        "L": 2,
        "coupling": "affine",
        "last_zeros": False,
        "size": 8,
        "coupling_bias": 0.25,
        "squeeze_contig": True,
    }
    (tmp_path / "configs.json").write_text(json.dumps(configuration))
    glow = flowkern.Glow.from_checkpoint(tmp_path / "glowmodel.pt")
    assert glow.size == (3, 8, 8) and next(glow.parameters()).dtype == torch.float32
    x, double = images().float(), {k: v.double() for k, v in weights.items()}
    wanted = glowip.log_prob(double, x.double(), 2, bias=0.25, contiguous=[0])
    torch.testing.assert_close(glow.log_prob(x + 0.5).double(), wanted, rtol=1e-5, atol=0)
    (tmp_path / "configs.json").write_text("[")
    with pytest.raises(ValueError, match="configs.json, is not a JSON object"):
        flowkern.Glow.from_checkpoint(tmp_path / "glowmodel.pt")


class Payload:
    """Pickles as a call, which an unsafe load would execute."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return (open, (str(self.touched), "w"))


@pytest.mark.parametrize(
    "name, write",
    [
        ("empty.pt", lambda p: p.write_bytes(b"")),
        ("text.pt", lambda p: p.write_text("hello world")),
        ("text.npz", lambda p: p.write_text("hello world")),
        ("cut.npz", lambda p: p.write_bytes(b"PK\x03\x04" + bytes(90))),
        ("torch.npz", lambda p: torch.save({"w": torch.ones(2)}, p)),
        ("words.npz", lambda p: np.savez(p, name=np.array("glow"), w=np.zeros(3))),
        ("empty.safetensors", lambda p: p.write_bytes(b"")),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_files_of_another_kind_are_refused_in_one_sentence(name, write, tmp_path):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=name) as error:
        flowkern.Glow.from_checkpoint(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_precision_are_taken_in_single_precision(dtype):
    """Their state would be of no use: log-likelihoods off by dozens of nats."""
    model = NormFlows(flowkern.Glow((3, 16, 16), levels=1, depth=2, hidden=8, scale="sigmoid")).model
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    glow, x = flowkern.Glow.from_checkpoint({"state_dict": stored, "step": torch.tensor(3)}, size=16), images().float()
    assert {p.dtype for p in glow.parameters()} == {torch.float32}
    torch.testing.assert_close(glow.log_prob(x), model.log_prob(x, None), rtol=1e-5, atol=1e-2)


def test_pickled_code_is_never_executed(tmp_path):
    for name, write in (
        ("a.pt", lambda p: torch.save({"w": torch.ones(1), "x": Payload(tmp_path / "touched")}, p)),
        ("b.pt", lambda p: p.write_bytes(pickle.dumps(Payload(tmp_path / "touched")))),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match="pickled Python objects, which are never executed") as error:
            flowkern.Glow.from_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    np.savez(tmp_path / "c.npz", x=np.array([Payload(tmp_path / "touched")], dtype=object))
    with pytest.raises(ValueError, match="not a file of tensors"):
        flowkern.Glow.from_checkpoint(tmp_path / "c.npz")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "oracle, gone, misshapen",
    [
        (rosinality, ["blocks.0.flows.0.invconv.w_l", "blocks.1.prior.scale"], "blocks.1.flows.0.coupling.net.2.bias"),
        (chaiyujin, ["flow.layers.4.invconv.weight", "learn_top.bias"], "flow.layers.4.f.2.actnorm.bias"),
        (
            glowip,
            ["glow_modules.1.invconv.W", "glow_modules.4.coupling.net.actnorm1.b"],
            "glow_modules.1.coupling.net.logs",
        ),
        (openai, ["model/0/0/invconv/W", "model/pool0/conv/logs"], "model/1/0/f1/l_2/actnorm_scale/logs"),
    ],
    ids=lambda v: getattr(v, "__name__", "").removeprefix("oracles."),
)
def test_every_missing_unknown_or_misshapen_tensor_is_named_with_its_shape(oracle, gone, misshapen):
    weights = oracle.weights(2, 1)
    shapes = {name: tuple(weights.pop(name).shape) for name in gone}
    weights["model/extra"], weights["model/other"] = torch.ones(2, 3), torch.ones(1)
    weights[misshapen] = torch.ones(5, 7)
    with pytest.raises(ValueError) as error:
        flowkern.Glow.from_checkpoint(weights, size=SIZE)
    text = str(error.value)
    assert "2 missing" in text and "2 unknown" in text and "1 of another shape" in text and "\n" not in text
    assert all(f"{name} {shape}" in text for name, shape in shapes.items())
    assert "model/extra (2, 3)" in text and f"{misshapen} (5, 7) instead of" in text


def test_what_cannot_be_loaded_says_why(tmp_path):
    load = flowkern.Glow.from_checkpoint
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        load(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not all of it")
    with pytest.raises(ValueError, match="truncated or not a file of tensors"):
        load(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="holds no named tensors"):
        load({"epoch": 3})
    with pytest.raises(ValueError, match=r"of no known dialect \(rosinality, .*; the first are w"):
        load({"w": torch.ones(1)})
    with pytest.raises(ValueError, match="unknown dialect 'glow'; choose one of 'rosinality'"):
        load(rosinality.weights(1, 1), dialect="glow")
    with pytest.raises(ValueError, match="is no openai Glow: it has no model/0/0/f1/l_1/W"):
        load(rosinality.weights(1, 1), dialect="openai", size=SIZE)
    with pytest.raises(TypeError, match="dialect 'rosinality': got an unexpected keyword argument 'leaky'"):
        load(rosinality.weights(1, 1), size=SIZE, leaky=0.1)
    weights = chaiyujin.weights(1, 1, invconv=False)
    with pytest.raises(ValueError, match="pass permutation='reverse', shuffled ones are not in the file"):
        load(weights, size=SIZE)
    weights["flow.layers.1.invconv.l"] = torch.ones(12, 12)
    with pytest.raises(ValueError, match="LU-decomposed, and P and the signs are not in the file"):
        load(weights, size=SIZE)
    with pytest.raises(ValueError, match="unknown scale_map 'tanh'; choose one of 'sigmoid', 'exp', 'sigmoid_inv'"):
        load(normflows_model(1, 1).state_dict(), scale_map="tanh")
    with pytest.raises(ValueError, match="split_mode 'checkerboard' has no counterpart"):
        load(normflows_model(1, 1).state_dict(), split_mode="checkerboard")
    weights = rosinality.weights(1, 1)
    weights["blocks.0.flows.0.actnorm.scale"][0, 3] = 0
    with pytest.raises(ValueError, match="blocks.0.flows.0.actnorm.scale has a zero"):
        load(weights, size=SIZE)
    del weights["blocks.0.flows.0.actnorm.scale"]
    with pytest.raises(ValueError, match=r"1 missing \(blocks.0.flows.0.actnorm.scale \(1, 12, 1, 1\)\)"):
        load(weights, size=SIZE)
    weights = glowip.weights(1, 1)
    weights["glow_modules.1.invconv.W"][0] = 0
    with pytest.raises(ValueError, match=r"1x1 convolution that becomes levels.0.steps.0.conv is singular"):
        load(weights, size=SIZE)


def test_a_dialects_priors_per_pixel_want_their_size():
    glow = flowkern.Glow.from_checkpoint(normflows_model(2, 1).state_dict())
    with pytest.raises(ValueError, match="constants for every pixel of a level of 8x8, and the images make it 4x4"):
        glow(images()[:, :, :8, :8])


def test_a_loaded_model_can_be_audited():
    from flowkern.audit import audit

    glow = flowkern.Glow.from_checkpoint(glowip.weights(2, 2), size=SIZE, squeeze_contig=True)
    found = audit(glow, images() + 0.5)
    assert found.reconstruction < 1e-8 and [level.steps for level in found.levels] == [2, 1]
    conditioned = flowkern.Glow.from_checkpoint(chaiyujin.weights(2, 1, classes=3), size=SIZE)
    with pytest.raises(ValueError, match="measure unconditioned Glows"):
        audit(conditioned, images())


def test_the_reference_does_not_ignore_options():
    for glow in (
        flowkern.Glow((1, 4, 4), levels=1, depth=1, hidden=2, variant={"edge": "ones"}),
        flowkern.Glow((1, 4, 4), levels=1, depth=1, hidden=2, top_prior="learned"),
    ):
        with pytest.raises(ValueError, match="plain and learned splits alone, this one has"):
            reference.glow_forward(glow, torch.rand(1, 1, 4, 4))
        with pytest.raises(ValueError, match="plain and learned splits alone, this one has"):
            reference.glow_inverse(glow, torch.rand(1, 16))


def test_variant_options_are_checked():
    for variant, message in (
        ({"edges": "ones"}, "unknown variant option 'edges'; choose among edge"),
        ({"edge": "twos"}, "unknown variant option edge='twos'; choose one of None, 'ones'"),
        ({"squeeze": ["pixels"]}, r"squeeze wants one value, or one per level \(2\)"),
        ({"scale_map": "exp"}, "scale_map='exp' wants scale='softclamp', got 'sigmoid'"),
    ):
        with pytest.raises(ValueError, match=message):
            flowkern.Glow((3, 8, 8), levels=2, depth=1, hidden=2, scale="sigmoid", variant=variant)


def test_an_actnorm_that_was_not_initialised_yet_is_not():
    weights = rosinality.weights(2, 1) | {"blocks.0.flows.0.actnorm.initialized": torch.tensor(0, dtype=torch.uint8)}
    assert not flowkern.Glow.from_checkpoint(weights, size=16, shift=0.0).is_initialized
    assert flowkern.Glow.from_checkpoint(rosinality.weights(2, 1), size=16, shift=0.0).is_initialized
