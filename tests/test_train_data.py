"""The data of training: what `--data` accepts and refuses, how files become pixels, and samples as pure functions."""

import io
import itertools
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image

from train import data, images, picture_files
from train.config import Config
from train.images import Pictures


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


def training(seed=0, prior_noise=0.2, augment="mirror", bits=8, count=3):
    pictures = [np.asarray(picture(i, (24, 17))) for i in range(count)]
    return data.TrainingSamples(pictures, 8, augment, bits, prior_noise, seed)


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


def test_photos_are_a_folder_where_a_path_says_so(tmp_path, monkeypatch):
    """Only the bare word stands for scikit-image's photographs."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "photos", 5)
    for given in ("./photos", "photos/", str(tmp_path / "photos")):
        found = images.load(config(data=given).data, keep)
        assert [len(part) for part in (found.train, found.val, found.test)] == [3, 1, 1]
        assert config(data=config(data=given).data).data == config(data=given).data
    with pytest.warns(UserWarning, match=r"photos are scikit-image's photographs; .* is ./photos$"):
        assert len(images.load(config(data="photos").data, keep).train) == 10


def test_a_file_beside_a_folder_of_splits_changes_nothing(tmp_path):
    for split in ("train", "val", "test"):
        folder_of(tmp_path / "set" / split, 2)
    before = names(images.find(tmp_path))
    (tmp_path / "README.md").write_text("of these pictures")
    assert names(images.find(tmp_path)) == before and len(before["train"]) == 2


def test_splits_that_are_mixed_anew_are_warned_of(tmp_path):
    for split in ("train", "val", "test"):
        folder_of(tmp_path / "set" / split, 2)
    folder_of(tmp_path / "more", 1)
    with pytest.warns(UserWarning, match="has folders of train, val and test images deeper in it"):
        assert sum(map(len, images.find(tmp_path).values())) == 7


def test_names_with_digits_of_other_kinds_and_files_that_pillow_only_writes(tmp_path):
    for name in ("5\N{SUPERSCRIPT TWO}3.png", "10.png", "9.png"):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    assert sorted(sum(names(images.find(tmp_path)).values(), [])) == ["10.png", "5\N{SUPERSCRIPT TWO}3.png", "9.png"]


def test_what_a_division_rests_on_is_listed_and_results_are_no_pictures(tmp_path):
    folder_of(tmp_path, 6)
    before = images.listing(images.find(tmp_path))
    (tmp_path / "x-denoised.png").write_bytes(png(1))
    (tmp_path / "x-denoised-2.png").write_bytes(png(1))
    assert images.listing(images.find(tmp_path)) == before == images.load(str(tmp_path), keep).listing
    (tmp_path / "y.png").write_bytes(png(1))
    now = images.listing(images.find(tmp_path))
    assert before["train"].startswith("4 files, ") and now["train"].startswith("5 files, ")


def test_splits_given_twice_are_refused(tmp_path):
    for name in ("train", "val", "validation", "test"):
        folder_of(tmp_path / name, 1)
    with pytest.raises(ValueError, match="has the val images twice, validation is one of them: leave one"):
        images.find(tmp_path)


@pytest.mark.parametrize("shape", ["folders", "a folder in a folder", "zips", "one zip", "one zip with a top folder"])
def test_given_splits_are_kept(tmp_path, shape):
    seeds = {"train": [1, 2, 10], "validation": [3], "test": [4, 5]}
    files = {f"{split}/{seed}.png": png(seed) for split, members in seeds.items() for seed in members}
    path = tmp_path
    if "folder" in shape and "zip" not in shape:
        top = tmp_path / "celeba" / "faces" if "in a folder" in shape else tmp_path
        for name, content in files.items():
            (top / name).parent.mkdir(exist_ok=True, parents=True)
            (top / name).write_bytes(content)
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


def only_results(tmp_path):
    for name in ("a-denoised", "a-denoised-2"):
        picture(0).save(tmp_path / f"{name}.png")
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
        (all_broken, r"none of the 36 train files in .* can be read as an image: \d+.jpg, \d+.jpg, \d+.jpg, ..."),
        (only_results, r"holds no images but results of denoising \(a-denoised"),
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
    assert len(prepared.train.pictures) == prepared.epoch_images == 4
    assert prepared.pictures.skipped == ["0.png", "3.png"]
    assert all(torch.isfinite(prepared.train[i]["clean"]).all() for i in range(8))


def test_a_damaged_member_of_a_zip_is_counted(tmp_path):
    path = archive(tmp_path / "x.zip", {f"{split}/{i}.png": png(i) for split in images.SPLITS for i in range(3)})
    content = bytearray(path.read_bytes())
    start = content.find(b"IDAT") + 40
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="left out 1 of 9 files"):
        assert len(images.load(str(path), keep).train) == 2


def test_only_the_splits_asked_for_are_read(tmp_path):
    for split in images.SPLITS:
        folder_of(tmp_path / split, 3)
    (tmp_path / "train" / "0.png").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = data.prepare(config(data=str(tmp_path), batch=16), splits=("val", "test"))
    assert prepared.pictures.train == [] and len(prepared.val) == 12
    assert prepared.describe() == "12 validation and 12 test images of 8x8"


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_as_many_held_out_images_as_asked_for(fit, tmp_path):
    for split in images.SPLITS:
        folder_of(tmp_path / split, 5)
    found = data.prepare(config(data=str(tmp_path), fit=fit, val_images=2, test_images=3, eval_size=16))
    assert (len(found.train.pictures), len(found.val), len(found.test)) == (5, 2, 3)
    assert found.describe() == (
        "5 training pictures, 5 samples of 8x8 an epoch; 2 validation and 3 test images of 16x16"
    )


def test_an_epoch_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an epoch of 3 training images is smaller than a batch of 16"):
        settings = config(data=str(folder_of(tmp_path, 5)), batch=16)
        data.training_loader(data.prepare(settings), settings)


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
    for number, kind in ((1.01, np.float32), (300, np.float32), (70000, np.int32)):
        image = np.full((4, 4), number, kind)
        with pytest.raises(ValueError, match="on no scale that is known"):
            images.to_rgb(Image.fromarray(image))


def test_tiffs_of_16_bits_are_read_as_they_are_denoised(tmp_path):
    rgb = np.asarray(picture(0)).astype(np.uint16) * 257
    grey, alpha = rgb[..., 0], np.full((*rgb.shape[:2], 1), 65535, np.uint16)
    kinds = {
        "planes": (rgb.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
        "inverted": (65535 - grey, {"photometric": "miniswhite"}),
        "grey": (grey, {"photometric": "minisblack"}),
        "alpha": (np.concatenate([rgb, alpha], 2), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        "compressed": (rgb, {"photometric": "rgb", "compression": "zlib", "predictor": True}),
    }
    for name, (samples, options) in kinds.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", samples, **options)
        entry = images.Entry(name, (tmp_path / f"{name}.tif").read_bytes)
        found = images._decode(entry, "train", lambda image, split: image)
        denoised = picture_files.read(tmp_path / f"{name}.tif").pixels / 257
        assert np.array_equal(found, np.broadcast_to(denoised, found.shape)), name
        assert np.array_equal(found[..., 0], grey / 257), name


def test_linked_folders_are_followed_and_each_is_read_once(tmp_path):
    folder_of(tmp_path / "elsewhere", 3)
    folder_of(tmp_path / "data", 3, first=3)
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    assert sum(map(len, images.find(tmp_path / "data").values())) == 6
    assert len(picture_files.find([str(tmp_path / "data")])) == 6


def test_pictures_beside_splits_are_told_of(tmp_path):
    for split in images.SPLITS:
        folder_of(tmp_path / split, 2)
    folder_of(tmp_path, 1)
    with pytest.warns(UserWarning, match="has splits, and what lies beside them is not read: 0.png"):
        images.find(tmp_path)


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
    assert all(cropped.train[i]["clean"].shape == (3, 8, 8) for i in range(3))
    assert len(cropped.test) == 4
    picture(10, (4000, 100)).save(tmp_path / "train" / "wide.png")
    widest = max(p.shape[1] for p in data.prepare(config(data=str(tmp_path))).train.pictures)
    assert widest == data.LONGEST


def test_tiles_do_not_overlap():
    pictures = [np.arange(20 * 17 * 3).reshape(20, 17, 3), 5000 + np.arange(16 * 8 * 3).reshape(16, 8, 3)]
    found, sources = data.tiles(pictures, 8, 100)
    assert sources == 2 and data.tiles(pictures, 8, 1)[1] == 1
    assert len(found) == 4 + 2
    values = np.concatenate([t.ravel() for t in found])
    assert len(np.unique(values)) == len(values)
    assert all(np.array_equal(a, b) for a, b in zip(found, data.tiles(pictures, 8, 3)[0], strict=False))


# Samples


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_samples_are_pure_functions_of_seed_and_position():
    samples, positions = training(), range(12)
    first = {i: samples[i] for i in positions}
    again = {i: training()[i] for i in reversed(positions)}
    assert all(equal(first[i], again[i]) for i in positions)
    for key in ("noise", "prior"):
        assert not any(torch.equal(first[i][key], first[j][key]) for i, j in itertools.combinations(positions, 2))
    levels = torch.stack([first[i]["level"] for i in positions])
    assert len(levels.unique()) == len(positions) and 0 <= levels.min() < 0.3 and 0.7 < levels.max() < 1
    other = training(seed=1)
    assert not any(torch.equal(first[i]["noise"], other[i]["noise"]) for i in positions)


def test_the_sequence_passes_through_all_pictures_each_time_in_another_order():
    samples = training(count=7)
    passes = [[samples.picture_at(7 * turn + i) for i in range(7)] for turn in range(6)]
    assert all(sorted(found) == list(range(7)) for found in passes)
    assert len({tuple(found) for found in passes}) == 6
    at_random = np.random.default_rng(0).permutation(42)
    assert {int(i): training(count=7).picture_at(i) for i in at_random} == dict(enumerate(sum(passes, [])))
    assert [training(seed=1, count=7).picture_at(i) for i in range(42)] != sum(passes, [])


@pytest.mark.parametrize(("pictures", "epoch"), [(7, 4), (3, 8), (6, 6)])
def test_epochs_are_consecutive_stretches_of_the_sequence(pictures, epoch):
    """So after any number of whole passes every picture has been shown equally often, however long an epoch is."""
    samples, sampler = training(count=pictures), data.EpochSampler(epoch, batch=2)
    seen = []
    for i in range(pictures):
        sampler.set_epoch(i)
        seen += list(sampler)
    assert seen == list(range(pictures * epoch))
    assert set(Counter(map(samples.picture_at, seen)).values()) == {epoch}


def test_an_epoch_has_whole_batches_only():
    sampler = data.EpochSampler(11, batch=4)
    assert list(sampler) == list(range(8)) and len(sampler) == 8
    sampler.set_epoch(1)
    assert list(sampler) == list(range(8, 16))
    arranged = data.arrange(Pictures(training().pictures, [], []), config(batch=4, epoch_images=11))
    assert [len(batch["clean"]) for batch in data.training_loader(arranged, config(batch=4))] == [4, 4]


def test_held_out_samples_never_change_and_differ_from_training():
    pictures = training().pictures
    val, test = (data.FixedSamples(pictures, stream, 8, 0.2) for stream in (data.VAL, data.TEST))
    assert equal(val[1], val[1])
    assert not torch.equal(val[0]["noise"], test[0]["noise"])
    assert not torch.equal(val[0]["noise"], val[1]["noise"])
    assert len(val) == 3
    settings = [config(seed=seed, size=8) for seed in (0, 1)]
    arranged = [data.arrange(Pictures(pictures, pictures, pictures), c) for c in settings]
    assert equal(arranged[0].test[2], arranged[1].test[2])  # whatever the run's seed


# Batches


def test_workers_and_resumed_epochs_see_the_same_batches():
    prepared = data.arrange(Pictures(training().pictures, [], []), config(epoch_images=6))
    batches = {}
    for workers in (0, 2):
        loader = data.training_loader(prepared, config(workers=workers))
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches[workers, epoch] = list(loader)
    assert [len(found) for found in batches.values()] == [3, 3, 3, 3]
    assert all(equal(a, b) for e in (0, 1) for a, b in zip(batches[0, e], batches[2, e], strict=True))
    resumed = data.training_loader(prepared, config())
    resumed.sampler.set_epoch(1)
    assert all(equal(a, b) for a, b in zip(resumed, batches[0, 1], strict=True))
    assert not any(equal(a, b) for a, b in zip(batches[0, 0], batches[0, 1], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_continues_in_mid_epoch(workers):
    def loader_at(epoch):
        loader = data.TrainingLoader(training(), 12, 2, 1, workers)
        loader.sampler.set_epoch(epoch)
        return loader

    loader = loader_at(3)
    assert loader.state_dict() == {"given": 0}
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state = loader.state_dict()
    rest = list(batches)
    assert len(rest) == 2 and loader.state_dict() == {"given": 0}
    resumed = loader_at(3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for count, found in enumerate(resumed, 1):
        assert equal(found, rest[count - 1])
        assert resumed.state_dict() == {"given": (4 + count) % 6}
    assert count == 2
    resumed.sampler.set_epoch(4)
    assert all(equal(a, b) for a, b in zip(resumed, loader_at(4), strict=True))
    finished = loader_at(4)
    finished.load_state_dict({"given": 0})
    assert len(list(finished)) == 6


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_divide_each_batch_among_them(processes):
    alone = data.EpochSampler(40, batch=6)
    shares = [data.EpochSampler(40, 6, rank, processes) for rank in range(processes)]
    for sampler in (alone, *shares):
        sampler.set_epoch(2)
    assert {len(s) for s in shares} == {36 // processes}
    part, whole, lists = 6 // processes, list(alone), [list(s) for s in shares]
    for i in range(6):
        together = [place for share in lists for place in share[i * part : (i + 1) * part]]
        assert sorted(together) == whole[6 * i : 6 * (i + 1)]


def test_parts_of_all_processes_are_one_process_s_batch(monkeypatch):
    """Also when a batch is worked through in parts."""
    whole = list(data.TrainingLoader(training(), 16, 8, 1, 0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(list(data.TrainingLoader(training(), 16, 8, 2, 0)))
    assert [len(p) for p in parts] == [4, 4]
    for i, batch in enumerate(whole):
        together = torch.cat([p["level"] for share in parts for p in share[2 * i : 2 * i + 2]])
        assert torch.equal(together.sort().values, batch["level"].sort().values)
    with pytest.raises(ValueError, match="^a batch of 6 can't be divided among 2 processes in 2 parts each$"):
        data.TrainingLoader(training(), 16, 6, 2, 0)


def test_the_first_batch_is_whole_in_every_process(monkeypatch):
    arranged = data.arrange(Pictures(training().pictures, [], []), config(batch=4, epoch_images=8))
    (expected, _) = data.training_loader(arranged, config(batch=4))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert equal(data.first_batch(arranged, config(batch=4)), expected)


# Pixels of samples


def test_crops_and_flips_come_from_the_picture():
    samples = training()
    flipped, places = 0, set()
    for position in range(30):
        clean = (samples[position]["clean"] * 255).round().byte()
        whole = torch.tensor(samples.pictures[samples.picture_at(position)]).permute(2, 0, 1)
        windows = whole.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)
        straight = (windows == clean).all(dim=(2, 3, 4))
        mirrored = (windows == clean.flip(2)).all(dim=(2, 3, 4))
        assert straight.any() != mirrored.any()
        flipped += int(mirrored.any())
        places.add(tuple((straight | mirrored).nonzero()[0].tolist()))
    assert 5 < flipped < 25 and len(places) > 15


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


@pytest.mark.parametrize("bits", [5, 8])
def test_dequantisation_stays_within_its_bin(bits):
    pixels = torch.arange(256.0).repeat(3, 16, 1)
    x = data.dequantise(pixels, bits, np.random.default_rng(0)) * 2**bits
    quantised = pixels.int() >> (8 - bits)
    assert ((x >= quantised) & (x <= quantised + 1)).all() and x.dtype == torch.float32
    assert len(quantised.unique()) == 2**bits
    within = x - quantised
    assert abs(within.mean() - 0.5) < 0.01 and abs(within.std() - 12**-0.5) < 0.01


@pytest.mark.parametrize("bits", [5, 8])
def test_samples_are_dequantised_to_the_bits_asked_for(bits):
    for samples in (
        training(prior_noise=0, bits=bits),
        data.FixedSamples(training().pictures, data.TEST, bits, prior_noise=0),
    ):
        sample = samples[1]
        pixels = (sample["clean"] * 255).round().int()
        assert torch.equal((sample["prior"] * 2**bits).floor().int(), pixels >> (8 - bits))


def test_noise_of_the_prior_and_of_the_measurement_have_their_spread():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    samples = data.FixedSamples([pixels] * 200, data.TEST, 8, prior_noise=0.2)
    spreads = torch.tensor([(s["prior"] - s["clean"] * 255 / 256).std() for s in map(samples.__getitem__, range(200))])
    assert 0 < spreads.min() < 0.02 and 0.18 < spreads.max() < 0.21 and 0.08 < spreads.mean() < 0.12
    noise = data.gaussian(np.random.default_rng(0), (3, 64, 64))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03 and noise.dtype == torch.float32


def test_reading_good_pictures_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.prepare(config(data=str(folder_of(Path(tmp_path), 5))))


def test_16_bit_values_are_rounded():
    for colours, kind in ((1, "minisblack"), (3, "rgb")):
        values, file = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1).repeat(colours, 2).squeeze(), io.BytesIO()
        tifffile.imwrite(file, values, photometric=kind)
        for encoded in (file.getvalue(), imagecodecs.png_encode(values)):
            found = np.asarray(images._rgb_in(encoded))[..., 0]
            assert np.array_equal(found, np.rint((values if colours == 1 else values[..., 0]) / 257))


def test_a_16_bit_png_is_upright():
    pixels, exif = np.random.default_rng(0).integers(0, 65536, (4, 6, 3), dtype=np.uint16), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = picture_files.Picture(pixels, None, "PNG", exif=exif.tobytes())
    found = np.asarray(images._rgb_in(picture_files._encoded(turned, "PNG")))
    assert np.array_equal(found, np.rint(np.rot90(pixels, -1) / 257))


def test_floats_up_to_one_exactly():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(np.asarray(images.to_rgb(Image.fromarray(ramp)))[..., 0], np.arange(256).reshape(16, 16))


def test_splits_have_noise_of_their_own(tmp_path):
    for split in images.SPLITS:
        folder_of(tmp_path / split, 2)
    found = data.prepare(config(data=str(tmp_path)))
    train, val, test = (part[0]["noise"] for part in (found.train, found.val, found.test))
    assert not torch.equal(val, test) and not torch.equal(train, val) and not torch.equal(train, test)


def test_few_tiles_are_of_many_pictures():
    pictures = [np.full((64, 64, 3), i, np.uint8) for i in range(4)]
    assert data.tiles(pictures, 8, 16)[1] == 4
