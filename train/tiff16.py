"""TIFFs of 16 bits a sample, of which Pillow gets planes and inverted greys wrong, and does not read colours."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile

HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# What makes an array upright, by EXIF's orientation.
UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}

# What it says of a broken file is in the exception, too.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


@dataclass
class Samples:
    """pixels: (H, W, 1) grey or (H, W, 3) RGB, uint16, upright. alpha: (H, W, 1) or None. frames: pictures in the file,
    of which this is the first. profile: its ICC profile.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None
    frames: int
    profile: bytes | None


def read(source: Path | BinaryIO) -> Samples | None:
    """What a TIFF holds; None if its samples are not of 16 bits. Raises ValueError for kinds that are not read, and
    tifffile's exceptions for broken files.
    """
    with tifffile.TiffFile(source) as file:
        return _samples(file) if file.pages[0].dtype == np.uint16 else None


def _samples(file: tifffile.TiffFile) -> Samples:
    page = file.pages[0]
    kind, axes, extra = page.photometric.name, page.axes, page.extrasamples
    channels = {"MINISWHITE": 1, "MINISBLACK": 1, "RGB": 3}.get(kind, 0)
    spare = page.samplesperpixel - channels  # taken for alpha, declared or not
    if not channels or axes not in ("YX", "YXS", "SYX") or spare > 1 or page.bitspersample != 16:
        raise ValueError(
            "TIFFs of more than 8 bits are read if they are 16-bit grey or RGB, with or without one alpha channel; "
            f"this one is {page.bitspersample}-bit {kind} {page.shape}"
        )
    samples = page.asarray()
    samples = samples[..., None] if axes == "YX" else np.moveaxis(samples, 0, -1) if axes == "SYX" else samples
    tag = page.tags.get("Orientation")
    samples = upright(samples, tag.value if tag else 1)
    pixels, alpha = samples[..., :channels], samples[..., channels:] if spare else None
    if kind == "MINISWHITE":
        pixels = 65535 - pixels
    if extra and extra[0].name == "ASSOCALPHA":  # the colours are multiplied by alpha
        pixels = (pixels / np.maximum(alpha, 1) * 65535).clip(0, 65535).round().astype(np.uint16)
    return Samples(pixels, alpha, len(file.pages), page.iccprofile)


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """An array (H, W, ...) turned as EXIF's orientation says."""
    return np.ascontiguousarray(UPRIGHT.get(orientation, np.asarray)(samples))
