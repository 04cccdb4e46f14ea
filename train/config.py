"""Every setting of a training run, in one flat dataclass, and the command line made from it."""

import argparse
import math
import sys
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import jsonargparse
import torch
import yaml

from train.measurement import Measurement, MeasurementSettings
from train.options import PHOTOS, add_settings, setting

PRESETS = Path(__file__).parent / "presets"
SMALLEST = 6    # side of an image
FLOW = ("levels", "depth", "hidden", "coupling", "scale", "alpha", "split_prior")
# What the weights of an unfolded network's proxes fit.
STRUCTURE = ("prox", "folds", "tied", "resnet_width", "resnet_blocks", "unet_width", *FLOW)


@dataclass
class Config(MeasurementSettings):
    """The settings of a training run. The defaults are the paper's where it states one."""

    data: str = setting(
        "data",
        PHOTOS,
        "Folder or zip of images; folder or zip with train, val and test inside (or "
        "train.zip, val.zip, test.zip); or 'photos', the photographs that scikit-image installs.",
    )
    size: int = setting("data", 64, "Side of the training images, in pixels; for a Glow a multiple of 2^levels.")
    eval_size: int | None = setting("data", None, "Side of the validation and test images (default: as size).")
    fit: Literal["resize", "crop"] = setting(
        "data",
        "resize",
        "How an image becomes size x size: its centre square resized, or random crops ('photos' is always cropped) at "
        "its own resolution. Before cropping, pictures of more than 1024 pixels a side are reduced to that, and those "
        "smaller than a crop enlarged.",
    )
    augment: Literal["none", "mirror", "all"] = setting(
        "data",
        "mirror",
        "Random changes of training images: left-right mirroring; 'all' also turns them by quarters and permutes the "
        "colour channels, for sets of few pictures without an upright.",
    )
    epoch_images: int | None = setting(
        "data", None, "Training images between two validations; pictures are taken in turn (default: every one once)."
    )
    val_images: int | None = setting("data", None, "Validation images at most (default: all; cropped: 64).")
    test_images: int | None = setting("data", None, "Test images at most (default: all; cropped: 96).")
    workers: int = setting("data", 0, "Processes that load data; 0 loads in the training process.")

    levels: int = setting("flow", 4, "Levels of the Glow.")
    depth: int | list[int] = setting("flow", 32, "Steps of flow per level: one number, or one per level.")
    hidden: int = setting("flow", 512, "Width of the coupling networks.")
    coupling: Literal["affine", "additive"] = setting("flow", "affine", "Kind of coupling.")
    scale: Literal["softclamp", "sigmoid"] = setting(
        "flow", "softclamp", "Scale map of the affine coupling; Glow's sigmoid is unstable when trained end to end."
    )
    alpha: float = setting(
        "flow", 1.0, "Bound of the softclamped log-scale; smaller is steadier where learning rates are large."
    )
    split_prior: Literal["standard", "learned"] = setting("flow", "standard", "Prior of the halves that levels emit.")
    memory: Literal["recompute", "store", "checkpoint"] = setting(
        "flow", "recompute", "What backward does about activations."
    )
    anchor_every: int | None = setting(
        "flow", None, "Keep an exact state every so many steps of flow, to bound the drift."
    )
    backend: str = setting("flow", "auto", "Which implementation of the pixel ops runs.")
    compute_dtype: Literal["float32", "bfloat16"] | None = setting(
        "flow", None, "Precision of the coupling networks (default: that of --precision)."
    )

    prox: Literal["glow", "resnet", "unet"] = setting(
        "unfolded", "glow", "The proximal map: a Glow (Wei et al.), a ResNet (Mardani et al.), a U-Net (Ronneberger)."
    )
    folds: int = setting("unfolded", 4, "Folds K of the unfolded network.")
    tied: bool = setting(
        "unfolded", False, "All folds share the weights of one prox; mu, lambda and batch norm stay each fold's own."
    )
    final: Literal["prox", "consistency"] = setting(
        "unfolded", "prox", "What the last fold ends with; 'consistency' is the paper's equation 11 as printed."
    )
    init: Literal["mode", "adjoint", "smooth", "tv"] | None = setting(
        "unfolded",
        None,
        "Where the iteration starts: the flow's most likely image, the noisy image (of another measurement A^T y), "
        "the smoothest image or that of least total variation that fits the measurement (default: mode for a "
        "Glow, adjoint for the others).",
    )
    consistency: Literal["gradient", "exact"] = setting(
        "unfolded",
        "gradient",
        "How folds are drawn to the measurement: by a gradient step of learnt size mu, or by the exact solution of a "
        "least-squares problem of learnt weight rho.",
    )
    mu: float | None = setting(
        "unfolded", None, "Start value of the step sizes (default: 0.5 / |A|^2, which for denoising is 0.5)."
    )
    lam: float = setting(
        "unfolded", 0.05, "Start value of the shrinkage; a network that starts from another's proxes keeps theirs."
    )
    noise_aware: bool = setting(
        "unfolded",
        False,
        "The network is told the noise level of each image and scales its lambdas, those of a Glow, by its square; "
        "--lam is lambda at the largest level. For one network that serves a range.",
    )
    kept_images: int | None = setting(
        "unfolded",
        None,
        "Keep so many of the images between folds, and compute the rest again in backward: memory that does not grow "
        "with the folds, for more time (default: keep all).",
    )
    resnet_width: int = setting("unfolded", 128, "Maps of the ResNet.")
    resnet_blocks: int = setting("unfolded", 2, "Residual blocks of the ResNet.")
    unet_width: int = setting("unfolded", 64, "Maps of the U-Net at full resolution.")

    prior_checkpoint: str | None = setting(
        "start",
        None,
        "A Glow saved with save_pretrained, or the prior of an earlier run; "
        "skips pre-training and takes the place of the flow settings above.",
    )
    network_checkpoint: str | None = setting(
        "start",
        None,
        "The folder of an earlier run, for whatever measurement, a denoiser say: training starts from its proxes, not "
        "from new ones. Its prior, and its settings of flow, prox and folds, take the place of those above.",
    )
    pretrain: bool = setting("start", True, "Pre-train the Glow; otherwise its ActNorms are initialised, no more.")

    bits: Literal[5, 8] = setting("prior", 8, "Bits per channel that pixels are quantised to before dequantisation.")
    prior_noise: float = setting(
        "prior", 0.0, "Pre-train on images with Gaussian noise of random sigma up to this added."
    )
    prior_lr: float = setting("prior", 1e-4, "Learning rate of the pre-training (Adam).")
    prior_steps: int | None = setting("prior", None, "Pre-training stops after so many steps at the latest.")
    prior_seconds: float | None = setting("prior", None, "Pre-training stops after so many seconds at the latest.")

    sigma: float = setting(
        "denoising", 0.2, "Standard deviation of the noise on the measurement to train for, for pixels in [0, 1]."
    )
    sigma_max: float | None = setting(
        "denoising", None, "Train for a range: each image's noise level is drawn between sigma and this."
    )
    loss: Literal["mse", "psnr"] = setting(
        "denoising",
        "mse",
        "What is minimised: the mean squared error, as in the paper; or minus the mean of the images' PSNR in dB, as "
        "tables score, in which an image that is easy counts as much as one that is hard.",
    )
    likelihood: float = setting(
        "denoising",
        0.0,
        "Weight, beside the loss, of the negative log-likelihood (nats per number) of each fold's image "
        "under its flow. It holds the latents' scale, which the error leaves free; without it (0, as in the paper) "
        "learning rates must be far smaller.",
    )
    lr: float = setting("denoising", 1e-5, "Learning rate of the proxes' weights (Adam).")
    lr_steps: float = setting("denoising", 1e-2, "Learning rate of the step sizes mu and the shrinkage lambda.")
    steps: int | None = setting("denoising", None, "End-to-end training stops after so many steps at the latest.")
    seconds: float | None = setting(
        "denoising", None, "End-to-end training stops after so many seconds at the latest."
    )

    batch: int = setting("training", 16, "Images per step, over all processes.")
    accumulate: int = setting("training", 1, "Work through each batch in so many parts, to fit in memory.")
    schedule: Literal["constant", "cosine"] = setting(
        "training",
        "constant",
        "Learning rates stay, or fall to 0 along a cosine over the steps or seconds given, whichever run out first.",
    )
    warmup: int = setting("training", 0, "Steps over which learning rates rise from 0, in both stages.")
    patience: int = setting("training", 5, "A stage stops after so many validations without a better loss.")
    clip: float | None = setting("training", None, "Gradients are scaled down to this norm.")
    ema: float | None = setting(
        "training", None, "Validate and keep an exponential moving average of the weights with this decay, e.g. 0.999."
    )
    precision: Literal["32", "bf16-mixed"] = setting(
        "training", "32", "Of the networks; a flow's state stays in 32 bits either way."
    )
    compile: bool = setting("training", False, "Run the network through torch.compile.")
    cuda_graphs: bool = setting(
        "training",
        True,
        "Replay a Glow's steps from CUDA graphs, where that is possible: on one GPU, in whole batches.",
    )
    checkpoint_steps: int | None = setting(
        "training", None, "Save the state of training every so many steps, beside once an epoch."
    )
    tensorboard: bool = setting("training", True, "Write event files for TensorBoard into the run's folder.")
    seed: int = setting("training", 0, "Seed of weights, crops, flips and noise.")

    references: list[Literal["tv", "vtv", "smooth", "denoiser", "map"]] = setting(
        "evaluation",
        ("tv",),
        "Methods to compare with: total variation of each channel; of all together; the smoothest image that fits the "
        "measurement; BM3D where installed, else non-local means, for denoising alone; the MAP estimate in the latent "
        "space of the pre-trained Glow.",
    )
    eval_sigmas: list[float] = setting("evaluation", (0.10, 0.15, 0.20, 0.25), "Noise levels to evaluate at.")
    figure_images: int = setting("evaluation", 4, "Test images shown in the figure.")

    trial_lrs: list[float] | None = setting(
        "comparison",
        None,
        "Learning rates tried with every prox; the one with the best validation loss is used. A single one: no trials "
        "(default: --lr).",
    )
    trial_steps: int | None = setting("comparison", None, "Steps of a trial (default: those of a run).")
    seeds: list[int] = setting("comparison", (0,), "Everything is trained from scratch with each of these seeds.")
    figure_sigmas: list[float] = setting("comparison", (0.20, 0.25), "Noise levels of the figure.")

    denoise_steps: int | None = setting(
        "problems",
        None,
        "Each kind of prox is first trained in so many steps to denoise at the same sigma, once, and all problems "
        "start from there (null: they start from the prior).",
    )
    denoise_size: int | None = setting(
        "problems",
        None,
        "The Glow learns to denoise on crops of this side, as many pixels a step as otherwise (default: as size). A "
        "U-Net learns from whole images, as small crops make it worse.",
    )
    denoise_lr: float | None = setting("problems", None, "Learning rate of the Glow's denoiser (default: --lr).")
    denoise_lam: float | None = setting(
        "problems", None, "Start value of the denoiser's shrinkage, with which its problems go on (default: --lam)."
    )
    unet_lr: float | None = setting("problems", None, "Learning rate of the U-Net's weights (default: that of --lr).")

    out: str | None = setting("run", None, "The run's folder (default: the next free number in runs/).")
    resume: bool = setting("run", False, "Continue the latest run of this command in runs/, or the one in --out.")

    def __post_init__(self):
        if self.data != PHOTOS:
            path = str(Path(self.data))  # the same folder with a slash at its end
            self.data = path if path != PHOTOS else f"./{PHOTOS}"  # and this one is no folder's name
        for name in ("eval_sigmas", "figure_sigmas", "trial_lrs"):
            if getattr(self, name) is None:
                continue
            values = [float(value) for value in getattr(self, name)]
            fine = values and all(0 < value < math.inf for value in values)
            _require(name, values, fine, "one or more positive numbers")
            setattr(self, name, values)
        self.references, self.seeds = list(self.references), list(self.seeds)
        unit = 2**self.levels if self.prox == "glow" else 1
        for name, value in (("size", self.size), ("eval_size", self.eval_size or self.size)):
            if value < 1 or value % unit:
                raise ValueError(f"{name} must be a positive multiple of 2^levels = {unit}, got {value}")
            _require(name, value, value >= SMALLEST, f"at least {SMALLEST}, as SSIM wants it")
        widths = ("resnet_width", "resnet_blocks", "unet_width")
        for name in ("batch", "folds", "levels", "hidden", "patience", "figure_images", "accumulate", *widths):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        limits = ("steps", "seconds", "prior_steps", "prior_seconds", "clip", "checkpoint_steps", "trial_steps")
        limits += ("denoise_steps", "denoise_size", "denoise_lr", "denoise_lam", "unet_lr")
        for name in ("epoch_images", "val_images", "test_images", *limits):
            value = getattr(self, name)
            _require(name, value, value is None or value > 0, "positive")
        for name in ("lr", "lr_steps", "prior_lr", "sigma", "lam", "alpha"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        if self.sigma_max is not None and self.sigma_max < self.sigma:
            raise ValueError(f"sigma_max must be at least sigma = {self.sigma}, got {self.sigma_max}")
        if self.prox == "unet" and min(self.size, self.eval_size or self.size) < 16:
            raise ValueError(f"a U-Net wants size and eval_size of at least 16, got {self.size}, {self.eval_size}")
        _require("mu", self.mu, self.mu is None or math.isfinite(self.mu), "a finite number")
        measurement = self.measurement
        for side in (self.size, self.eval_size or self.size):
            measurement.check_side(side)
        if self.consistency == "exact" and self.mu is not None:
            raise ValueError(f"consistency='exact' learns rho and has no step size mu, got mu = {self.mu}")
        if self.consistency == "exact" and not measurement.has_inverse:
            raise ValueError(f"consistency='exact' needs an exact inverse; {measurement.describe()} has none")
        if "denoiser" in self.references and not measurement.is_identity:
            raise ValueError(f"the reference 'denoiser' only denoises; the operator is {measurement.kind!r}")
        for name in ("prior_noise", "likelihood", "warmup", "workers", "seed"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _require("seed", self.seed, self.seed < 2**63, "less than 2^63")
        _require("ema", self.ema, self.ema is None or 0 < self.ema < 1, "between 0 and 1")
        differ = self.seeds and len(set(self.seeds)) == len(self.seeds)
        _require("seeds", self.seeds, differ and min(self.seeds) >= 0, "different numbers, 0 or more")
        if self.noise_aware and self.prox != "glow":
            raise ValueError(f"noise_aware scales the lambda of a Glow; prox is {self.prox!r}")
        _require("kept_images", self.kept_images, self.kept_images is None or self.kept_images >= 1, "1 or more")
        if self.init == "mode" and self.prox != "glow":
            raise ValueError(f"init='mode' needs the most likely image of a Glow; prox is {self.prox!r}")
        if "map" in self.references and self.prox != "glow":
            raise ValueError(f"the reference 'map' needs a run with a Glow; prox is {self.prox!r}")

    def check_schedule(self, *stages: str) -> None:
        """Raise ValueError if the schedule needs a limit that a stage ("prior", "unfolded") does not have; warn where
        one ends before its learning rates have risen.
        """
        limits = {"prior": ("prior_steps", "prior_seconds"), "unfolded": ("steps", "seconds")}
        for stage in stages:
            if self.schedule == "cosine" and not any(getattr(self, name) for name in limits[stage]):
                raise ValueError(f"schedule='cosine' needs {' or '.join(limits[stage])}")
            steps = getattr(self, limits[stage][0])
            if steps and steps <= self.warmup:
                warnings.warn(
                    f"{limits[stage][0]} = {steps} end within the warm-up of {self.warmup} steps, before learning "
                    f"rates have risen to what they are set to",
                    stacklevel=2,
                )

    @property
    def measurement(self) -> Measurement:
        """What is measured. Raises ValueError as `Measurement.of`."""
        return Measurement.of(self)

    @property
    def has_prior_stage(self) -> bool:
        """Whether a Glow is pre-trained before end-to-end training."""
        return self.prox == "glow" and self.pretrain and not (self.prior_checkpoint or self.network_checkpoint)

    def trained_at(self) -> str:
        """The noise levels of training, for people."""
        return " to ".join(noise(sigma) for sigma in (self.sigma, self.sigma_max) if sigma is not None)

    def of_run(self) -> dict:
        """The settings that define a run: all but those that say where it is."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "resume")}

    def flow(self) -> dict:
        """What the flow is, as keyword arguments of `flowkern.Glow`."""
        return {name: getattr(self, name) for name in FLOW}

    def execution(self) -> dict:
        """How the flow runs, as keyword arguments of `flowkern.Glow`."""
        dtype = self.compute_dtype and getattr(torch, self.compute_dtype)
        options = {name: getattr(self, name) for name in ("memory", "anchor_every", "backend")}
        # What diverges has to reach the loss, where it is recognised as that.
        return options | {"compute_dtype": dtype, "check_finite": False}


def noise(sigma: float) -> str:
    """A noise level for people: two decimals, or as many as it has."""
    return f"{sigma:.2f}" if math.isclose(sigma, round(sigma, 2)) else f"{sigma:.6g}"


def _require(name: str, value, holds, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {value}")


@dataclass(frozen=True)
class Command:
    """A command that trains: its name after `python -m train.`, what it does, the groups of settings it ignores,
    the preset that it starts from by default, and whether it starts from a Glow, so that --prox is not for the user.
    """

    name: str
    description: str
    hidden: tuple[str, ...] = ("comparison", "problems")
    preset: str = "demo"
    glow: bool = False

    def parser(self, preset: str) -> jsonargparse.ArgumentParser:
        """The command line: an option per setting, over the settings of --config, over the preset's."""
        result = jsonargparse.ArgumentParser(
            prog=f"python -m train.{self.name}",
            default_config_files=[str(PRESETS / f"{preset}.yaml")],
            allow_abbrev=False,  # what is unused is told by whole words
            description=self.description,
        )
        result.add_argument(
            "--preset", type=str, default=preset, help=f"Named settings to start from: {', '.join(presets())}."
        )
        result.add_argument("--config", action="config", help="YAML file of settings, over the preset's.")
        add_settings(result, Config, (*self.hidden, "prox") if self.glow else self.hidden)
        return result

    def parse(self, arguments: list[str] | None = None) -> Config:
        """The settings that a command line asks for. Exits with a message on unknown options and values."""
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--preset", default=self.preset)
        preset = early.parse_known_args(arguments)[0].preset
        if preset not in presets():
            raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(presets())}")
        values = self.parser(preset).parse_args(arguments)
        if values["preset"] != preset:
            raise ValueError(f"a preset is chosen on the command line, --preset {values['preset']}, not in --config")
        words = {word.split("=")[0] for word in (sys.argv[1:] if arguments is None else arguments)}
        for f in fields(Config):
            option = f.name.replace("_", "-")
            unused = f.name != "prox" and {f.name, f.metadata["group"]} & set(self.hidden)
            if unused and words & {f"--{option}", f"--no-{option}"}:
                raise ValueError(f"train.{self.name} does not use --{option}")
        if self.glow and values["prox"] != "glow":
            raise ValueError(f"train.{self.name} starts from a Glow; --prox {values['prox']} is for train.unfolded")
        return Config(**{f.name: values[f.name] for f in fields(Config)})


def presets() -> list[str]:
    """The names of the presets that come with the commands."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def load(path: Path) -> Config:
    """The settings that `save` wrote, or that another run's folder holds.

    Raises ValueError in one sentence for a file that holds something else.
    """
    try:
        saved = yaml.safe_load(path.read_text())
        return Config(**saved)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{path} does not hold the settings of a run: {str(error).splitlines()[0]}") from error


def save(config: Config, path: Path) -> None:
    """Write the settings as YAML that `--config` reads back, whole or not at all; where the run is, is not in it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(yaml.safe_dump(config.of_run(), sort_keys=False))
    partial.replace(path)
