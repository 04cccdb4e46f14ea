"""Pictures of results: what methods make of images, samples of a flow, curves of training."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor

from train.callbacks import read_metrics
from train.config import noise
from train.evaluation import Evaluation

SIDE = 1.35  # inches of an image


def denoised(path: Path, found: Evaluation, sigmas: list[float] | None = None) -> None:
    """Wei et al., figure 1: for each sigma a block of rows, one for each image: clean, noisy, every method, with PSNR.

    sigmas: default the two highest of the evaluation. The best method of a row is set in bold.
    """
    sigmas = sorted(found.sigmas)[-2:] if sigmas is None else sigmas
    count, columns = len(found.clean), 1 + len(found.scores)
    size = (SIDE * columns, (SIDE + 0.22) * count * len(sigmas) + 0.5)
    figure, axes = plt.subplots(count * len(sigmas), columns, squeeze=False, layout="constrained", figsize=size)
    for block, sigma in enumerate(sigmas):
        for image in range(count):
            row = axes[block * count + image]
            first = block == image == 0
            _show(row[0], found.clean[image], "Clean" if first else None, "")
            if image == 0:
                row[0].set_ylabel(f"σ = {noise(sigma)}", fontsize=9)
            best = max(scores.psnr[sigma][image] for scores in found.scores.values())
            for axis, scores in zip(row[1:], found.scores.values(), strict=True):
                reached = scores.psnr[sigma][image]
                title = scores.method.title if first else None
                _show(axis, scores.shown[sigma][image], title, f"{reached:.2f} dB", bold=bool(reached == best))
    figure.savefig(path, dpi=200)
    plt.close(figure)


def reconstructed(path: Path, found: Evaluation) -> None:
    """For each image a row of truth, measurement and every method's estimate with its PSNR, and a row of their errors:
    at the evaluation's highest noise level.

    Errors are absolute, averaged over the colours, on a scale that all
    share; larger ones than it shows are at its end.
    """
    sigma = max(found.sigmas)
    labels = [f"σ = {noise(sigma)}", *[""] * (len(found.clean) - 1)]
    panels(path, [(label, found, sigma, image) for image, label in enumerate(labels)])


def panels(path: Path, rows: list[tuple[str, Evaluation, float, int]]) -> None:
    """`reconstructed` of rows (label, evaluation, sigma, image) of several evaluations with the same methods."""
    columns = 1 + len(rows[0][1].scores)
    errors = [[(s.shown[sigma][i] - found.clean[i]).abs().mean(0) for s in list(found.scores.values())[1:]]
              for _, found, sigma, i in rows]  # fmt: skip
    # Beyond what all but one pixel in a hundred exceed, a scale shows nothing but outliers.
    flat = torch.cat([error.flatten() for row in errors for error in row] or [torch.ones(1)])
    scale = Normalize(0, max(flat.quantile(0.99).item() if len(flat) < 2**24 else flat.max().item(), 1e-3))
    size = (SIDE * columns + 1.5, (2 * SIDE + 0.25) * len(rows) + 0.4)
    figure, axes = plt.subplots(2 * len(rows), columns, squeeze=False, layout="constrained", figsize=size)
    for index, (label, found, sigma, image) in enumerate(rows):
        upper, lower = axes[2 * index], axes[2 * index + 1]
        first = index == 0
        _show(upper[0], found.clean[image], "Truth" if first else None, "")
        upper[0].set_ylabel(label, fontsize=8)
        best = max(scores.psnr[sigma][image] for scores in found.scores.values())
        for axis, scores in zip(upper[1:], found.scores.values(), strict=True):
            reached = scores.psnr[sigma][image]
            title = scores.method.title if first else None
            _show(axis, scores.shown[sigma][image], title, f"{reached:.2f} dB", bold=bool(reached == best))
        for axis in lower[:2]:
            axis.axis("off")
        lower[1].text(0.95, 0.5, "error", fontsize=8, ha="right", transform=lower[1].transAxes)
        for axis, error in zip(lower[2:], errors[index], strict=True):
            axis.imshow(error.numpy(), cmap="inferno", norm=scale, interpolation="nearest")
            axis.axis("off")
    bar = figure.colorbar(ScalarMappable(scale, "inferno"), ax=axes, extend="max", shrink=0.6, aspect=40)
    bar.set_label("error |estimate − truth|,\nmean over colours; pixels in [0, 1]", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=200 if len(rows) < 8 else 130)
    plt.close(figure)


def _show(axis, image: Tensor, title: str | None, label: str, bold: bool = False) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlabel(label, fontsize=7, labelpad=2, fontweight="bold" if bold else "normal")
    if title:
        axis.set_title(title, fontsize=8)


def samples(path: Path, rows: dict[float, Tensor]) -> None:
    """Samples of a flow, a row for each temperature: {temperature: images (N, 3, H, W), clipped to [0, 1]}."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, squeeze=False, layout="constrained", figsize=(SIDE * columns + 0.3, SIDE * len(rows))
    )
    for row, (temperature, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            _show(axis, image.clamp(0, 1), None, "")
        row[0].set_ylabel(f"T = {temperature:g}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


LOSSES = {"mse": "mean squared error", "psnr": "minus PSNR in dB"}


def curves(path: Path, metrics: Path, loss: str) -> None:
    """Loss of each stage and validation PSNR over steps. loss: of end-to-end training, one of LOSSES."""
    rows = read_metrics(metrics)
    panels = [
        (stage, column, title)
        for stage, column, title in (
            ("prior", "loss", "Pre-training: bits per dimension"),
            ("unfolded", "loss", f"End to end: {LOSSES[loss]}"),
            ("unfolded", "val_psnr", "End to end: validation PSNR in dB"),
        )
        if any(r["stage"] == stage for r in rows)
    ]
    if not panels:
        return
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
