"""Several runs that are compared: each done once, in one folder, continued where an interruption left off."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from train import data, ranks, run
from train import folder as folders
from train.config import Config
from train.data import Data
from train.folder import Folder
from train.run import Run

T = TypeVar("T")


def prepare(settings: Config, kind: str) -> "Campaign":
    """Check the settings, read the pictures, make the campaign's folder. Raises as `run.prepare` does."""
    run.new_prior(settings)  # raises what is wrong with the flow
    folder = folders.choose_for_all(settings, kind)
    images = data.prepare(settings)
    data.training_loader(images, settings)  # and with the batch
    ranks.from_first(lambda: folders.create(folder, settings, images.pictures.listing))
    return Campaign(folder, replace(settings, resume=False), images)


@dataclass
class Campaign:
    """base: the settings that the runs share. images: the pictures that they share."""

    folder: Folder
    base: Config
    images: Data

    def keep(self, work: Callable[[], object]) -> None:
        """Do the work and let others have the folder then."""
        try:
            work()
        finally:
            self.folder.unlock()

    def run(self, name: str, **overrides) -> Run:
        """The run of this name with some settings changed, prepared: new, or as far as it had come."""
        if ranks.is_first():
            print(f"\n{name}", flush=True)
        config = replace(self.base, out=str(self.folder.path / "runs" / name), **overrides)
        return run.prepare(config, pictures=self.images.pictures)

    def prior(self, name: str, **overrides) -> Path:
        """The folder of a run that ends after pre-training."""
        made = self.run(name, **overrides)
        return made.holding(made.trained_prior) and made.folder.path

    def network(self, name: str, **overrides) -> Run:
        """A run, trained but not evaluated."""
        made = self.run(name, **overrides)
        made.holding(made.trained_network)
        return made

    def attempt(self, work: Callable[..., T], name: str, **overrides) -> T | None:
        """`prior` or `network` of a run that may diverge: None if it did, now or before an interruption."""
        failed = self.folder.path / "runs" / name / "failed.txt"
        try:
            if ranks.from_first(failed.is_file):
                raise FloatingPointError(ranks.from_first(failed.read_text))
            return work(name, **overrides)
        except FloatingPointError as error:
            if ranks.is_first():
                failed.write_text(str(error))
                print(f"{name} failed: {error}", flush=True)
            return None
