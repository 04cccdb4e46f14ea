"""How long a stage may train: by steps, by seconds, or both, and the learning rate that follows from it."""

import math
import time

import lightning as L


class Budget(L.Callback):
    """Stops training once so many steps or seconds are used up, whichever comes first; None means no limit.

    Saved with the checkpoint, so that a resumed run has what was left. Progress is the larger of the two fractions:
    on a slow machine a cosine schedule ends with the time instead of being cut off. With steps alone (or a machine fast
    enough) a run is repeatable to the bit. All processes go by the first one's clock.
    """

    def __init__(self, steps: int | None, seconds: float | None):
        self.steps, self.seconds = steps, seconds
        self.used_steps, self.used_seconds = 0, 0.0

    @property
    def progress(self) -> float:
        """0 at the start, 1 when used up; 0 throughout without limits."""
        return max(
            self.used_steps / self.steps if self.steps else 0.0,
            self.used_seconds / self.seconds if self.seconds else 0.0,
        )

    def factor(self, schedule: str, warmup: int) -> float:
        """What to multiply learning rates by now: `schedule` is "constant" or "cosine"."""
        rise = min(1.0, (self.used_steps + 1) / warmup) if warmup else 1.0
        return rise * (0.5 * (1 + math.cos(math.pi * min(1.0, self.progress))) if schedule == "cosine" else 1.0)

    def state_dict(self) -> dict:
        return {"steps": self.used_steps, "seconds": self.used_seconds}

    def load_state_dict(self, state: dict) -> None:
        self.used_steps, self.used_seconds = state["steps"], state["seconds"]

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        self._since = time.monotonic() - self.used_seconds
        if self.progress >= 1:  # interrupted after its last step
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        self.used_steps = trainer.global_step
        self.used_seconds = time.monotonic() - self._since
        if self.seconds and trainer.world_size > 1:
            self.used_seconds = trainer.strategy.broadcast(self.used_seconds)
        if self.progress >= 1:
            trainer.should_stop = True
