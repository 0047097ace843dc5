"""The degradations: equal to the published ones, batched, on any device; files of all kinds, the cache, test sets."""
import csv
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_correlation_by_fourier_transforms_equals_the_direct_one():
    x = torch.rand(2, 1, 91, 101, dtype=torch.float64, generator=d.seeded("drops")) * 256
    kernel = torch.rand(2, 1, 42, 42, dtype=torch.float64, generator=d.seeded("kernel"))
    direct = torch.nn.functional.conv2d(x.transpose(0, 1), kernel, groups=2).transpose(0, 1)
    assert d.correlate(x, kernel).shape == (2, 1, 50, 60) and (d.correlate(x, kernel) - direct).abs().max() < 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_with_mixed_parameters_equals_single_images(task):
    n, size = 5, (64, 96)
    x = torch.rand(n, 3, *size, generator=d.seeded(1))
    depth = torch.cat([(k + 1) * d.depth_prior(*size, d.seeded(k)) for k in range(n)])          # each its own maximum
    drawn = d.draw(task, size, "in", d.seeded(2), n)
    together = d.apply(x, task, drawn, depth)
    for i in range(n):
        alone = d.apply(x[i:i + 1], task, {k: v[i:i + 1] for k, v in drawn.items()}, depth[i:i + 1])
        assert (together[i:i + 1] - alone).abs().max() <= 1e-6
    assert together.shape == x.shape and 0 <= together.min() and together.max() <= 1
    assert torch.equal(together, d.quantize(together))


# (lowest, highest, step) of what is drawn: Section 4.1 of the paper and the published script.
BLUR, RAIN = (7, 21, 2), {"width": (3, 11, 2), "length": (20, 40, 1), "angle": (-45, 44, 1)}
DRAWN = {
    ("in", "blur"): {"sigma": (1, 3, .01), "kernel_size": BLUR}, ("out", "blur"): {"sigma": (3, 5, .01), "kernel_size": BLUR},
    ("in", "noise"): {"sigma": (15, 50, 1)}, ("out", "noise"): {"sigma": (50, 70, 1)},
    ("in", "jpeg"): {"quality": (30, 70, 1)}, ("out", "jpeg"): {"quality": (10, 30, 1)},
    ("in", "rain"): {"density": (50, 99, 1), **RAIN}, ("out", "rain"): {"density": (100, 149, 1), **RAIN},
    ("in", "haze"): {"airlight": (.8, 1, .01), "beta": (.5, 2.5, .01)}, ("out", "haze"): {"airlight": (.8, 1, .01), "beta": (2.5, 3, .01)},
    ("in", "dark"): {"gamma": (1, 3, .01)}, ("out", "dark"): {"gamma": (3, 4, .01)}, ("in", "sr"): {},
}


@pytest.mark.parametrize("split, task", DRAWN)
def test_what_is_drawn_fills_the_papers_ranges_and_nothing_else(split, task):
    assert {(s, t) for s in RANGES for t in RANGES[s]} == set(DRAWN)
    drawn = d.draw(task, (4, 4), split, d.seeded(split, task), 4000)
    assert set(drawn) - {"field", "noise"} == set(DRAWN[split, task])
    for name, (mean, deviation, channels) in {"field": (128, 73.9, 1), "noise": (0, 1, 3)}.items():
        if name in drawn:
            assert drawn[name].shape == (4000, channels, 4, 4) and abs(drawn[name].std() / deviation - 1) < 0.01
            assert abs(drawn[name].mean() - mean) < 0.02 * deviation
    for name, (low, high, step) in DRAWN[split, task].items():
        steps = (drawn[name].double().numpy() - low) / step
        counts = np.bincount(steps.round().astype(int))              # a negative number would be an error
        assert np.abs(steps - steps.round()).max() < 1e-4 and len(counts) == round((high - low) / step) + 1
        ends = 1 if task == "rain" or name == "kernel_size" else 0.5    # what is rounded has ends half as often
        assert 0.3 * ends < np.mean(counts[[0, -1]]) / counts[1:-1].mean() < 1.7 * ends


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (50, 75)])
def test_images_of_any_size_are_degraded(task, size):
    x = torch.rand(2, 3, *size, generator=d.seeded(size))
    y = d.degrade(x, task, generator=d.seeded(task))
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1
    if task == "jpeg":                                                  # black is added up to whole blocks of 16
        whole = torch.nn.functional.pad(x, (0, -size[1] % 16, 0, -size[0] % 16))
        assert torch.equal(d.jpeg(x, 30), d.jpeg(whole, 30)[:, :, :size[0], :size[1]])


def test_part_of_a_rain_field_is_normalised_with_the_rest():
    field = torch.rand(1, 1, 200, 300, generator=d.seeded("field")) * 256
    whole = d.rain_streaks(field, 99, 5, 30, 10)
    assert whole.max() == 1 and whole[:, :, :40, :50].max() < 1
    assert torch.equal(d.rain_streaks(field, 99, 5, 30, 10, size=(40, 50)), whole[:, :, :40, :50])
    assert d.rain_streaks(field, 99, 5, 30, 10, peak=0.5).max() * 255 == 127
    assert (d.rain_streaks(torch.zeros(1, 1, 30, 40), 99, 5, 30, 10) == 0).all()                # a field without drops


def test_the_prior_is_far_at_the_top_and_drawn_for_each_image():
    prior = torch.cat([d.depth_prior(40, 60, d.seeded(k)) for k in range(20)])
    assert prior.shape == (20, 1, 40, 60) and 0 < prior.min() and 0.99 < prior.max() <= 1
    assert (prior[:, 0, :8].mean((1, 2)) > 2 * prior[:, 0, -8:].mean((1, 2))).all()
    x = torch.zeros(2, 3, 40, 60)
    one, two = d.apply(x, "haze", {"airlight": torch.ones(2), "beta": torch.ones(2)}, generator=d.seeded(0))
    assert not torch.equal(one, two)
    drawn = d.draw("haze", (40, 60), "out", d.seeded(1), 2)
    assert torch.equal(d.degrade(x, "haze", "out", prior[:2] * 9, d.seeded(1)), d.add_haze(x, prior[:2], **drawn))


class Watch(TorchDispatchMode):
    """Notes what a GPU would have to wait for, or would compute in TF32."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise AssertionError(f"{name} waits for the device")
        if name in ("mm", "bmm", "baddbmm", "addmm", "convolution") and args[0].dtype != torch.float64:
            raise AssertionError(f"{name} in {args[0].dtype}")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("task", TASKS)
def test_data_are_the_same_whatever_the_network_computes_in_and_nothing_waits(task):
    x, depth = torch.rand(2, 3, 48, 64, generator=d.seeded(1)), torch.rand(2, 1, 8, 8, generator=d.seeded(2))
    plain = d.apply(x, task, d.draw(task, (48, 64), n=2, generator=d.seeded(3)), depth)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):                                      # a caller's default device
            drawn = d.draw(task, (48, 64), n=2, generator=d.seeded(3))
            assert d.dead_leaves(48, 40, d.seeded(4))[0].dtype == d.depth_prior(9, 9, d.seeded(4)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), Watch():
        again = d.apply(x, task, drawn, depth)
    assert torch.equal(again, plain) and again.dtype == torch.float32


def test_tables_are_made_once_per_device_and_leave_inference_mode():
    d._jpeg_tables.cache_clear()
    with torch.inference_mode():
        d.jpeg(photo(), 40)
    assert d._jpeg_tables.cache_info().misses == 1 and d._jpeg_tables(torch.device("cpu"))[0].is_inference() is False
    d.jpeg(photo().requires_grad_(), 40)
    assert d._jpeg_tables.cache_info().misses == 1


# Images ---------------------------------------------------------------------------------------------

def test_dead_leaves_come_from_the_seed_and_look_like_a_scene():
    image, depth = d.dead_leaves(192, 256, d.seeded(3))
    again, _ = d.dead_leaves(192, 256, d.seeded(3))
    other, _ = d.dead_leaves(192, 256, d.seeded(4))
    assert torch.equal(image, again) and not torch.equal(image, other)
    assert image.shape == (1, 3, 192, 256) and depth.shape == (1, 1, 192, 256)
    # The scene of a seed stays as it has always been: the demo's images are made of it.
    assert image.mean((0, 2, 3)).tolist() == pytest.approx([0.26144, 0.34434, 0.44164], abs=2e-5)
    assert image[0, :, 96, 128].mul(255).round().tolist() == [64, 87, 116]
    assert torch.equal(image, d.quantize(image)) and 0 < depth.min() and depth.max() <= 1
    assert len(depth.unique()) > 50                                     # layers, not one plane


def test_leaves_fall_from_far_to_near_and_each_run_has_its_own(monkeypatch):
    depths, paint = [], d._paint_leaf
    monkeypatch.setattr(d, "_paint_leaf", lambda image, depth, leaf_depth, *more: depths.append(leaf_depth) or paint(image, depth, leaf_depth, *more))
    d.dead_leaves(96, 96, d.seeded(0))
    assert depths[0] == pytest.approx(0.75) and 0.05 < depths[-1] < 0.07 and (np.diff(depths) < 0).all()
    items = [item for seed in range(3) for item in d.leaf_items(800, 512, seed)]
    assert len({arguments for _, _, arguments, _ in items}) == len({name for name, *_ in items}) == 2400


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_broken_and_small_files_are_named_and_skipped(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    photos = tmp_path / "photos"
    (photos / "deeper").mkdir(parents=True)
    save(photos / "deeper" / "good.png", rgb)
    save(photos / "small.png", rgb[:20])
    good = (photos / "deeper" / "good.png").read_bytes()
    (photos / "torn.png").write_bytes(good[:len(good) // 2])
    (photos / "text.jpg").write_text("not a picture")
    said, cores = [], torch.get_num_threads()
    torch.set_num_threads(cores + 1)
    cache = d.ImageCache(tmp_path / "cache", d.photo_items([photos]), 64, said.append)
    assert len(cache) == 1 and cache.size(0) == (80, 90)
    assert [Path(line.split(":")[0]).name for line in said if "skipped" in line] == ["text.jpg", "torn.png", "small.png"]
    assert "preparing images: 4 of 4, 0:00:00 left" in said and torch.get_num_threads() == cores + 1
    torch.set_num_threads(cores)
    (photos / "deeper" / "good.png").unlink()
    with pytest.raises(ValueError, match="no usable image"):
        d.ImageCache(tmp_path / "cache", d.photo_items([photos]), 64, said.append)


@pytest.fixture
def photos(tmp_path):
    """A folder of one photo with a depth map of a quarter of its size, stored by columns."""
    rgb = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    for name in ("photos", "maps"):
        (tmp_path / name).mkdir()
    save(tmp_path / "photos" / "a.png", rgb)
    np.save(tmp_path / "maps" / "a.npy", np.asfortranarray(np.arange(1, 441, dtype=np.float32).reshape(20, 22)))
    return tmp_path, rgb


def cache_of(folder, say=print, cache="cache"):
    return d.ImageCache(folder / cache, d.photo_items([folder / "photos"], folder / "maps"), 64, say)


def test_the_cache_gives_the_files_pixels_and_notices_a_changed_file(photos):
    folder, rgb = photos
    crop = cache_of(folder).crop(0, 10, 20, 48)
    assert crop.dtype == np.uint8 and np.array_equal(crop.transpose(1, 2, 0), rgb[10:58, 20:68])
    save(folder / "photos" / "a.png", 255 - rgb)
    assert np.array_equal(cache_of(folder).crop(0, 10, 20, 48), 255 - crop)
    np.save(folder / "maps" / "a.npy", np.array([[3.5, 7], [3.5, 7]]))
    depth = cache_of(folder).depth_crop(0, 0, 0, 32, None)
    assert depth.shape == (1, 32, 32) and depth.dtype == np.float32 and np.allclose(depth[:, :, :22], 0.5)     # 7 is the farthest


def test_a_cache_is_not_made_anew_because_its_data_moved(photos):
    folder, _ = photos
    first = cache_of(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    shutil.copytree(folder / "photos", folder / "job" / "photos")      # as each job does that copies data to its disk
    shutil.copytree(folder / "maps", folder / "job" / "maps", copy_function=shutil.copyfile)
    (folder / "cache").rename(folder / "job" / "cache")
    said = []
    again = cache_of(folder / "job", said.append)
    assert again.identity == first.identity == "1 images, fingerprint " + again.identity.split()[-1]
    (folder / "maps" / "a.npy").rename(folder / "maps" / "b.npy")
    (folder / "photos" / "a.png").rename(folder / "photos" / "b.png")
    assert cache_of(folder, cache="other").identity != first.identity
    assert {folder / "cache" / path.name: path.stat().st_mtime_ns for path in (folder / "job" / "cache").iterdir()} == before and not said


@pytest.mark.parametrize("suffix", (".npy", ".depth.npy"))
@pytest.mark.parametrize("damage", (lambda b: b"", lambda b: b[:128], lambda b: b[:-1], lambda b: b"PK" + bytes(len(b)), lambda b: None))
def test_a_torn_cache_file_is_made_anew_and_one_that_vanishes_is_an_error(photos, suffix, damage):
    folder, rgb = photos
    whole = cache_of(folder)
    depth = whole.depth_crop(0, 0, 0, 80, None)
    [file] = [path for path in (folder / "cache").iterdir() if (".depth" in path.name) == (".depth" in suffix)]
    torn = damage(file.read_bytes())
    file.unlink() if torn is None else file.write_bytes(torn)
    with pytest.raises((OSError, ValueError, EOFError)):
        whole.crop(0, 0, 0, 80), whole.depth_crop(0, 0, 0, 80, d.seeded(0))                     # never the prior
    again = cache_of(folder)
    assert np.array_equal(again.crop(0, 0, 0, 80).transpose(1, 2, 0), rgb[:, :80])
    assert np.array_equal(again.depth_crop(0, 0, 0, 80, None), depth)


def test_a_full_disk_is_one_line_that_names_another(photos, monkeypatch):
    def full(file, array):
        raise OSError("1000 requested and 128 written")                 # numpy's words
    monkeypatch.setattr(d.np, "save", full)
    with pytest.raises(ValueError, match="^[^\n]*cache: .*1000 requested.*--cache DIR[^\n]*$"):
        cache_of(photos[0])
    assert not list((photos[0] / "cache").iterdir())


def test_depth_maps_are_checked(photos):
    folder, _ = photos
    (folder / "maps" / "a.npy").rename(folder / "maps" / "b.npy")
    with pytest.raises(ValueError, match="no depth map for a.png"):
        cache_of(folder)
    assert d.read_depth(save(folder / "a.png", np.full((20, 22), 1000, np.uint16))).max() == 1000
    png = save(folder / "c.png", np.zeros((4, 4, 3), np.uint8))
    Image.fromarray(np.full((4, 4), 3, np.uint8)).convert("P").save(folder / "p.png")
    for name, array in (("object", np.array([None])), ("complex", np.ones((2, 2), complex)), ("nan", np.full((2, 2), np.nan)),
                        ("below", np.eye(2) - 0.1), ("zero", np.zeros((2, 2))), ("empty", np.zeros((0, 2))), ("cube", np.ones((2, 2, 2)))):
        np.save(folder / f"{name}.npy", array)
    for path in (png, folder / "p.png", *folder.glob("*.npy")):
        with pytest.raises(ValueError, match=f"^{path}: not a readable depth map: [^\n]*$"):
            d.read_depth(path)


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
EIGHT = RAMP % 256


def pillow(array, **options):
    return lambda path: Image.fromarray(array).save(path, **options)


GREY3 = np.repeat(EIGHT[:, :, None], 3, 2).astype(np.uint8)


def lab(path):
    srgb, profile = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(Image.fromarray(GREY3), srgb, profile, outputMode="LAB").save(path)


def held(turn):
    """How the camera was held, as EXIF says it."""
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


# name: (file, how it is written, what is read (first channel) or None, alpha or None)
KINDS = {
    "16-bit colour": ("x.png", lambda p: png(p, COLOUR), COLOUR[:, :, 0] / 256, None),
    "16-bit colour, one clear": ("x.png", lambda p: png(p, COLOUR, struct.pack(">3H", *COLOUR[0, 7])), None, "some"),
    "8-bit grey, one clear": ("x.png", lambda p: png(p, EIGHT, struct.pack(">H", 7), 8), EIGHT, (EIGHT != 7) * 255),
    "8-bit colour, one clear": ("x.png", lambda p: png(p, COLOUR // 256, struct.pack(">3H", *COLOUR[19, 0] // 256), 8), None, "some"),
    "a palette with alpha": ("x.png", lambda p: png(p, RAMP % 4, b"\x80", 8, bytes(range(12))), RAMP % 4 * 3,
                             np.where(RAMP % 4 == 0, 128, 255)),
    "16-bit PPM": ("x.ppm", lambda p: p.write_bytes(b"P6 30 20 65535\n" + COLOUR.astype(">u2").tobytes()), COLOUR[:, :, 0] / 257, None),
    "palette": ("x.png", lambda p: Image.fromarray(GREY3[:, :, 0]).convert("P").save(p), EIGHT, None),
    "CMYK": ("x.tif", lambda p: Image.fromarray(GREY3).convert("CMYK").save(p), EIGHT, None),
    "alpha": ("x.png", pillow(np.dstack((GREY3, 255 - EIGHT.astype(np.uint8)))), EIGHT, 255 - EIGHT),
    "LAB": ("x.tif", lab, EIGHT, None),
    **{f"{name}, turn {turn}": (name, pillow(GREY3, exif=held(turn), lossless=True), wanted, None) for name in ("x.tif", "x.png", "x.webp")
       for turn, wanted in ((1, EIGHT), (2, EIGHT[:, ::-1]), (3, EIGHT[::-1, ::-1]), (4, EIGHT[::-1]), (5, EIGHT.T), (6, np.rot90(EIGHT, -1)),
                            (7, np.rot90(EIGHT, 2).T), (8, np.rot90(EIGHT)))},
    **{suffix: (f"x{suffix}", pillow(np.full((20, 30, 3), 90, np.uint8)), np.full((20, 30), 90), None)
       for suffix in (".jpg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".jfif", ".tga", ".ppm")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_and_what_is_clear_stays_clear(tmp_path, kind):
    name, write, first, alpha = KINDS[kind]
    write(tmp_path / name)
    assert d.list_images([tmp_path]) == [tmp_path / name]
    image, notes = d.open_image(tmp_path / name)
    if first is not None:
        assert np.abs(d.to_rgb(image)[:, :, 0] - first).max() <= 2
    assert ("A" in image.getbands()) == (alpha is not None) and notes == [] and 0x0112 not in image.getexif()
    if alpha is not None:
        found = np.asarray(image.getchannel("A"))
        assert 0 < (found == 0).sum() < 600 if isinstance(alpha, str) else np.array_equal(found, alpha)


def test_pictures_and_tensors_are_the_same_numbers():
    every = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    assert np.array_equal(d.to_image(d.to_tensor(every)), every) and d.to_tensor(every).max() == 1
    assert d.to_image(torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 1.1])[None, :, None].expand(3, 4, 1))[:, 0, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("name, array", [("a.png", RAMP.astype(np.uint16)), ("b.tif", RAMP.astype(np.uint16)), ("c.tif", RAMP.astype(np.int32)),
                                         ("d.tif", RAMP.astype(np.float32)), ("e.pgm", RAMP.astype(np.int32))])
def test_grey_of_more_than_8_bits_is_refused_with_the_mend(tmp_path, name, array):
    Image.fromarray(array).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: [^\n]*more than 8 bits[^\n]*255 [*] array / white[^\n]*$"):
        d.read_image(tmp_path / name)


def odd_exif(path, rgb):
    """A turn beside values that can't be written back: a fraction over 0, text where a number should be."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 5, 1, 50) + struct.pack("<HHI4s", 0x9000, 2, 4, b"\xff\xfe\xfd\xfc")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 3) + tags + struct.pack("<III", 0, 1, 0)
    save(path, rgb, exif=exif, lossless=True)


def many_pages(path, rgb):
    Image.fromarray(rgb).save(path, save_all=True, append_images=[Image.fromarray(rgb[:9, :9])] * 3)


def text_png(kind, data):
    def write(path, rgb):
        good = save(path, rgb).read_bytes()
        path.write_bytes(good[:33] + chunk(kind, b"a\0\0" + zlib.compress(data)) + good[33:])       # after the head
    return write


# What a whole photograph may hold: none of it makes it unreadable.
ODD = {
    "EXIF that can't be written": ("x.webp", odd_exif, -1, []),
    "torn EXIF": ("x.png", lambda p, rgb: save(p, rgb, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12"), 0, []),
    "two megabytes of text": ("x.png", text_png(b"zTXt", b"A" * 2_000_000), 0, []),
    "a profile of two megabytes": ("x.png", text_png(b"iCCP", bytes(2_000_000)), 0, []),
    "four pages": ("x.tif", many_pages, 0, ["the first of its frames"]),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_but_whole_photographs_are_read(tmp_path, monkeypatch, kind):
    name, write, turns, wanted = ODD[kind]
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "n_frames", property(lambda image: pytest.fail("counted all frames")))
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    write(tmp_path / name, rgb)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2 ** 20)      # Pillow's own
    image, notes = d.open_image(tmp_path / name)
    assert np.array_equal(d.to_rgb(image), np.rot90(rgb, turns)) and notes == wanted


def test_only_the_formats_of_the_readme_are_tried(tmp_path, monkeypatch):
    for kind in ("PCX", "EPS", "SGI", "PNG"):
        Image.new("RGB", (20, 30)).save(tmp_path / "x.png", kind)
        if kind != "PNG":
            with pytest.raises(ValueError, match="x.png: not a readable image"):
                d.read_image(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(ValueError, match="x.png: .*600 pixels, more than 599.*--max-pixels"):
        d.read_image(tmp_path / "x.png")


def test_whatever_a_decoder_raises_becomes_one_line(tmp_path, monkeypatch):
    for module, name, read in ((d.Image, "open", d.open_image), (d.np, "load", d.read_depth)):
        monkeypatch.setattr(module, name, lambda *args, **options: {}[MemoryError()])           # KeyError(MemoryError())
        with pytest.raises(ValueError, match="^[^\n]*x.npy: not a readable .*MemoryError[^\n]*$"):
            read(tmp_path / "x.npy")


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    """120 of all formats, with bytes changed, cut or put in; mostly near the head, where decoders believe them."""
    random = np.random.default_rng(0)
    for suffix in d.SUFFIXES:
        good = save(tmp_path / f"x{suffix}", GREY3 if suffix != ".pgm" else GREY3[:, :, 0]).read_bytes()
        for _ in range(10):
            data, at = bytearray(good), random.integers(0, random.choice((30, 200, len(good))))
            data[at:at + random.integers(0, 5)] = random.bytes(random.integers(0, 5))
            (tmp_path / f"x{suffix}").write_bytes(data[:random.integers(1, len(data))] if random.random() < 0.2 else data)
            try:
                assert d.read_image(tmp_path / f"x{suffix}").shape[2] == 3
            except ValueError as error:
                assert str(error).startswith(f"{tmp_path}/x{suffix}: ") and "\n" not in str(error)


def test_which_files_of_a_folder_are_taken_and_which_are_said(tmp_path, capsys):
    for name in ("photos/more/a.PNG", "photos/more/c.jpg", "photos/._a.png", "photos/.thumbs/t.jpg", "b.gif", "elsewhere/e.png",
                 "photos/Thumbs.db", "photos/desktop.ini", "photos/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name, real in (("photos/circle", "."), ("photos/again", "more"), ("photos/file.gif", "../b.gif"), ("photos/outside", "../elsewhere"),
                       ("elsewhere/loop", "../photos")):
        (tmp_path / name).symlink_to(real)
    names = sorted(path.name for path in d.list_images([tmp_path / "photos"]))
    assert names == ["a.PNG", "c.jpg", "e.png", "file.gif"] and capsys.readouterr() == ("", "")         # each once
    for name in ("phone.heic", "raw.dng", "notes.txt"):
        (tmp_path / "photos" / name).write_bytes(b"")
    said = []
    assert len(d.photo_items([tmp_path / "photos", tmp_path / "elsewhere"], None, said.append)) == 4
    assert len(said) == 1 and "not read as images: 3" in said[0] and "phone.heic" in said[0] and "raw.dng" in said[0]


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
    for path in [tmp_path / "photos" / name for name in images] + [tmp_path / "depth" / name for name in maps]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    folders = [str(tmp_path / "photos")], str(tmp_path / "depth")
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            d.find_depths(*folders)
    else:
        assert [str(depth.relative_to(tmp_path / "depth")) for depth in d.find_depths(*folders).values()] == wanted


def test_names_in_two_spellings_and_names_too_long_are_the_same_name(tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / unicodedata.normalize("NFD", "é.png"), np.zeros((40, 40, 3), np.uint8))     # as macOS writes it
    np.save(tmp_path / "maps" / unicodedata.normalize("NFC", "é.npy"), np.ones((2, 2)))
    assert [depth.suffix for depth in d.find_depths([tmp_path / "in"], tmp_path / "maps").values()] == [".npy"]
    long = "日" * 80
    for k, end in enumerate("ab"):
        (tmp_path / "deep" / long / long).mkdir(parents=True, exist_ok=True)
        save(tmp_path / "deep" / long / long / f"{end}.png", np.full((40, 40, 3), k, np.uint8))
    assert d.write_test_sets(tmp_path / "deep", tmp_path / "sets", "in", 0) == 0
    names = os.listdir(tmp_path / "sets" / "single_indis" / "sr")
    assert len(names) == 2 and all(len(os.fsencode(name)) < 255 for name in names) and d.short_name("a" * 200) == "a" * 200
    assert sorted(names) == sorted(os.listdir(tmp_path / "sets" / "original" / "GT"))


def test_more_images_are_read_than_files_may_be_open(tmp_path):
    for k in range(200):
        np.save(tmp_path / f"{k}.npy", np.full((10, 12, 3), k, np.uint8))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        cache = d.ImageCache(tmp_path, [(str(k), d.read_photo, (None,)) for k in range(200)], 8)
        assert all((cache.crop(k, 1, 2, 8) == k).all() for k in range(200))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("corners", (False, True))
@pytest.mark.parametrize("small, size", [((8, 8), (2000, 3000)), ((75, 100), (300, 400)), ((339, 510), (1356, 2040)), ((97, 53), (300, 401)),
                                         ((64, 64), (64, 64)), ((300, 200), (111, 222)), ((1, 1), (50, 40)), ((5, 1), (50, 40))])
def test_a_part_of_the_enlarged_depth_equals_the_wholes(small, size, corners):
    for depth in (torch.rand(1, 1, *small, generator=d.seeded(small)), torch.rand(1, 1, *small, generator=d.seeded(small)).round() + 0.5):
        whole = torch.nn.functional.interpolate(depth, size, mode="bilinear", align_corners=corners)
        for top, left in ((0, 0), (size[0] // 3, size[1] // 4), (max(size[0] - 176, 0), max(size[1] - 176, 0))):
            crop, part = d.enlarged_part(depth, size, top, left, 176, corners), whole[:, :, top:top + 176, left:left + 176]
            assert crop.shape == part.shape and (crop - part).abs().max() <= 1e-4


# Writing files, and being stopped ---------------------------------------------------------------------

def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    steps, replace = [], os.replace
    monkeypatch.setattr(d.os, "fsync", lambda file: steps.append("on the disk"))

    def held_for_a_moment(old, new):                                    # by a virus scanner
        steps.append("replaced")
        if len(steps) == 2:
            raise PermissionError(13, "in use")
        replace(old, new)
    monkeypatch.setattr(d.os, "replace", held_for_a_moment)
    (tmp_path / "x").write_text("old")
    with d.whole_file(tmp_path / "x") as file:
        file.write(b"new")
        assert (tmp_path / "x").read_text() == "old"
    assert (tmp_path / "x").read_text() == "new" and steps == ["on the disk", "replaced", "replaced"]
    with pytest.raises(KeyboardInterrupt), d.whole_file(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "new"


def test_what_is_said_aside_never_ends_the_work(capfd, monkeypatch):
    d.progress("heard")
    assert capfd.readouterr() == ("", "heard\n")
    closed = open(os.devnull, "w")
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        d.progress("unheard")
    assert capfd.readouterr() == ("", "")


def test_work_is_spread_over_the_cores_that_a_job_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    assert d.usable_cores() == 3
    assert [d.clock(seconds) for seconds in (89, 150, 3900)] == ["0:01:29", "0:02:30", "1:05:00"]
    assert d.time_left(time.monotonic() - 10, 5, 20) == "0:00:30 left"


def run_degrade(folder, *flags, code=None, **options):
    """The command in a process of its own; code: a script that calls it instead, with no main guard."""
    root = Path(d.__file__).parent
    start = [sys.executable, *(["-c", code] if code else [root / "degrade.py"]), "--images", "in", "--out", "sets", *flags]
    return subprocess.Popen(start, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}, **options)


@pytest.fixture
def pictures(tmp_path):
    """Seventy noisy pictures, more than anybody would degrade in a second."""
    (tmp_path / "in").mkdir()
    for k in range(70):
        save(tmp_path / "in" / f"{k}.png", np.random.default_rng(k).integers(0, 256, (150, 150, 3), np.uint8))
    return tmp_path


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopped_it_ends_at_once_in_one_line_and_leaves_nothing_half_done(pictures, name, code):
    run = run_degrade(pictures, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while len(list(pictures.glob("sets/single_indis/blur/*.png"))) < 3:
        assert run.poll() is None
        time.sleep(0.02)
    os.kill(run.pid, getattr(signal, name))
    said = run.communicate(timeout=60)
    assert run.returncode == code and said[0] == "" and said[1].splitlines()[-1] == f"degrade.py: stopped by {name}"
    assert "Traceback" not in said[1] and not list(pictures.rglob(".*")) and not (pictures / "sets" / "params.csv").exists()
    done = list(pictures.glob("sets/**/*.png"))
    assert len(done) < 300                                              # of 560: no more were begun
    for path in done:
        Image.open(path).load()


def test_a_script_without_a_main_guard_and_a_closed_pipe_do_no_harm(pictures):
    for path in list((pictures / "in").iterdir())[2:]:
        path.unlink()
    run = run_degrade(pictures, code="import sys, degrade; degrade.main(sys.argv[1:])")
    run.stdout.close()                                                  # as `| head` does
    said = run.stderr.read()
    assert run.wait() == 141 and said == "degrading images: 16 of 16, 0:00:00 left\n"
    assert len(list(pictures.glob("sets/**/*.png"))) == 16 and (pictures / "sets" / "params.csv").exists()


# Test sets --------------------------------------------------------------------------------------------

def test_test_sets_hold_what_params_csv_says(tmp_path, monkeypatch):
    for name in ("in", "maps"):
        (tmp_path / name).mkdir()
    for k, name in enumerate("abc"):
        save(tmp_path / "in" / f"{name}.png", d.to_image(d.dead_leaves(64, 80, d.seeded(k))[0]))
        np.save(tmp_path / "maps" / f"{name}.npy", np.random.default_rng(k).random((16, 20), np.float32) * 9)
    d.main(["--images", str(tmp_path / "in"), "--depth", str(tmp_path / "maps"), "--out", str(tmp_path / "sets"), "--split", "both", "--seed", "4"])
    rows = list(csv.DictReader(open(tmp_path / "sets" / "params.csv")))
    assert len(rows) == len({row["generator_seed"] for row in rows}) == 39
    for row in rows:
        name, written = Path(row["file"]).stem, d.read_image(tmp_path / "sets" / row["file"])
        x = d.to_tensor(d.read_image(tmp_path / "sets" / "original" / "GT" / f"{name}.png"))
        number = dict(pair.split("=") for pair in row["parameters"].split())
        if row["task"] == "haze":
            depth = torch.from_numpy(np.load(tmp_path / "maps" / f"{name}.npy"))[None, None]
            y = d.add_haze(x, depth, float(number["airlight"]), float(number["beta"]))
        elif row["task"] in ("sr", "jpeg", "dark"):
            y = {"sr": lambda: d.bicubic_x4(x, stored=True), "jpeg": lambda: d.jpeg(x, float(number["quality"])),
                 "dark": lambda: d.darken(x, float(number["gamma"]))}[row["task"]]()
        else:
            y = d.degrade(x, row["task"], row["split"], generator=torch.Generator().manual_seed(int(row["generator_seed"])))
        assert np.array_equal(d.to_image(y), written)
    # The same seed gives the same bytes, on one core, too, and another seed others.
    monkeypatch.setattr(d, "usable_cores", lambda: 1)
    for seed in (4, 5):
        d.write_test_sets(tmp_path / "in", tmp_path / str(seed), "both", seed, tmp_path / "maps")
        assert ((tmp_path / str(seed) / "params.csv").read_bytes() == (tmp_path / "sets" / "params.csv").read_bytes()) == (seed == 4)
    for path in tmp_path.glob("sets/**/*.png"):
        assert path.read_bytes() == (tmp_path / "4" / path.relative_to(tmp_path / "sets")).read_bytes()


def test_test_sets_never_mix_with_other_files(tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.png", np.zeros((40, 40, 3), np.uint8))
    for taken in ("sets/params.csv", "more/original/GT/a.png", "file"):
        (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / taken).write_bytes(b"")
        with pytest.raises(SystemExit, match="degrade.py: --out .*(sets|more|file) is not empty; name a new"):
            d.main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / taken.split("/")[0])])
        assert (tmp_path / taken).read_bytes() == b""
    (tmp_path / "new").mkdir()
    d.main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="is inside --images"):
        d.main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "in" / "sets")])


def test_torn_files_are_named_and_the_exit_code_tells(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    good = save(tmp_path / "in" / "a.png", np.zeros((40, 40, 3), np.uint8)).read_bytes()
    (tmp_path / "in" / "b.png").write_bytes(good[:50])
    many_pages(tmp_path / "in" / "c.tif", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(SystemExit) as stopped:
        d.main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "sets")])
    said = capsys.readouterr()
    assert stopped.value.code == 1 and said.err.count("b.png: not a readable image") == 1 and "Traceback" not in said.err
    assert said.err.count("c.tif: the first of its frames") == 1
    assert sorted(path.name for path in tmp_path.glob("sets/single_indis/*/*")) == ["a.png"] * 7 + ["c.png"] * 7


def test_a_name_that_is_not_utf_8_is_handled_on_any_terminal(tmp_path):
    name, out = os.fsdecode(b"caf\xe9 \xc3\xa9.png"), os.fsdecode(b"caf\xe9")
    (tmp_path / out / "in").mkdir(parents=True)
    save(tmp_path / out / "in" / name, np.zeros((40, 40, 3), np.uint8))
    cache = d.ImageCache(tmp_path / out / "cache", d.photo_items([tmp_path / out / "in"]), 32)
    assert cache.crop(0, 0, 0, 32).shape == (3, 32, 32)
    run = run_degrade(tmp_path / out, "--out", out)
    said = run.communicate()
    assert run.returncode == 0 and "\\udce9" in said[0] and "Traceback" not in said[1]
    assert all((tmp_path / out / out / "single_indis" / task / name).exists() for task in TASKS)
    assert b"caf\xe9 \xc3\xa9" in (tmp_path / out / out / "params.csv").read_bytes()


def test_memory_that_is_lacking_is_one_line_and_an_illegal_access_a_fault():
    with pytest.raises(SystemExit, match="x.py: not enough memory"), d.ends_in_one_line("x.py"):
        raise RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="illegal"), d.ends_in_one_line("x.py"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
