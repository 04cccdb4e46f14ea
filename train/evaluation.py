"""How well a trained network denoises: per-image PSNR and SSIM beside the noisy input and total variation."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from train.config import Config
from train.data import Data, FixedSamples
from train.stages import psnr

METHODS = ("noisy", "tv", "unfolded")
TUNING_IMAGES = 48

PROTOCOL = {
    "sigma": "standard deviation of white Gaussian noise on pixels scaled to [0, 1]",
    "clipping": "noisy images are not clipped; estimates are clipped to [0, 1]; 'noisy' is scored unclipped",
    "psnr": "dB, peak 1, mean of the PSNR of each image",
    "ssim": "mean of the SSIM of each image, Gaussian window of 11 pixels, sigma 1.5, estimates and 'noisy' clipped",
    "noise": "one fixed pattern per test image (generator seeded by 0, stream, 0, index), scaled by sigma",
    "tv": "skimage.restoration.denoise_tv_chambolle per channel, defaults but the weight, which at each sigma "
    f"maximises the mean PSNR on validation images (at most {TUNING_IMAGES})",
    "gain": "mean over test images of the paired difference unfolded - tv, standard error of that mean",
}


@dataclass
class Level:
    """Scores at one noise level: per method the PSNR and SSIM of each image (n,), and a few images for the figure."""

    sigma: float
    tv_weight: float
    psnr: dict[str, Tensor] = field(default_factory=dict)
    ssim: dict[str, Tensor] = field(default_factory=dict)
    shown: dict[str, Tensor] = field(default_factory=dict)

    def gain(self) -> dict[str, float]:
        """The paired PSNR gain of the network over total variation: mean, standard error of the mean, n."""
        difference = (self.psnr["unfolded"] - self.psnr["tv"]).double()
        n = len(difference)
        error = (difference.std(correction=1) / math.sqrt(n)).item() if n > 1 else math.nan
        return {"mean": difference.mean().item(), "standard_error": error, "n": n}


def total_variation(images: Tensor, weight: float) -> Tensor:
    """Total-variation denoising of a batch (N, 3, H, W), each image and channel by itself; not clipped."""
    done = [denoise_tv_chambolle(image.permute(1, 2, 0).numpy(), weight=weight, channel_axis=-1) for image in images]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).float()


def tune_total_variation(clean: Tensor, noisy: Tensor) -> float:
    """The weight that maximises the mean PSNR on these images (N, 3, H, W)."""

    def loss(log_weight: float) -> float:
        return -psnr(total_variation(noisy, math.exp(log_weight)).clamp(0, 1), clean).mean().item()

    found = minimize_scalar(loss, bounds=(math.log(0.02), math.log(2)), method="bounded", options={"xatol": 0.05})
    return math.exp(found.x)


@torch.no_grad()
def evaluate(net: nn.Module, data: Data, config: Config) -> list[Level]:
    """Score the network and the baselines on every test image at every sigma."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = net.to(device).eval()
    tuning_clean, tuning_noise = _stack(data.val, TUNING_IMAGES)
    clean, noise = _stack(data.test)
    levels = []
    for sigma in config.eval_sigmas:
        noisy = clean + sigma * noise
        weight = tune_total_variation(tuning_clean, tuning_clean + sigma * tuning_noise)
        estimates = {
            "noisy": noisy,
            "tv": total_variation(noisy, weight),
            "unfolded": torch.cat([net(part.to(device)).cpu() for part in noisy.split(config.batch)]),
        }
        level = Level(sigma, weight)
        for method, estimate in estimates.items():
            clipped = estimate.clamp(0, 1)
            level.ssim[method] = structural_similarity_index_measure(clipped, clean, data_range=1.0, reduction="none")
            level.psnr[method] = psnr(noisy if method == "noisy" else clipped, clean)
            level.shown[method] = clipped[: config.figure_images]
        level.shown["clean"] = clean[: config.figure_images]
        levels.append(level)
    return levels


def _stack(samples: FixedSamples, most: int | None = None) -> tuple[Tensor, Tensor]:
    chosen = [samples[i] for i in range(len(samples))[:most]]
    return torch.stack([s["clean"] for s in chosen]), torch.stack([s["noise"] for s in chosen])
