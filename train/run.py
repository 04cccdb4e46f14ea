"""A run from its settings to its folder: prepare everything that can fail, then train, evaluate and report."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flowkern import Glow, GlowProx, Unfolded
from train import data, evaluation, figures, report
from train import folder as folders
from train.config import Config
from train.data import Data
from train.fitting import discard_state, fit
from train.folder import Folder
from train.stages import PriorStage, UnfoldedStage

# The settings that a given prior decides.
OF_PRIOR = ("levels", "depth", "hidden", "coupling", "scale", "split_prior")


def prepare(config: Config) -> "Run":
    """Check all that can be checked before training, then make the run's folder.

    Raises OSError, ValueError, TypeError or RuntimeError with one sentence: settings, folder, pictures or prior.
    """
    torch.manual_seed(config.seed)
    if config.prior_checkpoint:
        prior = _load_prior(Path(config.prior_checkpoint), config)
        config = replace(config, **{name: prior.config[name] for name in OF_PRIOR})
    else:
        prior = Glow((3, config.size, config.size), config.levels, config.depth, config.hidden, coupling=config.coupling,
                     scale=config.scale, split_prior=config.split_prior, shift=0.5, **_options(config))
    folder = folders.choose(config)
    pictures = data.prepare(config)
    folders.create(folder, config)
    return Run(config, folder, pictures, prior)


@dataclass
class Run:
    """A run that is ready to start or to continue."""

    config: Config
    folder: Folder
    data: Data
    prior: Glow

    def train(self) -> Path:
        """The stages that are not complete yet, then evaluation and report. Returns the run's folder.

        Raises FloatingPointError when a loss is no longer finite.
        """
        start = time.monotonic()
        print(f"{self.data.describe()}\nrun folder: {self.folder.path}", flush=True)
        net = self._unfolded(self._prior())
        levels = evaluation.evaluate(net.eval(), self.data.val, self.data.test, self.config.eval_sigmas, self.config.batch,
                                     self.config.figure_images)
        report.write(self.folder, levels, self.config, self.data.describe(), net)
        figures.denoised(self.folder.denoised, levels)
        figures.curves(self.folder.curves, self.folder.metrics)
        report.show(levels, self.config)
        print(f"{(time.monotonic() - start) / 60:.1f} minutes; results in {self.folder.path}")
        return self.folder.path

    def _prior(self) -> Glow:
        if self.folder.is_complete("prior"):
            return Glow.from_pretrained(self.folder.model("prior"), **_options(self.config))
        if not self.config.prior_checkpoint:
            fit(PriorStage, self.prior, self.config, self.data, self.folder, self.config.prior_steps, self.config.prior_seconds)
        self.prior.save_pretrained(self.folder.model("prior"))
        discard_state("prior", self.folder)
        return self.prior

    def _unfolded(self, prior: Glow) -> Unfolded:
        if self.folder.is_complete("unfolded"):
            return Unfolded.from_pretrained(self.folder.model("unfolded"), **_options(self.config))
        net = Unfolded(GlowProx(prior, self.config.lam), self.config.folds, init=self.config.init, final=self.config.final,
                       mu=self.config.mu)
        fit(UnfoldedStage, net, self.config, self.data, self.folder, self.config.steps, self.config.seconds)
        net.save_pretrained(self.folder.model("unfolded"))
        discard_state("unfolded", self.folder)
        return net


def _options(config: Config) -> dict:
    """How a Glow runs, as opposed to what it is."""
    return {"memory": config.memory, "anchor_every": config.anchor_every, "backend": config.backend,
            "compute_dtype": config.compute_dtype and getattr(torch, config.compute_dtype)}


def _load_prior(path: Path, config: Config) -> Glow:
    """The Glow in `path`: a saved Glow, or the prior of a run's folder."""
    inside = path / "checkpoints" / "prior"
    prior = Glow.from_pretrained(inside if inside.is_dir() else path, **_options(config))
    if prior.size[0] != 3:
        raise ValueError(f"the prior in {path} is for images of {prior.size[0]} channels; training wants 3")
    return prior
