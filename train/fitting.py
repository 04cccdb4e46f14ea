"""One stage of training under Lightning: budget, early stopping, checkpoints, resume."""

import logging
import sys
import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn

from train.budget import Budget
from train.callbacks import ProgressBar, Recorder
from train.config import Config
from train.data import Data, training_loader, validation_loader
from train.folder import Folder
from train.stages import PriorStage, UnfoldedStage


def fit(kind: type[PriorStage] | type[UnfoldedStage], model: nn.Module, config: Config, data: Data, folder: Folder,
        steps: int | None, seconds: float | None, extra: tuple[Callback, ...] = ()) -> None:
    """Train `model` in place and leave it with the weights of its best validation loss.

    Continues from the folder's training state if there is one, and removes it when the stage is complete. steps,
    seconds: the stage's limits. extra: further callbacks.
    """
    _quieten()
    budget = Budget(steps, seconds)
    name = kind.name
    # The state of an epoch is complete only after its validation, so that is when both checkpoints are taken.
    best = ModelCheckpoint(folder.checkpoints, f"{name}-best", monitor="val_loss", save_weights_only=True,
                           save_on_train_epoch_end=True, enable_version_counter=False)
    last = ModelCheckpoint(folder.checkpoints, f"{name}-last", save_on_train_epoch_end=True, enable_version_counter=False)
    bar = sys.stderr.isatty()
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_epochs=-1, gradient_clip_val=config.clip, logger=False, num_sanity_val_steps=0,
        enable_model_summary=False, enable_progress_bar=bar, use_distributed_sampler=False, default_root_dir=folder.path,
        callbacks=[budget, Recorder(folder.metrics, name, budget, echo=not bar), *([ProgressBar()] if bar else []), *extra,
                   EarlyStopping("val_loss", patience=config.patience, check_on_train_epoch_end=False), best, last])
    state = folder.last(name)
    trainer.fit(kind(model, config, budget), training_loader(data, config), validation_loader(data, config),
                ckpt_path=state if state.exists() else None, weights_only=True)
    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})


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
