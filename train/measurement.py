"""What is measured of the images: the operator A of `y = A x + noise`, a sample's mask, the noise on y.

Images are square, (N, 3, side, side). Everything random is drawn by the sample that it belongs to (`train.data`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowkern.operators import (
    Blur,
    Downsample,
    Identity,
    Inpainting,
    Operator,
    RandomProjection,
    gaussian_kernel,
)
from train.options import setting

CHANNELS = 3
GROUP = "measurement"
DEFAULTS = {
    "identity": {},
    "inpaint": {"keep": None, "hole": None, "seed": None},
    "blur": {"sigma": 1.5, "boundary": "circular"},
    "sr": {"factor": 2},
    "cs": {"ratio": 0.25, "seed": 0},
}


@dataclass
class MeasurementSettings:
    """The options that say what is measured. None: the default of the operator that they belong to."""

    operator: Literal["identity", "inpaint", "blur", "sr", "cs"] = setting(
        GROUP,
        "identity",
        "What is measured, before noise: the image itself (denoising), some of its pixels, a Gaussian blur of it, "
        "means of its blocks (super-resolution), random projections (compressed sensing).",
    )
    inpaint_keep: float | None = setting(
        GROUP, None, "Fraction of pixels that are measured, in random places (default: 0.5; 1 if there is a hole)."
    )
    inpaint_hole: int | None = setting(GROUP, None, "Side of a square in a random place that is not measured.")
    inpaint_seed: int | None = setting(
        GROUP, None, "One mask for all images, drawn with this seed (default: each image has its own)."
    )
    blur_sigma: float | None = setting(GROUP, None, "Standard deviation of the blur in pixels (default: 1.5).")
    blur_boundary: Literal["circular", "reflect"] | None = setting(
        GROUP, None, "How images go on beyond their border (default: circular)."
    )
    sr_factor: int | None = setting(GROUP, None, "Side of the blocks in pixels (default: 2).")
    cs_ratio: float | None = setting(GROUP, None, "Projections per number in the image (default: 0.25).")
    cs_seed: int | None = setting(GROUP, None, "Seed of the projections, the same for all images (default: 0).")


NAMES = tuple(f.name for f in fields(MeasurementSettings))


@dataclass(frozen=True)
class Measurement:
    """An operator and its settings, defaults filled in. Two are equal if they measure the same."""

    kind: str = "identity"
    settings: dict = field(default_factory=dict)
    _operators: dict = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, given) -> "Measurement":
        """The measurement that an object with the fields of `MeasurementSettings` describes.

        Raises ValueError in one sentence for a setting out of its range, or of another operator.
        """
        values = {name: getattr(given, name) for name in NAMES[1:] if getattr(given, name) is not None}
        kind = given.operator
        for name in values:
            if name.split("_")[0] != kind:
                raise ValueError(f"{name} is a setting of operator {name.split('_')[0]!r}; the operator is {kind!r}")
        made = cls(kind, DEFAULTS[kind] | {name.split("_")[1]: value for name, value in values.items()})
        if kind == "inpaint" and made.settings["keep"] is None:
            made.settings["keep"] = 1.0 if made.settings["hole"] else 0.5
        made._check()
        return made

    def _check(self) -> None:
        for name, holds, wanted in (
            ("keep", lambda value: 0 < value <= 1, "in (0, 1]"),
            ("hole", lambda value: value is None or value >= 1, "at least 1"),
            ("seed", lambda value: value is None or value >= 0, "0 or more"),
            ("sigma", lambda value: 0 < value < math.inf, "positive"),
            ("factor", lambda value: value >= 2, "at least 2"),
            ("ratio", lambda value: 0 < value <= 1, "in (0, 1]"),
        ):
            if name in self.settings and not holds(self.settings[name]):
                raise ValueError(f"{self.kind}_{name} must be {wanted}, got {self.settings[name]}")

    def check_side(self, side: int) -> None:
        """Raise ValueError in one sentence if images of this side can't be measured so."""
        s = self.settings
        if self.kind == "inpaint" and s["hole"] and s["hole"] >= side:
            raise ValueError(f"inpaint_hole must be smaller than the images of {side}x{side}, got {s['hole']}")
        if self.kind == "sr" and side % s["factor"]:
            raise ValueError(f"sr_factor {s['factor']} does not divide the side of images of {side}x{side}")
        if self.kind == "blur" and len(gaussian_kernel(s["sigma"])) > side:
            wide = len(gaussian_kernel(s["sigma"]))
            raise ValueError(f"blur_sigma {s['sigma']} needs {wide} pixels, more than images of {side}x{side} have")

    @property
    def is_identity(self) -> bool:
        return self.kind == "identity"

    @property
    def has_inverse(self) -> bool:
        """Whether data consistency can be exact."""
        return self.settings.get("boundary") != "reflect"

    @property
    def varies(self) -> bool:
        """Whether each image has a mask of its own."""
        return self.kind == "inpaint" and self.settings["seed"] is None

    def describe(self) -> str:
        """What is measured, in words."""
        s = self.settings
        if self.kind == "inpaint":
            hole = f"all but a hole of {s['hole']}x{s['hole']}" if s["hole"] else ""
            share = f"{100 * s['keep']:g} % of the pixels" if s["keep"] < 1 or not hole else ""
            drawn = "drawn for each image" if self.varies else f"the same for all images (seed {s['seed']})"
            return f"{' of '.join(filter(None, (share, hole)))}, {drawn}"
        if self.kind == "blur":
            return f"a Gaussian blur of {s['sigma']:g} pixels ({s['boundary']})"
        if self.kind == "sr":
            return f"means of {s['factor']}x{s['factor']} blocks"
        if self.kind == "cs":
            return f"{100 * s['ratio']:g} % random projections (seed {s['seed']})"
        return "the image"

    def noise_shape(self, side: int) -> tuple[int, ...]:
        """The shape of the noise of one image, that of its measurement."""
        if self.kind == "sr":
            return (CHANNELS, side // self.settings["factor"], side // self.settings["factor"])
        return (len(self.operator(side).indices),) if self.kind == "cs" else (CHANNELS, side, side)

    def mask(self, side: int, rng: np.random.Generator) -> Tensor:
        """A random mask (1, side, side), 1 where a pixel is measured; at least one is."""
        measured = np.ones((side, side), dtype=bool)
        if hole := self.settings["hole"]:
            top, left = rng.integers(0, side - hole + 1, 2)
            measured[top : top + hole, left : left + hole] = False
        there = np.flatnonzero(measured)
        count = max(1, round(self.settings["keep"] * len(there)))
        mask = np.zeros(side * side, dtype=np.float32)
        mask[rng.permutation(there)[:count]] = 1
        return torch.from_numpy(mask.reshape(1, side, side))

    def operator(self, side: int) -> Operator:
        """A for images of this side. Where each has a mask of its own, one that measures every pixel stands for it."""
        if side not in self._operators:
            self._operators[side] = self._make(side)
        return self._operators[side]

    def _make(self, side: int) -> Operator:
        s = self.settings
        if self.kind == "inpaint":
            whole = torch.ones(1, side, side)
            return Inpainting(whole if self.varies else self.mask(side, np.random.default_rng(s["seed"])))
        if self.kind == "blur":
            return Blur(gaussian_kernel(s["sigma"]), s["boundary"])
        if self.kind == "sr":
            return Downsample(s["factor"])
        return RandomProjection((CHANNELS, side, side), s["ratio"], s["seed"]) if self.kind == "cs" else Identity()

    def given(self, side: int, mask: Tensor | None, device: torch.device) -> dict:
        """What methods are given with measurements of images of this side: their operator, by name, if it is needed.

        mask: (N, 1, side, side) where each image has its own.
        """
        if self.is_identity:
            return {}
        if not self.varies:
            return {"operator": self.operator(side).to(device)}
        operator = Inpainting(torch.ones(1, side, side))
        operator.mask = mask  # drawn here: checked as an argument it would have a GPU waited for
        return {"operator": operator}

    def measure(self, batch: dict[str, Tensor], sigma: float | Tensor) -> tuple[Tensor, dict]:
        """The measurement y of a batch of samples, and what methods are `given` with it.

        batch: `clean` (N, 3, side, side), `noise` (N, *noise_shape), and `mask` (N, 1, side, side) if it varies.
        sigma: of the noise, a number or one an image (N,).
        """
        clean, noise = batch["clean"], batch["noise"]
        if isinstance(sigma, Tensor):
            sigma = sigma.reshape(-1, *[1] * (noise.ndim - 1))
        given = self.given(clean.shape[-1], batch.get("mask"), clean.device)
        if self.is_identity:
            return clean + sigma * noise, given
        forward = given["operator"].forward
        if self.kind == "inpaint":  # a pixel that is not measured has no noise either
            return forward(clean + sigma * noise), given
        return forward(clean) + sigma * noise, given


def parts(y: Tensor, operator: Operator | None, count: int) -> Iterator[tuple[Tensor, dict]]:
    """A measurement `count` images at a time, each part with its operator, by name, if there is one."""
    for start in range(0, len(y), count):
        own = operator
        if isinstance(operator, Inpainting) and operator.images > 1:
            own = Inpainting(operator.mask[start : start + count])
        yield y[start : start + count], {} if operator is None else {"operator": own}


def as_image(y: Tensor, operator: Operator | None = None) -> Tensor:
    """The measurement as images (N, 3, side, side): y itself where it is one, else A^+ y: blocks of one colour for
    super-resolution, what was projected on for compressed sensing.
    """
    if isinstance(operator, Downsample):
        return y.repeat_interleave(operator.factor, 2).repeat_interleave(operator.factor, 3)
    return operator.adjoint(y) if isinstance(operator, RandomProjection) else y


def visible(y: Tensor, operator: Operator | None = None) -> Tensor:
    """`as_image` for people, clipped to [0, 1]; pixels that were not measured are magenta."""
    image = as_image(y, operator).clamp(0, 1)
    if not isinstance(operator, Inpainting):
        return image
    return torch.where(operator.mask > 0, image, image.new_tensor([1.0, 0.0, 1.0])[:, None, None])
