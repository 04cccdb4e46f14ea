"""A run from its settings to its folder: prepare everything that can fail, then train, evaluate and report."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flowkern import Glow, GlowProx, Unfolded
from train import data, evaluation, figures, report
from train import folder as folders
from train.budget import Budget
from train.config import FLOW, Config
from train.data import Data
from train.fitting import discard_state, fit
from train.folder import Folder
from train.stages import PriorStage, UnfoldedStage


def prepare(config: Config) -> "Run":
    """Check all that can be checked before training, then make the run's folder.

    Raises OSError, ValueError, TypeError or RuntimeError with one sentence: settings, folder, pictures or prior.
    """
    torch.manual_seed(config.seed)
    if config.prior_checkpoint:
        prior = _load_prior(Path(config.prior_checkpoint), config)
        config = replace(config, **{name: prior.config[name] for name in FLOW})
    else:
        size = (3, config.size, config.size)
        prior = Glow(size, **config.flow(), shift=0.5, **config.execution())
    folder = folders.choose(config)
    pictures = data.prepare(config)
    folders.create(folder, config)
    return Run(config, folder, pictures, prior, report.commit())


@dataclass
class Run:
    """A run that is ready to start or to continue. commit: of the code that it starts with."""

    config: Config
    folder: Folder
    data: Data
    prior: Glow
    commit: str | None

    def train(self) -> Path:
        """The stages that are not complete yet, then evaluation and report. Returns the run's folder.

        Raises FloatingPointError when a loss is no longer finite.
        """
        start = time.monotonic()
        print(f"{self.data.describe()}\nrun folder: {self.folder.path}", flush=True)
        net = self._unfolded(self._prior())
        levels = evaluation.evaluate(net, self.data, self.config)
        report.write(self.folder, levels, self.config, self.data.describe(), net, self.commit)
        figures.denoised(self.folder.denoised, levels)
        figures.curves(self.folder.curves, self.folder.metrics)
        report.show(levels, self.config)
        print(f"{(time.monotonic() - start) / 60:.1f} minutes; results in {self.folder.path}")
        return self.folder.path

    def _prior(self) -> Glow:
        config, folder = self.config, self.folder
        if folder.is_complete("prior"):
            return Glow.from_pretrained(folder.model("prior"), **config.execution())
        if not config.prior_checkpoint:
            fit(PriorStage(self.prior, config, Budget(config.prior_steps, config.prior_seconds)), self.data, folder)
        self.prior.save_pretrained(folder.model("prior"))
        discard_state("prior", folder)
        return self.prior

    def _unfolded(self, prior: Glow) -> Unfolded:
        config, folder = self.config, self.folder
        if folder.is_complete("unfolded"):
            return Unfolded.from_pretrained(folder.model("unfolded"), **config.execution())
        prox = GlowProx(prior, config.lam)
        net = Unfolded(prox, config.folds, init=config.init, final=config.final, mu=config.mu)
        fit(UnfoldedStage(net, config, Budget(config.steps, config.seconds)), self.data, folder)
        net.save_pretrained(folder.model("unfolded"))
        discard_state("unfolded", folder)
        return net


def _load_prior(path: Path, config: Config) -> Glow:
    """The Glow in `path`: a saved Glow, or the prior of a run's folder."""
    inside = path / "checkpoints" / "prior"
    prior = Glow.from_pretrained(inside if inside.is_dir() else path, **config.execution())
    if prior.size[0] != 3:
        raise ValueError(f"the prior in {path} is for images of {prior.size[0]} channels; training wants 3")
    return prior
