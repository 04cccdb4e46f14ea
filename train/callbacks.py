"""What a stage reports while it trains: the progress bar, the rows of metrics.csv, speed and peak memory."""

import csv
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

COLUMNS = (
    "stage",
    "epoch",
    "step",
    "seconds",
    "loss",
    "val_loss",
    "val_psnr",
    "val_ssim",
    "images_per_second",
    "peak_mib",
)


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far in MiB: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, with the stage's name and without a version number."""

    def get_metrics(self, trainer: L.Trainer, stage: L.LightningModule) -> dict:
        metrics = super().get_metrics(trainer, stage)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, stage)
        self.train_progress_bar.set_description(f"{stage.name}, epoch {trainer.current_epoch}")


class Termination(L.Callback):
    """SIGTERM ends all of several processes after the same batch. Lightning's handler talks to the others from within
    the signal, where they may be waiting for something else.
    """

    def __init__(self):
        self._asked = False

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._ask)  # Lightning puts back what was there before

    def _ask(self, *_) -> None:
        self._asked = True

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, *_) -> None:
        asked = torch.tensor(int(self._asked), device=stage.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        trainer._signal_connector.received_sigterm = bool(asked)


class _Nowhere:
    """A writer that takes everything and writes nothing."""

    def __getattr__(self, name: str):
        return lambda *arguments, **options: None


class Events(TensorBoardLogger):
    """Event files, without which training goes on where they can't be written, as on a full disk."""

    @property
    def experiment(self):
        """The writer; where its file can't be opened, one that does nothing, until the next try."""
        try:
            return super().experiment
        except OSError as error:
            self._told(error)
            return _Nowhere()

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except (OSError, ValueError) as error:  # Lightning makes a ValueError of whatever the writer raises
            self._told(error)

    def finalize(self, status: str) -> None:
        """The writer's thread may have failed long before, and says so now."""
        try:
            super().finalize(status)
        except OSError as error:
            self._told(error)

    def _told(self, error: Exception) -> None:
        warnings.warn(f"no more events for TensorBoard ({error.__cause__ or error}); training goes on", stacklevel=3)


class Recorder(L.Callback):
    """Measures speed (of the steps alone) and peak memory for the bar, and appends one row per epoch to metrics.csv.

    Only the first process writes. A resumed stage first drops its rows beyond the checkpoint, which holds what had been
    measured of the epoch. echo: print each row, for logs that can't show a bar.
    """

    def __init__(self, path: Path, echo: bool):
        self.path, self.echo = path, echo
        self._trainer = None
        self._begin()

    def _begin(self) -> None:
        self._losses, self._images, self._seconds = [], 0, 0.0

    def _mean_losses(self) -> Tensor:
        """The loss of each step of the epoch so far, averaged over processes; all of them take part."""
        losses = torch.stack([torch.as_tensor(x, device=self._trainer.strategy.root_device) for x in self._losses])
        return self._trainer.strategy.reduce(losses, reduce_op="mean")

    def state_dict(self) -> dict:
        # Lightning gathers a checkpoint in every process, and writes it in the first.
        losses = self._mean_losses().tolist() if self._losses else []
        return {"losses": losses, "images": self._images, "seconds": self._seconds}

    def load_state_dict(self, state: dict) -> None:
        self._losses, self._images, self._seconds = state["losses"], state["images"], state["seconds"]

    def on_train_start(self, trainer, stage) -> None:
        self._trainer = trainer
        if not trainer.is_global_zero:
            return
        rows = [r for r in read_metrics(self.path) if r["stage"] != stage.name or int(r["step"]) <= trainer.global_step]
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)

    def on_train_epoch_start(self, trainer, stage) -> None:
        self._begin()

    def on_train_batch_start(self, trainer, stage, batch, batch_idx: int) -> None:
        self._start = time.monotonic()

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx: int) -> None:
        seconds, images = time.monotonic() - self._start, len(batch["clean"]) * trainer.world_size
        # Lightning divides the loss by the parts of a batch, and no more than that.
        loss = outputs["error"] if "error" in outputs else outputs["loss"].detach() * stage.config.accumulate
        self._losses.append(loss)
        self._seconds += seconds
        self._images += images
        stage.log("img/s", images / seconds, prog_bar=True, logger=False)
        stage.log("MiB", peak_memory_mib(stage.device), prog_bar=True, logger=False)

    def on_train_epoch_end(self, trainer, stage) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        row = {
            "stage": stage.name,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "seconds": round(stage.budget.used_seconds, 2),
            "loss": float(self._mean_losses().mean()),
            **{k: metrics.get(k, "") for k in ("val_loss", "val_psnr", "val_ssim")},
            "images_per_second": round(self._images / self._seconds, 2),
            "peak_mib": round(peak_memory_mib(stage.device), 1),
        }
        if not trainer.is_global_zero:
            return
        before = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS).writerow(row)
        except OSError as error:
            os.truncate(self.path, before)  # half a row, to which the next one would be appended
            warnings.warn(f"{self.path.name} lacks epoch {row['epoch']} ({error}); training goes on", stacklevel=2)
        if self.echo:
            print(line(row), flush=True)


def line(row: dict) -> str:
    """A row of metrics.csv for people."""
    psnr = f"  PSNR {row['val_psnr']:.2f} dB" if row["val_psnr"] != "" else ""
    return (
        f"{row['stage']:>8}  epoch {row['epoch']:>3}  step {row['step']:>5}  {row['seconds']:6.0f} s  "
        f"loss {row['loss']:.4f}  val {row['val_loss']:.4f}{psnr}  "
        f"{row['images_per_second']:.0f} images/s  {row['peak_mib']:.0f} MiB"
    )


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, none if there is no file; a row that an interruption cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]
