"""Runs small enough for a second, and what tests read from the folders that they leave."""

from pathlib import Path

import numpy as np
from PIL import Image

import flowkern
from train import callbacks
from train.config import Config

TINY = {
    "size": 16,
    "batch": 4,
    "epoch_images": 12,
    "levels": 1,
    "depth": 2,
    "hidden": 8,
    "resnet_width": 8,
    "unet_width": 2,
    "folds": 2,
    "prior_steps": 5,
    "prior_lr": 1e-3,
    "steps": 8,
    "lr": 1e-3,
    "eval_sigmas": [0.1, 0.2, 0.25],
    "tensorboard": False,
}
COUNTS = {"train": 6, "val": 3, "test": 5}
FILES = {"config.yaml", "pictures.json", "metrics.csv", "table.md", "results.json", "denoised.png", "curves.png"}
FILES |= {"checkpoints"}


def draw_pictures(path):
    """Smooth pictures, already split."""
    ramp = np.linspace(0, 1, 24)
    for split, count in COUNTS.items():
        (path / split).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([i, count])
            waves = rng.random(3) * np.sin(rng.uniform(1, 6, 3) * ramp[:, None, None] + ramp[None, :, None]) / 2 + 0.5
            Image.fromarray((255 * waves).astype(np.uint8)).save(path / split / f"{i}.png")
    return path


def tiny(pictures, out, **settings):
    return Config(data=str(pictures), out=out and str(out), **(TINY | settings))


def options(**settings):
    """Settings as the words of a command line."""
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return words


def names(path):
    """What a folder holds, hidden files left out."""
    return {p.name for p in path.iterdir() if not p.name.startswith(".")}


def network(path):
    return flowkern.Unfolded.from_pretrained(Path(path) / "checkpoints" / "unfolded")


def rows(path, stage=None):
    """The rows of metrics.csv, or those of one stage."""
    return [r for r in callbacks.read_metrics(Path(path) / "metrics.csv") if stage in (None, r["stage"])]


def table(path):
    """The cells of table.md, header first."""
    lines = [line for line in (path / "table.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


class Interrupted(Exception):
    """Stands in for a machine that goes away."""
