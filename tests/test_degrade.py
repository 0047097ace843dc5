"""The degradations: equal to the published ones, batched, on any device; images and training batches."""
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import degrade as d
from degrade import RANGES, TASKS
from reference import CASES, DEGRADED, grey_levels, photo

GAUSS = torch.from_numpy(DEGRADED["gauss"]).permute(2, 0, 1)[None]
DEPTH = torch.from_numpy(DEGRADED["depth"])[None, None]


def streaks(case):
    field = torch.from_numpy(DEGRADED[f"{case}_field"])[None, None]
    p = CASES[case]
    return d.rain_streaks(field, p["value"], p["width"], p["length"], p["angle"])


OURS = {
    "blur": lambda x, case: d.gaussian_blur(x, CASES[case]["kernel_size"], CASES[case]["sigma"]),
    "jpeg": lambda x, case: d.jpeg(x, CASES[case]["quality"]),
    "dark": lambda x, case: d.darken(x, CASES[case]["gamma"]),
    "sr": lambda x, case: d.bicubic_x4(x),
    "noise": lambda x, case: d.add_noise(x, CASES[case]["sigma"], GAUSS),
    "haze": lambda x, case: d.add_haze(x, DEPTH, CASES[case]["airlight"], CASES[case]["beta"]),
    "rain": lambda x, case: d.add_rain(x, streaks(case)),
}
BOUNDS = {"jpeg": (0.02, 1), "haze": (0.1, 2), "rain": (0.05, 2)}      # mean, largest; others (0.05, 1)
DEGRADATIONS = [case for case in CASES if case.rstrip("0123456789") in OURS]


@pytest.mark.parametrize("case", DEGRADATIONS)
def test_equals_the_published_degradation(case):
    task = case.rstrip("0123456789")
    mean, largest = grey_levels(OURS[task](photo(), case), case)
    bound = BOUNDS.get(task, (0.05, 1))
    assert mean <= bound[0] and largest <= bound[1]
    if task == "rain":
        layer = (streaks(case)[0, 0] * 255).round().numpy() - DEGRADED[f"{case}_layer"].astype(float)
        assert np.abs(layer).mean() <= 1e-3 and np.abs(layer).max() <= 1


def test_streaks_added_drop_by_drop_equal_the_correlation():
    """Which is what a GPU computes."""
    field = torch.rand(1, 1, 91, 101, generator=d.seeded("drops")) * 256
    kernel = torch.rand(42, 42, dtype=torch.float64, generator=d.seeded("kernel"))
    drops = torch.where(field >= 250, field, 0).double()
    whole = torch.nn.functional.conv2d(drops, kernel[None, None])[0, 0]
    assert (d._sum_of_streaks(field[0, 0], torch.tensor(250.0), kernel) - whole).abs().max() < 1e-9


def test_jpeg_tables_are_transposed_as_published():
    turned = d.jpeg(photo().mT, 10).mT          # what the standard's own orientation would give
    assert np.abs((turned - d.jpeg(photo(), 10)).numpy()).mean() * 255 > 0.5


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_with_mixed_parameters_equals_single_images(task):
    n, size = 5, (64, 96)
    x = torch.rand(n, 3, *size, generator=d.seeded(1))
    depth = torch.cat([d.depth_prior(*size, d.seeded(k)) for k in range(n)])
    drawn = d.draw(task, size, "in", d.seeded(2), n)
    together = d.apply(x, task, drawn, depth)
    for i in range(n):
        alone = d.apply(x[i:i + 1], task, {k: v[i:i + 1] for k, v in drawn.items()}, depth[i:i + 1])
        assert (together[i:i + 1] - alone).abs().max() <= 1e-6
    assert together.shape == x.shape and 0 <= together.min() and together.max() <= 1
    assert torch.equal(together, d.quantize(together))


@pytest.mark.parametrize("split", RANGES)
def test_drawn_parameters_fill_their_ranges_and_nothing_else(split):
    for task, ranges in RANGES[split].items():
        drawn = d.draw(task, (4, 4), split, d.seeded(split, task), 4000)
        for name, (low, high) in ranges.items():
            values = drawn[name]
            assert low <= values.min() and values.max() <= high
            assert values.min() <= low + 0.03 * (high - low) and values.max() >= high - 0.03 * (high - low)
            decimals = 0 if name in d.STEPS else d.DECIMALS[task]
            assert torch.allclose(values, torch.round(values, decimals=decimals), atol=1e-5)
            if name in ("kernel_size", "width"):
                assert (values % 2 == 1).all()


def test_sr_has_no_out_range():
    with pytest.raises(ValueError, match="sr"):
        d.degrade(torch.rand(1, 3, 16, 16), "sr", "out")


@pytest.mark.parametrize("task", TASKS)
def test_every_degradation_is_device_clean(task):
    drawn = d.draw(task, (32, 48), n=2, generator=d.seeded(0))          # numbers on the CPU, as in training
    with torch.device("meta"):
        x = torch.rand(2, 3, 32, 48)
        assert d.apply(x, task, drawn, torch.rand(2, 1, 8, 12)).is_meta


def test_haze_divides_by_the_whole_images_depth():
    x, depth = torch.zeros(1, 3, 8, 8), torch.full((1, 1, 8, 8), 0.5)
    whole = d.add_haze(x, depth, 1.0, 2.0)                              # the maximum is 0.5: d = 1
    crop = d.add_haze(x, depth, 1.0, 2.0, depth_max=torch.tensor([1.0]))
    assert torch.allclose(whole, d.quantize(torch.tensor(1 - np.exp(-2.0))).float(), atol=1e-6)
    assert torch.allclose(crop, d.quantize(torch.tensor(1 - np.exp(-1.0))).float(), atol=1e-6)


# Images ---------------------------------------------------------------------------------------------

def test_dead_leaves_come_from_the_seed_and_look_like_a_scene():
    image, depth = d.dead_leaves(192, 256, d.seeded(3))
    again, _ = d.dead_leaves(192, 256, d.seeded(3))
    other, _ = d.dead_leaves(192, 256, d.seeded(4))
    assert torch.equal(image, again) and not torch.equal(image, other)
    assert image.shape == (1, 3, 192, 256) and depth.shape == (1, 1, 192, 256)
    assert torch.equal(image, d.quantize(image)) and 0 < depth.min() and depth.max() <= 1
    assert len(depth.unique()) > 50                                     # layers, not one plane
    spectra = [spectrum_slope(d.dead_leaves(256, 256, d.seeded(k))[0]) for k in range(12)]
    assert abs(np.mean(spectra) - 2.92) < 0.3       # photos in the README's details: 2.92


def spectrum_slope(image, lowest=4):
    """Exponent of the radial power spectrum of a square image, 1/f^slope."""
    grey = image[0].mean(0).double()
    n = grey.shape[0]
    window = torch.hann_window(n, periodic=False, dtype=torch.float64)
    power = torch.fft.fft2((grey - grey.mean()) * window[:, None] * window).abs() ** 2
    at = torch.fft.fftfreq(n) * n
    radius = torch.hypot(at[:, None], at[None]).round().long()
    bands = np.arange(lowest, n // 3)
    means = [power[radius == b].mean().item() for b in bands]
    return -np.polyfit(np.log(bands), np.log(means), 1)[0]


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_every_kind_of_file_becomes_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    grey = rgb[:, :, 0]
    assert np.array_equal(d.read_image(save(tmp_path / "rgb.png", rgb)), rgb)
    assert np.array_equal(d.read_image(save(tmp_path / "grey.png", grey)), np.repeat(grey[:, :, None], 3, 2))
    assert np.array_equal(d.read_image(save(tmp_path / "rgba.png", np.dstack((rgb, grey)))), rgb)
    Image.fromarray(rgb).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(d.read_image(tmp_path / "cmyk.tif").astype(int) - rgb).mean() < 3
    assert d.read_image(tmp_path / "palette.png").shape == rgb.shape
    deep = save(tmp_path / "deep.png", grey.astype(np.uint16) * 257)
    assert np.array_equal(d.read_image(deep)[:, :, 1], grey)
    turned = Image.Exif()
    turned[0x0112] = 6                                                  # the camera was held on its side
    for name in ("turned.png", "turned.tif"):
        save(tmp_path / name, rgb, exif=turned)
        assert np.array_equal(d.read_image(tmp_path / name), np.rot90(rgb, -1))
        assert d.ImageFiles(tmp_path, [(name, d._make_photo, (tmp_path / name, None))], 20).size(0) == (30, 20)


def test_broken_and_small_files_are_named_and_skipped(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    photos = tmp_path / "photos"
    (photos / "deeper").mkdir(parents=True)
    save(photos / "deeper" / "good.png", rgb)
    save(photos / "small.png", rgb[:20])
    good = (photos / "deeper" / "good.png").read_bytes()
    (photos / "torn.png").write_bytes(good[:len(good) // 2])
    (photos / "text.jpg").write_text("not a picture")
    said = []
    cache = d.ImageCache(tmp_path / "cache", d.photo_items([photos]), 64, said.append)
    assert len(cache) == 1 and cache.size(0) == (80, 90)
    assert {name for name in ("small.png", "torn.png", "text.jpg") for line in said if name in line} == {
        "small.png", "torn.png", "text.jpg"}
    (photos / "deeper" / "good.png").unlink()
    with pytest.raises(ValueError, match="no usable image"):
        d.ImageCache(tmp_path / "cache", d.photo_items([photos]), 64, said.append)


def test_the_cache_gives_the_files_pixels_and_notices_a_changed_file(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    path = save(tmp_path / "photos" / "a.png", rgb)
    (tmp_path / "depth").mkdir()
    by_columns = np.asfortranarray(np.arange(1, 441, dtype=np.float32).reshape(20, 22))
    np.save(tmp_path / "depth" / "a.npy", by_columns)
    read = lambda: d.ImageCache(tmp_path / "cache", d.photo_items([tmp_path / "photos"], tmp_path / "depth"), 64)
    crop = read().crop(0, 10, 20, 48)
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), rgb[10:58, 20:68])
    assert read().depth(0).shape == (1, 1, 20, 22) and np.array_equal(read().depth(0)[0, 0], by_columns)
    save(path, 255 - rgb)
    assert np.array_equal(read().crop(0, 10, 20, 48), 255 - crop)


def test_a_disk_that_is_too_small_is_refused_with_the_space_needed(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    save(tmp_path / "photos" / "a.png", np.zeros((1000, 1000, 3), np.uint8))
    usage = d.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(d.shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    with pytest.raises(ValueError, match="0.003|need 0.0 GB.*--cache"):
        d.ImageCache(tmp_path / "cache", d.photo_items([tmp_path / "photos"]), 64)
    monkeypatch.setattr(d.shutil, "disk_usage", lambda path: usage._replace(free=4_000_000))
    assert len(d.ImageCache(tmp_path / "cache", d.photo_items([tmp_path / "photos"]), 64)) == 1


def test_depth_folders_are_checked(tmp_path):
    (tmp_path / "photos").mkdir()
    save(tmp_path / "photos" / "a.png", np.zeros((80, 90, 3), np.uint8))
    (tmp_path / "depth").mkdir()
    with pytest.raises(ValueError, match="no depth map for a.png"):
        d.photo_items([tmp_path / "photos"], tmp_path / "depth")
    save(tmp_path / "a.png", np.full((20, 22), 1000, np.uint16))
    assert d.read_depth(tmp_path / "a.png").max() == 1000
    (tmp_path / "a.mat").write_bytes(b"")
    with pytest.raises(ValueError, match="scipy|not a readable"):
        d.read_depth(tmp_path / "a.mat")


# Files of every kind ----------------------------------------------------------------------------------

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path, array, clear=None, bits=16, palette=b""):
    """A PNG as Pillow does not write it: deep colour, and with `clear`, the tRNS chunk."""
    colour = 3 if palette else 2 if array.ndim == 3 else 0
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in array)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *array.shape[1::-1], bits, colour, 0, 0, 0))
                     + (chunk(b"PLTE", palette) if palette else b"") + (b"" if clear is None else chunk(b"tRNS", clear))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


RAMP = np.arange(600).reshape(20, 30)               # dark, for 16 bits
COLOUR = np.dstack((RAMP * 100, RAMP * 50, 60000 - RAMP * 100))
FLOAT = (RAMP / 599 * 1.004).astype(np.float32)
HOLE = (np.arange(600).reshape(20, 30) != 7) * 255  # all opaque but one pixel
EIGHT = RAMP % 256


def pillow(array, mode=None):
    return lambda path: Image.fromarray(array, mode).save(path) if mode is None else Image.fromarray(array).convert(mode).save(path)


# name: (file, how it is written, what is read (first channel) or None, alpha or None, words of the note)
KINDS = {
    "a dark 16-bit PNG": ("x.png", lambda p: png(p, RAMP // 3), RAMP // 3 / 257, None, "read as 8 bits, white is 65535"),
    "a dark 16-bit TIFF": ("x.tif", pillow((RAMP // 3).astype(np.uint16)), RAMP // 3 / 257, None, "white is 65535"),
    "32-bit integers": ("x.tif", pillow((RAMP * 100).astype(np.int32)), RAMP * 100 / 257, None, "white is 65535"),
    "16-bit PGM": ("x.pgm", pillow((RAMP * 100).astype(np.int32)), RAMP * 100 / 257, None, "white is 65535"),
    "floats a little above 1": ("x.tif", pillow(FLOAT), FLOAT.clip(0, 1) * 255, None, "clipped to 0..1"),
    "floats": ("x.tif", pillow(FLOAT / 2), FLOAT / 2 * 255, None, "white is 1"),
    "NaN": ("x.tif", pillow(np.where(RAMP == 7, np.nan, FLOAT / 2).astype(np.float32)), None, None, "clipped"),
    "16-bit colour": ("x.png", lambda p: png(p, COLOUR), COLOUR[:, :, 0] / 256, None, "read as 8 bits"),
    "16-bit colour, one clear": ("x.png", lambda p: png(p, COLOUR, struct.pack(">3H", *COLOUR[0, 7])), None, "some", "8 bits"),
    "16-bit grey, one clear": ("x.png", lambda p: png(p, RAMP, struct.pack(">H", 7)), RAMP / 257, HOLE, "8 bits"),
    "8-bit grey, one clear": ("x.png", lambda p: png(p, EIGHT, struct.pack(">H", 7), 8), EIGHT, (EIGHT != 7) * 255, ""),
    "8-bit colour, one clear": ("x.png", lambda p: png(p, COLOUR // 256, struct.pack(">3H", *COLOUR[19, 0] // 256), 8), None,
                                "some", ""),
    "a palette with alpha": ("x.png", lambda p: png(p, RAMP % 4, b"\x80", 8, bytes(range(12))), RAMP % 4 * 3,
                             np.where(RAMP % 4 == 0, 128, 255), ""),
    "AVIF": ("x.avif", pillow(np.full((20, 30, 3), 90, np.uint8)), np.full((20, 30), 90), None, ""),
    "GIF": ("x.gif", pillow(np.full((20, 30, 3), 90, np.uint8)), np.full((20, 30), 90), None, ""),
    "JFIF": ("x.jfif", pillow(np.full((20, 30, 3), 90, np.uint8)), np.full((20, 30), 90), None, ""),
    "TGA": ("x.tga", pillow(np.full((20, 30, 3), 90, np.uint8)), np.full((20, 30), 90), None, ""),
    "16-bit PPM": ("x.ppm", lambda p: p.write_bytes(b"P6 30 20 65535\n" + COLOUR.astype(">u2").tobytes()), COLOUR[:, :, 0] / 257,
                   None, "read as 8 bits"),
    "PPM": ("x.ppm", pillow(np.full((20, 30, 3), 90, np.uint8)), np.full((20, 30), 90), None, ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_white_is_a_matter_of_the_type_and_what_is_clear_stays_clear(tmp_path, kind):
    name, write, first, alpha, words = KINDS[kind]
    write(tmp_path / name)
    assert d.list_images([tmp_path]) == [tmp_path / name]
    image, notes = d.open_image(tmp_path / name)
    assert words in ", ".join(notes) and ("clipped" in ", ".join(notes)) == ("clipped" in words)
    if first is not None:
        assert np.abs(d.to_rgb(image)[:, :, 0] - first).max() <= 1
    assert ("A" in image.getbands()) == (alpha is not None)
    if alpha is not None:
        found = np.asarray(image.getchannel("A"))
        assert 0 < (found == 0).sum() < 600 if isinstance(alpha, str) else np.array_equal(found, alpha)


def test_a_lab_tiff_is_read_as_its_colours(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(Image.fromarray(rgb), srgb, lab, outputMode="LAB").save(tmp_path / "lab.tif", icc_profile=b"Lab's")
    image, _ = d.open_image(tmp_path / "lab.tif")
    assert image.mode == "RGB" and image.info["icc_profile"] != b"Lab's"        # but sRGB's
    assert np.abs(np.asarray(image).astype(int) - rgb).mean() < 3


@pytest.mark.parametrize("fault", (RuntimeError("decoder"), MemoryError(), KeyError("x"), struct.error("short")))
def test_whatever_a_decoder_raises_becomes_one_line(tmp_path, monkeypatch, fault):
    save(tmp_path / "x.png", np.zeros((20, 30, 3), np.uint8))
    np.save(tmp_path / "d.npy", np.ones((4, 4)))

    def fails(*args, **options):
        raise fault
    monkeypatch.setattr(d.Image, "open", fails)
    monkeypatch.setattr(d.np, "load", fails)
    with pytest.raises(ValueError, match="x.png: not a readable image .*(decoder|MemoryError|x|short)"):
        d.open_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match="d.npy: not a readable depth map"):
        d.read_depth(tmp_path / "d.npy")
    assert d._head_size(d._make_photo, (tmp_path / "x.png", None)) == (0, 0)


def test_which_files_of_a_folder_are_taken_and_which_are_said(tmp_path, capsys):
    one = np.zeros((20, 30, 3), np.uint8)
    for name in ("more/a.PNG", "more/c.jpg", "._a.png", ".thumbs/t.jpg", "more/.hidden.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / "photos" / name, one)
    save(tmp_path / "b.gif", one)
    (tmp_path / "photos" / "links").mkdir()
    for name, real in (("circle", ".."), ("again", "../more"), ("file.gif", "../../b.gif"), ("outside", "../../elsewhere")):
        (tmp_path / "photos" / "links" / name).symlink_to(real)
    (tmp_path / "elsewhere" / "up").mkdir(parents=True)
    save(tmp_path / "elsewhere" / "e.png", one)
    (tmp_path / "elsewhere" / "up" / "loop").symlink_to(tmp_path / "photos")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "photos" / name).write_bytes(b"")
    names = sorted(path.name for path in d.list_images([tmp_path / "photos"]))
    assert names == ["a.PNG", "c.jpg", "e.png", "file.gif"]             # each once
    assert capsys.readouterr() == ("", "")
    for name in ("phone.heic", "raw.dng", "notes.txt"):
        (tmp_path / "photos" / name).write_bytes(b"")
    said = []
    assert len(d.photo_items([tmp_path / "photos", tmp_path / "elsewhere"], None, said.append)) == 4
    assert len(said) == 1 and "passed over 3 files" in said[0] and "phone.heic" in said[0] and "raw.dng" in said[0]


def test_a_dataset_made_of_links_is_entered(tmp_path):
    for name in ("DIV2K", "Flickr2K"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / f"{name}.png", np.zeros((20, 30, 3), np.uint8))
        (tmp_path / "DF2K").mkdir(exist_ok=True)
        (tmp_path / "DF2K" / name).symlink_to(tmp_path / name)
    assert [p.name for p in d.list_images([tmp_path / "DF2K"])] == ["DIV2K.png", "Flickr2K.png"]


# (images, depth maps) -> the map of each image, or the words of the refusal
DEPTHS = {
    "by path": (["a/1.png", "b/1.png"], ["a/1.npy", "b/1.npy"], ["a/1.npy", "b/1.npy"]),
    "by path, a root's too": (["1.png", "a/1.png"], ["1.npy", "a/1.npy"], ["1.npy", "a/1.npy"]),
    "by the images' folder and path": (["1.png"], ["photos/1.npy", "b/1.npy"], ["photos/1.npy"]),
    "by stem": (["a/1.png", "b/2.png"], ["2.npy", "x/1.npy"], ["x/1.npy", "2.npy"]),
    "capitals": (["1.png"], ["1.PNG"], ["1.PNG"]),
    "two for one": (["1.png"], ["a/1.npy", "b/1.npy"], "a/1.npy.*b/1.npy"),
    "two endings": (["1.png"], ["1.npy", "1.png"], "1.npy.*1.png"),
    "one for two": (["a/1.png", "b/1.png"], ["a/1.npy"], "a/1.png.*b/1.png"),
    "hidden": (["1.png"], ["._1.npy", ".x/1.npy"], "no depth map for 1.png"),
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_each_image_gets_its_own_depth_map(tmp_path, kind):
    images, maps, wanted = DEPTHS[kind]
    for folder, names in (("photos", images), ("depth", maps)):
        for k, name in enumerate(names):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("npy"):
                np.save(tmp_path / folder / name, np.full((2, 2), k + 1.0))
            else:
                save(tmp_path / folder / name, np.full((2, 2), k + 1, np.uint8))
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            d.photo_items([tmp_path / "photos"], tmp_path / "depth")
        return
    items = d.photo_items([str(tmp_path / "photos")], str(tmp_path / "depth"))
    assert [str(depth.relative_to(tmp_path / "depth")) for _, _, (_, depth) in items] == wanted
    assert [d.read_depth(depth).max() for _, _, (_, depth) in items] == [maps.index(name) + 1 for name in wanted]


def test_a_name_that_is_not_utf_8_is_handled_on_any_terminal(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / name, np.zeros((40, 40, 3), np.uint8))
    cache = d.ImageCache(tmp_path / "cache", d.photo_items([tmp_path / "in"]), 32)
    assert cache.crop(0, 0, 0, 32).shape == (3, 32, 32)
    run = [sys.executable, "degrade.py", "--images", tmp_path / "in", "--out", tmp_path / "sets"]
    for _ in range(2):                                                  # anew, and going on
        done = subprocess.run(run, cwd=Path(d.__file__).parent, capture_output=True, text=True,
                              env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and "\\udce9" in done.stdout and "Traceback" not in done.stderr
    assert all((tmp_path / "sets" / "single_indis" / task / name).exists() for task in TASKS)
    assert b"caf\xe9 \xc3\xa9" in (tmp_path / "sets" / "params.csv").read_bytes()


def test_test_sets_never_mix_with_other_files(tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.png", np.zeros((40, 40, 3), np.uint8))
    for taken in ("sets/params.csv", "more/original/GT/a.png"):
        (tmp_path / taken).parent.mkdir(parents=True)
        (tmp_path / taken).write_bytes(b"")
        with pytest.raises(SystemExit, match="holds other test sets"):
            d.main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / taken.split("/")[0])])
        assert (tmp_path / taken).read_bytes() == b""
    command = ["--images", str(tmp_path / "in"), "--out"]
    assert not d.main([*command, str(tmp_path / "new")]) and not d.main([*command, str(tmp_path / "new")])
    save(tmp_path / "in" / "a.png", np.ones((40, 40, 3), np.uint8))          # another picture of this name
    with pytest.raises(SystemExit, match="holds other test sets"):
        d.main([*command, str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="is inside --images"):
        d.main([*command, str(tmp_path / "in" / "sets")])


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sys.path.insert(0, sys.argv[1])
import degrade as d
cache = d.ImageCache(sys.argv[2], [(str(k), d._make_photo, (f"{k}.png", None)) for k in range(2000)], 8, print)
for k in range(2000):
    assert cache.crop(k, 1, 2, 8)[0, 0, 0] == k % 256
assert cache.crop(3, 1, 2, 8)[0, 0, 0] == 3
"""


def test_two_thousand_images_under_a_limit_of_256_open_files(tmp_path):
    for k in range(2000):
        np.save(tmp_path / f"{k}.npy", np.full((10, 12, 3), k % 256, np.uint8))
    done = subprocess.run([sys.executable, "-c", MANY, str(Path(d.__file__).parent), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Enlarged depth ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("corners", (False, True))
@pytest.mark.parametrize("small, size", [((8, 8), (2000, 3000)), ((75, 100), (300, 400)), ((339, 510), (1356, 2040)), ((97, 53), (300, 401)),
                                         ((64, 64), (64, 64)), ((300, 200), (111, 222)), ((1, 1), (50, 40)), ((5, 1), (50, 40))])
def test_a_crop_of_the_enlarged_depth_equals_the_wholes(small, size, corners):
    for depth in (torch.rand(1, 1, *small, generator=d.seeded(small)), torch.rand(1, 1, *small, generator=d.seeded(small)).round() + 0.5):
        whole = torch.nn.functional.interpolate(depth, size, mode="bilinear", align_corners=corners)
        for top, left in ((0, 0), (size[0] // 3, size[1] // 4), (max(size[0] - 176, 0), max(size[1] - 176, 0))):
            crop, highest = d.enlarged_crop(depth, size, top, left, 176, corners), d.enlarged_maximum(depth, size, corners)
            part = whole[:, :, top:top + 176, left:left + 176]
            assert crop.shape == part.shape and (crop - part).abs().max() <= 1e-6
            assert highest.shape == (1,) and (highest - whole.amax()).abs() <= 1e-6
