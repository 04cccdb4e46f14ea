"""Watching how exactly the flow inverts while it trains: recomputed activations are as exact as that, no more."""

import warnings

import lightning as L
import torch
from torch import Tensor, nn

from flowkern import Glow
from flowkern.audit import DRIFT_LIMIT, drift
from train.data import FixedSamples
from train.noise_level import told

IMAGES = 4


class DriftWatch(L.Callback):
    """After each validation, warns once for every level (of every fold) drifting beyond `flowkern.audit.DRIFT_LIMIT`.

    Measured on the images that the flow gets to see: the prior's own, or each fold's input.
    """

    def __init__(self, samples: FixedSamples):
        chosen = [samples[i] for i in range(min(IMAGES, len(samples)))]
        self.images = {key: torch.stack([sample[key] for sample in chosen]) for key in chosen[0]}
        self.told: set[str] = set()

    def on_validation_epoch_end(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        if not trainer.is_global_zero or stage.config.prox != "glow":
            return
        images = {key: value.to(stage.device) for key, value in self.images.items()}
        if isinstance(stage.model, Glow):
            inputs = [("", stage.model, images["prior"])]
        else:
            y, options = stage.measurement.measure(images, stage.config.sigma)
            found = fold_inputs(stage.model, y, **options, **told(stage.model, stage.config.sigma))
            inputs = [(f"fold {k}, ", prox.glow, x) for k, (prox, x) in enumerate(found, 1)]
        for where, glow, x in inputs:
            for level, found in enumerate(drift(glow, x), 1):
                self._judge(f"{where}level {level}", found)

    def _judge(self, where: str, found: float) -> None:
        if not found <= DRIFT_LIMIT and where not in self.told:
            self.told.add(where)
            warnings.warn(
                f"{where} drifts: inverse(forward(x)) is off by {found:.1e} of x, more than {DRIFT_LIMIT:.0e}, and "
                f"recomputed gradients with it; set --anchor-every or --memory checkpoint",
                stacklevel=2,
            )


@torch.no_grad()
def fold_inputs(net: nn.Module, y: Tensor, **options) -> list[tuple[nn.Module, Tensor]]:
    """The prox of each fold that runs and the image that enters it, for the measurement y. options: of the network."""
    seen = []
    hooks = [prox.register_forward_pre_hook(lambda prox, args: seen.append((prox, args[0]))) for prox in net.proxes]
    try:
        net.forward(y, **options)  # not what was compiled, which has no hooks
    finally:
        for hook in hooks:
            hook.remove()
    return seen
