"""One stage of training under Lightning: budget, early stopping, checkpoints, resume, several processes."""

import logging
import signal
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from train import checkpoints, ranks
from train.batchnorm import SyncAnywhere
from train.callbacks import Events, ProgressBar, Recorder, Termination
from train.data import Data, training_loader, validation_loader
from train.drift import DriftWatch
from train.folder import Folder
from train.stages import PriorStage, UnfoldedStage


def fit(stage: PriorStage | UnfoldedStage, data: Data, folder: Folder) -> None:
    """Train the stage's model in place and leave it with the weights of its best validation loss.

    Continues from the folder's training state of this stage, if there is one.
    """
    _quieten()
    name, config = stage.name, stage.config
    state = ranks.from_first(lambda: checkpoints.newest(folder.last(name)))
    if config.compile:
        stage.model.compile()
    bar = sys.stderr.isatty() and ranks.is_first()
    saving = _saving(name, config, folder)
    trainer = L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=ranks.local_count(),
        num_nodes=ranks.count() // ranks.local_count(),
        strategy="ddp" if ranks.count() > 1 else "auto",
        plugins=_plugins(),
        precision="32-true" if config.precision == "32" else config.precision,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip,
        max_epochs=-1,
        callbacks=[
            stage.budget,
            *([_averaging(config.ema)] if config.ema else []),
            Recorder(folder.metrics, echo=not bar),
            DriftWatch(data.val),
            *([ProgressBar()] if bar else []),
            Patience("val_loss", patience=config.patience, check_on_train_epoch_end=False),
            *saving,
            *([Termination()] if ranks.count() > 1 else []),
        ],
        enable_progress_bar=bar,
        enable_model_summary=False,
        logger=Events(folder.path, "tensorboard", version=name) if config.tensorboard else False,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder.path,
    )
    try:
        trainer.fit(
            stage, training_loader(data, config), validation_loader(data, config), ckpt_path=state, weights_only=True
        )
    except SystemExit as stopped:  # how Lightning ends on Ctrl-C and, by an exception derived from it, on SIGTERM
        if ranks.is_first():
            print(f"interrupted, states are in {folder.path}: the same command continues", file=sys.stderr)
        signalled = signal.SIGTERM if isinstance(stopped, SIGTERMException) else signal.SIGINT
        raise SystemExit(128 + signalled) from stopped  # as shells have it; Lightning's own statuses are 0 and 1
    _keep_best(stage, folder.best(name))


class Patience(EarlyStopping):
    """Also ends a stage that had come to its end when it was interrupted."""

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


def _saving(name: str, config, folder: Folder) -> list[checkpoints.Checkpoint]:
    """The callbacks that save: the best weights, and states."""
    options = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    # With averaged weights, Lightning puts the average only into whole states.
    weights = {"save_weights_only": not config.ema, "monitor": "val_loss"}
    best = checkpoints.Checkpoint(folder.checkpoints, folder.best(name).stem, **weights, **options)
    # The state of an epoch is complete only after its validation, so that is when both checkpoints are taken.
    saving = [best, checkpoints.Checkpoint(folder.checkpoints, f"{name}-last", **options)]
    if config.checkpoint_steps:
        options["save_on_train_epoch_end"] = False
        every = {"every_n_train_steps": config.checkpoint_steps}
        saving.append(checkpoints.StepCheckpoint(folder.checkpoints, f"{name}-last", **every, **options))
    return saving


def _averaging(decay: float) -> EMAWeightAveraging:
    # Buffers are those of the last weights: permutations, signs and indices are integers, and an average of them is
    # wrong. Batch norms' statistics are measured anew anyway.
    return EMAWeightAveraging(_device(), use_buffers=False, decay=decay)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _keep_best(stage: L.LightningModule, path: Path) -> None:
    ranks.wait()
    try:
        stage.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except checkpoints.UNREADABLE as error:
        warnings.warn(f"{path} can't be read ({error}); keeping the last weights, not the best ones", stacklevel=2)


def discard_state(name: str, folder: Folder) -> None:
    """Remove the training state of a stage whose model is saved."""
    checkpoints.discard(folder.last(name))
    folder.best(name).unlink(missing_ok=True)


def _plugins() -> list:
    # Named, because Lightning would take a cluster's scheduler for the launcher although nothing was launched with it.
    environment = TorchElasticEnvironment() if ranks.count() > 1 else LightningEnvironment()
    return [checkpoints.SafeCheckpoints(), environment, *([SyncAnywhere()] if ranks.count() > 1 else [])]


def _quieten() -> None:
    """Leave out Lightning's remarks that a user can do nothing about."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)`.*")
    warnings.filterwarnings("ignore", message=".*is recommended to use.*sync_dist=True.*")
    # A captured step's nodes were made on the stream of the capture.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match.*")
