"""The audit: what it measures against what is known or computed by hand, and its command."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from helpers import small_glow
from PIL import Image

import flowkern
from flowkern import reference
from flowkern.__main__ import main, read_images
from flowkern.audit import DRIFT_LIMIT, GRADIENT_LIMIT, audit, drift, smooth_fields


@pytest.fixture
def glow():
    return small_glow((3, 16, 16), levels=2, depth=3, hidden=8, dtype=torch.float32)


@pytest.fixture
def x():
    return smooth_fields(3, (3, 16, 16))


def stretch(glow, factor, level=1):
    """Make one step's mix badly conditioned: its first channel is scaled by `factor`."""
    with torch.no_grad():
        glow.levels[level].steps[0].actnorm.log_scale[0] += math.log(factor)
    return glow


def by_reference(glow, x):
    """Gradient per level of the mean negative log-likelihood, by the specification and ordinary autograd."""
    parameters = [list(level.parameters()) for level in glow.levels]
    z, logdet = reference.glow_forward(glow, x)
    loss = (0.5 * z.square().sum(dim=1) - logdet).mean()
    found = iter(torch.autograd.grad(loss, [p for level in parameters for p in level]))
    return [torch.cat([next(found).double().flatten() for _ in level]) for level in parameters]


def test_a_healthy_glow_has_errors_of_rounding(glow, x):
    found = audit(glow, x)
    assert found.concerns == [] and [level.level for level in found.levels] == [1, 2]
    assert [(level.steps, level.channels) for level in found.levels] == [(3, 12), (3, 24)]
    for level in found.levels:
        assert 0 < level.reconstruction < 1e-4 and 0 < level.gradient < 1e-3 and 0 < level.stored_gradient < 1e-3
    double = audit(copy.deepcopy(glow).double(), x.double())
    assert double.reconstruction < 1e-12 and double.gradient < 1e-11 and double.stored_gradient < 1e-12


@pytest.mark.parametrize("options", [{}, {"scale": "sigmoid"}, {"coupling": "additive"}, {"split_prior": "learned"}])
def test_gradient_errors_agree_with_the_reference_in_double_precision(x, options):
    glow = small_glow((3, 16, 16), levels=2, depth=3, hidden=8, dtype=torch.float32, **options)
    exact = by_reference(copy.deepcopy(glow).double(), x.double())
    found = audit(glow, x)
    for memory in ("recompute", "store"):
        glow.memory = memory
        glow.zero_grad()
        (-glow.log_prob(x).mean()).backward()
        for level, g64, measured in zip(glow.levels, exact, found.levels, strict=True):
            g = torch.cat([p.grad.double().flatten() for p in level.parameters()])
            error = ((g - g64).norm() / g64.norm()).item()
            told = measured.gradient if memory == "recompute" else measured.stored_gradient
            assert error == pytest.approx(told, rel=1e-3)


def test_the_smallest_scale_is_the_one_that_occurs(glow, x):
    with torch.no_grad():
        for level in glow.levels:
            for step in level.steps:
                step.coupling.net.weight3.zero_()
                step.coupling.net.bias3.zero_()
        net = glow.levels[0].steps[1].coupling.net
        net.bias3[:6], net.logs[:6] = -0.7, 0
    found = audit(glow, x)
    assert found.levels[0].smallest_scale == pytest.approx(math.exp(math.tanh(-0.7)), rel=1e-5)
    assert found.levels[1].smallest_scale == pytest.approx(1, rel=1e-5)


def test_the_condition_is_that_of_the_worst_mix(glow, x):
    with torch.no_grad():
        conv = glow.levels[1].steps[2].conv
        conv.lower.zero_()
        conv.upper.zero_()
        conv.log_s.zero_()
        conv.log_s[3] = math.log(500)
        glow.levels[1].steps[2].actnorm.log_scale.zero_()
    found = audit(glow, x)
    assert found.levels[1].condition == pytest.approx(500, rel=1e-4) and found.levels[0].condition < 100


def test_a_level_that_drifts_is_named(glow, x):
    found = audit(stretch(glow, 1e-6), x)
    assert found.levels[1].reconstruction > DRIFT_LIMIT > found.levels[0].reconstruction
    assert len(found.concerns) == 1 and found.concerns[0].startswith("level 2: ")
    by_level = drift(glow, x)
    assert by_level == [level.reconstruction for level in found.levels]


def test_a_wrong_gradient_is_named_and_anchors_mend_it():
    deep = small_glow((3, 16, 16), levels=1, depth=24, hidden=8, dtype=torch.float32, moved=0.04)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    found = audit(deep, x)
    assert found.levels[0].gradient > max(GRADIENT_LIMIT, 10 * found.levels[0].stored_gradient)
    assert found.concerns[0].startswith("level 1: the recomputed gradient")
    deep.anchor_every = 2
    anchored = audit(deep, x)
    assert anchored.levels[0].gradient < found.levels[0].gradient / 100
    assert not any("gradient" in sentence for sentence in anchored.concerns)


def test_an_anchor_at_every_step_makes_badly_conditioned_mixes_harmless(glow, x):
    stretch(stretch(glow, 1e-6, level=0), 1e-6, level=1)
    with torch.no_grad():
        for level in glow.levels:
            level.steps[2].actnorm.log_scale[1] += math.log(1e-6)
    assert audit(glow, x).gradient > GRADIENT_LIMIT
    glow.anchor_every = 1
    anchored = audit(glow, x)
    assert anchored.gradient < 2 * anchored.stored_gradient


def test_what_overflows_is_infinite(glow, x):
    with torch.no_grad():
        glow.levels[0].steps[0].actnorm.log_scale += 100
    found = audit(glow, x)
    assert found.reconstruction == math.inf and found.gradient == math.inf and found.concerns
    assert drift(glow, x)[0] == math.inf


def test_the_glow_is_left_as_it_was(glow, x):
    glow.levels[0].requires_grad_(False)
    glow.memory, glow.compute_dtype = "store", torch.bfloat16
    before = copy.deepcopy(glow.state_dict())
    audit(glow, x)
    drift(glow, x)
    assert glow.memory == "store" and glow.compute_dtype == torch.bfloat16 and glow.training
    assert [p.requires_grad for p in glow.levels[0].parameters()] == [False] * len(list(glow.levels[0].parameters()))
    assert all(p.grad is None for p in glow.parameters())
    assert all(torch.equal(before[name], value) for name, value in glow.state_dict().items())


def test_a_glow_in_training_mode_is_measured_as_a_fixed_function_and_left_alone():
    def network(i, o):
        first, last = torch.nn.Conv2d(i, 8, 3, padding=1), torch.nn.Conv2d(8, o, 3, padding=1)
        return torch.nn.Sequential(first, torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.2), last)

    glow, x = small_glow(network=network).train(), torch.rand(8, 2, 8, 8, dtype=torch.float64)
    before = copy.deepcopy(glow.state_dict())
    assert not audit(glow, x).concerns and max(drift(glow, x)) < 1e-6
    assert glow.training and all(p.requires_grad for p in glow.parameters())
    assert all(torch.equal(before[name], value) for name, value in glow.state_dict().items())


def test_a_glow_of_inference_mode():
    with torch.inference_mode():
        glow, x = flowkern.Glow((1, 8, 8), levels=2, depth=1, hidden=4), torch.rand(4, 1, 8, 8)
        glow.initialize(x)
    assert max(drift(glow, x)) < DRIFT_LIMIT and glow.training


def test_images_of_nothing_but_zeros_are_no_reason_for_concern(glow):
    glow.shift = 0.5
    grey = torch.full((2, 3, 16, 16), 0.5)
    assert not audit(glow, grey).concerns and max(drift(glow, grey)) < DRIFT_LIMIT / 10
    assert audit(stretch(glow, 1e-8, level=0), grey).concerns


@pytest.mark.parametrize("measure", [audit, drift])
def test_what_cannot_be_measured_is_refused(glow, x, measure):
    with pytest.raises(ValueError, match="at least one image"):
        measure(glow, x[:0])
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        measure(glow, x[:, :2])
    with pytest.raises(ValueError, match="not initialised"):
        measure(flowkern.Glow((3, 16, 16), levels=2, depth=1, hidden=4), x)


def test_smooth_fields_fill_the_unit_interval_and_repeat():
    a = smooth_fields(16, (3, 32, 32))
    assert 0 <= a.min() < 0.15 and 0.85 < a.max() <= 1
    assert torch.equal(a, smooth_fields(16, (3, 32, 32)))
    assert not torch.equal(a, smooth_fields(16, (3, 32, 32), seed=1))
    assert smooth_fields(0, (1, 8, 4)).shape == (0, 1, 8, 4)


def command(monkeypatch, capsys, *arguments):
    """Exit status, output and error output of `python -m flowkern audit`."""
    monkeypatch.setattr(sys, "argv", ["flowkern", "audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


def test_command_prints_a_row_per_level(glow, monkeypatch, capsys, tmp_path):
    glow.save_pretrained(tmp_path)
    status, out, _ = command(monkeypatch, capsys, tmp_path, "--batch", 2)
    found = audit(glow, smooth_fields(2, glow.size))
    assert status == 0 and "2 smooth random fields" in out and "as good as storing" in out
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0] in ("1", "2", "all")]
    assert [row[0] for row in rows] == ["1", "2", "all"]
    assert rows[0][:4] == ["1", "3", "12", f"{found.levels[0].reconstruction:.1e}"]
    assert rows[1][-2:] == [f"{found.levels[1].gradient:.1e}", f"{found.levels[1].stored_gradient:.1e}"]


def test_command_tells_concerns_and_exits_with_1(glow, monkeypatch, capsys, tmp_path):
    stretch(glow, 1e-6).save_pretrained(tmp_path)
    status, out, _ = command(monkeypatch, capsys, tmp_path)
    assert status == 1 and "-> level 2: " in out


def test_command_measures_every_fold_of_an_unfolded_network(glow, monkeypatch, capsys, tmp_path):
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2)
    stretch(net.proxes[1].glow, 1e-6)
    net.save_pretrained(tmp_path)
    status, out, _ = command(monkeypatch, capsys, tmp_path, "--batch", 1, "--anchor-every", 2)
    first, second = out.split("fold 1")[1].split("fold 2")
    assert status == 1 and "as good as storing" in first and "-> level 2" in second and "anchors 2" in out


def test_command_measures_on_pictures(glow, monkeypatch, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    glow.save_pretrained(tmp_path / "glow")
    picture = (torch.rand(20, 17, 3) * 255).to(torch.uint8)
    image.fromarray(picture.numpy()).save(tmp_path / "a.png")
    status, out, _ = command(monkeypatch, capsys, tmp_path / "glow", "--image", tmp_path / "a.png")
    x = picture[2:18, :16].permute(2, 0, 1)[None] / 255
    assert status == 0 and "1 picture" in out and f"{audit(glow, x).reconstruction:.1e}" in out
    image.fromarray(picture[:10].numpy()).save(tmp_path / "small.png")
    (tmp_path / "no.png").write_bytes(b"not a picture")
    for name, said in (("small.png", "10x17"), ("no.png", "not a readable picture"), ("none.png", "not a readable")):
        status, _, err = command(monkeypatch, capsys, tmp_path / "glow", "--image", tmp_path / name)
        assert status == 2 and said in err and name in err and len(err.splitlines()) == 1


def test_command_refuses_what_is_no_checkpoint_in_one_sentence(glow, monkeypatch, capsys, tmp_path):
    def refused(said, *options):
        status, out, err = command(monkeypatch, capsys, folder, *options)
        assert status == 2 and out == "" and said in err and len(err.splitlines()) == 1

    folder = tmp_path / "missing"
    refused("has no config.json")
    folder = tmp_path / "glow"
    glow.save_pretrained(folder)
    refused("unknown backend", "--backend", "abacus")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("truncated")
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden": 9}))
    refused("don't fit")
    (folder / "config.json").write_text("{")
    refused("not JSON")
    (folder / "config.json").write_text(json.dumps({"folds": 2, "kind": "UNetProx"}))
    refused("no Glow to audit")
    fresh = flowkern.Glow((3, 16, 16), levels=2, depth=1, hidden=4)
    fresh.save_pretrained(folder)
    refused("not initialised")


def test_it_measures_without_gradients_too_and_with_parameters_that_serve_nothing(x):
    """As a validation hook calls it."""

    class Net(torch.nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.conv = torch.nn.Conv2d(inputs, outputs, 1)
            self.unused = torch.nn.Parameter(torch.ones(2))

        def forward(self, a):
            return 0.1 * self.conv(a)

    glow = small_glow((3, 16, 16), levels=2, depth=2, dtype=torch.float32, network=Net)
    wanted = audit(glow, x)
    with torch.no_grad():
        assert audit(glow, x) == wanted
    with torch.inference_mode():
        assert audit(glow, x.clone()) == wanted


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_sixteen_bits_keep_their_scale(tmp_path, channels):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    (found,) = read_images([tmp_path / "a.png"], (channels, 8, 8))
    for plane in found:
        torch.testing.assert_close(plane, torch.linspace(0, 1, 64).view(8, 8), rtol=0, atol=1e-4)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(ValueError, match="b.tiff is of mode F, on no known scale"):
        read_images([tmp_path / "b.tiff"], (channels, 8, 8))


def test_a_glow_in_training_is_audited_as_in_evaluation():
    def network(inputs, outputs):
        first, last = torch.nn.Conv2d(inputs, 8, 3, padding=1), torch.nn.Conv2d(8, outputs, 3, padding=1)
        return torch.nn.Sequential(first, torch.nn.BatchNorm2d(8), torch.nn.ReLU(), last)

    glow = small_glow((1, 8, 8), levels=1, depth=2, dtype=torch.float32, network=network)
    x = torch.rand(4, 1, 8, 8)
    assert audit(glow.train(), x) == audit(glow.eval(), x)


def test_scales_that_are_all_above_one():
    glow = small_glow((1, 8, 8), levels=1, depth=3, dtype=torch.float32, moved=0)
    for step in glow.levels[0].steps:
        torch.nn.init.ones_(step.coupling.net.bias3)
    assert audit(glow, torch.rand(4, 1, 8, 8)).levels[0].smallest_scale > 1.1
