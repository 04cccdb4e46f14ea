"""The two pictures of a run: denoised.png and curves.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from train.callbacks import read_metrics
from train.evaluation import Level
from train.report import TITLES

COLUMNS = ("clean", "noisy", "tv", "unfolded")


def denoised(path: Path, levels: list[Level]) -> None:
    """Clean, noisy, total variation and ours for a few test images, labelled with PSNR, at the two highest sigmas."""
    levels = sorted(levels, key=lambda level: level.sigma)[-2:]
    count = len(levels[0].shown["clean"])
    columns = 1 + 3 * len(levels)
    side = 1.35
    figure, axes = plt.subplots(
        count, columns, squeeze=False, layout="constrained", figsize=(side * columns, (side + 0.22) * count + 0.5)
    )
    for row in range(count):
        _show(axes[row][0], levels[0].shown["clean"][row], "Clean" if row == 0 else None, "")
        for i, level in enumerate(levels):
            for j, method in enumerate(COLUMNS[1:]):
                title = f"{TITLES[method]}\nσ = {level.sigma:.2f}" if row == 0 else None
                _show(
                    axes[row][1 + 3 * i + j],
                    level.shown[method][row],
                    title,
                    f"{level.psnr[method][row]:.2f} dB",
                    bold=method == "unfolded",
                )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _show(axis, image: Tensor, title: str | None, label: str, bold: bool = False) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlabel(label, fontsize=7, labelpad=2, fontweight="bold" if bold else "normal")
    if title:
        axis.set_title(title, fontsize=8, fontweight="bold" if bold else "normal")


def curves(path: Path, metrics: Path) -> None:
    """Loss of each stage and validation PSNR over steps."""
    rows = read_metrics(metrics)
    panels = [
        (stage, column, title)
        for stage, column, title in (
            ("prior", "loss", "Pre-training: bits per dimension"),
            ("unfolded", "loss", "End to end: mean squared error"),
            ("unfolded", "val_psnr", "End to end: validation PSNR in dB"),
        )
        if any(r["stage"] == stage for r in rows)
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, (stage, column, title) in zip(axes[0], panels, strict=True):
        chosen = [r for r in rows if r["stage"] == stage]
        for name, label in (
            ((column, "training"), ("val_loss", "validation")) if column == "loss" else ((column, None),)
        ):
            points = [(int(r["step"]), float(r[name])) for r in chosen if r[name]]
            axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if column == "loss":
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
