"""The degradations: equal to the published ones, batched, on any device; images and training batches."""
import numpy as np
import pytest
import torch
from PIL import Image

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
    np.save(tmp_path / "depth" / "a.npy", np.ones((20, 22), np.float32))
    read = lambda: d.ImageCache(tmp_path / "cache", d.photo_items([tmp_path / "photos"], tmp_path / "depth"), 64)
    crop = read().crop(0, 10, 20, 48)
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), rgb[10:58, 20:68])
    assert read().depth(0).shape == (1, 1, 20, 22)
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
