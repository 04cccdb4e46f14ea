"""The two stages of training as Lightning modules: the flow by likelihood, then the unfolded network end to end."""

import itertools
import math
from collections.abc import Callable, Iterable

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from flowkern import Glow, Unfolded
from train import data, graphs, ranks
from train.budget import Budget
from train.config import Config
from train.noise_level import told

CALIBRATION_BATCHES = 8
# A mean squared error below that of rounding to 8 bits by far: 90 dB. It keeps the logarithm of a perfect image finite.
PERFECT = 1e-9
# Validation errors of pixels in [0, 1] from which no run has come back: what follows would be wasted.
LOST = {"mse": 1e6, "psnr": 60.0}


class _Stage(L.LightningModule):
    """A model, its parameter groups and a learning rate that follows the budget.

    Every stage has `inputs(batch)`, the tensors that its model works on, and `run(*inputs)`, what it does with them in
    a step, which CUDA graphs may replay.
    """

    def __init__(self, model: nn.Module, config: Config, budget: Budget):
        super().__init__()
        self.model, self.config, self.budget = model, config, budget
        self.replayed: graphs.Replayed | None = None

    def on_train_start(self) -> None:
        if graphs.wanted(self.config, self.device):
            self.capture(data.random_batch(self.config, self.device))

    def capture(self, batch: dict[str, Tensor]) -> None:
        """Take `run` as CUDA graphs, for batches of the sizes of this one."""
        self.replayed = graphs.capture(self.model, self.run, self.inputs(batch), self.config)

    def run_or_replay(self, *inputs: Tensor, **options) -> Tensor:
        """`run(*inputs, **options)`, in training as it was captured if it was."""
        replayed = self.training and self.replayed and self.replayed.suits(*inputs)
        return self.replayed.run(*inputs) if replayed else self.run(*inputs, **options)

    def on_train_end(self) -> None:
        self.replayed = None

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        factor = self.budget.factor(self.config.schedule, self.config.warmup)
        for group in self.optimizers().param_groups:
            group["lr"] = group["initial_lr"] * factor

    def adam(self, *groups: tuple[list[nn.Parameter], float]) -> torch.optim.Adam:
        """Adam as in the paper, with a learning rate for each group."""
        # Lightning can't clip gradients for a fused optimizer under autocast.
        fused = self.config.precision == "32"
        return torch.optim.Adam([{"params": p, "lr": lr, "initial_lr": lr} for p, lr in groups], fused=fused)

    def check_finite(self, loss: Tensor, most: float = math.inf) -> Tensor:
        """The loss. Raises FloatingPointError if it is not finite, or more than `most`, in all processes if it is so in
        one.
        """
        own = bool(torch.isfinite(loss) & (loss <= most))
        sound = self.trainer.strategy.reduce_boolean_decision(own, all=True) if ranks.count() > 1 else own
        if not sound:
            value = f"{loss.item():g}" if not own else "infinite or NaN in another process"
            raise FloatingPointError(
                f"the {self.name} loss became {value} at step {self.global_step}: lower the "
                f"learning rate, raise --likelihood, or keep --scale softclamp"
            )
        return loss


class PriorStage(_Stage):
    """Likelihood training of the Glow on dequantised images: minimises bits per dimension."""

    name = "prior"
    model: Glow

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor]:
        return (batch["prior"],)

    def run(self, images: Tensor) -> Tensor:
        return self.model.bits_per_dim(images, bits=self.config.bits).mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.check_finite(self.run_or_replay(*self.inputs(batch)))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.check_finite(self.run_or_replay(*self.inputs(batch)))
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch["prior"]))

    def configure_optimizers(self) -> torch.optim.Adam:
        return self.adam((list(self.model.parameters()), self.config.prior_lr))


class UnfoldedStage(_Stage):
    """End-to-end training of the unfolded network: minimises `--loss`, and with it the flows' negative log-likelihood
    as much as `--likelihood` says.

    calibration: makes the training batches on which batch norms' statistics are measured.
    """

    name = "unfolded"
    model: Unfolded

    def __init__(
        self, model: Unfolded, config: Config, budget: Budget, calibration: Callable[[], Iterable[dict]] | None = None
    ):
        super().__init__(model, config, budget)
        self.calibration, self.measurement = calibration, config.measurement
        if config.prox != "glow":
            model.to(memory_format=torch.channels_last)  # convolutions run up to 2.5 times as fast
        if config.final == "consistency" and (config.folds > 1 or model.init != "mode"):
            # The last prox does not run: DDP would wait for gradients of what is its own. Tied folds share the rest.
            used = {id(p) for prox in model.proxes[:-1] for p in prox.parameters()}
            for p in model.proxes[-1].parameters():
                p.requires_grad_(id(p) in used)
        elif config.final == "consistency":
            model.proxes[0].raw_lam.requires_grad_(False)  # its flow makes the start, and that is all
        self.val_psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
        self.val_ssim = StructuralSimilarityIndexMeasure(data_range=1.0)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The measurements, their noise levels, and the masks where every image has its own."""
        low, high = self.config.sigma, self.config.sigma_max or self.config.sigma
        sigma = low + (high - low) * batch["level"]
        y, _ = self.measurement.measure(batch, sigma)
        return (y, sigma, batch["mask"]) if self.measurement.varies else (y, sigma)

    def run(self, y: Tensor, sigma: Tensor, mask: Tensor | None = None, side: int | None = None) -> tuple[Tensor, ...]:
        """The estimate and, where the likelihood is trained along, its log_prob. side: of the images, default that of
        training.
        """
        given = self.measurement.given(side or self.config.size, mask, y.device) | told(self.model, sigma)
        if self.training and self.with_likelihood:
            return self.model(channels_last(y), return_log_prob=True, **given)
        return (self.model(channels_last(y), **given),)

    @property
    def with_likelihood(self) -> bool:
        return self.config.prox == "glow" and self.config.likelihood > 0

    def estimate(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What `run` finds for a batch, the estimate in 32 bits."""
        found, *log_prob = self.run_or_replay(*self.inputs(batch), side=batch["clean"].shape[-1])
        return found.float(), *log_prob

    def on_validation_epoch_start(self) -> None:
        """Measure batch norms' statistics anew, with the weights as they are now.

        Running averages are of the weights of the last steps, and through the norms of several folds, one behind the
        other, that small error grows (docs/results.md).
        """
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms or self.calibration is None:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        with torch.no_grad():
            for batch in itertools.islice(self.calibration(), CALIBRATION_BATCHES):
                self.estimate({key: value.to(self.device) for key, value in batch.items()})
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """What training minimises on a batch."""
        return sum(self._losses(self.estimate(batch), batch["clean"]))

    def error(self, estimate: Tensor, clean: Tensor) -> Tensor:
        """How far the estimates are from the clean images: the mean squared error, or minus the mean PSNR in dB."""
        if self.config.loss == "mse":
            return nn.functional.mse_loss(estimate, clean)
        squares = (estimate - clean).square().mean((1, 2, 3))
        return 10 * torch.log10(squares + PERFECT).mean()

    def _losses(self, found: tuple[Tensor, ...], clean: Tensor) -> list[Tensor]:
        """The error and, where it is trained along, the weighted likelihood."""
        estimate, *log_prob = found
        # A single fold that ends with data consistency runs no flow.
        ran = [d for d in log_prob if d.numel()]
        return [self.error(estimate, clean), *(-self.config.likelihood * d.mean() / clean[0].numel() for d in ran)]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The loss; and the error alone, which can be compared with validation's."""
        found, clean = self.estimate(batch), batch["clean"]
        losses = self._losses(found, clean)
        self.log("loss", losses[0], prog_bar=True)
        self.log("psnr", psnr(found[0].detach().clamp(0, 1), clean).mean(), prog_bar=True)
        return {"loss": self.check_finite(sum(losses)), "error": losses[0].detach()}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        (estimate,), clean = self.estimate(batch), batch["clean"]
        error = self.check_finite(self.error(estimate, clean), LOST[self.config.loss])
        self.log("val_loss", error, batch_size=len(clean))
        self.val_psnr(estimate.clamp(0, 1), clean)
        self.val_ssim(estimate.clamp(0, 1), clean)
        self.log("val_psnr", self.val_psnr, prog_bar=True, batch_size=len(clean))
        self.log("val_ssim", self.val_ssim, batch_size=len(clean))

    def configure_optimizers(self) -> torch.optim.Adam:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        steps = [p for name, p in named if is_step_size(name)]
        weights = [p for name, p in named if not is_step_size(name)]
        return self.adam((weights, self.config.lr), (steps, self.config.lr_steps))


def channels_last(y: Tensor) -> Tensor:
    """y in channels-last memory, if it is images."""
    return y.contiguous(memory_format=torch.channels_last) if y.ndim == 4 else y


def is_step_size(name: str) -> bool:
    """Whether a parameter of `Unfolded` is a step size (mu, rho) or a shrinkage lambda: they learn at a rate of their
    own.
    """
    return name.split(".")[-1] in ("mu", "raw_lam", "raw_rho")


def psnr(estimate: Tensor, clean: Tensor) -> Tensor:
    """PSNR per image (N,) in dB against a peak of 1."""
    return peak_signal_noise_ratio(estimate, clean, data_range=1.0, dim=(1, 2, 3), reduction="none")
