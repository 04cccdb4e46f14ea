"""A trained network and what it does to one picture file, for the command `python -m train.denoise`."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from flowkern import GlowProx, Unfolded
from flowkern.operators import Identity
from train import config as configuration
from train import noise_level, picture_files, tiling
from train.folder import Folder

# What can go wrong with one picture, and leaves the others to be done.
# A RuntimeError: memory that the CPU does not have.
FAILURES = (picture_files.PictureError, FloatingPointError, OSError, MemoryError, RuntimeError)


def load(checkpoint: Path, device: str) -> Unfolded:
    """The network in `checkpoint`, a run's folder or a saved `Unfolded`, ready on `device`: "auto", "cpu" or "cuda".

    Raises FileNotFoundError or ValueError in one sentence: not there, not a saved Unfolded, truncated, not for
    denoising images of three channels; "cuda" where PyTorch finds none.
    """
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint} does not exist; wanted is a run's folder or a saved Unfolded")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; pass --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Folder(checkpoint)
    net = Unfolded.from_pretrained(run.model("unfolded") if run.checkpoints.is_dir() else checkpoint)
    if not isinstance(net.operator, Identity):
        raise ValueError(f"{checkpoint} was trained for {type(net.operator).__name__} measurements, not for denoising")
    for prox in net.proxes:
        if isinstance(prox, GlowProx):
            prox.set_options(check_finite=False)  # the estimate is looked at, of each picture
    net = net.to(device).eval()
    side = tiling.grid(net)
    try:
        with torch.no_grad():
            net(next(net.parameters()).new_zeros(1, 3, side, side), **noise_level.told(net, 0.1))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} can't denoise images of three channels: {error}") from error
    return net


def trained_for(checkpoint: Path, told: bool = False) -> str:
    """For which noise the network was trained, in a sentence, as far as the run's config.yaml is there.

    told: whether the network is told the level of the noise.
    """
    beyond = "it is told each picture's" if told else "other noise is left in or oversmoothed"
    for run in (checkpoint, *checkpoint.resolve().parents[1:2]):
        config = Folder(run).config
        if config.is_file():
            try:
                sigma = configuration.load(config).trained_at()
            except (OSError, ValueError):
                return f"trained for unknown noise: {config} is not the configuration of a run"
            return f"trained for noise of sigma {sigma} on pixels in [0, 1]; {beyond}"
    return f"trained for unknown noise: {checkpoint} comes without its run's config.yaml"


def check_level(net: nn.Module, sigma: float | None) -> None:
    """Raise ValueError in one sentence if a network can't be told this noise level; None is none given."""
    if sigma is not None and not noise_level.is_told(net):
        raise ValueError("--sigma is for a network trained with --noise-aware, and this one was not")
    if sigma is not None and not 0 <= sigma < math.inf:
        raise ValueError(f"--sigma must be a number of at least 0, got {sigma}")


def denoise(net: nn.Module, file: Path, folder: Path, sigma: float | None = None, **settings: int) -> str:
    """Denoise the picture in `file` into `folder`. settings: `denoise_tiled`'s. Returns a line that says what was done.

    sigma: of the noise, for a network that wants to be told; None: estimated from the picture.

    Raises one of FAILURES, its message to follow the file's name; then nothing was written.
    """
    start = time.monotonic()
    picture = picture_files.read(file)
    full = np.iinfo(picture.pixels.dtype).max
    image = torch.from_numpy(picture.pixels.transpose(2, 0, 1).astype(np.float32)).div_(full)
    grey = len(image) == 1
    strength, known = "", {}
    if noise_level.is_told(net):
        level = _estimated(image) if sigma is None else sigma
        strength = f", sigma {level:.3f}{' (estimated)' if sigma is None else ''}"
        known = noise_level.told(net, level)
    estimate = tiling.denoise_tiled(net, image.expand(3, -1, -1), progress=_bar(file.name), **settings, **known)
    estimate = estimate.mean(0, keepdim=True) if grey else estimate
    pixels = estimate.clamp_(0, 1).mul_(full).round_().permute(1, 2, 0).numpy()
    picture.pixels = np.ascontiguousarray(pixels, dtype=picture.pixels.dtype)
    written = picture_files.write(picture, file, folder)
    sizes = [settings[name] for name in ("tile", "overlap", "multiple")]
    tiles = math.prod(len(tiling.starts(side, *sizes)) for side in image.shape[1:])
    tiled = f"{tiles} tile{'s' if tiles > 1 else ''}"
    return f"{file}: {picture.describe()}{strength}, {tiled}, {time.monotonic() - start:.1f} s -> {written}"


def _estimated(image: torch.Tensor) -> float:
    try:
        return noise_level.estimate(image)
    except ValueError as error:
        smallest = noise_level.SMALLEST
        message = f"smaller than {smallest}x{smallest}, give its noise with --sigma"
        raise picture_files.PictureError(message) from error


def _bar(name: str):
    """A progress bar on a terminal's stderr, gone when the picture is done."""
    console = Console(stderr=True)
    options = {"transient": True, "console": console, "disable": not console.is_terminal}
    return lambda batches, total: track(batches, name, total=total, **options)
