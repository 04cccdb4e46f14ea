"""The command `python -m train.denoise`: tiles without seams, picture files of all kinds, nothing overwritten."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image, ImageCms, ImageOps
from skimage import data
from torch import nn

import flowkern
from train import denoise, denoising, noise_level, picture_files, tiling

SIZES = {"tile": 32, "overlap": 16, "batch": 3, "multiple": 16}
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def run(file, net=None, folder=None):
    """The path that the result of a picture file was written to; the network changes nothing."""
    line = denoising.denoise(net or nn.Identity(), file, folder or file.parent, **SIZES)
    path = type(file)(line.rsplit(" -> ", 1)[1])
    assert line.startswith(f"{file}: ") and path.is_file()
    return path


@pytest.fixture(scope="module")
def network():
    """A tiny unfolded network that is not the identity."""
    torch.manual_seed(0)
    glow = flowkern.Glow((3, 16, 16), levels=1, depth=1, hidden=4, shift=0.5)
    glow.initialize(torch.rand(4, 3, 16, 16))
    net = flowkern.Unfolded(flowkern.GlowProx(glow), folds=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return net


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    """A run's folder with that network and its configuration."""
    path = tmp_path_factory.mktemp("run")
    network.save_pretrained(path / "checkpoints" / "unfolded")
    (path / "config.yaml").write_text(yaml.safe_dump({"sigma": 0.15, "sigma_max": 0.3}))
    return path


@pytest.fixture
def photo(tmp_path):
    """A small picture alone in a folder."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "photo.png"
    Image.fromarray(noise(20, 45, 3)).save(path)
    return path


# Tiles


@pytest.mark.parametrize("tile", [16, 32, 64, 256])
@pytest.mark.parametrize("overlap", [0, 1, 15, 16, 48, 192])
def test_shares_of_tiles_sum_to_one(tile, overlap):
    if overlap > tile - 16:
        with pytest.raises(ValueError, match=f"overlap must be 0 to {tile - 16} for tiles of {tile} pixels"):
            tiling.check(tile, overlap, 1)
        return
    for size in [*range(1, 70), 127, 128, 129, 255, 256, 257, 271, 272, 273, 1000]:
        starts, shares = tiling.starts(size, tile, overlap), tiling.weights(size, tile, overlap)
        length = shares.shape[1]
        assert starts[0] == 0 and starts[-1] + length == -(-size // 16) * 16 and all(s % 16 == 0 for s in starts)
        assert all(a < b <= a + tile - overlap for a, b in zip(starts[:-1], starts[1:], strict=True))
        total = torch.zeros(starts[-1] + length, dtype=torch.float64)
        for start, share in zip(starts, shares, strict=True):
            total[start : start + length] += share
        assert (shares >= 0).all() and not total[size:].any()
        assert (total[:size] - 1).abs().max() < 1e-12
        assert not shares[1:, : overlap // 4].any() and not shares[:-1, length - overlap // 4 :].any()


def test_shares_rise_smoothly():
    shares = tiling.weights(1008, 256, 64)
    assert shares.diff(dim=1).abs().max() < 0.06  # pi / 2 over 32 pixels, at its steepest


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (16, 16), (17, 31), (33, 32), (61, 100)])
def test_an_identity_gives_the_picture_back(size):
    image = torch.rand(3, *size)
    given = image.clone()
    result = tiling.denoise_tiled(nn.Identity(), image, **SIZES)
    assert (result - image).abs().max() < 2e-7 and torch.equal(image, given)


@pytest.fixture
def local():
    """A network that sees two pixels far."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)).double()


@pytest.mark.parametrize("size", [(96, 144), (90, 141), (33, 200), (16, 16), (7, 100)])
def test_tiles_agree_with_the_whole_picture(local, size):
    image = torch.rand(3, *size, dtype=torch.float64)
    with torch.no_grad():
        whole = local(image[None])[0]
    tiled = tiling.denoise_tiled(local, image, **SIZES)
    # At the right and bottom the picture goes on by reflection, if it needs to, where `whole` sees zeros.
    inner = [slice(0, side if side % 16 == 0 else side - 2) for side in size]
    assert (tiled - whole)[:, inner[0], inner[1]].abs().max() < 1e-12


def test_without_overlap_the_seam_would_be_seen(local):
    image = torch.rand(3, 96, 144, dtype=torch.float64)
    with torch.no_grad():
        whole = local(image[None])[0]
    assert (tiling.denoise_tiled(local, image, 32, 0, 3) - whole).abs().max() > 1e-3


def test_a_planted_mistake_in_the_shares_is_seen(monkeypatch):
    weights, image = tiling.weights, torch.rand(3, 61, 100)
    monkeypatch.setattr(tiling, "weights", lambda *sizes: weights(*sizes).clamp(max=0.99))
    assert (tiling.denoise_tiled(nn.Identity(), image, **SIZES) - image).abs().max() > 1e-3


def test_batches_are_as_small_as_asked_and_progress_sees_each():
    seen, shapes = [], []

    class Net(nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            shapes.append(tuple(x.shape))
            return x

    def progress(batches, total):
        for batch in batches:
            seen.append(total)
            yield batch

    tiling.denoise_tiled(Net(), torch.rand(3, 40, 61), **SIZES, progress=progress)
    assert shapes == [(3, 3, 32, 32)] * 2 and seen == [2, 2]


def test_unusable_results_and_settings_are_one_sentence():
    class Broken(nn.Module):
        def forward(self, x):
            return x / 0

    with pytest.raises(FloatingPointError, match="the network's result is not finite"):
        tiling.denoise_tiled(Broken(), torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match=r"image must be floating point and \(C, H, W\), got \(8, 8\) of torch.uint8"):
        tiling.denoise_tiled(nn.Identity(), torch.zeros(8, 8, dtype=torch.uint8))


def test_the_grid_suits_every_kind_of_prox(network):
    assert tiling.grid(network) == 16
    for prox, grid in [
        (SimpleNamespace(multiple=32), 32),
        (SimpleNamespace(multiple=2), 16),
        (SimpleNamespace(multiple=64), 64),
    ]:
        assert tiling.grid(SimpleNamespace(proxes=[prox])) == grid


# Picture files: what goes in comes out


def write_plain(path, samples):
    """A picture file by other means than ours, where there are any."""
    if samples.dtype == np.uint8:
        Image.fromarray(samples).save(path)
    elif path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(samples))
    else:
        alpha = samples.ndim == 3 and samples.shape[2] in (2, 4)
        kind = "rgb" if samples.ndim == 3 and samples.shape[2] > 2 else "minisblack"
        tifffile.imwrite(path, samples, photometric=kind, extrasamples=["unassalpha"] if alpha else None)


def read_plain(path):
    if path.suffix == ".tif":
        return tifffile.imread(path)
    return imagecodecs.png_decode(path.read_bytes())


@pytest.mark.parametrize("size", [(1, 1), (1, 19), (33, 50)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures_come_back_exactly(suffix, dtype, channels, size, tmp_path):
    samples = noise(*size, channels, dtype=dtype)
    samples = samples[..., 0] if channels == 1 else samples
    write_plain(tmp_path / f"a{suffix}", samples)
    path = run(tmp_path / f"a{suffix}")
    result = read_plain(path)
    assert path.name == f"a-denoised{suffix}"
    assert result.dtype == dtype and np.array_equal(result, samples)
    if dtype == np.uint8:
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), samples)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_not_denoised(dtype, tmp_path):
    class Darker(nn.Module):
        def forward(self, x):
            return x / 2 - 0.1

    samples = noise(20, 30, 4, dtype=dtype)
    write_plain(tmp_path / "a.png", samples)
    result, full = read_plain(run(tmp_path / "a.png", Darker())), np.iinfo(dtype).max
    assert np.array_equal(result[..., 3], samples[..., 3])
    wanted = (samples[..., :3] / 2 - 0.1 * full).clip(0).round()
    assert np.abs(result[..., :3] - wanted).max() <= 1 and (result[..., :3] == 0).any()


def test_grey_is_the_mean_of_what_three_channels_give(tmp_path):
    class Shift(nn.Module):
        def forward(self, x):
            return x + torch.tensor([0.0, 0.1, 0.2])[:, None, None]

    Image.fromarray(np.full((5, 9), 100, np.uint8)).save(tmp_path / "a.png")
    assert np.array_equal(read_plain(run(tmp_path / "a.png", Shift())), np.full((5, 9), 126))  # 100 + 0.1 * 255


@pytest.mark.parametrize(
    ("mode", "suffix", "wanted", "written"),
    [
        ("RGB", ".jpg", "RGB", ".png"),
        ("L", ".jpg", "L", ".png"),
        ("CMYK", ".jpg", "RGB", ".png"),
        ("CMYK", ".tif", "RGB", ".tif"),
        ("P", ".png", "RGB", ".png"),
        ("P", ".gif", "RGB", ".png"),
        ("1", ".png", "L", ".png"),
        ("RGB", ".webp", "RGB", ".png"),
        ("RGB", ".bmp", "RGB", ".bmp"),
        ("RGBA", ".tga", "RGBA", ".png"),
        ("L", ".pgm", "L", ".pgm"),
        ("L", ".PNM", "L", ".PNM"),
        ("L", ".ppm", "L", ".pgm"),
        ("1", ".pbm", "L", ".pgm"),
        ("RGB", ".ppm", "RGB", ".ppm"),
        ("RGB", ".JPEG", "RGB", ".png"),
        ("RGB", ".TIFF", "RGB", ".TIFF"),
    ],
)
def test_modes_and_formats(mode, suffix, wanted, written, tmp_path):
    source = tmp_path / f"a{suffix}"
    Image.fromarray(noise(33, 20, 4 if mode == "RGBA" else 3)).convert(mode).save(source)
    path = run(source)
    assert path.name == f"a-denoised{written}"
    with Image.open(source) as before, Image.open(path) as after:
        assert after.mode == wanted and np.array_equal(np.asarray(after), np.asarray(before.convert(wanted)))


def test_a_transparent_colour_becomes_alpha(tmp_path):
    for mode in ("P", "L", "RGB"):
        image = Image.fromarray(noise(9, 9, 3)).convert(mode)
        image.save(tmp_path / f"{mode}.png", transparency=(1, 2, 3) if mode == "RGB" else image.getpixel((4, 4)))
        with Image.open(run(tmp_path / f"{mode}.png")) as result:
            assert result.mode == ("LA" if mode == "L" else "RGBA")
            assert (mode == "RGB") == (result.getpixel((4, 4))[-1] == 255)


def test_a_wrong_suffix_is_not_kept(tmp_path):
    Image.fromarray(noise(5, 5, 3)).save(tmp_path / "a.jpg", "PNG")
    assert run(tmp_path / "a.jpg").name == "a-denoised.png"


def test_16_bit_grey_of_other_formats_stays_16_bit(tmp_path):
    samples = noise(20, 30, dtype=np.uint16)
    for suffix in (".pgm", ".jp2"):
        Image.fromarray(samples).save(tmp_path / f"a{suffix}")
        assert np.array_equal(read_plain(run(tmp_path / f"a{suffix}")), samples)


def test_16_bit_tiffs_of_other_layouts(tmp_path):
    samples, file = noise(20, 30, 3, dtype=np.uint16), tmp_path / "a.tif"
    planes = np.moveaxis(samples, -1, 0)
    tifffile.imwrite(file, planes, photometric="rgb", planarconfig="separate", compression="lzw", predictor=True)
    assert np.array_equal(read_plain(run(file)), samples)
    tifffile.imwrite(file, samples[..., 0], photometric="miniswhite", byteorder=">")
    assert np.array_equal(read_plain(run(file)), 65535 - samples[..., 0])
    alpha = np.full((20, 30, 1), 32768, np.uint16)
    tifffile.imwrite(file, np.append(samples // 2, alpha, 2), photometric="rgb", extrasamples=["assocalpha"])
    result = read_plain(run(file)).astype(int)
    assert np.abs(result[..., :3] - samples).max() <= 2 and (result[..., 3] == 32768).all()


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (noise(4, 4, 4, dtype=np.uint16), {"photometric": "separated"}, "this one is 16-bit SEPARATED"),
        (
            noise(6, 7, 5, dtype=np.uint16),
            {"photometric": "rgb", "planarconfig": "contig"},
            "with or without one alpha channel",
        ),
        (noise(4, 4, dtype=np.uint16) // 16, {"bitspersample": 12}, "this one is 12-bit MINISBLACK"),
        (np.zeros((4, 4), np.float32), {}, "its pixels are floating-point numbers, and 8 or 16 bits are wanted"),
        (np.full((4, 4), 1 << 20, np.int32), {}, "its pixels are 32-bit numbers, and 8 or 16 bits are wanted"),
    ],
)
def test_what_would_lose_bits_is_refused(samples, options, message, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", samples, **options)
    with pytest.raises(picture_files.PictureError, match=message):
        run(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_results_are_upright(orientation, tmp_path):
    samples, exif = noise(6, 9, 3), Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    for suffix in (".jpg", ".png", ".tif"):
        Image.fromarray(samples).save(tmp_path / f"a{suffix}", exif=exif)
        with Image.open(tmp_path / f"a{suffix}") as before, Image.open(run(tmp_path / f"a{suffix}")) as after:
            assert np.array_equal(np.asarray(after), np.asarray(ImageOps.exif_transpose(before)))
            assert dict(after.getexif()).get(0x0112, 1) == 1
            assert suffix == ".tif" or dict(after.getexif()) == {0x010F: "a camera"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_results_are_upright(orientation, tmp_path):
    samples, exif = noise(6, 9, 3), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(samples).save(tmp_path / "a.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        wide, upright = np.asarray(image) * np.uint16(257), np.asarray(ImageOps.exif_transpose(image)) * np.uint16(257)
    picture = picture_files.Picture(wide, None, "PNG", exif=exif.tobytes())
    (tmp_path / "a.png").write_bytes(picture_files._encoded(picture, "PNG"))
    tifffile.imwrite(tmp_path / "a.tif", wide, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    for name in ("a.png", "a.tif"):
        assert np.array_equal(read_plain(run(tmp_path / name)), upright)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_colour_profile_is_kept(suffix, dtype, tmp_path):
    picture = picture_files.Picture(noise(8, 8, 3, dtype=dtype), None, "PNG", profile=PROFILE)
    file = tmp_path / f"a{suffix}"
    file.write_bytes(picture_files._encoded(picture, {".png": "PNG", ".tif": "TIFF"}[suffix]))
    with Image.open(file) as before, Image.open(run(file)) as after:
        assert before.info["icc_profile"] == after.info["icc_profile"] == PROFILE


def test_the_profile_of_cmyk_does_not_describe_the_result(tmp_path):
    Image.fromarray(noise(8, 8, 4), "CMYK").save(tmp_path / "a.jpg", icc_profile=PROFILE)
    with Image.open(run(tmp_path / "a.jpg")) as result:
        assert "icc_profile" not in result.info


def test_the_first_of_several_pictures_is_taken_and_said(tmp_path):
    first, second = (Image.fromarray(noise(8, 8, 3) // k) for k in (1, 2))
    for suffix in (".tif", ".gif", ".webp"):
        file = tmp_path / f"a{suffix}"
        first.save(file, save_all=True, append_images=[second])
        assert "RGB, the first of 2 pictures in it, 1 tile, " in denoising.denoise(
            nn.Identity(), file, tmp_path, **SIZES
        )


# Noise levels


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.25])
def test_the_noise_of_a_picture_is_estimated(sigma):
    """Of a photograph within 0.01, of slopes and flat colours within 5 %; what is saturated does not count."""
    generator = torch.Generator().manual_seed(0)
    photo = torch.from_numpy(data.coffee()).permute(2, 0, 1) / 255
    found = noise_level.estimate(photo + sigma * torch.randn(photo.shape, generator=generator))
    assert found == pytest.approx(sigma, abs=0.01)
    slopes = torch.linspace(0, 1, 200)[:, None] * torch.linspace(-3, 2, 201)
    noisy = slopes + sigma * torch.randn(3, 200, 201, generator=generator)
    assert noise_level.estimate(noisy) == pytest.approx(sigma, rel=0.05)
    noisy[:, :150] = 1
    assert noise_level.estimate(noisy) == pytest.approx(sigma, rel=0.1)
    assert noise_level.estimate(torch.ones(1, 4, 4)) == 0
    with pytest.raises(ValueError, match="smaller than 4x4"):
        noise_level.estimate(torch.ones(3, 3, 9))


class Knowing(nn.Module):
    """A network that knows the noise level by itself."""

    def __init__(self, net, sigma):
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, y):
        return self.net(y, sigma=self.sigma)


def test_a_network_that_wants_the_noise_level_is_told(network, photo, tmp_path, capsys):
    """The level that was given, in every tile, or that of the picture."""
    aware = flowkern.Unfolded(list(network.proxes), folds=2, noise_aware=True)
    aware.save_pretrained(tmp_path / "aware")
    image = torch.from_numpy(read_plain(photo).transpose(2, 0, 1) / np.float32(255))
    level = noise_level.estimate(image)
    for words, sigma, said in (
        (["--sigma", "0.3"], 0.3, ", sigma 0.300, 2 tiles"),
        (["--sigma", "0"], 0.0, ", sigma 0.000, 2 tiles"),
        ([], level, f", sigma {level:.3f} (estimated), 2 tiles"),
    ):
        tiles = ["--tile", "32", "--overlap", "16"]
        assert denoise.main([str(tmp_path / "aware"), str(photo), "--out", str(tmp_path / said), *tiles, *words]) == 0
        assert said in capsys.readouterr().out
        wanted = tiling.denoise_tiled(Knowing(aware, sigma), image, **SIZES)
        found = read_plain(tmp_path / said / "photo-denoised.png") / np.float32(255)
        assert np.abs(found - wanted.clamp(0, 1).permute(1, 2, 0).numpy()).max() < 0.51 / 255


def test_what_can_t_be_told_is_one_sentence(network, saved, photo, tmp_path, capsys):
    aware = flowkern.Unfolded(list(network.proxes), folds=2, noise_aware=True)
    aware.save_pretrained(tmp_path / "aware")
    for checkpoint, level, message in (
        (saved, "0.1", "--sigma is for a network trained with --noise-aware, and this one was not"),
        (tmp_path / "aware", "-1", "--sigma must be a number of at least 0, got -1"),
        (tmp_path / "aware", "nan", "--sigma must be a number of at least 0, got nan"),
    ):
        assert denoise.main([str(checkpoint), str(photo), "--sigma", level]) == 2
        assert message in capsys.readouterr().err
    Image.fromarray(noise(3, 9, 3)).save(tmp_path / "tiny.png")
    assert denoise.main([str(tmp_path / "aware"), str(tmp_path / "tiny.png")]) == 2
    assert "tiny.png: smaller than 4x4, give its noise with --sigma" in capsys.readouterr().err
    assert denoise.main([str(tmp_path / "aware"), str(tmp_path / "tiny.png"), "--sigma", "0.1"]) == 0


# Nothing overwritten, no half files


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    """File systems with hard links, and those without."""

    def refuse(*arguments):
        raise PermissionError("no links here")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


def test_the_next_free_name_is_taken(photo, links):
    (photo.parent / "photo-denoised.png").write_text("somebody's")
    (photo.parent / "photo-denoised-3.png").write_text("somebody's")
    assert [run(photo).name for _ in range(2)] == ["photo-denoised-2.png", "photo-denoised-4.png"]
    assert (photo.parent / "photo-denoised.png").read_text() == "somebody's"
    assert len(list(photo.parent.iterdir())) == 5


def test_results_written_at_the_same_time_get_names_of_their_own(tmp_path, links):
    def write(value):
        return picture_files.write(picture_files.Picture(np.full((4, 4, 1), value, np.uint8), None, "PNG"), source, out)

    source, out = tmp_path / "a.png", tmp_path
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(write, range(24)))
    assert len(set(paths)) == 24 and set(paths) == set(tmp_path.iterdir())
    assert [int(read_plain(path)[0, 0]) for path in paths] == list(range(24))


@pytest.mark.parametrize("name", ["fsync", "link"])
def test_an_interrupted_write_leaves_nothing(name, photo, monkeypatch):
    def interrupt(*arguments):
        assert all(path == photo or path.suffix == ".partial" for path in photo.parent.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(os, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(photo)
    assert list(photo.parent.iterdir()) == [photo]


def test_a_failed_replacement_leaves_nothing(photo, monkeypatch):
    def refuse(*arguments):
        raise PermissionError("no")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(type(photo), "replace", refuse)
    with pytest.raises(PermissionError):
        run(photo)
    assert list(photo.parent.iterdir()) == [photo]


# The command


def test_the_command_end_to_end(photo, saved, network, tmp_path, capsys):
    samples = noise(32, 48, 3)
    Image.fromarray(samples).save(tmp_path / "whole.png")
    with torch.no_grad():
        wanted = network(torch.from_numpy(samples).permute(2, 0, 1)[None] / 255)[0].clamp(0, 1) * 255
    for checkpoint in (saved, saved / "checkpoints" / "unfolded"):
        out = tmp_path / "new" / checkpoint.name
        assert denoise.main([str(checkpoint), str(tmp_path / "whole.png"), str(photo), "--out", str(out)]) == 0
        result = read_plain(out / "whole-denoised.png")
        assert np.abs(result - wanted.permute(1, 2, 0).numpy()).max() < 0.51
        assert np.abs(result.astype(int) - samples).max() > 10
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("trained for noise of sigma 0.15 to 0.30 on pixels in [0, 1]")
        assert said[1].startswith(f"{tmp_path / 'whole.png'}: 48 x 32, 8-bit RGB, 1 tile, ")
        assert said[2].endswith(f" s -> {out / 'photo-denoised.png'}") and len(said) == 3
    assert list(photo.parent.iterdir()) == [photo]


def test_tiles_of_any_size_go_through_the_command(photo, saved, capsys):
    sizes = ["--tile", "16", "--overlap", "0", "--batch", "2", "--device", "cpu"]
    assert denoise.main([str(saved), str(photo), *sizes]) == 0
    assert ", 6 tiles, " in capsys.readouterr().out and (photo.parent / "photo-denoised.png").is_file()


def test_folders_are_searched_but_not_for_results(saved, tmp_path, capsys):
    names = [
        "a.png",
        "b/c.TIF",
        "b/x-denoised.png",
        "b/x-denoised-12.png",
        ".hidden.png",
        ".d/e.png",
        "x-denoised-y.bmp",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise(4, 5, 3)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = picture_files.find([str(tmp_path), str(tmp_path / "b" / "x-denoised.png"), str(tmp_path / "a.png")])
    assert [file.relative_to(tmp_path).as_posix() for file in found] == [
        "a.png", "b/c.TIF", "x-denoised-y.bmp", "b/x-denoised.png",
    ]  # fmt: skip
    for _ in range(2):
        assert denoise.main([str(saved), str(tmp_path)]) == 0
    assert (tmp_path / "b" / "c-denoised-2.TIF").is_file() and (tmp_path / "x-denoised-y-denoised-2.bmp").is_file()
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == len(names) + 1 + 6


def test_a_broken_file_is_reported_and_the_rest_goes_on(saved, photo, capsys):
    folder = photo.parent
    content = photo.read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut16.png").write_bytes(imagecodecs.png_encode(noise(30, 30, 3, dtype=np.uint16))[:3000])
    tifffile.imwrite(folder / "cut16.tif", noise(30, 30, 3, dtype=np.uint16))
    (folder / "cut16.tif").write_bytes((folder / "cut16.tif").read_bytes()[:3000])
    assert denoise.main([str(saved), str(folder)]) == 1
    said = capsys.readouterr()
    broken = ["cut.png", "cut16.png", "cut16.tif", "empty.jpg"]
    lines = said.err.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, broken, strict=True):
        assert line.startswith(f"error: {folder / name}: can't be read as a picture: ")
    assert (folder / "photo-denoised.png").is_file() and len(list(folder.iterdir())) == 6
    assert denoise.main([str(saved), *(str(folder / name) for name in broken)]) == 2
    assert len(list(folder.iterdir())) == 6


def test_a_result_that_is_not_finite_is_that_picture_s_failure(photo, saved, monkeypatch, capsys):
    monkeypatch.setattr(flowkern.Unfolded, "forward", lambda self, y: y / 0)
    assert denoise.main([str(saved), str(photo)]) == 2
    assert capsys.readouterr().err == f"error: {photo}: the network's result is not finite\n"
    assert list(photo.parent.iterdir()) == [photo]


def test_latents_that_overflow_are_that_picture_s_failure(photo, network, tmp_path, capsys):
    """A Glow looks at its own inputs, and would end the command."""
    wild = copy.deepcopy(network)
    with torch.no_grad():
        wild.proxes[0].glow.levels[0].steps[0].actnorm.log_scale.fill_(100)
    wild.save_pretrained(tmp_path / "wild")
    assert denoise.main([str(tmp_path / "wild"), str(photo)]) == 2
    assert capsys.readouterr().err == f"error: {photo}: the network's result is not finite\n"


def test_ctrl_c_says_where(photo, saved, monkeypatch, capsys):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiling, "denoise_tiled", interrupt)
    assert denoise.main([str(saved), str(photo)]) == 130
    assert capsys.readouterr().err == f"interrupted at {photo}\n" and list(photo.parent.iterdir()) == [photo]


def spoilt(network, path, how):
    """A checkpoint with something wrong."""
    if how == "nothing":
        return path
    if how == "run without a result":
        (path / "checkpoints").mkdir(parents=True)
        return path
    if how == "a Glow":
        network.proxes[0].glow.save_pretrained(path)
    elif how == "grey":
        flowkern.Unfolded(flowkern.GlowProx(flowkern.Glow((1, 8, 8), levels=1, depth=1, hidden=4)), 1).save_pretrained(
            path
        )
    else:
        network.save_pretrained(path)
        weights = path / "model.safetensors"
        if how == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif how == "a file":
            return weights
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nothing", "does not exist; wanted is a run's folder or a saved Unfolded"),
        ("run without a result", "is not a saved Unfolded: it has no config.json"),
        ("a file", "is not a saved Unfolded: it has no config.json"),
        ("a Glow", "does not hold the configuration of an Unfolded"),
        ("truncated", "is truncated or not a safetensors file"),
        ("grey", "can't denoise images of three channels"),
    ],
)
def test_unusable_checkpoint_is_one_sentence(how, message, network, photo, tmp_path, capsys):
    assert denoise.main([str(spoilt(network, tmp_path / "checkpoint", how)), str(photo), "--out", "unmade"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1 and not said.out
    assert list(photo.parent.iterdir()) == [photo] and not os.path.exists("unmade")


def test_a_network_for_other_measurements_is_refused(photo, saved, monkeypatch, capsys):
    def made(path):
        return SimpleNamespace(operator=SimpleNamespace())

    monkeypatch.setattr(flowkern.Unfolded, "from_pretrained", made)
    assert denoise.main([str(saved), str(photo)]) == 2
    assert "was trained for SimpleNamespace measurements, not for denoising" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png does not exist"),
        ([], "holds no pictures to denoise"),
        (["--tile", "100"], "tile must be a positive multiple of 16 for this network, got 100"),
        (["--overlap", "250"], "overlap must be 0 to 240 for tiles of 256 pixels, got 250"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device here"),
        (["--out", "PHOTO"], "photo.png is a file; --out wants a folder"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, photo, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "no pictures").mkdir()
    given = [str(photo)] if arguments else [str(tmp_path / "no pictures")]
    assert denoise.main([str(saved), *given, *(str(photo) if a == "PHOTO" else a for a in arguments)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1 and not said.out
    assert list(photo.parent.iterdir()) == [photo]


def test_write_protected_folders_are_found_before_work(photo, saved, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    assert denoise.main([str(saved), str(photo)]) == 2
    assert f"results can't be written into {photo.parent}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sigma: 0.2\nsigma_max: null\n", "trained for noise of sigma 0.20 on pixels"),
        ("sigma: many\n", "config.yaml is not the configuration of a run"),
        ("- no\n", "config.yaml is not the configuration of a run"),
        ("{", "config.yaml is not the configuration of a run"),
        (None, "comes without its run's config.yaml"),
    ],
)
def test_the_noise_trained_for_is_said(content, message, tmp_path):
    if content:
        (tmp_path / "config.yaml").write_text(content)
    assert message in denoising.trained_for(tmp_path)
    assert message in denoising.trained_for(tmp_path / "checkpoints" / "unfolded") or not content


def test_help_documents_everything(capsys):
    with pytest.raises(SystemExit) as caught:
        denoise.main(["--help"])
    said = capsys.readouterr().out
    options = ("--out", "--sigma", "--device", "--tile", "--overlap", "--batch", "checkpoint", "image")
    assert caught.value.code == 0 and all(f"  {name} " in said for name in options)
    assert all(word in said for word in ("exit status", "16-bit", "Grey", "Alpha", "config.yaml", "overwritten"))


@pytest.mark.parametrize("alpha", [0, 1000, 40000, 65535])
def test_colours_multiplied_by_alpha_are_divided_by_it(alpha, tmp_path):
    """Those that exceed their alpha, as resampling leaves them, are white and not what overflows."""
    file, colour = tmp_path / "a.tif", np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    samples = np.stack([colour] * 3 + [np.full_like(colour, alpha)], 2)
    tifffile.imwrite(file, samples, photometric="rgb", extrasamples=["assocalpha"])
    wanted = np.rint(np.minimum(colour / max(alpha, 1), 1) * 65535)
    assert np.array_equal(picture_files.read(file).pixels[..., 0], wanted)


def test_exif_data_in_a_png_is_bare(tmp_path):
    file, image = tmp_path / "a.png", Image.new("RGB", (8, 6))
    exif = image.getexif()
    exif[0x010E] = "a picture"
    image.save(file, exif=exif)
    content = picture_files.write(picture_files.read(file), file, tmp_path).read_bytes()
    assert content[content.index(b"eXIf") + 4 :][:2] in (b"II", b"MM")


def test_negative_pixels_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 4), -1, np.int32))
    with pytest.raises(picture_files.PictureError, match="32-bit numbers"):
        picture_files.read(tmp_path / "a.tif")
