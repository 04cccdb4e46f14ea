"""Every setting of a training run, in one flat dataclass, and the command line made from it."""

import argparse
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import jsonargparse
import torch
import yaml

PRESETS = Path(__file__).parent / "presets"
FLOW = ("levels", "depth", "hidden", "coupling", "scale", "alpha", "split_prior")


def _setting(group: str, default, text: str):
    return field(default=default, metadata={"group": group, "help": text})


@dataclass
class Config:
    """The settings of `python -m train.unfolded`. The defaults are the paper's where it states one."""

    data: str = _setting(
        "data",
        "photos",
        "Folder or zip of images; folder or zip with train, val and test inside (or "
        "train.zip, val.zip, test.zip); or 'photos', the photographs that scikit-image installs.",
    )
    size: int = _setting("data", 64, "Side of the training images, in pixels; a multiple of 2^levels.")
    eval_size: int | None = _setting("data", None, "Side of the validation and test images (default: as size).")
    fit: Literal["resize", "crop"] = _setting(
        "data",
        "resize",
        "How an image becomes size x size: its centre square "
        "resized, or random crops at its own resolution ('photos' is always cropped).",
    )
    augment: Literal["none", "mirror", "all"] = _setting(
        "data",
        "mirror",
        "Random changes of training images: left-right mirroring; 'all' also turns them by quarters and permutes the "
        "colour channels, for sets of few pictures without an upright.",
    )
    epoch_images: int | None = _setting("data", None, "Training images per epoch (default: every image once).")
    val_images: int | None = _setting("data", None, "Validation images at most (default: all; cropped: 64).")
    test_images: int | None = _setting("data", None, "Test images at most (default: all; cropped: 96).")
    workers: int = _setting("data", 0, "Processes that load data; 0 loads in the training process.")

    levels: int = _setting("flow", 4, "Levels of the Glow.")
    depth: int | list[int] = _setting("flow", 32, "Steps of flow per level: one number, or one per level.")
    hidden: int = _setting("flow", 512, "Width of the coupling networks.")
    coupling: Literal["affine", "additive"] = _setting("flow", "affine", "Kind of coupling.")
    scale: Literal["softclamp", "sigmoid"] = _setting(
        "flow", "softclamp", "Scale map of the affine coupling; Glow's sigmoid is unstable when trained end to end."
    )
    alpha: float = _setting(
        "flow", 1.0, "Bound of the softclamped log-scale; smaller is steadier where learning rates are large."
    )
    split_prior: Literal["standard", "learned"] = _setting("flow", "standard", "Prior of the halves that levels emit.")
    memory: Literal["recompute", "store", "checkpoint"] = _setting(
        "flow", "recompute", "What backward does about activations."
    )
    anchor_every: int | None = _setting(
        "flow", None, "Keep an exact state every so many steps of flow, to bound the drift."
    )
    backend: str = _setting("flow", "auto", "Which implementation of the pixel ops runs.")
    compute_dtype: Literal["float32", "bfloat16"] | None = _setting("flow", None, "Precision of the coupling networks.")

    folds: int = _setting("unfolded", 4, "Folds K of the unfolded network.")
    final: Literal["prox", "consistency"] = _setting(
        "unfolded", "prox", "What the last fold ends with; 'consistency' is the paper's equation 11 as printed."
    )
    init: Literal["mode", "adjoint"] = _setting(
        "unfolded", "mode", "Where the iteration starts: the flow's most likely image, or the noisy image."
    )
    mu: float = _setting("unfolded", 0.5, "Start value of the step sizes.")
    lam: float = _setting("unfolded", 0.05, "Start value of the shrinkage.")

    prior_checkpoint: str | None = _setting(
        "prior",
        None,
        "A Glow saved with save_pretrained, or the prior of an earlier run; "
        "skips pre-training and the flow settings above.",
    )
    prior_noise: float = _setting(
        "prior", 0.0, "Pre-train on images with Gaussian noise of random sigma up to this added."
    )
    prior_lr: float = _setting("prior", 1e-4, "Learning rate of the pre-training (Adam).")
    prior_steps: int | None = _setting("prior", None, "Pre-training stops after so many steps at the latest.")
    prior_seconds: float | None = _setting("prior", None, "Pre-training stops after so many seconds at the latest.")

    sigma: float = _setting("training", 0.2, "Standard deviation of the noise to train for, on pixels in [0, 1].")
    sigma_max: float | None = _setting(
        "training", None, "Train for a range: each image's noise level is drawn between sigma and this."
    )
    lr: float = _setting("training", 1e-5, "Learning rate of the flow weights (Adam).")
    lr_steps: float = _setting("training", 1e-2, "Learning rate of the step sizes mu and the shrinkage lambda.")
    schedule: Literal["constant", "cosine"] = _setting(
        "training",
        "constant",
        "Learning rates stay, or fall to 0 along a cosine over the steps or seconds given, whichever run out first.",
    )
    warmup: int = _setting("training", 0, "Steps over which learning rates rise from 0, in both stages.")
    steps: int | None = _setting("training", None, "End-to-end training stops after so many steps at the latest.")
    seconds: float | None = _setting("training", None, "End-to-end training stops after so many seconds at the latest.")
    batch: int = _setting("training", 16, "Images per step.")
    patience: int = _setting("training", 5, "Either stage stops after so many epochs without a better validation loss.")
    clip: float | None = _setting("training", None, "Gradients are scaled down to this norm.")
    seed: int = _setting("training", 0, "Seed of weights, crops, flips and noise.")

    eval_sigmas: list[float] = _setting("evaluation", (0.10, 0.15, 0.20, 0.25), "Noise levels to evaluate at.")
    figure_images: int = _setting("evaluation", 4, "Test images shown in denoised.png.")

    out: str | None = _setting("run", None, "Run folder (default: runs/unfolded-NNN, the next free number).")
    resume: bool = _setting("run", False, "Continue the interrupted run in --out, or the latest in runs/.")

    def __post_init__(self):
        self.eval_sigmas = [float(s) for s in self.eval_sigmas]
        eval_size = self.eval_size or self.size
        for name, value in (("size", self.size), ("eval_size", eval_size)):
            if value < 1 or value % 2**self.levels:
                raise ValueError(f"{name} must be a positive multiple of 2^levels = {2**self.levels}, got {value}")
        for name in ("batch", "folds", "levels", "hidden", "patience", "figure_images"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        limits = ("steps", "seconds", "prior_steps", "prior_seconds", "clip")
        for name in ("epoch_images", "val_images", "test_images", *limits):
            value = getattr(self, name)
            _require(name, value, value is None or value > 0, "positive")
        for name in ("lr", "lr_steps", "prior_lr", "sigma", "lam", "alpha"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        if self.sigma_max is not None and self.sigma_max < self.sigma:
            raise ValueError(f"sigma_max must be at least sigma = {self.sigma}, got {self.sigma_max}")
        for name in ("prior_noise", "warmup", "workers"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        sigmas = self.eval_sigmas
        _require("eval_sigmas", sigmas, sigmas and min(sigmas) > 0, "one or more positive numbers")

        prior_ends = self.prior_checkpoint or self.prior_steps or self.prior_seconds
        if self.schedule == "cosine" and not (prior_ends and (self.steps or self.seconds)):
            raise ValueError("schedule='cosine' needs steps or seconds, and prior_steps or prior_seconds")

    def trained_at(self) -> str:
        """The noise levels of training, for people."""
        return f"{self.sigma:.2f}" if self.sigma_max is None else f"{self.sigma:.2f} to {self.sigma_max:.2f}"

    def of_run(self) -> dict:
        """The settings that define a run: all but those that say where it is."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "resume")}

    def flow(self) -> dict:
        """What the flow is, as keyword arguments of `flowkern.Glow`."""
        return {name: getattr(self, name) for name in FLOW}

    def execution(self) -> dict:
        """How the flow runs, as keyword arguments of `flowkern.Glow`."""
        dtype = self.compute_dtype and getattr(torch, self.compute_dtype)
        return {name: getattr(self, name) for name in ("memory", "anchor_every", "backend")} | {"compute_dtype": dtype}


def _require(name: str, value, holds, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {value}")


def parser(preset: str) -> jsonargparse.ArgumentParser:
    """The command line: an option per field of `Config`, over the settings of --config, over the preset's."""
    result = jsonargparse.ArgumentParser(
        prog="python -m train.unfolded",
        default_config_files=[str(PRESETS / f"{preset}.yaml")],
        description="Train a deep-unfolded denoiser with a Glow prior (Wei et al.), evaluate it beside total "
        "variation, and write a run folder with the table, figures, metrics and checkpoints.",
    )
    result.add_argument(
        "--preset", type=str, default=preset, help=f"Named settings to start from: {', '.join(presets())}."
    )
    result.add_argument("--config", action="config", help="YAML file of settings, over the preset's.")
    groups = {}
    for f in fields(Config):
        group = f.metadata["group"]
        groups.setdefault(group, result.add_argument_group(group))
        option = "--" + f.name.replace("_", "-")
        if f.type is bool and f.default is False:
            groups[group].add_argument(option, action="store_true", help=f.metadata["help"])
        else:
            default = list(f.default) if isinstance(f.default, tuple) else f.default
            groups[group].add_argument(option, type=f.type, default=default, help=f.metadata["help"])
    return result


def presets() -> list[str]:
    """The names of the presets that come with the command."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def parse(arguments: list[str] | None = None) -> Config:
    """The configuration that a command line asks for. Exits with a message on unknown options and values."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="demo")
    preset = early.parse_known_args(arguments)[0].preset
    if preset not in presets():
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(presets())}")
    values = parser(preset).parse_args(arguments)
    return Config(**{f.name: values[f.name] for f in fields(Config)})


def save(config: Config, path: Path) -> None:
    """Write the settings as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
