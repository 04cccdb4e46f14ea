"""The baselines of the results table: that each denoises, and that tuning finds what is best."""

import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

import flowkern
from train import baselines
from train.baselines import BM3D, MapPrior, NonLocalMeans, TotalVariation, bm3d_available, reference_denoiser
from train.stages import psnr

SIGMA = 0.15


def smooth_pictures(n=2, size=32):
    """Slow waves in colour (n, 3, size, size) in [0, 1], and the same with noise."""
    rng = np.random.default_rng(0)
    ramp = torch.linspace(0, 1, size)
    frequency = torch.from_numpy(rng.uniform(1, 5, (n, 3, 1, 1))).float()
    clean = 0.5 + 0.4 * torch.sin(frequency * ramp[:, None] + ramp + frequency)
    return clean, clean + SIGMA * torch.from_numpy(rng.standard_normal(clean.shape)).float()


def map_prior(**options):
    """MAP with a flow that has learnt a little of what smooth pictures are."""
    torch.manual_seed(0)
    glow = flowkern.Glow((3, 32, 32), levels=3, depth=2, hidden=16, shift=0.5)
    pictures, _ = smooth_pictures(16)
    optimizer = None
    for _ in range(60):
        loss = glow.bits_per_dim(pictures + 0.02 * torch.randn_like(pictures)).mean()
        optimizer = optimizer or torch.optim.Adam(glow.parameters(), lr=3e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return MapPrior(glow.eval(), steps=20, **options)


MAKERS = {"tv": TotalVariation, "nlm": NonLocalMeans, "map": map_prior}


@pytest.mark.parametrize("key", [*MAKERS, "bm3d"])
def test_beats_the_noisy_image(key):
    if key == "bm3d" and not bm3d_available():
        pytest.skip("the package bm3d is not installed")
    baseline = (MAKERS | {"bm3d": BM3D})[key]()
    clean, noisy = smooth_pictures(1 if key == "bm3d" else 2)
    before = noisy.clone()
    estimate = baseline(noisy, SIGMA, baseline.tune(clean, noisy, SIGMA))
    assert estimate.shape == noisy.shape and estimate.dtype == torch.float32
    assert (psnr(estimate, clean) > psnr(noisy, clean) + 3).all()
    assert torch.equal(noisy, before)
    assert baseline.key == key and baseline.title and baseline.protocol


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (TotalVariation, np.geomspace(0.02, 2, 25)),
        (NonLocalMeans, SIGMA * np.geomspace(0.1, 2, 25)),
    ],
)
def test_tuning_finds_the_best_of_its_range(make, settings):
    baseline, (clean, noisy) = make(), smooth_pictures()
    scores = [psnr(baseline(noisy, SIGMA, s).clamp(0, 1), clean).mean().item() for s in settings]
    assert 0 < np.argmax(scores) < len(settings) - 1
    found = baseline.tune(clean, noisy, SIGMA)
    assert psnr(baseline(noisy, SIGMA, found).clamp(0, 1), clean).mean() > max(scores) - 0.1


def test_tuning_does_not_end_on_a_bump():
    def score(x):
        return -((math.log(x) - 1) ** 2) + 0.5 * math.cos(12 * math.log(x))

    grid = np.geomspace(0.05, 20, 1000)
    best = max(map(score, grid))
    assert baselines.highest(score, 0.05, 20) == pytest.approx(grid[np.argmax([*map(score, grid)])], rel=0.05)
    assert score(baselines.highest(score, 0.05, 20)) > best - 0.05
    assert baselines.highest(lambda x: x, 0.5, 2) == pytest.approx(2)
    assert baselines.highest(lambda x: -x, 0.5, 2) == pytest.approx(0.5)


def test_map_tunes_over_its_grid():
    baseline = map_prior(gammas=(1e-3, 1, 1e4), tuning_images=1, batch=2)
    clean, noisy = smooth_pictures(3)
    scores = {g: psnr(baseline(noisy[:1], SIGMA, g * SIGMA**2).clamp(0, 1), clean[:1]).item() for g in (1e-3, 1, 1e4)}
    assert baseline.tune(clean, noisy, SIGMA) == max(scores, key=scores.get) * SIGMA**2
    assert max(scores.values()) > min(scores.values()) + 0.5
    assert baseline(noisy, SIGMA, 0.01).shape == noisy.shape  # in two batches
    assert "0.001, 1, 10000 sigma^2" in baseline.protocol and "20 steps of adam" in baseline.protocol


def test_without_bm3d_non_local_means_stands_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d", None)  # what import then finds is ImportError
    assert not bm3d_available()
    assert isinstance(reference_denoiser(), NonLocalMeans)
    with pytest.raises(ImportError):
        BM3D()


def test_a_bm3d_whose_binary_does_not_load_is_none(monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "bm3d":
                raise OSError("libbm4d.so: wrong architecture")

    monkeypatch.delitem(sys.modules, "bm3d", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert not bm3d_available()


def test_with_bm3d_it_is_told_sigma_image_by_image(monkeypatch):
    """With a stand-in for the package, so that this runs where it is not installed."""
    seen = []

    def bm3d_rgb(image, sigma, profile):
        seen.append((image.shape, image.dtype, sigma, profile.num_threads))
        return image / 2

    package = ModuleType("bm3d")
    package.BM3DProfile, package.bm3d_rgb = type("BM3DProfile", (), {"num_threads": 0}), bm3d_rgb
    monkeypatch.setitem(sys.modules, "bm3d", package)
    monkeypatch.setattr(baselines, "version", lambda name: "4.0.3")
    denoiser = reference_denoiser()
    clean, noisy = smooth_pictures()
    assert isinstance(denoiser, BM3D) and denoiser.tune(clean, noisy, SIGMA) is None
    torch.testing.assert_close(denoiser(noisy, SIGMA), noisy / 2)
    assert seen == [((32, 32, 3), np.float64, SIGMA, 1)] * 2
    assert "4.0.3" in denoiser.protocol
