"""How results are measured and shown: scores, gains, tables, figures, pooling over seeds, the memory of a step."""

import gc
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import tiny

import flowkern
from train import baselines, comparison, data, evaluation, figures, memory, report, run
from train.evaluation import Evaluation, Method, Scores


@pytest.fixture(scope="module")
def images(pictures):
    return data.prepare(tiny(pictures, ""))


def stacked(samples):
    """All clean images, and their noise."""
    found = [samples[i] for i in range(len(samples))]
    return torch.stack([s["clean"] for s in found]), torch.stack([s["noise"] for s in found])


def decibels(estimate, clean):
    """PSNR of each image, from the definition."""
    return -10 * np.log10(((estimate - clean).double() ** 2).mean(dim=(1, 2, 3)).numpy())


def scored(key, title=None, seed=0, sigmas=(0.2, 0.1), n=5, **facts):
    """Made-up scores of a method."""
    rng = torch.Generator().manual_seed(seed)
    psnr, ssim = ({s: scale * torch.rand(n, generator=rng) for s in sigmas} for scale in (40, 1))
    shown = {s: torch.rand(2, 3, 8, 8, generator=rng) for s in sigmas}
    return Scores(Method(key, title or key, None, facts=facts), psnr, ssim, shown, {}, 0.25 + seed)


def evaluated(*scores, sigmas=(0.2, 0.1)):
    return Evaluation(list(sigmas), {s.method.key: s for s in scores}, torch.rand(2, 3, 8, 8), 5)


# Scores


def test_evaluation_scores_what_it_says(images):
    """A method that gives its input back scores as the noisy image, clipped."""
    asked = []

    def unchanged(noisy, sigma):
        asked.append(sigma)
        return noisy

    same = Method("same", "Unchanged", unchanged)
    found = evaluation.evaluate([same], images.val, images.test, [0.2, 0.1], shown=2, progress=False)
    clean, noise = stacked(images.test)
    assert list(found.scores) == ["noisy", "same"] and found.images == 5 and asked == [0.2, 0.1]
    assert torch.equal(found.clean, clean[:2])
    for sigma in (0.2, 0.1):
        noisy = clean + sigma * noise
        clipped = noisy.clamp(0, 1)
        np.testing.assert_allclose(found.scores["same"].psnr[sigma], decibels(clipped, clean), atol=1e-3)
        np.testing.assert_allclose(found.scores["noisy"].psnr[sigma], decibels(noisy, clean), atol=1e-3)
        assert torch.equal(found.scores["same"].shown[sigma], clipped[:2])
        assert torch.equal(found.scores["same"].ssim[sigma], found.scores["noisy"].ssim[sigma])
    assert (found.scores["same"].ssim[0.1] > found.scores["same"].ssim[0.2]).all()
    assert found.scores["same"].seconds_per_image > 0


def test_a_perfect_method_has_an_ssim_of_one(images):
    clean, _ = stacked(images.test)
    perfect = Method("perfect", "Perfect", lambda noisy, sigma: clean)
    found = evaluation.evaluate([perfect], images.val, images.test, [0.2], shown=1, progress=False)
    torch.testing.assert_close(found.scores["perfect"].ssim[0.2], torch.ones(5))


def test_what_can_be_tuned_is_tuned_on_validation_images_at_each_sigma(images):
    given = {}

    def tune(clean, noisy, sigma):
        given[sigma] = (clean, noisy)
        return 10 * sigma

    method = Method("tuned", "Tuned", lambda noisy, sigma, setting: torch.full_like(noisy, setting / 10), tune=tune)
    found = evaluation.evaluate([method], images.val, images.test, [0.1, 0.3], shown=1, progress=False)
    clean, noise = stacked(images.val)
    for sigma, (tuned_on, noisy) in given.items():
        assert torch.equal(tuned_on, clean) and torch.equal(noisy, clean + sigma * noise)
    assert found.scores["tuned"].settings == {0.1: 1.0, 0.3: pytest.approx(3.0)}
    test, _ = stacked(images.test)
    np.testing.assert_allclose(found.scores["tuned"].psnr[0.3], decibels(torch.full_like(test, 0.3), test), atol=1e-3)


def test_no_more_images_are_tuned_on_than_are_needed(images, monkeypatch):
    monkeypatch.setattr(evaluation, "TUNING_IMAGES", 2)
    seen = []
    method = Method("m", "M", lambda noisy, sigma, s: noisy, tune=lambda clean, noisy, sigma: seen.append(len(clean)))
    evaluation.evaluate([method], images.val, images.test, [0.1], shown=1, progress=False)
    assert seen == [2]


def test_tiles_are_said_to_be_of_few_pictures(pictures):
    made = data.prepare(tiny(pictures, None, fit="crop", size=8, test_images=99))
    found = evaluation.evaluate([], made.val, made.test, [0.1], 1, False)
    assert found.sources == 5
    assert report.protocol(found)["images"].startswith("45 test images, tiles of 5 pictures: standard errors are over")
    whole = data.prepare(tiny(pictures, None))
    assert whole.test.sources is None


def test_the_gain_is_paired(images):
    found = evaluated(scored("a", seed=1), scored("b", seed=2))
    for sigma in found.sigmas:
        difference = (found.scores["a"].psnr[sigma] - found.scores["b"].psnr[sigma]).double().numpy()
        gain = found.gain("a", "b", sigma)
        assert gain["mean"] == pytest.approx(difference.mean(), abs=1e-9) and gain["n"] == 5
        assert gain["standard_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(5), rel=1e-9)
        assert found.gain("b", "a", sigma)["mean"] == -gain["mean"]
    one = evaluated(scored("a", seed=1, n=1), scored("b", seed=2, n=1)).gain("a", "b", 0.2)
    assert one["n"] == 1 and one["standard_error"] is None and report.gain_in_words({"mean": 1.0} | one).count("±") == 0


def test_a_network_is_evaluated_as_it_is_trained_not_while(images):
    """In batches, without dropout and the like, and with the noisy image as the only thing that it is told."""

    class Net(torch.nn.Module):
        sizes = []

        def forward(self, y):
            assert not self.training
            self.sizes.append(len(y))
            return 2 * y

    noisy = torch.rand(5, 3, 8, 8)
    found = evaluation.network(Net().train(), batch=2)(noisy, 0.3)
    assert torch.equal(found, 2 * noisy) and found.is_contiguous() and Net.sizes == [2, 2, 1]


@pytest.mark.parametrize("kind", ["tv", "denoiser", "map"])
def test_references_are_the_baselines(kind, finished, pictures, monkeypatch):
    monkeypatch.setattr(baselines, "bm3d_available", lambda: False)
    settings = replace(tiny(pictures, finished), references=[kind])
    (method,) = run.references(settings, run.Folder(finished))
    made = {"tv": baselines.TotalVariation, "denoiser": baselines.NonLocalMeans, "map": baselines.MapPrior}[kind]
    assert type(method.estimate) is made and method.tune == method.estimate.tune
    assert (method.key, method.title, method.protocol) == (made.key, made.title, method.estimate.protocol)
    if kind == "map":
        prior = flowkern.Glow.from_pretrained(finished / "checkpoints" / "prior")
        weights = zip(method.estimate.glow.state_dict().values(), prior.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)


# Tables


def test_the_table_has_a_row_a_method_and_the_gains_below():
    a, b = scored("a", "Method A", seed=1, parameters=1_500_000, training_mib=2.25), scored("tv", "TV", seed=2)
    found = evaluated(replace(scored("noisy", "Noisy"), seconds_per_image=1.0), b, a)
    header, rows = report.table(found)
    assert header == ["", "σ = 0.20", "σ = 0.10", "ms per image", "Parameters", "Training MiB"]
    assert [row[0] for row in rows] == ["Noisy", "TV", "Method A", "Method A − TV"]
    assert rows[0][3:] == ["", "", ""] and rows[1][3:] == ["2250.0", "", ""]
    assert rows[2][3:] == ["1250.0", "1.50 M", "2.2"] and rows[3][3:] == ["", "", ""]
    assert rows[2][1] == f"{a.psnr[0.2].mean():.2f} ({a.ssim[0.2].mean():.3f})"
    gain = found.gain("a", "tv", 0.1)
    assert rows[3][2] == f"{gain['mean']:+.2f} ± {gain['standard_error']:.2f}"
    assert [row[0] for row in report.table(found, against="a")[1]][3:] == ["TV − Method A"]
    for against in (None, "missing"):
        assert len(report.table(found, against)[1]) == 3
    assert len(report.markdown("", header, rows, {"a": "b"}).splitlines()) == 2 + 2 + 4 + 1 + 1


def test_results_for_programs_have_more_digits_and_the_settings():
    tuned = scored("tv", seed=2)
    tuned.settings = {0.2: 0.5, 0.1: 0.25}
    found = evaluated(scored("noisy"), tuned, scored("a", seed=1, parameters=7))
    json_ = report.scores_as_json(found)
    assert [level["setting"] for level in json_["tv"]["levels"]] == [0.5, 0.25]
    assert json_["a"]["levels"][1]["psnr"] == found.scores["a"].psnr[0.1].mean().item()
    assert json_["a"]["levels"][1]["gain_over_tv"] == found.gain("a", "tv", 0.1)
    assert json_["a"]["parameters"] == 7 and json_["a"]["seconds_per_image"] == 1.25
    assert "seconds_per_image" not in json_["noisy"] and "gain_over_tv" not in json_["tv"]["levels"][0]


# Pooling over seeds


def test_runs_of_a_prox_are_averaged_image_by_image():
    runs = [scored(f"glow-{i}", "Glow prox", seed=10 + i, parameters=4, training_minutes=1.0 + i) for i in range(3)]
    net, tv = scored("unet-0", "U-Net prox", seed=20), scored("tv", seed=30)
    single = evaluated(scored("noisy"), tv, net, *runs)
    pooled = comparison.pool(single, ["unet", "glow"])
    assert list(pooled.scores) == ["noisy", "tv", "unet", "glow"]
    assert pooled.scores["tv"] is tv and list(single.scores)[-1] == "glow-2"
    glow = pooled.scores["glow"]
    for sigma in single.sigmas:
        for what in ("psnr", "ssim"):
            wanted = np.mean([getattr(r, what)[sigma].numpy() for r in runs], axis=0)
            np.testing.assert_allclose(getattr(glow, what)[sigma], wanted, rtol=1e-6)
        assert torch.equal(pooled.scores["unet"].psnr[sigma], net.psnr[sigma])
    assert glow.method.facts == {"parameters": 4, "training_minutes": 2.0}
    assert glow.seconds_per_image == pytest.approx(np.mean([r.seconds_per_image for r in runs]))
    assert glow.shown is runs[0].shown and (glow.method.key, glow.method.title) == ("glow", "Glow prox")


def test_differences_come_with_their_spread_over_images_and_over_seeds():
    proxes = ("resnet", "unet", "glow")
    scores = [scored(f"{p}-{i}", seed=10 * k + i, sigmas=(0.2, 0.15)) for k, p in enumerate(proxes) for i in range(2)]
    single = evaluated(*scores, sigmas=(0.2, 0.15))
    pooled = comparison.pool(single, list(proxes))
    rows = comparison.comparisons(single, pooled, dict.fromkeys(proxes, 2))
    assert [row[0] for row in rows[:3]] == ["Glow − U-Net", "U-Net − ResNet", "Glow − ResNet"]
    psnr = {key: s.psnr[0.2].double().numpy() for key, s in single.scores.items()}
    image = np.mean([psnr[f"glow-{i}"] - psnr[f"unet-{i}"] for i in range(2)], axis=0)
    seeds = [psnr[f"glow-{i}"].mean() - psnr[f"unet-{i}"].mean() for i in range(2)]
    error = image.std(ddof=1) / math.sqrt(5)
    assert rows[0][1] == f"{image.mean():+.2f} ± {error:.2f}, seeds ± {np.std(seeds, ddof=1):.2f}"
    assert [row[1:3] for row in rows[3:]] == [["27.05", "28.03"], ["28.18", "28.92"], ["28.24", "29.01"]]
    alone = comparison.comparisons(single, pooled, dict.fromkeys(proxes, 1))
    assert "seeds" not in alone[0][1]


# Figures


def test_figures_show_the_two_highest_noise_levels_or_those_asked_for(tmp_path):
    scores = [scored(key, seed=i, sigmas=(0.25, 0.1, 0.2)) for i, key in enumerate(("noisy", "a"))]
    found = evaluated(*scores, sigmas=(0.25, 0.1, 0.2))
    pictures = {}
    for name, sigmas in {"default": None, "named": [0.2, 0.25], "other": [0.1, 0.25], "one": [0.25]}.items():
        figures.denoised(tmp_path / "a.png", found, sigmas)
        with Image.open(tmp_path / "a.png") as image:
            pictures[name] = (image.size, image.tobytes())
    assert pictures["default"] == pictures["named"] != pictures["other"]
    assert pictures["other"][0] == pictures["named"][0]
    assert pictures["one"][0][1] < 0.6 * pictures["named"][0][1]


def test_figures_have_a_column_for_each_method(tmp_path):
    widths = []
    for count in (1, 3):
        found = evaluated(*(scored(f"m{i}", seed=i) for i in range(count)))
        figures.denoised(tmp_path / "a.png", found)
        with Image.open(tmp_path / "a.png") as image:
            widths.append(image.size[0])
    assert widths[1] == pytest.approx(2 * widths[0], abs=2)  # the clean images are a column, too


def test_samples_are_clipped_and_in_rows(tmp_path):
    image = torch.rand(2, 3, 8, 8)
    made = {"in": {0.5: image.round()}, "out": {0.5: 3 * image.round() - 1}, "two": {0.5: image, 1.0: image}}
    for name, rows in made.items():
        figures.samples(tmp_path / f"{name}.png", rows)
    content = {name: Image.open(tmp_path / f"{name}.png") for name in made}
    assert content["in"].tobytes() == content["out"].tobytes()
    assert content["two"].size[1] == pytest.approx(2 * content["in"].size[1], abs=2)


# The memory of a step

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_memory_is_the_sum_of_what_lives_together_at_most():
    kept = []

    def step():
        a = torch.ones(MIB, dtype=torch.uint8)
        b = torch.ones(2 * MIB, dtype=torch.uint8)
        del a
        c = torch.ones(3 * MIB, dtype=torch.uint8)  # with b: 5
        del b, c
        kept.append(torch.ones(4 * MIB, dtype=torch.uint8))

    assert memory.peak_mib(step, CPU) == 5
    assert memory.peak_mib(lambda: None, CPU) == 0


def test_what_was_there_before_is_not_counted():
    before = torch.ones(8 * MIB, dtype=torch.uint8)
    assert memory.peak_mib(lambda: before.zero_(), CPU) == 0
    assert memory.peak_mib(lambda: before.clone(), CPU) == 8


def test_a_step_that_fails_ends_the_measurement():
    with pytest.raises(ZeroDivisionError):
        memory.peak_mib(lambda: 1 / 0, CPU)
    assert memory.peak_mib(lambda: torch.ones(MIB, dtype=torch.uint8), CPU) == 1


def test_only_the_profiler_is_silenced(capfd):
    memory.peak_mib(lambda: os.write(2, b"the step's own words\n"), CPU)
    os.write(2, b"and later ones\n")
    assert capfd.readouterr().err == "the step's own words\nand later ones\n"


def test_nothing_is_collected_while_a_step_is_counted():
    """The profiler would count off what an earlier one has seen made."""
    seen = []
    memory.peak_mib(lambda: seen.append(gc.isenabled()), CPU)
    assert seen == [False] and gc.isenabled()


def test_a_training_step_takes_less_memory_when_activations_are_recomputed(pictures):
    found, parameters = {}, 0
    for mode in ("recompute", "store"):
        glow = flowkern.Glow((3, 16, 16), levels=1, depth=12, hidden=8, memory=mode)
        glow.initialize(torch.rand(8, 3, 16, 16))
        net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2)
        parameters = sum(p.nbytes for p in net.parameters()) / MIB
        settings = tiny(pictures, "", memory=mode, depth=12, batch=8)
        before = {name: p.clone() for name, p in net.state_dict().items()}
        found[mode] = run.training_mib(net, settings)
        assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
        assert run.training_mib(net, settings) == found[mode]
    assert parameters < found["recompute"] < found["store"] / 2


def test_a_batch_in_parts_takes_less_memory(pictures):
    net = flowkern.Unfolded(flowkern.ResNetProx(3, 8, 1), folds=1)
    settings = tiny(pictures, "", prox="resnet", batch=8)
    whole, parts = (run.training_mib(net, replace(settings, accumulate=n)) for n in (1, 4))
    assert whole / 4.5 < parts < whole / 3


def test_the_ssim_is_that_of_clipped_images(images):
    far = stacked(images.test)[0] * 3 - 1
    methods = [Method("far", "", lambda y, sigma: far), Method("clipped", "", lambda y, sigma: far.clamp(0, 1))]
    found = evaluation.evaluate(methods, images.val, images.test, [0.2], shown=1, progress=False).scores
    assert torch.equal(found["far"].ssim[0.2], found["clipped"].ssim[0.2])


def test_proxes_with_fewer_seeds_than_others_are_compared_without_a_spread_over_seeds():
    repeats = {"resnet": 1, "unet": 1, "glow": 2}
    scores = [scored(f"{p}-{i}", seed=10 * k + i) for k, (p, n) in enumerate(repeats.items()) for i in range(n)]
    single = evaluated(*scores)
    found = comparison.comparisons(single, comparison.pool(single, list(repeats)), repeats)
    assert "seeds" not in found[0][1]
