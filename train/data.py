"""From pictures to training samples: an endless sequence in which everything random follows from (seed, position).

So a resumed run, or several processes, see exactly the samples that an uninterrupted one sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from train import images, ranks
from train.config import Config
from train.images import Pictures
from train.measurement import Measurement
from train.options import PHOTOS

# Cropped pictures are kept whole in memory, at most this many pixels on their long side.
LONGEST = 1024
CROPS = {"val_images": 64, "test_images": 96}

# Streams of random numbers that must not coincide.
SHUFFLE, TRAIN, VAL, TEST = range(4)


def random(seed: int, stream: int, position: int) -> np.random.Generator:
    """The random numbers of one sample: a pure function of its arguments."""
    return np.random.default_rng((seed, stream, position))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in 0..255."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()


def gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise."""
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


class TrainingSamples(Dataset):
    """Training pictures as an endless sequence of random samples: `clean` and `prior` (3, H, W), `noise`, `level`.

    The sequence passes through all pictures again and again, each time in another order. clean: pixels / 255. noise:
    standard normal, in the shape of the measurement. level: where the image stands in the range of noise levels,
    uniform in [0, 1). prior: what the flow is pre-trained on, dequantised to `bits` bits per channel, see `dequantise`,
    plus Gaussian noise of a sigma uniform in [0, prior_noise].
    mask (1, H, W): which pixels are measured, where every image has a mask of its own.
    """

    def __init__(
        self,
        pictures: list[np.ndarray],
        size: int,
        augment: str,
        bits: int,
        prior_noise: float,
        seed: int,
        measurement: Measurement = Measurement(),  # noqa: B008
    ):
        self.pictures, self.size, self.augment = pictures, size, augment
        self.bits, self.prior_noise, self.seed, self.measurement = bits, prior_noise, seed, measurement
        self._order = (-1, None)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = random(self.seed, TRAIN, position)
        picture = self.pictures[self.picture_at(position)]
        top, left = (int(rng.integers(0, side - self.size + 1)) for side in picture.shape[:2])
        crop = picture[top : top + self.size, left : left + self.size]
        pixels = to_tensor(augmented(crop, self.augment, rng))
        return _sample(pixels, self.bits, self.prior_noise, self.measurement, rng)

    def picture_at(self, position: int) -> int:
        """The index of the picture at this position of the sequence."""
        turn, place = divmod(position, len(self.pictures))
        if self._order[0] != turn:
            self._order = (turn, random(self.seed, SHUFFLE, turn).permutation(len(self.pictures)))
        return int(self._order[1][place])


class FixedSamples(Dataset):
    """Held-out pictures with noise, masks, dequantisation and all that stay the same in every epoch and run.

    Items as those of `TrainingSamples`. sources: of how many pictures they are tiles; None if they are pictures.
    """

    def __init__(
        self,
        pictures: list[np.ndarray],
        stream: int,
        bits: int,
        prior_noise: float,
        measurement: Measurement = Measurement(),  # noqa: B008
        sources: int | None = None,
    ):
        self.pictures, self.stream, self.bits, self.prior_noise = pictures, stream, bits, prior_noise
        self.measurement, self.sources = measurement, sources

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random(0, self.stream, index)
        return _sample(to_tensor(self.pictures[index]), self.bits, self.prior_noise, self.measurement, rng)


def _sample(
    pixels: Tensor, bits: int, prior_noise: float, measurement: Measurement, rng: np.random.Generator
) -> dict[str, Tensor]:
    side = pixels.shape[-1]
    sample = {
        "clean": pixels / 255,
        "noise": gaussian(rng, measurement.noise_shape(side)),
        "prior": dequantise(pixels, bits, rng),
        "level": torch.tensor(rng.random(), dtype=torch.float32),
    }
    if measurement.varies:
        sample["mask"] = measurement.mask(side, rng)
    if prior_noise:  # last, so that the rest is the same without it
        sample["prior"] += float(rng.uniform(0, prior_noise)) * gaussian(rng, pixels.shape)
    return sample


def augmented(crop: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    """A crop (H, W, 3) mirrored ("mirror"), or also turned by quarters and its colours permuted ("all"), at random."""
    if how != "none" and rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.rot90(crop, rng.integers(4))[..., rng.permutation(3)] if how == "all" else crop


def dequantise(pixels: Tensor, bits: int, rng: np.random.Generator) -> Tensor:
    """(q + u) / 2^bits, u uniform in [0, 1), q the pixels' upper bits. pixels in 0..255. Bits per dimension of this are
    those of the quantised image.
    """
    quantised = torch.floor(pixels / 2 ** (8 - bits))
    return (quantised + torch.from_numpy(rng.random(tuple(pixels.shape), dtype=np.float32))) / 2**bits


def tiles(pictures: list[np.ndarray], size: int, count: int) -> tuple[list[np.ndarray], int]:
    """`count` crops that do not overlap (all there are, if fewer), in an order that mixes the pictures; and of how many
    pictures they are.
    """
    found = [
        (i, p[y : y + size, x : x + size])
        for i, p in enumerate(pictures)
        for y in range(0, p.shape[0] - size + 1, size)
        for x in range(0, p.shape[1] - size + 1, size)
    ]
    chosen = [found[i] for i in np.random.default_rng(0).permutation(len(found))[:count]]
    return [crop for _, crop in chosen], len({i for i, _ in chosen})


class EpochSampler(Sampler):
    """One process's positions in the sequence of samples during an epoch. Lightning calls `set_epoch`.

    length: whole batches of `batch` images over all `processes`. Every process has an equal part of each batch, so that
    together they see what one process would. `skip` positions are left out of the next pass, once.
    """

    def __init__(self, length: int, batch: int, rank: int = 0, processes: int = 1):
        self.length, self.rank, self.processes = length // batch * batch, rank, processes
        self.epoch = self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.processes

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.length
        positions = range(start + self.rank, start + self.length, self.processes)[self.skip :]
        self.skip = 0
        return iter(positions)


class TrainingLoader(DataLoader):
    """Batches of training samples. Its state is how far in the epoch it has come, so that a run continues from there.

    A batch of `batch` images is divided among the processes and then into `accumulate` parts.
    """

    def __init__(self, samples: TrainingSamples, length: int, batch: int, accumulate: int, workers: int):
        parts = ranks.count() * accumulate
        if batch % parts:
            raise ValueError(
                f"a batch of {batch} can't be divided among {ranks.count()} processes in {accumulate} parts each"
            )
        sampler = EpochSampler(length, batch, ranks.rank(), ranks.count())
        self.given = 0
        super().__init__(
            samples, batch // parts, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        skipped = self.sampler.skip // self.batch_size
        for self.given, batch in enumerate(super().__iter__(), skipped + 1):  # noqa: B020
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]
        self.sampler.skip = self.given * self.batch_size


@dataclass
class Data:
    """What a run trains, validates and tests on. epoch_images: training images between two validations."""

    train: TrainingSamples
    epoch_images: int
    val: FixedSamples
    test: FixedSamples
    pictures: Pictures

    def describe(self) -> str:
        size, eval_size = self.train.size, self.test.pictures[0].shape[0]
        held_out = f"{len(self.val)} validation and {len(self.test)} test images of {eval_size}x{eval_size}"
        if not self.train.pictures:
            return held_out
        samples = f"{self.epoch_images} samples of {size}x{size} an epoch"
        return f"{len(self.train.pictures)} training pictures, {samples}; {held_out}"


def prepare(config: Config, splits: tuple[str, ...] = images.SPLITS) -> Data:
    """Read, check and arrange the pictures of `--data`. Raises FileNotFoundError or ValueError in one sentence."""
    crop = config.fit == "crop" or config.data == PHOTOS
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
        splits,
        progress=lambda work, total: track(
            work, "reading pictures", total=total, transient=True, disable=not ranks.is_first()
        ),
    )
    if crop:
        val, _ = tiles(pictures.val, eval_size, config.val_images or CROPS["val_images"])
        test, sources = tiles(pictures.test, eval_size, config.test_images or CROPS["test_images"])
        # One tile of each picture is a picture as another.
        pictures = replace(pictures, val=val, test=test, sources=sources if sources < len(test) else None)
    return arrange(pictures, config)


def arrange(pictures: Pictures, config: Config) -> Data:
    """Pictures that have been read, as a run with these settings samples them."""
    of_prior, measurement = (config.bits, config.prior_noise), config.measurement
    return Data(
        TrainingSamples(pictures.train, config.size, config.augment, *of_prior, config.seed, measurement),
        config.epoch_images or len(pictures.train),
        FixedSamples(pictures.val, VAL, *of_prior, measurement),
        FixedSamples(pictures.test, TEST, *of_prior, measurement, pictures.sources),
        pictures,
    )


def training_loader(data: Data, config: Config) -> TrainingLoader:
    """Batches of training samples, this process's part of them; an epoch has whole batches only.

    Raises ValueError in one sentence for an epoch without one, or a batch that can't be shared.
    """
    if data.epoch_images < config.batch:
        raise ValueError(
            f"an epoch of {data.epoch_images} training images is smaller than a batch of {config.batch}; "
            f"set --batch or --epoch-images"
        )
    return TrainingLoader(data.train, data.epoch_images, config.batch, config.accumulate, config.workers)


def first_batch(data: Data, config: Config) -> dict[str, Tensor]:
    """The whole first batch of training, the same in every process."""
    return default_collate([data.train[i] for i in range(config.batch)])


def random_batch(config: Config, device: torch.device) -> dict[str, Tensor]:
    """A batch of training samples' names and sizes, as many as are worked on at once, of random numbers."""
    count, side, measurement = part(config), config.size, config.measurement
    shapes = {"clean": (3, side, side), "noise": measurement.noise_shape(side), "prior": (3, side, side)}
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.rand(count, *shape, generator=generator) for name, shape in shapes.items()}
    batch |= {"level": torch.zeros(count), "mask": torch.ones(count, 1, side, side)}
    return {name: value.to(device) for name, value in batch.items()}


def validation_loader(data: Data, config: Config) -> DataLoader:
    """Batches of validation samples, all of them in every process."""
    return DataLoader(data.val, part(config))


def part(config: Config) -> int:
    """How many images are worked on at once: a batch's share of one process, in as many parts as there are."""
    return max(1, config.batch // (config.accumulate * ranks.count()))
