"""From pictures to training samples. Crops, flips, noise and dequantisation are pure functions of (seed, epoch, index).

So a resumed run, or several processes, see exactly the samples that an uninterrupted one sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from train import images
from train.config import Config

# Cropped pictures are kept whole in memory, at most this many pixels on their long side.
LONGEST = 1024
CROPS = {"val_images": 64, "test_images": 96}

# Streams of random numbers that must not coincide.
SHUFFLE, TRAIN, VAL, TEST = range(4)


def random(seed: int, stream: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample: a pure function of its arguments."""
    return np.random.default_rng((seed, stream, epoch, index))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in 0..255."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()


def gaussian(rng: np.random.Generator, like: Tensor) -> Tensor:
    """Standard normal noise in the shape of `like`."""
    return torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype=np.float32))


class TrainingSamples(Dataset):
    """Training pictures as random samples, addressed by (epoch, index): `clean`, `noise` and `prior`, each (3, H, W).

    clean: pixels / 255. noise: standard normal. level: where the image stands in the range of noise levels, uniform in
    [0, 1). prior: (pixels + uniform) / 256, uniformly dequantised, plus Gaussian noise whose sigma is drawn from
    [0, prior_noise]: what the flow is pre-trained on.
    """

    def __init__(self, pictures: list[np.ndarray], size: int, length: int, augment: str, prior_noise: float, seed: int):
        self.pictures, self.size, self.length, self.augment = pictures, size, length, augment
        self.prior_noise, self.seed = prior_noise, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        rng = random(self.seed, TRAIN, epoch, index)
        picture = self.pictures[index % len(self.pictures)]
        top, left = (int(rng.integers(0, side - self.size + 1)) for side in picture.shape[:2])
        crop = picture[top : top + self.size, left : left + self.size]
        pixels = to_tensor(augmented(crop, self.augment, rng))
        return {
            "clean": pixels / 255,
            "noise": gaussian(rng, pixels),
            "prior": dequantise(pixels, self.prior_noise, rng),
            "level": torch.tensor(rng.random(), dtype=torch.float32),
        }


class FixedSamples(Dataset):
    """Held-out pictures with noise, dequantisation and all that stay the same in every epoch and run.

    Items as those of `TrainingSamples`.
    """

    def __init__(self, pictures: list[np.ndarray], stream: int, prior_noise: float):
        self.pictures, self.stream, self.prior_noise = pictures, stream, prior_noise

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random(0, self.stream, 0, index)
        pixels = to_tensor(self.pictures[index])
        return {
            "clean": pixels / 255,
            "noise": gaussian(rng, pixels),
            "prior": dequantise(pixels, self.prior_noise, rng),
            "level": torch.tensor(rng.random(), dtype=torch.float32),
        }


def augmented(crop: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    """A crop (H, W, 3) mirrored ("mirror"), or also turned by quarters and its colours permuted ("all"), at random."""
    if how != "none" and rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.rot90(crop, rng.integers(4))[..., rng.permutation(3)] if how == "all" else crop


def dequantise(pixels: Tensor, prior_noise: float, rng: np.random.Generator) -> Tensor:
    """(pixels + u) / 256, u uniform, plus Gaussian noise of a sigma uniform in [0, prior_noise]. pixels in 0..255."""
    x = (pixels + torch.from_numpy(rng.random(tuple(pixels.shape), dtype=np.float32))) / 256
    return x + float(rng.uniform(0, prior_noise)) * gaussian(rng, pixels) if prior_noise else x


def tiles(pictures: list[np.ndarray], size: int, count: int) -> list[np.ndarray]:
    """`count` crops that do not overlap (all there are, if fewer), in an order that mixes the pictures."""
    found = [
        p[y : y + size, x : x + size]
        for p in pictures
        for y in range(0, p.shape[0] - size + 1, size)
        for x in range(0, p.shape[1] - size + 1, size)
    ]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order[:count]]


class EpochSampler(Sampler):
    """Shuffled (epoch, index) keys of one process's share of an epoch. Lightning calls `set_epoch`."""

    def __init__(self, length: int, seed: int, rank: int = 0, processes: int = 1):
        self.length, self.seed, self.rank, self.processes, self.epoch = length, seed, rank, processes, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = random(self.seed, SHUFFLE, self.epoch, 0).permutation(self.length)
        share = order[self.rank :: self.processes][: len(self)]
        return iter([(self.epoch, int(i)) for i in share])


@dataclass
class Data:
    """What a run trains, validates and tests on."""

    train: TrainingSamples
    val: FixedSamples
    test: FixedSamples
    skipped: list[str]

    def describe(self) -> str:
        size, eval_size = self.train.size, self.test.pictures[0].shape[0]
        return (
            f"{len(self.train.pictures)} training pictures, {len(self.train)} samples of {size}x{size} an epoch; "
            f"{len(self.val)} validation and {len(self.test)} test images of {eval_size}x{eval_size}"
        )


def prepare(config: Config) -> Data:
    """Read, check and arrange the pictures of `--data`. Raises FileNotFoundError or ValueError in one sentence."""
    crop = config.fit == "crop" or config.data == "photos"
    eval_size = config.eval_size or config.size

    def fit(image: Image.Image, split: str) -> Image.Image:
        size = config.size if split == "train" else eval_size
        if not crop:
            return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        scale = max(min(1, LONGEST / max(image.size)), size / min(image.size))
        return image if scale == 1 else image.resize([round(s * scale) for s in image.size], Image.Resampling.LANCZOS)

    limits = {} if crop else {"val": config.val_images, "test": config.test_images}
    pictures = images.load(
        config.data,
        fit,
        limits,
        progress=lambda work, total: track(work, "reading pictures", total=total, transient=True),
    )
    val, test = pictures.val, pictures.test
    if crop:
        val, test = (
            tiles(held_out, eval_size, getattr(config, name) or CROPS[name])
            for held_out, name in ((val, "val_images"), (test, "test_images"))
        )
    length = config.epoch_images or len(pictures.train)
    if length < config.batch:
        raise ValueError(
            f"an epoch of {length} training images is smaller than a batch of {config.batch}; "
            f"set --batch or --epoch-images"
        )
    return Data(
        TrainingSamples(pictures.train, config.size, length, config.augment, config.prior_noise, config.seed),
        FixedSamples(val, VAL, config.prior_noise),
        FixedSamples(test, TEST, config.prior_noise),
        pictures.skipped,
    )


def training_loader(data: Data, config: Config, rank: int = 0, processes: int = 1) -> DataLoader:
    """Batches of training samples; the last, incomplete batch of an epoch is left out."""
    sampler = EpochSampler(len(data.train), config.seed, rank, processes)
    return DataLoader(
        data.train,
        config.batch,
        sampler=sampler,
        drop_last=True,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
    )


def validation_loader(data: Data, config: Config) -> DataLoader:
    """Batches of validation samples."""
    return DataLoader(data.val, config.batch)
