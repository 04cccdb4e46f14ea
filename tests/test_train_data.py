"""The data of training: what `--data` accepts and refuses, how files become pixels, and samples as pure functions."""

import io
import itertools
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train import data, images
from train.config import Config


def picture(seed, size=(20, 16), mode="RGB"):
    """A random picture of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folder_of(path, count, first=0):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        picture(i).save(path / f"{i}.png")
    return path


def archive(path, files):
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return path


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "png")
    return buffer.getvalue()


def names(splits):
    return {split: [entry.name for entry in entries] for split, entries in splits.items()}


def keep(image, split):
    return image


def config(**settings):
    return Config(**({"size": 8, "levels": 1, "depth": 1, "hidden": 4, "batch": 2, "fit": "crop"} | settings))


def training(seed=0, prior_noise=0.2, augment="mirror"):
    pictures = [np.asarray(picture(i, (24, 17))) for i in range(3)]
    return data.TrainingSamples(pictures, 8, 6, augment, prior_noise, seed)


# What --data may be


def test_photographs_are_installed_real_and_split_by_scene():
    splits = names(images.photographs())
    assert all(splits.values())
    everything = sum(splits.values(), [])
    assert len(set(everything)) == len(everything)
    pictures = images.load("photos", keep)
    assert all(
        p.dtype == np.uint8 and min(p.shape[:2]) >= 300 and p.shape[2] == 3 for p in pictures.train + pictures.test
    )
    assert all((p[..., 0] != p[..., 2]).any() for p in pictures.test)
    assert not pictures.skipped


def test_plain_folder_is_divided_once_and_disjointly(tmp_path):
    folder_of(tmp_path / "a" / "deep", 30)
    folder_of(tmp_path / "b", 30, first=30)
    splits = names(images.find(tmp_path))
    assert {split: len(found) for split, found in splits.items()} == {"train": 54, "val": 3, "test": 3}
    assert len(set(sum(splits.values(), []))) == 60
    assert splits == names(images.find(tmp_path))
    assert splits["test"] != sorted(splits["test"])[:3] or splits["val"] != sorted(splits["val"])


@pytest.mark.parametrize("shape", ["folders", "zips", "one zip", "one zip with a top folder"])
def test_given_splits_are_kept(tmp_path, shape):
    seeds = {"train": [1, 2, 10], "validation": [3], "test": [4, 5]}
    files = {f"{split}/{seed}.png": png(seed) for split, members in seeds.items() for seed in members}
    path = tmp_path
    if shape == "folders":
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
    elif shape == "zips":
        for split, members in seeds.items():
            archive(tmp_path / f"{split}.zip", {f"{seed}.png": png(seed) for seed in members})
    else:
        top = "faces/" if shape.endswith("folder") else ""
        path = archive(tmp_path / "all.zip", {top + name: content for name, content in files.items()})
    pictures = images.load(str(path), keep)
    for found, members in ((pictures.train, [1, 2, 10]), (pictures.val, [3]), (pictures.test, [4, 5])):
        assert len(found) == len(members)
        assert all(np.array_equal(a, np.asarray(picture(seed))) for a, seed in zip(found, members, strict=True))


def test_celeba_hq_is_split_in_file_order():
    entries = [images.Entry(f"{i}.jpg", bytes) for i in range(30_000)]
    splits = names(images.divide(entries, "celeba"))
    assert [len(s) for s in splits.values()] == [27_000, 1_500, 1_500]
    assert (splits["train"][0], splits["train"][-1]) == ("0.jpg", "26999.jpg")
    assert (splits["val"][0], splits["test"][0], splits["test"][-1]) == ("27000.jpg", "28500.jpg", "29999.jpg")
    assert len(images.divide(entries[:-1], "celeba")["val"]) == 1_499


def test_files_are_in_natural_order_without_hidden_ones(tmp_path):
    content = png(0)
    path = archive(
        tmp_path / "x.zip",
        {
            "train/10.png": content,
            "train/9.png": content,
            "train/._9.png": b"",
            "__MACOSX/train/9.png": b"",
            "train/a.txt": b"",
        }
        | {"val/1.png": content, "test/1.PNG": content},
    )
    assert names(images.find(path))["train"] == ["train/9.png", "train/10.png"]


# What --data may not be


def no_such(tmp_path):
    return tmp_path / "nowhere"


def empty(tmp_path):
    return tmp_path


def only_text(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def text_as_zip(tmp_path):
    (tmp_path / "data.zip").write_text("no zip")
    return tmp_path / "data.zip"


def truncated_zip(tmp_path):
    path = archive(tmp_path / "data.zip", {f"{i}.png": png(i) for i in range(5)})
    path.write_bytes(path.read_bytes()[:-40])
    return path


def broken_split_zip(tmp_path):
    folder_of(tmp_path / "val", 1)
    folder_of(tmp_path / "test", 1)
    (tmp_path / "train.zip").write_text("no zip")
    return tmp_path


def single_picture(tmp_path):
    picture(0).save(tmp_path / "one.png")
    return tmp_path / "one.png"


def no_test_split(tmp_path):
    folder_of(tmp_path / "train", 3)
    folder_of(tmp_path / "val", 1)
    return tmp_path


def empty_split(tmp_path):
    (no_test_split(tmp_path) / "test").mkdir()
    return tmp_path


def too_few(tmp_path):
    return folder_of(tmp_path, 2)


def all_broken(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8 no more")
    return tmp_path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_such, "does not exist"),
        (empty, r"holds no images \(0 files of other kinds\)"),
        (only_text, r"holds no images \(1 files of other kinds\)"),
        (text_as_zip, "is neither a folder nor a zip that can be read"),
        (truncated_zip, "is neither a folder nor a zip that can be read"),
        (broken_split_zip, "train.zip is neither a folder nor a zip"),
        (single_picture, "one.png is neither a folder nor a zip"),
        (no_test_split, "has train and val but no images for test; give all of train, val and test"),
        (empty_split, "test holds no images"),
        (too_few, "holds 2 image files; training, validation and test need at least one each"),
        (all_broken, "none of the 36 train files in .* is an image that Pillow can read"),
    ],
)
def test_unusable_data_is_one_sentence(make, message, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        data.prepare(config(data=str(make(tmp_path))))
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


def test_broken_files_among_good_ones_are_counted(tmp_path):
    folder_of(tmp_path / "train", 6)
    folder_of(tmp_path / "val", 1)
    folder_of(tmp_path / "test", 1)
    whole = (tmp_path / "train" / "0.png").read_bytes()
    (tmp_path / "train" / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "3.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out 2 of 8 files that could not be read as images: 0.png, 3.png"):
        prepared = data.prepare(config(data=str(tmp_path)))
    assert len(prepared.train.pictures) == 4 and len(prepared.skipped) == 2
    samples = [prepared.train[0, i] for i in range(len(prepared.train))]
    assert all(torch.isfinite(s["clean"]).all() for s in samples)


def test_a_damaged_member_of_a_zip_is_counted(tmp_path):
    path = archive(tmp_path / "x.zip", {f"{split}/{i}.png": png(i) for split in images.SPLITS for i in range(3)})
    content = bytearray(path.read_bytes())
    start = content.find(b"IDAT") + 40
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="left out 1 of 9 files"):
        assert len(images.load(str(path), keep).train) == 2


def test_an_epoch_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an epoch of 3 training images is smaller than a batch of 16"):
        data.prepare(config(data=str(folder_of(tmp_path, 5)), batch=16))


# Pixels


def test_kinds_of_images():
    rgb = picture(0)
    grey = np.asarray(rgb.convert("L"))
    ramp = np.linspace(0, 65535, 320).reshape(16, 20).astype(np.uint16)
    clear = rgb.convert("RGBA")
    clear.putalpha(0)
    palette = rgb.quantize(8)
    palette.info["transparency"] = 0
    turned = Image.new("RGB", (20, 16))
    exif = turned.getexif()
    exif[0x0112] = 6  # stored on its side
    cases = {
        "grey": (rgb.convert("L"), np.repeat(grey[..., None], 3, 2)),
        "16-bit grey": (Image.fromarray(ramp), np.repeat(np.rint(ramp / 257).astype(np.uint8)[..., None], 3, 2)),
        "float in [0, 1]": (Image.fromarray(grey.astype(np.float32) / 255), np.repeat(grey[..., None], 3, 2)),
        "float in [0, 255]": (Image.fromarray(grey.astype(np.float32)), np.repeat(grey[..., None], 3, 2)),
        "opaque": (rgb.convert("RGBA"), np.asarray(rgb)),
        "transparent": (clear, np.full((16, 20, 3), 255, np.uint8)),
        "black and white": (rgb.convert("1"), np.asarray(rgb.convert("1").convert("RGB"))),
        "CMYK": (rgb.convert("CMYK"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
    }
    for name, (image, wanted) in cases.items():
        found = np.asarray(images.to_rgb(image))
        assert found.dtype == np.uint8 and np.array_equal(found, wanted), name
    index_zero = np.asarray(palette) == 0
    assert index_zero.any() and (np.asarray(images.to_rgb(palette))[index_zero] == 255).all()
    buffer = io.BytesIO()
    turned.save(buffer, "jpeg", exif=exif)
    assert images.to_rgb(Image.open(buffer)).size == (16, 20)
    with pytest.raises(ValueError, match="NaN or infinite"):
        images.to_rgb(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def test_resized_and_cropped_to_size(tmp_path):
    folder_of(tmp_path / "train", 2)
    for split in ("val", "test"):
        folder_of(tmp_path / split, 1)
    picture(9, (5, 40)).save(tmp_path / "train" / "tall.png")
    resized = data.prepare(config(data=str(tmp_path), fit="resize", eval_size=16))
    assert [p.shape for p in resized.train.pictures] == [(8, 8, 3)] * 3
    assert resized.test.pictures[0].shape == (16, 16, 3)
    cropped = data.prepare(config(data=str(tmp_path)))
    assert sorted(p.shape for p in cropped.train.pictures) == [(16, 20, 3), (16, 20, 3), (64, 8, 3)]
    assert all(cropped.train[0, i]["clean"].shape == (3, 8, 8) for i in range(3))
    assert len(cropped.test) == 4
    picture(10, (4000, 100)).save(tmp_path / "train" / "wide.png")
    widest = max(p.shape[1] for p in data.prepare(config(data=str(tmp_path))).train.pictures)
    assert widest == data.LONGEST


def test_tiles_do_not_overlap():
    pictures = [np.arange(20 * 17 * 3).reshape(20, 17, 3), 5000 + np.arange(16 * 8 * 3).reshape(16, 8, 3)]
    found = data.tiles(pictures, 8, 100)
    assert len(found) == 4 + 2
    values = np.concatenate([t.ravel() for t in found])
    assert len(np.unique(values)) == len(values)
    assert all(np.array_equal(a, b) for a, b in zip(found, data.tiles(pictures, 8, 3), strict=False))


# Samples


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_samples_are_pure_functions_of_seed_epoch_and_index():
    samples = training()
    keys = [(epoch, index) for epoch in (0, 1) for index in range(6)]
    first = {key: samples[key] for key in keys}
    again = {key: training()[key] for key in reversed(keys)}
    assert all(equal(first[key], again[key]) for key in keys)
    assert not any(torch.equal(first[0, i][k], first[1, i][k]) for i in range(6) for k in ("noise", "prior"))
    levels = torch.stack([first[key]["level"] for key in keys])
    assert len(levels.unique()) == len(keys) and 0 <= levels.min() < 0.3 and 0.7 < levels.max() < 1
    assert not torch.equal(first[0, 0]["noise"], training(seed=1)[0, 0]["noise"])
    assert not torch.equal(first[0, 0]["noise"], first[0, 3]["noise"])  # the same picture, another sample of it


def test_held_out_samples_never_change_and_differ_from_training():
    pictures = training().pictures
    val, test = (data.FixedSamples(pictures, stream, 0.2) for stream in (data.VAL, data.TEST))
    assert equal(val[1], val[1])
    assert not torch.equal(val[0]["noise"], test[0]["noise"])
    assert len(val) == 3


def test_workers_and_resumed_epochs_see_the_same_batches():
    prepared = data.Data(training(), data.FixedSamples([], data.VAL, 0), data.FixedSamples([], data.TEST, 0), [])
    batches = {}
    for workers in (0, 2):
        loader = data.training_loader(prepared, config(workers=workers))
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches[workers, epoch] = list(loader)
    assert all(equal(a, b) for e in (0, 1) for a, b in zip(batches[0, e], batches[2, e], strict=True))
    resumed = data.training_loader(prepared, config())
    resumed.sampler.set_epoch(1)
    assert all(equal(a, b) for a, b in zip(resumed, batches[0, 1], strict=True))
    assert not all(equal(a, b) for a, b in zip(batches[0, 0], batches[0, 1], strict=True))


def test_processes_share_an_epoch_without_overlap():
    shares = [list(data.EpochSampler(11, seed=0, rank=rank, processes=2)) for rank in range(2)]
    assert [len(s) for s in shares] == [5, 5]
    assert len(set(shares[0]) | set(shares[1])) == 10
    assert {key[1] for key in data.EpochSampler(11, seed=0)} == set(range(11))


def test_crops_and_flips_come_from_the_picture():
    samples = training()
    flipped = 0
    for index in range(6):
        for epoch in range(5):
            clean = (samples[epoch, index]["clean"] * 255).round().byte()
            whole = torch.tensor(samples.pictures[index % 3]).permute(2, 0, 1)
            windows = whole.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)
            straight = (windows == clean).all(dim=(2, 3, 4)).any()
            mirrored = (windows == clean.flip(2)).all(dim=(2, 3, 4)).any()
            assert straight != mirrored
            flipped += int(mirrored)
    assert 5 < flipped < 25


def test_augmentation_is_what_its_name_says():
    crop = np.arange(4 * 4 * 3).reshape(4, 4, 3)
    made = {
        how: {data.augmented(crop, how, np.random.default_rng(i)).tobytes() for i in range(600)}
        for how in ("none", "mirror", "all")
    }
    assert made["none"] == {crop.tobytes()}
    assert made["mirror"] == {crop.tobytes(), crop[:, ::-1].tobytes()}
    everything = {
        np.rot90(m, turn)[..., list(order)].tobytes()
        for m in (crop, crop[:, ::-1])
        for turn in range(4)
        for order in itertools.permutations(range(3))
    }
    assert len(everything) == 48 and made["all"] == everything


def test_dequantisation_stays_within_its_bin_and_noise_has_its_spread():
    pixels = torch.randint(0, 256, (3, 64, 64)).float()
    x = data.dequantise(pixels, 0.0, np.random.default_rng(0))
    assert ((x * 256 >= pixels) & (x * 256 <= pixels + 1)).all()
    assert 0.45 < (x * 256 - pixels).mean() < 0.55
    spreads = torch.tensor(
        [(data.dequantise(pixels, 0.2, np.random.default_rng(i)) - pixels / 256).std() for i in range(200)]
    )
    assert 0 < spreads.min() < 0.02 and 0.18 < spreads.max() < 0.21 and 0.08 < spreads.mean() < 0.12
    noise = data.gaussian(np.random.default_rng(0), torch.empty(3, 64, 64))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03 and noise.dtype == torch.float32


def test_reading_good_pictures_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.prepare(config(data=str(folder_of(Path(tmp_path), 5))))
