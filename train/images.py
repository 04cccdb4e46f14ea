"""Reading pictures: where `--data` may point, and how a file becomes an array of 8-bit RGB pixels.

Every file is decoded here, before training starts; a broken one among good ones is counted and left out.
"""

import hashlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import ExifTags, Image, ImageOps

from train import tiff16
from train.options import PHOTOS

# Pillow's guard against files made to fill the memory; these are the user's own, and may be large.
Image.MAX_IMAGE_PIXELS = None
PNG_HEADER = b"\x89PNG\r\n\x1a\n"
SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
# Names that `train.denoise` gives to its results, which lie beside the pictures that they were made of.
RESULT = re.compile(r".*-denoised(-\d+)?")
CELEBA_HQ = {"train": 27_000, "val": 1_500, "test": 1_500}

# Which photographs of scikit-image's wheel serve what. Tested on are colour photographs of scenes that appear nowhere
# else. The validation pictures were chosen such that total variation, its weight tuned on them, stays within 0.02 dB of
# its best on the test pictures: a very smooth picture there would have handicapped it by 0.7 to 1.5 dB.
PHOTOGRAPHS = {
    "train": (
        "motorcycle_left.png",
        "motorcycle_right.png",
        "rocket.jpg",
        "ihc.png",
        "retina.jpg",
        "hubble_deep_field.jpg",
        "camera.png",
        "brick.png",
        "grass.png",
        "gravel.png",
    ),
    "val": ("chelsea.png", "coins.png"),
    "test": ("astronaut.png", "coffee.png"),
}


@dataclass(frozen=True)
class Entry:
    """One file: its name, for order and messages, and how to get its bytes."""

    name: str
    read: Callable[[], bytes]


@dataclass
class Pictures:
    """Decoded pictures per split, each (H, W, 3) uint8, and the names of files that could not be read.

    listing: see `listing`, of all that was found, read or not. sources: of how many pictures the test images are tiles,
    None if they are whole pictures.
    """

    train: list[np.ndarray]
    val: list[np.ndarray]
    test: list[np.ndarray]
    skipped: list[str] = field(default_factory=list)
    listing: dict[str, str] = field(default_factory=dict)
    sources: int | None = None


def load(
    data: str,
    prepare: Callable[[Image.Image, str], Image.Image],
    limits: dict[str, int | None] | None = None,
    splits: tuple[str, ...] = SPLITS,
    progress: Callable = lambda items, total: items,
) -> Pictures:
    """Read every picture that `data` names: 'photos', or a folder or zip as docs/training.md describes.

    prepare: (RGB image, split) -> the image to keep. limits: at most so many pictures of a split. splits: which to
    read; of the others there are no pictures. progress: wraps the iteration over the files.
    Raises FileNotFoundError or ValueError in one sentence: no such path, not a zip, no image in it, a split missing or
    empty. Warns once with the number of files that look like images and can't be decoded.
    """
    if data == PHOTOS and Path(data).is_dir():
        warnings.warn(
            f"--data {data} are scikit-image's photographs; the folder of that name here is ./{data}", stacklevel=2
        )
    found = photographs() if data == PHOTOS else find(Path(data))
    wanted = [(split, entry) for split in splits for entry in found[split][: (limits or {}).get(split)]]
    total = len(wanted)
    pictures, skipped = {split: [] for split in SPLITS}, []
    with ThreadPoolExecutor() as pool:
        futures = [(split, entry, pool.submit(_decode, entry, split, prepare)) for split, entry in wanted]
        for split, entry, future in progress(futures, total):
            pixels = future.result()
            if pixels is None:
                skipped.append(entry.name)
            else:
                pictures[split].append(pixels)
    for split in splits:
        if not pictures[split]:
            raise ValueError(
                f"none of the {len(found[split])} {split} files in {data} can be read as an image: "
                f"{_some([entry.name for entry in found[split]])}; mend or remove what is broken"
            )
    if skipped:
        named = _some(skipped)
        warnings.warn(
            f"left out {len(skipped)} of {total} files that could not be read as images: {named}", stacklevel=2
        )
    return Pictures(**pictures, skipped=skipped, listing=listing(found))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def listing(found: dict[str, list[Entry]]) -> dict[str, str]:
    """Which files are in each split, in short: their number, and a digest of their names in order."""

    def digest(entries: list[Entry]) -> str:
        return hashlib.sha256("\0".join(entry.name for entry in entries).encode(errors="surrogateescape")).hexdigest()

    return {split: f"{len(found[split])} files, {digest(found[split])[:16]}" for split in SPLITS}


def photographs() -> dict[str, list[Entry]]:
    """The photographs that lie in scikit-image's wheel; nothing is downloaded."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    missing = [name for names in PHOTOGRAPHS.values() for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"this scikit-image ({skimage.__version__}) does not install {', '.join(missing)}; "
            f"pass --data with a folder of images"
        )
    return {split: [_file(folder / name, name) for name in names] for split, names in PHOTOGRAPHS.items()}


def find(path: Path) -> dict[str, list[Entry]]:
    """The files of each split under a folder or zip, without decoding them."""
    if not path.exists():
        raise FileNotFoundError(f"--data {path} does not exist")
    if path.is_file():
        return _split_entries(_zip_entries(path), path)
    kinds = readable() | {".zip"}
    inside = [
        child
        for child in sorted(path.iterdir())
        if not _hidden(child.name) and (child.is_dir() or child.suffix.lower() in kinds)
    ]
    if len(inside) == 1 and inside[0].is_dir() and inside[0].name.lower() not in _SPLIT_NAMES:
        return find(inside[0])  # as unpacking an archive leaves it
    parts, others = {}, []
    for child in inside:
        split = _SPLIT_NAMES.get(child.stem.lower() if child.is_file() else child.name.lower())
        if not split or not (child.is_dir() or child.suffix.lower() == ".zip"):
            others.append(child.name)
            continue
        if split in parts:
            raise ValueError(f"{path} has the {split} images twice, {child.name} is one of them: leave one")
        parts[split] = _folder_entries(child) if child.is_dir() else _zip_entries(child)
    if parts and others:
        warnings.warn(f"{path} has splits, and what lies beside them is not read: {_some(others)}", stacklevel=2)
    return _complete(parts, path) if parts else divide(_folder_entries(path), path)


def divide(entries: list[Entry], path: Path | str) -> dict[str, list[Entry]]:
    """Split pictures that come without splits: 30,000 are CelebA-HQ, in file order; else 90/5/5 %, shuffled once.

    The shuffle does not depend on the run's seed, so that runs with different seeds are tested on the same pictures.
    """
    folders = {part.lower() for entry in entries for part in entry.name.split("/")[:-1]}
    if {_SPLIT_NAMES.get(folder) for folder in folders} >= set(SPLITS):
        warnings.warn(
            f"{path} has folders of train, val and test images deeper in it, which are mixed and divided anew; "
            f"give the folder or zip that they are in to keep them apart",
            stacklevel=2,
        )
    counts = CELEBA_HQ
    if len(entries) != sum(CELEBA_HQ.values()):
        if len(entries) < len(SPLITS):
            raise ValueError(
                f"{path} holds {len(entries)} image files; training, validation and test need at least one each"
            )
        held_out = max(1, len(entries) // 20)
        counts = {"train": len(entries) - 2 * held_out, "val": held_out, "test": held_out}
        entries = [entries[i] for i in np.random.default_rng(0).permutation(len(entries))]
    bounds = np.cumsum([0, *counts.values()])
    return {split: entries[a:b] for split, a, b in zip(SPLITS, bounds[:-1], bounds[1:], strict=True)}


def _split_entries(entries: list[Entry], path: Path) -> dict[str, list[Entry]]:
    """The splits of a zip: its top folders, below a single common one, may be named as splits."""
    names = [entry.name.split("/") for entry in entries]
    depth = 1 if all(len(n) > 2 for n in names) and len({n[0] for n in names}) == 1 else 0
    parts = {}
    for entry, name in zip(entries, names, strict=True):
        split = _SPLIT_NAMES.get(name[depth].lower()) if len(name) > depth + 1 else None
        if split:
            parts.setdefault(split, []).append(entry)
    return _complete(parts, path) if parts else divide(entries, path)


def _complete(parts: dict[str, list[Entry]], path: Path) -> dict[str, list[Entry]]:
    lacking = [split for split in SPLITS if not parts.get(split)]
    if lacking:
        raise ValueError(
            f"{path} has {' and '.join(parts)} but no images for {' and '.join(lacking)}; "
            f"give all of train, val and test, or one folder without splits"
        )
    return parts


def _folder_entries(folder: Path) -> list[Entry]:
    return _images([_file(f, f.relative_to(folder).as_posix()) for f in files_under(folder)], folder)


def files_under(folder: Path) -> Iterator[Path]:
    """The files in a folder and in its folders, linked ones included, each folder once."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # where a folder is found twice, everywhere under the same name
        yield from (file for name in names if (file := Path(where, name)).is_file())


def _file(path: Path, name: str) -> Entry:
    return Entry(name, path.read_bytes)


def _zip_entries(path: Path) -> list[Entry]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is neither a folder nor a zip that can be read ({error})") from None
    infos = [i for i in archive.infolist() if not i.is_dir()]
    return _images([Entry(i.filename, lambda i=i: archive.read(i)) for i in infos], path)


def _images(entries: list[Entry], path: Path) -> list[Entry]:
    """The entries whose suffix Pillow reads, in natural order (2 before 10), but for results of denoising."""
    suffixes = readable()
    found = [e for e in entries if not _hidden(e.name) and Path(e.name).suffix.lower() in suffixes]
    taken, found = found, [e for e in found if not RESULT.fullmatch(Path(e.name).stem)]
    if taken and not found:
        raise ValueError(f"{path} holds no images but results of denoising ({_some([e.name for e in taken])})")
    if not found:
        raise ValueError(f"{path} holds no images ({len(entries)} files of other kinds)")
    return sorted(found, key=lambda e: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", e.name)])


def readable() -> set[str]:
    """The suffixes of files that Pillow reads; some it only writes."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _decode(entry: Entry, split: str, prepare) -> np.ndarray | None:
    # Pillow raises many kinds of exceptions for broken files, struct.error and SyntaxError among them.
    try:
        return np.asarray(prepare(_rgb_in(entry.read()), split))
    except Exception:
        return None


def is_16_bit_png(header: bytes) -> bool:
    """By the first 25 bytes of a file: 16 bits a sample."""
    return header.startswith(PNG_HEADER) and header[24:25] == b"\x10"


def _rgb_in(content: bytes) -> Image.Image:
    if content.startswith(tiff16.HEADERS) and (found := tiff16.read(io.BytesIO(content))):
        parts = [found.pixels] if found.alpha is None else [found.pixels, found.alpha]
        return to_rgb(_of_8_bits(np.concatenate(parts, axis=2)))
    with Image.open(io.BytesIO(content)) as image:
        if is_16_bit_png(content) and not image.mode.startswith("I"):  # of colours Pillow keeps the upper bytes
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            return to_rgb(_of_8_bits(tiff16.upright(imagecodecs.png_decode(content), orientation)))
        image.load()
        return to_rgb(image)


def _of_8_bits(samples: np.ndarray) -> Image.Image:
    samples = (samples / 257).round().astype(np.uint8)
    return Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright: transparent pixels on white, grey in all three channels, 16-bit and float values scaled.

    Raises ValueError for numbers whose scale can't be told.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels are NaN or infinite")
        # 16-bit files arrive as "I;16", or as "I"; floats are taken to be in [0, 1], else in [0, 255].
        whole, low, high = image.mode.startswith("I"), values.min(), values.max()
        full = 65535 if whole else (1 if high <= 1 else 255)
        if not (0 if whole else -full) <= low <= high <= full or full == 255 and high < 2:
            raise ValueError(f"pixels from {low:g} to {high:g} are on no scale that is known")
        image = Image.fromarray(np.clip(values / full * 255, 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
