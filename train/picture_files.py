"""Picture files as arrays of 8- or 16-bit pixels and back. Nothing is overwritten, and no half file is left behind.

Pillow reads and writes 8 bits of colour; 16 bits of PNG and TIFF are imagecodecs' and tifffile's.
"""

import io
import itertools
import os
import secrets
import zlib
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import ExifTags, Image, PngImagePlugin

from train import tiff16
from train.images import PNG_HEADER, RESULT, files_under, is_16_bit_png, readable


class PictureError(Exception):
    """A file that can't be read as a picture; the message says why, and is to follow the file's name."""


@dataclass
class Picture:
    """An upright picture.

    pixels: (H, W, 1) grey or (H, W, 3) RGB, uint8 or uint16. alpha: (H, W, 1) of the same type, or None. format: the
    file's, as Pillow names it. frames: how many pictures the file holds; this is the first. profile: its ICC profile.
    exif: its EXIF data without the orientation (not of TIFF files, where they are mixed with the layout's).
    """

    pixels: np.ndarray
    alpha: np.ndarray | None
    format: str
    frames: int = 1
    profile: bytes | None = None
    exif: bytes | None = None

    def describe(self) -> str:
        """Size, depth and kind, for people."""
        height, width, channels = self.pixels.shape
        kind = ("grey" if channels == 1 else "RGB") + ("" if self.alpha is None else " with alpha")
        first = "" if self.frames == 1 else f", the first of {self.frames} pictures in it"
        return f"{width} x {height}, {8 * self.pixels.itemsize}-bit {kind}{first}"


def find(paths: list[str]) -> list[Path]:
    """The files that `paths` name, each once: files as given, and the pictures in folders and in their folders.

    From folders, hidden files and earlier results, NAME-denoised, are left out.
    Raises FileNotFoundError or ValueError in one sentence: no such path, a folder without pictures.
    """
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        for file in _in_folder(path) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read(path: Path) -> Picture:
    """The picture in the file `path`. Palettes, CMYK and other colour spaces become RGB, 1 bit becomes 8-bit grey.

    Raises PictureError.
    """
    # Pillow raises many kinds of exceptions for broken files, struct.error and SyntaxError among them.
    try:
        with path.open("rb") as file:
            header = file.read(25)
        if header.startswith(tiff16.HEADERS) and (found := tiff16.read(path)):
            return Picture(found.pixels, found.alpha, "TIFF", found.frames, found.profile)
        with Image.open(path) as image:
            if is_16_bit_png(header):
                return _picture(image, imagecodecs.png_decode(path.read_bytes()))
            image.load()
            return _picture(image, *_pixels(image))
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"can't be read as a picture: {said}") from error


def write(picture: Picture, source: Path, folder: Path) -> Path:
    """Write the result for the file `source` into `folder`: NAME-denoised.EXT, or NAME-denoised-2.EXT, ... if taken.

    In the picture's format where that is lossless, else as PNG. Returns the path, which appears when all is written.
    """
    kept = picture.format if _holds(picture) else "PNG"
    suffix = f".{kept.lower()}"
    if kept == "PPM":  # its names say what is inside
        suffix = ".pgm" if picture.pixels.shape[2] == 1 else ".ppm"
    fits = kept != "PPM" or source.suffix.lower() in (suffix, ".pnm")
    if fits and Image.registered_extensions().get(source.suffix.lower()) == kept:
        suffix = source.suffix
    partial = folder / f".{secrets.token_hex(8)}.partial"  # whatever the length of its name
    try:
        with partial.open("xb") as file:
            file.write(_encoded(picture, kept))
            file.flush()
            os.fsync(file.fileno())
        for number in itertools.count(1):
            path = folder / f"{source.stem}-denoised{'' if number == 1 else f'-{number}'}{suffix}"
            if _claim(partial, path):
                return path
    finally:
        partial.unlink(missing_ok=True)


def _in_folder(folder: Path) -> list[Path]:
    suffixes = readable()
    files = sorted(
        file
        for file in files_under(folder)
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and not RESULT.fullmatch(file.stem)
    )
    if not files:
        raise ValueError(f"{folder} holds no pictures to denoise")
    return files


def _picture(image: Image.Image, samples: np.ndarray, profile: bool = True) -> Picture:
    """The samples (H, W) or (H, W, 1 to 4) of an image file, with what else the file holds."""
    exif = image.getexif()
    orientation = exif.pop(ExifTags.Base.Orientation, 1)
    samples = tiff16.upright(samples if samples.ndim == 3 else samples[..., None], orientation)
    colours = samples.shape[2] - (samples.shape[2] % 2 == 0)
    return Picture(
        samples[..., :colours],
        samples[..., colours:] if colours < samples.shape[2] else None,
        image.format,
        getattr(image, "n_frames", 1),
        image.info.get("icc_profile") if profile else None,
        exif.tobytes() if exif and image.format != "TIFF" else None,
    )


def _pixels(image: Image.Image) -> tuple[np.ndarray, bool]:
    """The samples of a loaded image, and whether its colour profile still describes them."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and 8 or 16 bits are wanted")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are 32-bit numbers, and 8 or 16 bits are wanted")
        return values.astype(np.uint16), True
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("L" if grey else "RGB") + ("A" if image.has_transparency_data else "")
    if image.mode == "La":
        image = image.convert("LA")
    return np.asarray(image.convert(mode)), image.mode not in ("CMYK", "LAB")


def _holds(picture: Picture) -> bool:
    """Whether the picture's own format holds all that it is without loss."""
    more = any(part is not None for part in (picture.alpha, picture.profile, picture.exif))
    plain = picture.pixels.dtype == np.uint8 and not more
    return picture.format in ("PNG", "TIFF") or (plain and picture.format in ("BMP", "PPM", "TGA"))


def _encoded(picture: Picture, format: str) -> bytes:
    grey, alpha = picture.pixels.shape[2] == 1, picture.alpha is not None
    samples = np.concatenate([picture.pixels, picture.alpha], axis=2) if alpha else picture.pixels
    samples = samples[..., 0] if samples.shape[2] == 1 else samples
    if format == "PNG":
        return _with_chunks(imagecodecs.png_encode(samples), picture)
    file = io.BytesIO()
    if format == "TIFF":
        tifffile.imwrite(
            file,
            samples,
            photometric="minisblack" if grey else "rgb",
            extrasamples=["unassalpha"] if alpha else None,
            compression="zlib",
            predictor=True,
            iccprofile=picture.profile,
            metadata=None,
        )
    else:
        Image.fromarray(samples).save(file, format)
    return file.getvalue()


def _with_chunks(png: bytes, picture: Picture) -> bytes:
    """The PNG with the picture's profile and EXIF data, which imagecodecs can't write."""
    chunks, start = io.BytesIO(), len(PNG_HEADER) + 25  # they come after the first chunk, IHDR
    if picture.profile:
        PngImagePlugin.putchunk(chunks, b"iCCP", b"ICC profile\0\0", zlib.compress(picture.profile))
    if picture.exif:
        PngImagePlugin.putchunk(chunks, b"eXIf", picture.exif.removeprefix(b"Exif\0\0"))
    return png[:start] + chunks.getvalue() + png[start:]


def _claim(partial: Path, path: Path) -> bool:
    """Give the file its final name, unless that is taken: then False."""
    try:
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # FAT and some network drives know no links
        return _claim_without_link(partial, path)


def _claim_without_link(partial: Path, path: Path) -> bool:
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    try:
        partial.replace(path)
    except BaseException:
        path.unlink()  # our own empty file
        raise
    return True
