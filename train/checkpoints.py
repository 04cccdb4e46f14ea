"""Training states on disk: written whole or not at all, and never at the price of the one before."""

import os
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

STATE = "-last.ckpt"
# What torch.load raises for a file that is torn, empty or something else.
UNREADABLE = (RuntimeError, OSError, EOFError, UnpicklingError, KeyError, ValueError)


class SafeCheckpoints(TorchCheckpointIO):
    """Writes beside the target, then renames. A state that is continued from keeps its predecessor.

    A checkpoint that can't be written (a full disk) is warned of and left out: training goes on, and what was there
    before stays.
    """

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name.endswith(STATE) and path.exists():
                path.replace(previous(path))
            partial.replace(path)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            partial.unlink(missing_ok=True)
            warnings.warn(f"{path.name} could not be written ({error}); training goes on without it", stacklevel=2)


class _Movable:
    """Finds its files also in a folder that was moved or renamed since: Lightning remembers absolute paths."""

    def load_state_dict(self, state: dict) -> None:
        def here(path: str) -> str:
            return str(Path(self.dirpath) / Path(path).name) if path else path

        paths = {name: here(state[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        kept = {here(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state | paths | {"dirpath": self.dirpath, "best_k_models": kept})


class Checkpoint(_Movable, ModelCheckpoint):
    """Saves after an epoch, in a folder that may be moved."""

    @property
    def state_key(self) -> str:
        """As Lightning's own, under which earlier versions of this code saved its state."""
        return super().state_key.replace("Checkpoint{", "ModelCheckpoint{", 1)


class StepCheckpoint(_Movable, ModelCheckpoint):
    """Saves within epochs. Not after an epoch's last step: its validation comes first, and then the epoch's own state.

    A state from before that validation would be continued without it. Nor between the parts of a batch, whose gradients
    no state holds: Lightning would there after a continuation, as it has forgotten which step it has saved.
    """

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx: int) -> None:
        between_parts = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if not (trainer.should_stop or trainer.is_last_batch or between_parts):
            super().on_train_batch_end(trainer, stage, outputs, batch, batch_idx)


def previous(state: Path) -> Path:
    """Where the predecessor of a training state lies."""
    return state.with_name(state.name.replace(STATE, "-previous.ckpt"))


def torn(state: Path) -> Path:
    """Where a training state is put that could not be read."""
    return state.with_name(state.name + ".torn")


def newest(state: Path) -> Path | None:
    """The newest training state that can be read: `state`, else its predecessor; None where there is neither.

    Raises ValueError with one sentence if there is something, and none of it can be read.
    """
    found = [path for path in (state, previous(state)) if path.exists()]
    for path in found:
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UNREADABLE:
            continue
        if path != state:
            warnings.warn(f"{state.name} is missing or torn; continuing from {path.name}", stacklevel=2)
            if state.exists():
                state.replace(torn(state))  # as the next one's predecessor it would take the good one's place
        return path
    if found:
        raise ValueError(
            f"{' and '.join(str(path) for path in found)} can't be read; remove them to start their stage again"
        )
    return None


def discard(state: Path) -> None:
    """Remove a training state, its predecessor and what an interrupted write may have left."""
    for path in (state, previous(state), torn(state), state.with_name(state.name + ".partial")):
        path.unlink(missing_ok=True)
