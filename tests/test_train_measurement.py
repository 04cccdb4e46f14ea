"""Measurements other than the image: what they are, that they repeat, total variation, every operator end to end."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_train_campaigns import Fits
from test_train_commands import told
from train_cases import FILES, TINY, Interrupted, names, network, options, rows, table, tiny

import flowkern
from flowkern.operators import Blur, Downsample, Identity, Inpainting, RandomProjection, gaussian_kernel
from train import baselines, data, denoising, evaluate, inverse, measurement, run, variational
from train.measurement import Measurement, MeasurementSettings
from train.stages import psnr

CASES = {
    "inpaint": {"operator": "inpaint", "inpaint_keep": 0.5},
    "hole": {"operator": "inpaint", "inpaint_hole": 6},
    "fixed": {"operator": "inpaint", "inpaint_keep": 0.5, "inpaint_seed": 3},
    "blur": {"operator": "blur", "blur_sigma": 1.0},
    "reflect": {"operator": "blur", "blur_sigma": 1.0, "blur_boundary": "reflect"},
    "sr": {"operator": "sr"},
    "cs": {"operator": "cs", "cs_ratio": 0.25},
}
LITTLE = {"sigma": 0.02, "eval_sigmas": [0.02], "steps": 3, "prior_steps": 3}


def measured(**settings):
    return Measurement.of(MeasurementSettings(**settings))


def batch_of(samples, count=4):
    chosen = [samples[i] for i in range(count)]
    return {name: torch.stack([sample[name] for sample in chosen]) for name in chosen[0]}


# What is measured


@pytest.mark.parametrize(
    ("settings", "operator"),
    [
        ({}, Identity()),
        (CASES["blur"], Blur(gaussian_kernel(1.0))),
        (CASES["reflect"], Blur(gaussian_kernel(1.0), "reflect")),
        ({"operator": "sr", "sr_factor": 4}, Downsample(4)),
        ({"operator": "cs", "cs_ratio": 0.1, "cs_seed": 2}, RandomProjection((3, 16, 16), 0.1, 2)),
    ],
)
def test_the_operator_is_the_library_s_with_these_settings(settings, operator):
    made = measured(**settings)
    x = torch.rand(2, 3, 16, 16)
    noise = torch.randn(2, *made.noise_shape(16))
    y, given = made.measure({"clean": x, "noise": noise}, torch.tensor([0.0, 0.5]))
    assert y.shape == noise.shape and set(given) == ({"operator"} if settings else set())
    torch.testing.assert_close(y[0], operator.forward(x)[0])
    torch.testing.assert_close(y[1], operator.forward(x)[1] + 0.5 * noise[1])


def test_defaults_are_filled_in_and_compared():
    assert measured(operator="blur") == measured(operator="blur", blur_sigma=1.5, blur_boundary="circular")
    assert measured(operator="blur") != measured(operator="blur", blur_sigma=2.0) != measured(operator="sr")
    assert measured(operator="inpaint", inpaint_hole=3).settings["keep"] == 1
    assert measured(operator="inpaint").settings["keep"] == 0.5
    told = {measured(**settings).describe() for settings in CASES.values()}
    assert len(told) == len(CASES) and "all but a hole of 6x6, drawn for each image" in told


@pytest.mark.parametrize("keep", [0.25, 1.0])
@pytest.mark.parametrize("hole", [None, 6])
def test_masks_keep_the_fraction_outside_of_the_hole(keep, hole):
    made = measured(operator="inpaint", inpaint_keep=keep, inpaint_hole=hole)
    masks = torch.stack([made.mask(16, np.random.default_rng(i)) for i in range(60)])
    there = 256 - (hole or 0) ** 2
    assert masks.shape == (60, 1, 16, 16) and (masks.flatten(1).sum(1) == round(keep * there)).all()
    assert masks.mean(0).min() > 0 or keep == 0.25  # the hole is not always in one place
    if hole and keep == 1:
        low = torch.stack([(mask[0] == 0).nonzero() for mask in masks]).amin(1)
        assert low.amin() == 0 and low.amax() == 16 - hole and len(low.unique(dim=0)) > 40
    tiny_share = measured(operator="inpaint", inpaint_keep=1e-9)
    assert tiny_share.mask(16, np.random.default_rng(0)).sum() == 1


def test_missing_pixels_have_no_noise_and_are_seen_in_the_figure():
    made, rng = measured(operator="inpaint"), np.random.default_rng(0)
    masks = torch.stack([made.mask(8, rng) for _ in range(3)])
    batch = {"clean": torch.rand(3, 3, 8, 8), "noise": torch.ones(3, 3, 8, 8), "mask": masks}
    y, given = made.measure(batch, 0.5)
    assert torch.equal(y, masks * (batch["clean"] + 0.5)) and torch.equal(given["operator"].mask, masks)
    shown = measurement.visible(y, **given).permute(0, 2, 3, 1)
    missing = masks[:, 0] == 0
    assert (shown[missing] == torch.tensor([1.0, 0.0, 1.0])).all() and not (shown[~missing][:, 1] == 0).any()
    joined = [torch.cat([own["operator"].forward(batch["clean"][i : i + 2]) for i, (_, own) in
              zip((0, 2), measurement.parts(y, given["operator"], 2), strict=True)])]  # fmt: skip
    assert torch.equal(joined[0], masks * batch["clean"])


def test_measurements_as_images_are_pseudo_inverses():
    x = torch.rand(2, 3, 16, 16)
    for operator in (Downsample(2), RandomProjection((3, 16, 16), 0.3), Inpainting(torch.eye(16))):
        y = operator.forward(x)
        image = measurement.as_image(y, operator)
        torch.testing.assert_close(operator.forward(image), y)  # and of those the smallest:
        torch.testing.assert_close(measurement.as_image(operator.forward(image), operator), image)


@pytest.mark.parametrize("case", CASES)
def test_samples_are_pure_functions_of_seed_and_position(case, pictures):
    """Masks and noise too: a continued run, and each of several processes, see what an undisturbed one does."""
    made = data.prepare(tiny(pictures, "", **CASES[case])), data.prepare(tiny(pictures, "", **CASES[case]))
    other = data.prepare(tiny(pictures, "", seed=1, **CASES[case]))
    first = [made[0].train[i] for i in range(12)]
    for i in (7, 3, 11, 0):  # in another order
        again = made[1].train[i]
        assert all(torch.equal(first[i][name], again[name]) for name in again)
        assert not torch.equal(first[i]["noise"], other.train[i]["noise"])
        assert torch.equal(made[0].test[i % 5]["noise"], other.test[i % 5]["noise"])  # held-out images stay as they are
    assert ("mask" in first[0]) == (case in ("inpaint", "hole"))
    if "mask" in first[0]:
        assert not torch.equal(first[0]["mask"], first[1]["mask"])
        assert not torch.equal(made[0].val[0]["mask"], made[0].test[0]["mask"])
        assert torch.equal(made[0].test[0]["mask"], other.test[0]["mask"])
    loader = data.training_loader(made[0], tiny(pictures, "", **CASES[case]))
    loader.load_state_dict({"given": 2})
    (rest,) = loader
    assert torch.equal(rest["noise"], torch.stack([s["noise"] for s in first[8:]]))


def test_denoising_samples_are_those_of_before(pictures):
    """Masks are drawn last, so that what is measured changes nothing else."""
    plain, masked = (data.prepare(tiny(pictures, "", **o)).train[5] for o in ({}, CASES["inpaint"]))
    assert set(masked) - set(plain) == {"mask"} and all(torch.equal(plain[k], masked[k]) for k in plain)


def test_what_is_measured_does_not_depend_on_the_prior_s_noise(pictures):
    for split in ("train", "test"):
        quiet, noisy = (
            getattr(data.prepare(tiny(pictures, "", prior_noise=noise, **CASES["inpaint"])), split)[3]
            for noise in (0.0, 0.2)
        )
        assert {name for name in quiet if not torch.equal(quiet[name], noisy[name])} == {"prior"}


def test_rows_say_what_denoisers_were_trained_on_where_they_differ_or_are_tested_elsewhere():
    low, range_ = tiny("photos", None, sigma=0.1), tiny("photos", None, sigma=0.1, sigma_max=0.3)
    tested = tiny("photos", None, eval_sigmas=[0.1, 0.4])
    assert evaluate._trained(low, tested, [low]) == "" == evaluate._trained(range_, tested, [range_])
    assert evaluate._trained(low, tested, [low, range_]) == ", trained on σ = 0.10"
    assert evaluate._trained(range_, tested, [low, range_]) == ", trained on σ = 0.10 to 0.30"
    apart = tiny("photos", None, eval_sigmas=[0.4])
    assert evaluate._trained(range_, apart, [range_]) == ", trained on σ = 0.10 to 0.30"
    blur = tiny("photos", None, sigma=0.1, sigma_max=0.2, operator="blur")
    outside = run.replace(blur, eval_sigmas=[0.1, 0.3])
    assert evaluate._trained(blur, outside, [blur]) == ", trained on σ = 0.10 to 0.20"


# Total variation


@pytest.mark.parametrize("case", CASES)
def test_total_variation_reaches_its_lowest_objective(case):
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), (16, 16))
    made = measured(**CASES[case])
    operator = Inpainting(made.mask(16, np.random.default_rng(0))) if made.varies else made.operator(16)
    y = operator.forward(x + 0.02 * torch.randn_like(x))

    def objective(x, weight=0.02):
        jumps = variational.differences(x).square().sum(0).sqrt()
        return ((operator.forward(x) - y).square().sum() / 2 + weight * jumps.sum()).item()

    found = variational.total_variation(operator, y, 0.02)
    assert objective(found) <= 1.005 * objective(variational.total_variation(operator, y, 0.02, steps=2500))
    assert objective(found) < min(objective(x), objective(torch.full_like(x, 0.5)))
    for direction in torch.randn(5, *x.shape):
        assert objective(found) < objective(found + 0.05 * direction)


def test_differences_and_their_transpose():
    x, u = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(2, 2, 3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(
        (variational.differences(x) * u).sum(), (x * variational.differences_adjoint(u)).sum()
    )


def test_total_variation_of_two_pixels_by_hand():
    """min ((a - 1)^2 + b^2) / 2 + w |a - b| draws both towards each other by w."""
    y = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    for weight, wanted in ((0.2, [0.8, 0.2]), (2.0, [0.5, 0.5])):
        found = variational.total_variation(Identity(), y, weight).flatten()
        torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-3, rtol=0)


def test_total_variation_is_tuned_for_the_measurement():
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4), (16, 16), mode="bilinear")
    operator = Inpainting((torch.rand(3, 1, 16, 16) < 0.5).float())
    y = operator.forward(x + 0.05 * torch.randn_like(x))
    method = variational.MeasuredTotalVariation(steps=60, tuning_images=2)
    weight = method.tune(x, y, 0.05, operator=operator)
    reached = {w: psnr(method(y, 0.05, w, operator=operator).clamp(0, 1), x)[:2].mean() for w in (1e-4, weight, 1)}
    assert max(reached, key=reached.get) == weight
    assert (psnr(method(y, 0.05, weight, operator=operator), x) > psnr(y, x) + 5).all()


@pytest.mark.parametrize("kind", [variational.Smoothest, variational.LeastVariation])
def test_what_fits_the_measurement_is_tuned_for_the_noise(kind):
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4), (16, 16), mode="bilinear")
    operator = Inpainting((torch.rand(3, 1, 16, 16) < 0.5).float())
    method, weights = kind(), []
    for sigma in (0.02, 0.2):
        y = operator.forward(x + sigma * torch.randn_like(x))
        weights.append(method.tune(x, y, sigma, operator=operator))
        assert (psnr(method(y, sigma, weights[-1], operator=operator), x) > psnr(y, x) + 3).all()
    assert weights[1] > 5 * weights[0]
    assert method(x, 0.2, weights[1]).shape == x.shape


# End to end


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prox", ["glow", "unet"])
def test_every_operator_from_options_to_a_folder(case, prox, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(variational.MeasuredTotalVariation.__init__, "__defaults__", (5, 2))  # tested on its own
    consistency = "gradient" if case == "reflect" or prox == "unet" else "exact"
    settings = tiny(pictures, tmp_path, prox=prox, consistency=consistency, **LITTLE, **CASES[case])
    assert run.prepare(settings).train() == tmp_path
    assert names(tmp_path) == FILES - {"denoised.png"} | {"reconstructed.png"}
    assert float(rows(tmp_path, "unfolded")[-1]["val_loss"]) > 0
    results = json.loads((tmp_path / "results.json").read_text())
    told = settings.measurement.describe()
    assert results["protocol"]["measured of them"] == told
    assert f"folds trained for {told} at" in results["protocol"][run.TITLES[prox]]
    assert [row[0] for row in table(tmp_path)[1:3]] == ["Measured", "Total variation"]
    assert ("rho" in results["network"]) == (consistency == "exact")
    saved = network(tmp_path)
    assert saved.consistency == consistency and type(saved.operator) is type(settings.measurement.operator(16))
    # The table's figure, from the saved network and the library alone.
    batch = batch_of(data.prepare(settings).test, 5)
    y, given = settings.measurement.measure(batch, 0.02)
    with torch.no_grad():
        again = psnr(saved.eval()(y, **given).clamp(0, 1), batch["clean"]).mean().item()
    assert results["methods"]["unfolded"]["levels"][0]["psnr"] == pytest.approx(again, abs=1e-3)
    with Image.open(tmp_path / "reconstructed.png") as image:
        assert min(image.size) > 300
    with pytest.raises(ValueError, match=f"was trained for {type(saved.operator).__name__} measurements, not for deno"):
        denoising.load(tmp_path, "cpu")


def test_averaged_weights_leave_integers_as_they_are(pictures, tmp_path):
    """Signs and indices of projections, permutations of mixes: an average of them is wrong."""
    settings = tiny(pictures, tmp_path, ema=0.9, **LITTLE, **CASES["cs"])
    run.prepare(settings).trained_network()
    prior, net = flowkern.Glow.from_pretrained(tmp_path / "checkpoints" / "prior"), network(tmp_path)
    wanted = settings.measurement.operator(16)
    for made, given in ((net.operator, wanted), *((prox.glow, prior) for prox in net.proxes)):
        known = dict(given.named_buffers())
        assert known and all(torch.equal(buffer, known[name]) for name, buffer in made.named_buffers())
    # And the prior's, which were drawn before it was trained.
    drawn = dict(run.prepare(tiny(pictures, tmp_path / "again", **LITTLE, **CASES["cs"])).prior.named_buffers())
    assert all(torch.equal(b, drawn[n]) for n, b in prior.named_buffers() if "permutation" in n)


def test_an_interrupted_run_with_masks_ends_bitwise_where_another_does(pictures, tmp_path, monkeypatch):
    settings = LITTLE | {"steps": 9, "checkpoint_steps": 1, "pretrain": False} | CASES["inpaint"]
    whole = run.prepare(tiny(pictures, tmp_path / "whole", **settings)).trained_network()
    step = run.UnfoldedStage.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 5:
            raise Interrupted
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(run.UnfoldedStage, "training_step", interrupted)
        made = run.prepare(tiny(pictures, tmp_path / "parts", **settings))
        with pytest.raises(Interrupted):
            made.holding(made.trained_network)
    continued = run.prepare(tiny(pictures, tmp_path / "parts", **settings)).trained_network()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), continued.parameters(), strict=True))


def test_map_is_given_the_operator_of_its_images():
    torch.manual_seed(0)
    glow = flowkern.Glow((3, 8, 8), levels=1, depth=1, hidden=4, shift=0.5)
    glow.initialize(torch.rand(8, 3, 8, 8))
    operator = Inpainting((torch.rand(5, 1, 8, 8) < 0.7).float())
    y = operator.forward(torch.rand(5, 3, 8, 8))
    method = baselines.MapPrior(glow, gammas=(1, 10), steps=3, tuning_images=2, batch=2)
    assert method.tune(torch.rand(5, 3, 8, 8), y, 0.1, operator=operator) in (0.1**2, 10 * 0.1**2)
    found = method(y, 0.1, 0.01, operator=operator)
    wanted = flowkern.map_estimate(glow, y, 0.01, operator=operator, steps=3, optimizer="adam", lr=0.1)
    torch.testing.assert_close(found, wanted)


# Evaluating


@pytest.fixture(scope="module")
def blurred(pictures, tmp_path_factory):
    """A finished run that deblurs."""
    settings = tiny(pictures, tmp_path_factory.mktemp("blur") / "net", references=[], **LITTLE, **CASES["blur"])
    return run.prepare(settings).train()


def test_evaluate_as_trained_and_out_of_distribution(blurred, finished, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variational.MeasuredTotalVariation.__init__, "__defaults__", (5, 2))
    assert evaluate.main([str(blurred)]) == 0
    header, *cells = table(tmp_path / "runs" / "evaluate-001")
    assert header[1] == "σ = 0.02" and [row[0] for row in cells[:3]] == ["Measured", "Total variation", "Unfolded Glow"]
    own = json.loads((blurred / "results.json").read_text())["methods"]["unfolded"]["levels"][0]["psnr"]
    assert float(cells[2][1].split()[0]) == pytest.approx(own, abs=0.006)
    words = options(blur_sigma=2.0, eval_sigmas=[0.05], references="[map]", test_images=2)
    assert evaluate.main([str(blurred), *words]) == 0
    told_of = (tmp_path / "runs" / "evaluate-002" / "table.md").read_text()
    assert "measured: a Gaussian blur of 2 pixels (circular)" in told_of and "| σ = 0.05 |" in told_of
    assert "Unfolded Glow, trained on a Gaussian blur of 1 pixels (circular), σ = 0.02" in told_of
    capsys.readouterr()
    assert evaluate.main([str(finished), str(blurred)]) == 2
    assert "was trained for the image and " in (message := told(capsys))
    assert "for a Gaussian blur of 1 pixels (circular): say with --operator what to measure" in message
    assert evaluate.main([str(finished), str(blurred), "--operator", "inpaint", "--eval-sigmas", "[0.02]"]) == 0
    rows_ = [row[0] for row in table(tmp_path / "runs" / "evaluate-003")]
    assert "Unfolded Glow (whole), trained on the image, σ = 0.20" in rows_
    assert "Unfolded Glow (net), trained on a Gaussian blur of 1 pixels (circular), σ = 0.02" in rows_


def test_a_network_for_another_measurement_is_tested_on_the_image_itself(blurred, tmp_path, monkeypatch):
    """Told that every pixel is there as it is: it would take its own operator for what measured them."""
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(blurred), "--operator", "identity", "--references", "[tv]"]) == 0
    found = json.loads((tmp_path / "runs" / "evaluate-001" / "results.json").read_text())
    config = run.configuration.load(blurred / "config.yaml")
    held_out = data.prepare(run.replace(config, operator="identity", blur_sigma=None)).test
    samples = [held_out[i] for i in range(len(held_out))]
    clean, noise = (torch.stack([s[name] for s in samples]) for name in ("clean", "noise"))
    with torch.no_grad():
        x = network(blurred)(clean + 0.02 * noise, operator=Identity()).clamp(0, 1)
    wanted = psnr(x, clean).mean().item()
    assert found["methods"]["glow-0"]["levels"][0]["psnr"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sr-factor", "2"], "sr_factor is a setting of operator 'sr'; the operator is 'blur'"),
        (["--operator", "sr", "--sr-factor", "3"], "sr_factor 3 does not divide the side of images of 16x16"),
        (["--references", "[denoiser]"], "the reference 'denoiser' only denoises; the operator is 'blur'"),
    ],
)
def test_mistakes_of_evaluating_measurements(words, message, blurred, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(blurred), *words]) == 2
    assert message in told(capsys)
    assert not names(tmp_path)


# All of them


@pytest.mark.parametrize("denoise_steps", [None, 3])
def test_inverse_trains_each_problem_once_and_writes_one_table(
    denoise_steps, pictures, tmp_path, monkeypatch, capsys
):
    problems = {name: CASES[name] for name in ("hole", "cs")}
    monkeypatch.setattr(inverse, "PROBLEMS", problems)
    monkeypatch.setattr(variational.MeasuredTotalVariation.__init__, "__defaults__", (5, 2))
    monkeypatch.setattr(baselines.MapPrior.__init__, "__defaults__", ((1, 3), 2, "adam", 0.1, 2, 16))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | LITTLE | {"warmup": 0, "val_images": None, "test_images": None}))
    words = options(config=path, data=pictures, out=tmp_path / "run", denoise_steps=denoise_steps or "null")
    if denoise_steps:
        words += options(denoise_size=8, denoise_lr=1e-4, denoise_lam=0.2, unet_lr=2e-4)
    fits = Fits(interrupted="cs-unet")
    monkeypatch.setattr(run, "fit", fits)
    with pytest.raises(Interrupted):
        inverse.main(words)
    assert inverse.main(words) == 0
    denoisers = ["denoising-unet", "denoising-glow"] if denoise_steps else []
    assert fits.done == ["prior", *denoisers, "hole-unet", "hole-glow", "cs-unet", "cs-glow"]
    assert names(tmp_path / "run") == {
        "config.yaml", "pictures.json", "checkpoints", "runs", "table.md", "results.json", "reconstructed.png"
    }  # fmt: skip
    titles = [row[0] for row in table(tmp_path / "run")]
    one = ["Measured", "Total variation", "Vectorial total variation", "Smoothest image", "MAP over z"]
    one += ["Unfolded U-Net", "Unfolded Glow"]
    one += [f"{title} − Total variation" for title in one[2:]]
    heads = [f"{name}: {measured(**settings).describe()}" for name, settings in problems.items()]
    assert titles == ["", heads[0], *one, heads[1], *one]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["problems"]["cs"]["methods"]) == {"noisy", "tv", "vtv", "smooth", "map", "unet", "glow"}
    assert {"Unfolded Glow, cs", "Unfolded U-Net, hole", "Total variation"} <= set(results["protocol"])
    for name, settings in problems.items():
        saved = run.configuration.load(tmp_path / "run" / "runs" / f"{name}-glow" / "config.yaml")
        assert saved.measurement == measured(**settings) and saved.prior_checkpoint
        assert bool(saved.network_checkpoint) == bool(denoise_steps)
    if denoise_steps:
        last = rows(tmp_path / "run" / "runs" / "denoising-glow", "unfolded")[-1]
        assert int(last["step"]) == denoise_steps
        saved = run.configuration.load(tmp_path / "run" / "runs" / "denoising-glow" / "config.yaml")
        assert (saved.size, saved.eval_size, saved.batch, saved.epoch_images) == (8, 16, 4 * TINY["batch"], 48)
        assert (saved.lr, saved.lam, saved.init) == (1e-4, 0.2, "adjoint")
        saved = run.configuration.load(tmp_path / "run" / "runs" / "denoising-unet" / "config.yaml")
        assert (saved.size, saved.batch, saved.lr) == (16, TINY["batch"], 2e-4)
        assert ", from a network trained at σ = 0.02;" in results["protocol"]["Unfolded U-Net, hole"]
