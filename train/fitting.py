"""One stage of training under Lightning: budget, early stopping, checkpoints, resume."""

import logging
import sys
import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from train.callbacks import ProgressBar, Recorder
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
    # The state of an epoch is complete only after its validation, so that is when both checkpoints are taken.
    best = ModelCheckpoint(
        folder.checkpoints,
        f"{name}-best",
        monitor="val_loss",
        save_weights_only=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    last = ModelCheckpoint(
        folder.checkpoints, f"{name}-last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    stop = EarlyStopping("val_loss", patience=config.patience, check_on_train_epoch_end=False)
    bar = sys.stderr.isatty()
    watch = [Recorder(folder.metrics, echo=not bar), DriftWatch(data.val), *([ProgressBar()] if bar else [])]
    trainer = L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_epochs=-1,
        gradient_clip_val=config.clip,
        callbacks=[stage.budget, *watch, stop, best, last],
        enable_progress_bar=bar,
        enable_model_summary=False,
        logger=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder.path,
    )
    state = folder.last(name)
    try:
        trainer.fit(
            stage,
            training_loader(data, config),
            validation_loader(data, config),
            ckpt_path=state if state.exists() else None,
            weights_only=True,
        )
    except SystemExit:  # how Lightning ends on Ctrl-C
        print(f"interrupted: the same command with --resume --out {folder.path} continues", file=sys.stderr)
        raise
    stage.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])


def discard_state(name: str, folder: Folder) -> None:
    """Remove the training state of a stage whose model is saved."""
    for path in (folder.last(name), folder.checkpoints / f"{name}-best.ckpt"):
        path.unlink(missing_ok=True)


def _quieten() -> None:
    """Leave out Lightning's remarks that a user can do nothing about."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)`.*")
