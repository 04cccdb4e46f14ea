"""What a run leaves to read: table.md, results.json and the table on the terminal."""

import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from flowkern import Unfolded
from train.callbacks import read_metrics
from train.config import Config
from train.evaluation import METHODS, PROTOCOL, Level
from train.folder import Folder

TITLES = {"noisy": "Noisy", "tv": "Total variation", "unfolded": "Unfolded Glow"}
PACKAGES = ("torch", "lightning", "torchmetrics", "scikit-image", "numpy")


def rows(levels: list[Level]) -> list[list[str]]:
    """The table's cells: sigma, PSNR (SSIM) of each method, and the gain over total variation."""
    found = []
    for level in levels:
        gain = level.gain()
        cells = [f"{level.psnr[m].mean():.2f} ({level.ssim[m].mean():.3f})" for m in METHODS]
        found.append([f"{level.sigma:.2f}", *cells, f"{gain['mean']:+.2f} ± {gain['standard_error']:.2f}"])
    return found


def header() -> list[str]:
    return ["σ", *(f"{TITLES[m]}" for m in METHODS), "Gain over TV"]


def write(folder: Folder, levels: list[Level], config: Config, data: str, net: Unfolded, commit: str | None) -> None:
    """table.md and results.json. data: what was trained and tested on, in words."""
    folder.table.write_text(markdown(levels, config, data))
    folder.results.write_text(json.dumps(results(levels, config, data, net, training(folder), commit), indent=2) + "\n")


def markdown(levels: list[Level], config: Config, data: str) -> str:
    """The results with the protocol beside them."""
    lines = [header(), ["---:"] * len(header()), *rows(levels)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    protocol = "\n".join(f"- {name}: {text}" for name, text in PROTOCOL.items())
    return (
        f"PSNR in dB (SSIM), {levels[0].gain()['n']} test images; trained at σ = {config.trained_at()}; "
        f"gain: mean ± standard error.\n\n{table}\n\nData: {data}.\n\nProtocol\n\n{protocol}\n"
    )


def training(folder: Folder) -> dict:
    """Per stage, from metrics.csv: steps, epochs, seconds, speed and peak memory."""
    found = {}
    for row in read_metrics(folder.metrics):
        stage = found.setdefault(row["stage"], {"images_per_second": []})
        stage["images_per_second"].append(float(row["images_per_second"]))
        stage |= {
            "steps": int(row["step"]),
            "epochs": int(row["epoch"]) + 1,
            "seconds": float(row["seconds"]),
            "val_loss": float(row["val_loss"]),
            "peak_mib": float(row["peak_mib"]),
        }
    return {name: stage | {"images_per_second": median(stage["images_per_second"])} for name, stage in found.items()}


def results(levels: list[Level], config: Config, data: str, net: Unfolded, training: dict, commit: str | None) -> dict:
    """Everything in the table and what it was measured with."""
    return {
        "levels": [
            {
                "sigma": level.sigma,
                "tv_weight": level.tv_weight,
                "gain_over_tv": level.gain(),
                **{m: {"psnr": level.psnr[m].mean().item(), "ssim": level.ssim[m].mean().item()} for m in METHODS},
            }
            for level in levels
        ],
        "protocol": PROTOCOL | {"trained_at_sigma": config.trained_at(), "data": data},
        "network": {
            "parameters": sum(p.numel() for p in net.parameters()),
            "mu": net.mu.tolist(),
            "lambda": [prox.lam.item() for prox in net.proxes],
        },
        "training": training,
        "config": asdict(config),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit,
    }


def machine() -> dict:
    """Processor, threads and accelerator."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def commit() -> str | None:
    """The git commit of this checkout, marked when files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def show(levels: list[Level], config: Config) -> None:
    """Print the table."""
    table = Table(title=f"PSNR in dB (SSIM), {levels[0].gain()['n']} test images, trained at σ = {config.trained_at()}")
    for i, name in enumerate(header()):
        table.add_column(name, justify="right", style="bold" if i == len(METHODS) else None)
    for row in rows(levels):
        table.add_row(*row)
    Console().print(table)
