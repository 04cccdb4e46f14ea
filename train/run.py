"""A run from its settings to its folder: prepare everything that can fail, then train, evaluate and report."""

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from flowkern import Glow, GlowProx, ResNetProx, UNetProx, Unfolded
from flowkern.backend import resolve
from train import baselines, checkpoints, data, evaluation, figures, likelihood, ranks, report
from train import config as configuration
from train import folder as folders
from train.budget import Budget
from train.config import FLOW, STRUCTURE, Config
from train.data import Data
from train.evaluation import Method
from train.fitting import discard_state, fit
from train.folder import Folder
from train.images import Pictures
from train.memory import peak_mib
from train.stages import PriorStage, UnfoldedStage
from train.variational import LeastVariation, MeasuredTotalVariation, Smoothest

T = TypeVar("T")
TITLES = {"glow": "Unfolded Glow", "resnet": "Unfolded ResNet", "unet": "Unfolded U-Net"}


def prepare(config: Config, kind: str = "unfolded", pictures: Pictures | None = None) -> "Run":
    """Check all that can be checked before training, then make the run's folder.

    kind: what its folder is named after. pictures: those of the settings, if they have been read before.
    Raises OSError, ValueError, TypeError or RuntimeError with one sentence: settings, folder, pictures or prior.
    """
    torch.manual_seed(config.seed)
    prior = start = None
    if config.network_checkpoint:
        config, start = _load_start(Path(config.network_checkpoint), config)
    if config.prox == "glow":
        prior = _load_prior(Path(config.prior_checkpoint), config) if config.prior_checkpoint else new_prior(config)
        config = replace(config, **{name: prior.config[name] for name in FLOW})
    folder = folders.choose_for_all(config, kind)
    for stage in ("prior", "unfolded"):
        ranks.from_first(lambda stage=stage: checkpoints.newest(folder.last(stage)))  # raises what can't be continued
    _load_complete(config, folder)
    samples = data.arrange(pictures, config) if pictures else data.prepare(config)
    data.training_loader(samples, config)  # raises what is wrong with the batch
    for begun in {config.prior_checkpoint, config.network_checkpoint} - {None}:
        _warn_of_others(Folder(Path(begun)), config, samples.pictures.listing)
    ranks.from_first(lambda: folders.create(folder, config, samples.pictures.listing))
    return Run(config, folder, samples, prior, start, report.commit())


def _load_complete(config: Config, folder: Folder) -> None:
    """Raise what is wrong with the models of stages that are complete, before anything is done."""
    if folder.is_complete("prior"):
        Glow.from_pretrained(folder.model("prior"), **_execution_here(config))
    if folder.is_complete("unfolded"):
        load_network(config, folder)


def _warn_of_others(source: Folder, config: Config, pictures: dict[str, str]) -> None:
    """Warn where the run that this one starts from held other pictures of the same folder out of its training."""
    before = _settings_in(source)
    if before is None or before.data != config.data:
        return
    try:
        held_out = {split: pictures[split] for split in ("val", "test")}
        folders.check_pictures(source, held_out, "what it was trained on may be among what is tested on now")
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)


@dataclass
class Run:
    """A run that is ready to start or to continue. prior: of a Glow. start: the network whose proxes it starts from.
    commit: of the code that it starts with.
    """

    config: Config
    folder: Folder
    data: Data
    prior: Glow | None
    start: Unfolded | None
    commit: str | None

    def train(self) -> Path:
        """The stages that are not complete yet, then evaluation and report. Returns the run's folder.

        Raises FloatingPointError when a loss is no longer finite, or past all hope.
        """
        return self.holding(lambda: self._do(self.trained_network, self._report))

    def pretrain(self) -> Path:
        """Pre-training alone, then bits per dimension and samples. Returns the run's folder; raises as `train`."""
        return self.holding(lambda: self._do(self.trained_prior, self._report_prior))

    def holding(self, work: Callable[[], T]) -> T:
        """Do work in the folder and let others have it then."""
        try:
            return work()
        finally:
            self.folder.unlock()

    def _do(self, stages: Callable[[], nn.Module], report_on: Callable[[nn.Module], None]) -> Path:
        start = time.monotonic()
        self._say(f"{self.data.describe()}\nrun folder: {self.folder.path}")
        model = stages()
        if ranks.is_first():
            report_on(model)
        self._say(f"{(time.monotonic() - start) / 60:.1f} minutes; results in {self.folder.path}")
        return self.folder.path

    def trained_prior(self) -> Glow:
        """The Glow after pre-training, which is done now if it is not done yet."""
        config, folder = self.config, self.folder
        if folder.is_complete("prior"):
            discard_state("prior", folder)
            return Glow.from_pretrained(folder.model("prior"), **config.execution())
        if not self.prior.is_initialized:
            device = evaluation.device()  # where a backend that was asked for runs
            self.prior.to(device).initialize(data.first_batch(self.data, config)["prior"].to(device))
            self.prior.cpu()
        if config.has_prior_stage:
            fit(PriorStage(self.prior, config, Budget(config.prior_steps, config.prior_seconds)), self.data, folder)
        self._save(self.prior, "prior")
        return self.prior

    def trained_network(self) -> Unfolded:
        """The unfolded network after training, which is done now if it is not done yet."""
        config, folder = self.config, self.folder
        if folder.is_complete("unfolded"):
            discard_state("unfolded", folder)
            return load_network(config, folder)
        prox = self.make_prox()
        operator = config.measurement.operator(config.size)
        names = ("tied", "init", "final", "consistency", "mu", "noise_aware", "kept_images")
        options = {name: getattr(config, name) for name in names}
        # A lambda means what it did where it was learnt.
        level = self.start.sigma_ref if self.start is not None else config.sigma_max or config.sigma
        net = Unfolded(prox, config.folds, operator, sigma_ref=level, **options)
        if self.start is not None:
            net.proxes.load_state_dict(self.start.proxes.state_dict())
        budget, samples = Budget(config.steps, config.seconds), self.data
        fit(UnfoldedStage(net, config, budget, lambda: data.training_loader(samples, config)), samples, folder)
        self._save(net, "unfolded")
        # Compiled, it would be compiled again for every shape of the evaluation, in the time that is measured there.
        return load_network(config, folder) if config.compile else net

    def make_prox(self) -> nn.Module:
        """The prox that training starts from."""
        config = self.config
        if config.prox == "glow":
            return GlowProx(self.trained_prior(), config.lam)
        torch.manual_seed(config.seed)  # so that a continued run starts from the same weights
        if config.prox == "resnet":
            return ResNetProx(3, features=config.resnet_width, blocks=config.resnet_blocks)
        return UNetProx(3, width=config.unet_width)

    def _save(self, model: Glow | Unfolded, stage: str) -> None:
        if ranks.is_first():
            model.save_pretrained(self.folder.model(stage))
            discard_state(stage, self.folder)
        ranks.wait()

    def _report(self, net: Unfolded) -> None:
        config, folder = self.config, self.folder
        figures.curves(folder.curves, folder.metrics, config.loss)
        lam = [prox.lam.item() for prox in net.proxes if hasattr(prox, "lam")]
        steps = {"mu": net.mu.tolist()} if net.rho is None else {"rho": net.rho.tolist()}
        more = {
            "network": steps | {"lambda": lam},
            "training": report.training(folder),
            "config": config.of_run(),
            "commit": self.commit,
        }
        methods = [*references(config, folder), method_of(config, folder, net)]
        compare(methods, self.data, config, folder, more)

    def _report_prior(self, prior: Glow) -> None:
        likelihood.write(prior, self.data, self.config, self.folder, self.commit)

    def _say(self, text: str) -> None:
        if ranks.is_first():
            print(text, flush=True)


def compare(
    methods: list[Method], images: Data, config: Config, folder: Folder, more: dict, against: str = "tv"
) -> None:
    """Evaluate methods on a run's test images, leave table, figure and results in the folder, and print the table.

    more: further results. against: the method over which gains are given.
    """
    shown = config.figure_images
    found = evaluation.evaluate(methods, images.val, images.test, config.eval_sigmas, shown, progress=True)
    if found.measurement.is_identity:
        figures.denoised(folder.denoised, found)
    else:
        figures.reconstructed(folder.reconstructed, found)
    report.write(folder, found, report.protocol(found) | {"data": images.describe()}, more, against)
    report.show(*report.table(found, against), title=report.title(found))


def load_network(config: Config, folder: Folder) -> Unfolded:
    """The trained network of a run. Raises FileNotFoundError or ValueError as `Unfolded.from_pretrained`."""
    options = _execution_here(config) if config.prox == "glow" else {}
    return Unfolded.from_pretrained(folder.model("unfolded"), kept_images=config.kept_images, **options)


def _execution_here(config: Config) -> dict:
    """How the flow of a trained run is evaluated: as it was trained, unless that was on a machine of another kind."""
    options = config.execution()
    try:
        resolve(evaluation.device(), config.backend)
    except RuntimeError:
        options["backend"] = "auto"
    return options


def method_of(config: Config, folder: Folder, net: Unfolded) -> Method:
    """A run's network as a method to evaluate, with what its training took."""
    facts = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "training_minutes": training_seconds(config, folder) / 60,
    }
    try:
        facts["training_mib"] = training_mib(net, config)
    except (RuntimeError, MemoryError):  # trained by more processes than are here, or on another device
        pass
    estimate = evaluation.network(net, data.part(config))
    return Method("unfolded", TITLES[config.prox], estimate, trained_as(config), facts=facts)


def training_seconds(config: Config, folder: Folder) -> float:
    """How long a run's network was trained, what it started from included as far as its run's folder is there."""
    seconds = _seconds("unfolded", folder)
    if config.network_checkpoint:
        source = Folder(Path(config.network_checkpoint))
        before = _settings_in(source)
        return seconds + (training_seconds(before, source) if before else 0)
    return seconds + _prior_seconds(config, folder)


def _settings_in(folder: Folder) -> Config | None:
    """The settings of the run that another one started from; None where there are none, or of another version."""
    try:
        return configuration.load(folder.config)
    except (OSError, ValueError):
        return None


def _prior_seconds(config: Config, folder: Folder) -> float:
    seconds = _seconds("prior", folder)
    if not config.prior_checkpoint:
        return seconds
    source = Folder(Path(config.prior_checkpoint))
    before = _settings_in(source)
    return seconds + (_prior_seconds(before, source) if before else 0)


def _seconds(stage: str, folder: Folder) -> float:
    return report.training(folder).get(stage, {"seconds": 0.0})["seconds"]


def references(config: Config, folder: Folder) -> list[Method]:
    """The methods that a run is compared with; MAP uses the run's pre-trained Glow."""
    found = []
    for name in config.references:
        if name == "tv":
            made = baselines.TotalVariation() if config.measurement.is_identity else MeasuredTotalVariation()
        elif name == "smooth":
            made = Smoothest()
        elif name == "vtv":
            made = LeastVariation()
        elif name == "denoiser":
            made = baselines.reference_denoiser()
        else:
            prior = Glow.from_pretrained(folder.model("prior"), **_execution_here(config))
            made = baselines.MapPrior(prior.to(evaluation.device()))
        found.append(Method(made.key, made.title, made, made.protocol, made.tune))
    return found


def trained_as(config: Config) -> str:
    """How a network was trained, in a sentence for the protocol."""
    limits = [f"{config.steps} steps" if config.steps else "", f"{config.seconds:g} s" if config.seconds else ""]
    ends = " or ".join(limit for limit in limits if limit) or "until validation stops improving"
    prior = ""
    if config.prox == "glow":
        prior = f", {pretrained_as(config)}"
    start = ""
    if config.network_checkpoint:
        before = _settings_in(Folder(Path(config.network_checkpoint)))
        start = f", from a network {_trained_for(before)}" if before else ", from another"
    return (
        f"{config.folds} {'tied' if config.tied else 'untied'} folds {_trained_for(config)}{prior}{start};"
        f" {ends} of {config.batch} images of {config.size}x{config.size}, learning rate {config.lr:g}"
    )


def _trained_for(config: Config) -> str:
    what = "" if config.measurement.is_identity else f"for {config.measurement.describe()} "
    return f"trained {what}at σ = {config.trained_at()}{', which it is told' if config.noise_aware else ''}"


def pretrained_as(config: Config) -> str:
    """How a run's Glow came about, in words; of one from elsewhere, as far as its run's settings are there."""
    if config.prior_checkpoint:
        before = _settings_in(Folder(Path(config.prior_checkpoint)))
        return pretrained_as(before) if before else "with a Glow trained before"
    if not config.pretrain:
        return "not pre-trained"
    images = f"images with noise of sigma up to {config.prior_noise:g}" if config.prior_noise else "clean images"
    return f"pre-trained on {images}"


def training_mib(net: Unfolded, config: Config) -> float:
    """The memory of one training step of this network at its own batch and size, on the GPU if there is one, see
    `memory.peak_mib`.
    """
    device = evaluation.device()
    stage = UnfoldedStage(copy.deepcopy(net), config, Budget(None, None)).to(device).train()
    batch = data.random_batch(config, device)
    low = config.precision == "bf16-mixed"

    def step() -> None:
        stage.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            loss = stage.loss(batch)
        loss.backward()

    with torch.enable_grad():
        if device.type == "cuda":
            step()  # what is allocated once is not a step's
            stage.zero_grad()
        return peak_mib(step, device)


def new_prior(config: Config) -> Glow:
    """A Glow of these settings, untrained. Raises ValueError, TypeError or RuntimeError for what can't be."""
    return Glow((3, config.size, config.size), **config.flow(), shift=0.5, **config.execution())


def _load_prior(path: Path, config: Config) -> Glow:
    """The Glow in `path`: a saved Glow, or the prior of a run's folder."""
    inside = path / "checkpoints" / "prior"
    prior = Glow.from_pretrained(inside if inside.is_dir() else path, **config.execution())
    if prior.size[0] != 3:
        raise ValueError(f"the prior in {path} is for images of {prior.size[0]} channels; training wants 3")
    return prior


def _load_start(path: Path, config: Config) -> tuple[Config, Unfolded]:
    """The network of the run in `path`, and these settings with that run's structure and prior."""
    folder = Folder(path)
    if not folder.config.is_file():
        raise FileNotFoundError(f"{path} is not the folder of a run: it has no {folder.config.name}")
    source = configuration.load(folder.config)
    net = load_network(source, folder)
    given = {name: getattr(source, name) for name in STRUCTURE}
    given["noise_aware"] = source.noise_aware or config.noise_aware
    return replace(config, **given, prior_checkpoint=str(path) if source.prox == "glow" else None), net
