"""What pre-training reached: bits per dimension of held-out images, and samples."""

import torch
from torch.utils.data import DataLoader

from flowkern import Glow
from train import evaluation, figures, report
from train.config import Config
from train.data import Data, FixedSamples, part
from train.folder import Folder

TEMPERATURES = (0.5, 0.7, 0.85, 1.0)
SAMPLES = 8

PROTOCOL = {
    "bits_per_dim": "mean over images of -log2 p / (3 H W), of the images quantised to the bits named and uniformly "
    "dequantised once, no noise added: an upper bound, in expectation, of that of the discrete images",
    "samples": "g(T z), z standard normal, clipped to [0, 1]",
}


@torch.no_grad()
def bits_per_dim(glow: Glow, held_out: FixedSamples, config: Config) -> float:
    """Mean bits per dimension of held-out pictures, dequantised without noise."""
    clean = FixedSamples(held_out.pictures, held_out.stream, config.bits, prior_noise=0.0)
    device = next(glow.parameters()).device
    batches = DataLoader(clean, part(config))
    found = [glow.bits_per_dim(batch["prior"].to(device), bits=config.bits).double() for batch in batches]
    return torch.cat(found).mean().item()


@torch.no_grad()
def samples(glow: Glow, config: Config) -> dict[float, torch.Tensor]:
    """Samples at several temperatures, {temperature: (8, 3, size, size)}, the same latents in each row."""
    rows = {}
    for temperature in TEMPERATURES:
        torch.manual_seed(config.seed)
        rows[temperature] = glow.sample(SAMPLES, temperature=temperature).cpu()
    return rows


def write(glow: Glow, data: Data, config: Config, folder: Folder, commit: str | None) -> None:
    """samples.png, curves.png, table.md and results.json, and the figures on the terminal."""
    glow = glow.to(evaluation.device()).eval()
    figures.samples(folder.samples, samples(glow, config))
    figures.curves(folder.curves, folder.metrics, config.loss)
    found = {"val": bits_per_dim(glow, data.val, config), "test": bits_per_dim(glow, data.test, config)}
    header = ["", f"bits per dimension ({config.bits}-bit images)"]
    rows = [[{"val": "Validation", "test": "Test"}[split], f"{value:.3f}"] for split, value in found.items()]
    trained = f"noise of sigma up to {config.prior_noise:g} added" if config.prior_noise else "clean images"
    notes = PROTOCOL | {"training": trained, "data": data.describe()}
    folder.table.write_text(report.markdown("", header, rows, notes))
    results = {
        "bits_per_dim": found,
        "bits": config.bits,
        "protocol": notes,
        "parameters": sum(p.numel() for p in glow.parameters()),
        "training": report.training(folder),
        "config": config.of_run(),
        **report.circumstances(),
        "commit": commit,
    }
    report.finish(folder.results, results)
    report.show(header, rows, title=f"After {results['training'].get('prior', {}).get('steps', 0)} steps")
