"""The examples, run for a few steps."""

import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_class_conditional_digits(examples, tmp_path, monkeypatch):
    import digits

    picture = tmp_path / "digits.png"
    monkeypatch.setattr(sys, "argv", ["digits.py", "--steps", "25", "--seconds", "1000", "--picture", str(picture)])
    found = digits.main()
    assert found["steps"] == 25 and matplotlib.image.imread(picture).shape == (480, 480, 4)
    # log2(17) = 4.09 bits is what uniform grey levels cost.
    assert found["own"] < 3.9 and found["own"] < found["wrong"]


def test_autoencoder_with_a_glow_prior(examples):
    import vae

    model, loss, _ = vae.main(steps=40)
    assert loss < 42 and model.sample(3).shape == (3, 1, 8, 8)
    with torch.no_grad():
        z = model.posterior(torch.rand(5, 1, 8, 8)).mean
    assert torch.isfinite(model.glow.log_prob(z)).all()


def test_the_autoencoder_stays_short():
    assert len((EXAMPLES / "vae.py").read_text().splitlines()) < 60
