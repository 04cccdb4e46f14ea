"""What an evaluation leaves to read: table.md, results.json and the table on the terminal."""

import json
import math
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from train.callbacks import read_metrics
from train.config import noise
from train.evaluation import MEASURED, PROTOCOL, Evaluation
from train.folder import Folder

PACKAGES = ("torch", "lightning", "torchmetrics", "scikit-image", "numpy")
# Columns beside the scores: key of the facts, title, how to print it.
FACTS = (
    ("parameters", "Parameters", lambda value: f"{value / 1e6:.2f} M"),
    ("training_mib", "Training MiB", lambda value: f"{value:.1f}"),
    ("training_minutes", "Training min", lambda value: f"{value:.1f}"),
)


def table(found: Evaluation, against: str | None = "tv") -> tuple[list[str], list[list[str]]]:
    """Header and rows: per method PSNR (SSIM) at each sigma and its facts; below, its gain over `against`."""
    facts = [f for f in FACTS if any(f[0] in s.method.facts for s in found.scores.values())]
    header = ["", *(f"σ = {noise(sigma)}" for sigma in found.sigmas), "ms per image", *(title for _, title, _ in facts)]
    rows = []
    for key, scores in found.scores.items():
        cells = [f"{scores.psnr[s].mean():.2f} ({scores.ssim[s].mean():.3f})" for s in found.sigmas]
        known = scores.method.facts
        cells += ["" if key == "noisy" else f"{1000 * scores.seconds_per_image:.1f}"]
        rows.append([scores.method.title, *cells, *(show(known[k]) if k in known else "" for k, _, show in facts)])
    for key, scores in found.scores.items():
        if against in found.scores and key not in ("noisy", against):
            gains = [found.gain(key, against, sigma) for sigma in found.sigmas]
            cells = [gain_in_words(g) for g in gains]
            title = f"{scores.method.title} − {found.scores[against].method.title}"
            rows.append([title, *cells, *[""] * (1 + len(facts))])
    return header, rows


def gain_in_words(gain: dict) -> str:
    """A paired gain of `Evaluation.gain`, mean ± standard error."""
    error = gain["standard_error"]
    return f"{gain['mean']:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def title(found: Evaluation) -> str:
    """What the table shows, of which images."""
    measured = "" if found.measurement.is_identity else f", measured: {found.measurement.describe()}"
    return f"PSNR in dB (SSIM), {found.images} test images{measured}"


def protocol(found: Evaluation) -> dict[str, str]:
    """What every number was measured as, by name."""
    own = {s.method.title: s.method.protocol for s in found.scores.values() if s.method.protocol}
    measured = {"images": images(found), "measured of them": found.measurement.describe()}
    return PROTOCOL | ({} if found.measurement.is_identity else MEASURED) | measured | own


def images(found: Evaluation) -> str:
    """How many test images there are, and of how many pictures."""
    tiles = f", tiles of {found.sources} pictures: standard errors are over tiles, and say little about other pictures"
    return f"{found.images} test images{'' if found.sources is None else tiles}"


def markdown(title: str, header: list[str], rows: list[list[str]], notes: dict[str, str]) -> str:
    """A table with what it was measured by."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{title}\n\n{body}\n\n" + "".join(f"- {name}: {text}\n" for name, text in notes.items())


def write(folder: Folder, found: Evaluation, notes: dict[str, str], more: dict, against: str = "tv") -> None:
    """table.md, then results.json. notes: what the table's reader has to know; more: further results, by name."""
    header, rows = table(found, against)
    folder.table.write_text(markdown(f"{title(found)}; gains: mean ± standard error.", header, rows, notes))
    results = {"methods": scores_as_json(found, against), "protocol": notes, **circumstances(), **more}
    finish(folder.results, results)


def finish(path: Path, results: dict) -> None:
    """Write results.json, whole or not at all: it marks a finished run."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(path)


def scores_as_json(found: Evaluation, against: str = "tv") -> dict:
    """Everything in the table, and more digits of it."""
    result = {}
    for key, scores in found.scores.items():
        levels = []
        for sigma in found.sigmas:
            level = {"sigma": sigma, "psnr": scores.psnr[sigma].mean().item(), "ssim": scores.ssim[sigma].mean().item()}
            if against in found.scores and key not in (against, "noisy"):
                level[f"gain_over_{against}"] = found.gain(key, against, sigma)
            levels.append(level | ({"setting": scores.settings[sigma]} if sigma in scores.settings else {}))
        result[key] = {"title": scores.method.title, "levels": levels, **scores.method.facts}
        if not math.isnan(scores.seconds_per_image) and key != "noisy":
            result[key]["seconds_per_image"] = scores.seconds_per_image
    return result


def training(folder: Folder) -> dict:
    """Per stage, from metrics.csv: steps, epochs, seconds, speed and peak memory."""
    found = {}
    for row in read_metrics(folder.metrics):
        stage = found.setdefault(row["stage"], {"images_per_second": [], "best_val_loss": math.inf})
        stage["images_per_second"].append(float(row["images_per_second"]))
        stage |= {
            "steps": int(row["step"]),
            "epochs": int(row["epoch"]) + 1,
            "seconds": float(row["seconds"]),
            "val_loss": float(row["val_loss"]),
            "best_val_loss": min(stage["best_val_loss"], float(row["val_loss"])),
            "process_peak_mib": float(row["peak_mib"]),
        }
        found[row["stage"]] = stage
    return {name: stage | {"images_per_second": median(stage["images_per_second"])} for name, stage in found.items()}


def circumstances() -> dict:
    """Machine, versions and commit of this moment."""
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
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


def show(header: list[str], rows: list[list[str]], title: str) -> None:
    """Print a table."""
    shown = Table(title=title)
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    # A log has no width of its own; wrapped cells would be unreadable there.
    (console if console.is_terminal else Console(width=200)).print(shown)
