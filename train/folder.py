"""The folder of a run: where it is, what it holds, and when it may be continued."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import yaml

from train import config as configuration
from train.config import Config

ROOT = Path("runs")


@dataclass(frozen=True)
class Folder:
    """Paths inside a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def table(self) -> Path:
        return self.path / "table.md"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def denoised(self) -> Path:
        return self.path / "denoised.png"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def model(self, stage: str) -> Path:
        """The model that a finished stage leaves, in the form of `save_pretrained`."""
        return self.checkpoints / stage

    def is_complete(self, stage: str) -> bool:
        """Whether the stage has left its model. The configuration is what is written last."""
        return (self.model(stage) / "config.json").is_file()

    def last(self, stage: str) -> Path:
        """The training state that an unfinished stage continues from."""
        return self.checkpoints / f"{stage}-last.ckpt"


def choose(config: Config) -> Folder:
    """The folder for this run: a new one, or with `resume` the interrupted one. Nothing is written yet.

    Raises FileExistsError for a folder that is in use, FileNotFoundError or ValueError for one that can't be continued.
    """
    if not config.resume:
        path = Path(config.out) if config.out else ROOT / f"unfolded-{_latest()[0] + 1:03d}"
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is not empty: pass --resume to continue it, or another --out")
        return Folder(path)
    path = Path(config.out) if config.out else _latest()[1]
    if path is None or not (path / "config.yaml").is_file():
        raise FileNotFoundError(f"nothing to resume: {path or ROOT} holds no run")
    folder = Folder(path)
    before, now = yaml.safe_load(folder.config.read_text()), config.of_run()
    differing = [f"{k} was {before.get(k)!r} and is now {v!r}" for k, v in now.items() if before.get(k) != v]
    if differing:
        raise ValueError(f"{path} was started with other settings: {'; '.join(differing)}")
    for state in sorted(folder.checkpoints.glob("*.ckpt")):
        try:
            torch.load(state, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
            raise ValueError(f"{state} is truncated or not a checkpoint; remove it to start its stage again") from error
    return folder


def create(folder: Folder, config: Config) -> None:
    """Make the folder and write the settings into it."""
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    configuration.save(config, folder.config)


def _latest() -> tuple[int, Path | None]:
    """Number and path of the newest numbered run, (0, None) if there is none."""
    numbered = [
        (int(p.name.removeprefix("unfolded-")), p)
        for p in ROOT.glob("unfolded-*")
        if p.name.removeprefix("unfolded-").isdigit()
    ]
    return max(numbered, default=(0, None))
