"""How well methods denoise the same test images: PSNR and SSIM of each image, at several noise levels."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.progress import track
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from train.data import FixedSamples
from train.stages import psnr

TUNING_IMAGES = 48

PROTOCOL = {
    "sigma": "standard deviation of white Gaussian noise on pixels scaled to [0, 1]",
    "clipping": "noisy images are not clipped; estimates are clipped to [0, 1]; 'noisy' is scored unclipped",
    "psnr": "dB, peak 1, mean of the PSNR of each image",
    "ssim": "mean of the SSIM of each image, Gaussian window of 11 pixels, sigma 1.5, estimates and 'noisy' clipped",
    "noise": "one fixed pattern per test image (generator seeded by 0, stream, index), scaled by sigma, the same for "
    "every method",
    "gain": "mean over test images of the paired difference of PSNR, standard error of that mean",
    "time": "wall-clock time per test image, in batches, on the machine named, all else as it happened to be",
    "memory": "most bytes allocated during one training step beyond what was there before it (parameters, Adam's "
    "state), counted allocation by allocation, at the size of training and the batch of one process",
    "training min": "of the network and, for a Glow, of its pre-training, on the machine named and beside whatever "
    "else ran there",
    "precision": "evaluation runs in 32 bits, also of networks trained in bf16",
}


@dataclass
class Method:
    """Something that denoises. estimate: (noisy (N, 3, H, W), sigma) -> (N, 3, H, W), unclipped.

    protocol: one sentence on what it is, for whoever reads the table. tune: (clean, noisy, sigma) -> a setting, chosen
    on validation images for each sigma and given to `estimate` as a third argument. facts: parameters and the like.
    """

    key: str
    title: str
    estimate: Callable[..., Tensor]
    protocol: str = ""
    tune: Callable[[Tensor, Tensor, float], float | None] | None = None
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class Scores:
    """What one method scored: per sigma the PSNR and SSIM of each image (n,), a few images, and its setting."""

    method: Method
    psnr: dict[float, Tensor] = field(default_factory=dict)
    ssim: dict[float, Tensor] = field(default_factory=dict)
    shown: dict[float, Tensor] = field(default_factory=dict)
    settings: dict[float, float] = field(default_factory=dict)
    seconds_per_image: float = math.nan


@dataclass
class Evaluation:
    """Scores of all methods on the same images, the noisy input first. clean: the images shown."""

    sigmas: list[float]
    scores: dict[str, Scores]
    clean: Tensor
    images: int

    def gain(self, key: str, over: str, sigma: float) -> dict[str, float]:
        """The paired PSNR gain of a method over another: mean, standard error of the mean, n."""
        difference = (self.scores[key].psnr[sigma] - self.scores[over].psnr[sigma]).double()
        n = len(difference)
        error = (difference.std(correction=1) / math.sqrt(n)).item() if n > 1 else math.nan
        return {"mean": difference.mean().item(), "standard_error": error, "n": n}


@torch.no_grad()
def evaluate(
    methods: list[Method], val: FixedSamples, test: FixedSamples, sigmas: list[float], shown: int, progress: bool
) -> Evaluation:
    """Score every method, and the noisy input, on every test image at every sigma."""
    methods = [Method("noisy", "Noisy", lambda noisy, sigma: noisy), *methods]
    tuning_clean, tuning_noise = _stack(val, TUNING_IMAGES)
    clean, noise = _stack(test)
    scores = {method.key: Scores(method) for method in methods}
    work = [(method, sigma) for method in methods for sigma in sigmas]
    seconds = dict.fromkeys(scores, 0.0)
    for method, sigma in track(work, "evaluating", transient=True, disable=not progress):
        found, noisy = scores[method.key], clean + sigma * noise
        setting = ()
        if method.tune:
            setting = (method.tune(tuning_clean, tuning_clean + sigma * tuning_noise, sigma),)
            found.settings[sigma] = setting[0]
        start = time.monotonic()
        estimate = method.estimate(noisy, sigma, *setting)
        seconds[method.key] += time.monotonic() - start
        clipped = estimate.clamp(0, 1)
        found.ssim[sigma] = structural_similarity_index_measure(clipped, clean, data_range=1.0, reduction="none")
        found.psnr[sigma] = psnr(noisy if method.key == "noisy" else clipped, clean)
        found.shown[sigma] = clipped[:shown]
    for key, total in seconds.items():
        scores[key].seconds_per_image = total / (len(sigmas) * len(clean))
    return Evaluation(sigmas, scores, clean[:shown], len(clean))


def device() -> torch.device:
    """Where evaluation runs: on the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(net: nn.Module, batch: int) -> Callable[[Tensor, float], Tensor]:
    """A network as a method's `estimate`, in batches, on the GPU if there is one. It is not told sigma."""
    net = net.to(device()).eval()

    def estimate(noisy: Tensor, sigma: float) -> Tensor:
        parts = noisy.contiguous(memory_format=torch.channels_last).split(batch)
        return torch.cat([net(part.to(device())).float().cpu() for part in parts]).contiguous()

    return estimate


def _stack(samples: FixedSamples, most: int | None = None) -> tuple[Tensor, Tensor]:
    chosen = [samples[i] for i in range(len(samples))[:most]]
    return torch.stack([s["clean"] for s in chosen]), torch.stack([s["noise"] for s in chosen])
