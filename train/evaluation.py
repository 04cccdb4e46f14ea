"""How well methods restore the same test images: PSNR and SSIM of each image, at several noise levels."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.progress import track
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from flowkern.operators import Identity
from train import measurement
from train.data import FixedSamples
from train.measurement import Measurement
from train.noise_level import told
from train.stages import channels_last, psnr

TUNING_IMAGES = 48

PROTOCOL = {
    "sigma": "standard deviation of white Gaussian noise on pixels scaled to [0, 1]",
    "clipping": "noisy images are not clipped; estimates are clipped to [0, 1]; 'noisy' is scored unclipped",
    "psnr": "dB, peak 1, mean of the PSNR of each image",
    "ssim": "mean of the SSIM of each image, Gaussian window of 11 pixels, sigma 1.5, over all pixels of the mirrored "
    "image (scikit-image leaves out 5 at the border); estimates and 'noisy' clipped",
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
# In their place where what is measured is not the image itself.
MEASURED = {
    "sigma": "standard deviation of white Gaussian noise on the measurement of pixels scaled to [0, 1]",
    "clipping": "measurements are not clipped; estimates are clipped to [0, 1]; 'measured' is scored unclipped",
    "ssim": PROTOCOL["ssim"].replace("'noisy'", "'measured'"),
    "noise": "one fixed pattern, and where masks are drawn one mask, per test image (generator seeded by 0, stream, "
    "index), scaled by sigma, the same for every method; missing pixels have none",
    "measured": "the measurement as an image: itself where it is one, else its pseudo-inverse (blocks of one colour; "
    "what was projected on, which is the adjoint)",
}


@dataclass
class Method:
    """Something that restores images. estimate: (measurement, sigma) -> (N, 3, H, W), unclipped; for denoising the
    measurement is (N, 3, H, W), else `estimate` and `tune` are also given what measured it as `operator=`.

    protocol: one sentence on what it is, for whoever reads the table. tune: (clean, measurement, sigma) -> a setting,
    chosen on validation images for each sigma and given to `estimate` as a third argument. facts: parameters and the
    like.
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
    """Scores of all methods on the same images, the measurement itself first. clean: the images shown."""

    sigmas: list[float]
    scores: dict[str, Scores]
    clean: Tensor
    images: int
    measurement: Measurement = field(default_factory=Measurement)
    sources: int | None = None  # of how many pictures the images are tiles; None: each is a picture

    def gain(self, key: str, over: str, sigma: float) -> dict[str, float]:
        """The paired PSNR gain of a method over another: mean, standard error of the mean (None of one image), n."""
        difference = (self.scores[key].psnr[sigma] - self.scores[over].psnr[sigma]).double()
        n = len(difference)
        error = (difference.std(correction=1) / math.sqrt(n)).item() if n > 1 else None
        return {"mean": difference.mean().item(), "standard_error": error, "n": n}


@torch.no_grad()
def evaluate(
    methods: list[Method], val: FixedSamples, test: FixedSamples, sigmas: list[float], shown: int, progress: bool
) -> Evaluation:
    """Score every method, and the measurement as an image, on every test image at every sigma."""
    measured = test.measurement
    first = Method("noisy", "Noisy" if measured.is_identity else "Measured", _as_it_is)
    methods = [first, *methods]
    tuning, samples = _stack(val, TUNING_IMAGES), _stack(test)
    clean = samples["clean"]
    scores = {method.key: Scores(method) for method in methods}
    work = [(method, sigma) for method in methods for sigma in sigmas]
    seconds = dict.fromkeys(scores, 0.0)
    for method, sigma in track(work, "evaluating", transient=True, disable=not progress):
        found, (y, options) = scores[method.key], measured.measure(samples, sigma)
        setting = ()
        if method.tune:
            known, its_options = val.measurement.measure(tuning, sigma)
            setting = (method.tune(tuning["clean"], known, sigma, **its_options),)
            found.settings[sigma] = setting[0]
        start = time.monotonic()
        estimate = method.estimate(y, sigma, *setting, **options)
        seconds[method.key] += time.monotonic() - start
        clipped = estimate.clamp(0, 1)
        found.ssim[sigma] = structural_similarity_index_measure(clipped, clean, data_range=1.0, reduction="none")
        found.psnr[sigma] = psnr(estimate if method is first else clipped, clean)
        found.shown[sigma] = clipped[:shown]
        if method is first:
            found.shown[sigma] = measurement.visible(y, **options)[:shown]
    for key, total in seconds.items():
        scores[key].seconds_per_image = total / (len(sigmas) * len(clean))
    return Evaluation(sigmas, scores, clean[:shown], len(clean), measured, test.sources)


def device() -> torch.device:
    """Where evaluation runs: on the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(net: nn.Module, batch: int) -> Callable[..., Tensor]:
    """A network as a method's `estimate`, in batches, on the GPU if there is one; told sigma if it wants it."""
    net = net.to(device()).eval()

    def estimate(y: Tensor, sigma: float, operator=None) -> Tensor:
        if operator is None and not isinstance(getattr(net, "operator", None), Identity | None):
            operator = Identity()  # the network would take its own
        there = copy.deepcopy(operator).to(device()) if operator is not None else None
        batches = measurement.parts(channels_last(y).to(device()), there, batch)
        known = told(net, sigma)
        return torch.cat([net(part, **options, **known).float().cpu() for part, options in batches]).contiguous()

    return estimate


def _as_it_is(y: Tensor, sigma: float, operator=None) -> Tensor:
    return measurement.as_image(y, operator)


def _stack(samples: FixedSamples, most: int | None = None) -> dict[str, Tensor]:
    chosen = [samples[i] for i in range(len(samples))[:most]]
    return {name: torch.stack([sample[name] for sample in chosen]) for name in chosen[0]}
