"""Training batches: which task, which crop, degraded so that a crop looks like a piece of a whole degraded image."""
import time

import numpy as np
import pytest
import torch
from PIL import Image

import degrade as d
import train
from degrade import TASKS


class Flat:
    """A source of one 300 x 300 image whose pixels tell where they came from."""

    def __init__(self, edge=300, value=None):
        ramp = np.arange(edge) % 256
        self.image = np.stack((*np.meshgrid(ramp, ramp, indexing="ij"), 0 * np.add.outer(ramp, ramp))).astype(np.uint8)
        if value is not None:
            self.image[:] = value

    def __len__(self):
        return 1

    def size(self, k):
        return self.image.shape[1:]

    def crop(self, k, top, left, edge):
        return self.image[:, top:top + edge, left:left + edge]

    def depth_crop(self, k, top, left, edge, generator):
        return np.ones((1, edge, edge), np.float32)


def test_a_sample_depends_on_seed_stage_iteration_and_number_alone():
    one = lambda *key: train.sample({"photos": Flat()}, TASKS, 64, 8, key)
    assert np.array_equal(one(0, 1, 2, 3)["canvas"], one(0, 1, 2, 3)["canvas"])
    for other in ((1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)):
        assert not np.array_equal(one(0, 1, 2, 3)["canvas"], one(*other)["canvas"])


def test_a_run_sees_all_of_its_images():
    """Which image is cut depends on the iteration, too, not only on the place in the batch."""
    seen = []

    class Many(Flat):
        def __len__(self):
            return 100

        def crop(self, k, *more):
            seen.append(k)
            return super().crop(k, *more)
    for t in range(25):
        for i in range(8):
            train.sample({"photos": Many()}, ("dark",), 64, 8, (0, 0, t, i))
    assert len(seen) == 200 and len(set(seen)) > 70 and max(map(seen.count, seen)) < 10


def test_pairs_of_ones_own_are_trained_from_lq_to_gt(tmp_path):
    for name, value in (("lq", 4), ("gt", 1)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (130, 130, 3), np.uint8) // value).save(tmp_path / name / "a.png")
    items = train.pair_items([(tmp_path / "lq" / "a.png", tmp_path / "gt" / "a.png")])
    source = {"noise": d.ImageCache(tmp_path / "cache", items, 64)}
    lq, gt = train.make_batch(train.Part([train.sample(source, ("noise",), 64, 8, (0, 0, 0, i)) for i in range(8)]), 64, "cpu")[:2]
    assert torch.equal((lq * 255).round(), (gt * 255).round() // 4) and gt.max() > 0.9


def test_a_hazy_sample_is_a_piece_of_the_whole_hazy_picture(tmp_path):
    """Divided by the depth of a farthest point that lies outside the crop."""
    row, column = np.meshgrid(np.arange(250), np.arange(250), indexing="ij")
    image, depth = np.dstack((row, column, 0 * row + 90)).astype(np.uint8), np.ones((250, 250), np.float32)
    depth[:125, :125], depth[249, 249] = 3, 12
    cache = d.ImageCache(tmp_path, [("photo", lambda: (image, depth), (), True)], 64)
    s = train.sample({"photos": cache}, ("haze",), 64, 8, (0, 0, 0, 1))
    s["turn"] = 0
    haze = float(s["airlight"]), float(s["beta"])
    lq, gt = train.make_batch(train.Part([s]), 64, "cpu")[:2]
    y, x = (int(v) for v in (gt[0, :2, 0, 0] * 255).round())
    whole = d.add_haze(d.to_tensor(image), torch.from_numpy(depth)[None, None], *haze)
    assert max(y, x) + 64 < 249 and (lq - whole[:, :, y:y + 64, x:x + 64]).abs().max() * 255 < 1.01


def test_every_task_is_seen_equally_often():
    tasks = ("rain", "jpeg", "blur")
    seen = [train.sample({"photos": Flat()}, tasks, 64, 8, (0, 0, t, i))["task"] for t in range(6) for i in range(8)]
    assert {seen.count(task) for task in tasks} == {16}


def test_a_batch_holds_aligned_pairs_whatever_the_turn():
    samples = [train.sample({"photos": Flat()}, ("dark",), 64, 32, (0, 0, 0, i)) for i in range(32)]
    for s in samples:
        s["gamma"] = np.float32(1)                             # degrades nothing
    assert {s["turn"] for s in samples} == set(range(8))
    lq, gt, task = train.make_batch(train.Part(samples), 64, "cpu")[:3]
    assert lq.shape == gt.shape == (32, 3, 64, 64) and torch.equal(lq, gt)
    assert (task == TASKS.index("dark")).all()
    turned = {tuple((g[:2, 0, 1] - g[:2, 0, 0]).mul(255).round().int().tolist()) for g in gt}
    assert turned == {(0, 1), (0, -1), (1, 0), (-1, 0)}                 # all four directions of the ramp


def test_jpegs_grid_falls_everywhere_in_the_training_crops():
    """Chi-square over the 16 offsets of the chroma grid (8 of the luma grid), both axes."""
    offsets = np.array([train.sample({"photos": Flat()}, ("jpeg",), 64, 2000, (0, 0, 0, i))["offset"] for i in range(2000)])
    for period, bound in ((16, 37.7), (8, 24.3)):                       # 0.1 % points for 15 and 7
        for axis in (0, 1):
            counts = np.bincount(offsets[:, axis] % period, minlength=period)
            assert ((counts - 2000 / period) ** 2 / (2000 / period)).sum() < bound


def test_the_crops_border_has_been_degraded_like_its_middle():
    """Blur and JPEG of the training crop equal those of the whole image, cut out."""
    whole = torch.from_numpy(Flat().image)[None].float() / 255
    s = train.sample({"photos": Flat()}, ("blur",), 64, 8, (0, 0, 0, 5))
    s["turn"] = 0
    lq, gt, _ = train.make_batch(train.Part([s]), 64, "cpu")[:3]
    degraded = d.apply(whole, "blur", {name: torch.tensor([float(s[name])]) for name in ("sigma", "kernel_size")})
    y, x = (int(v) for v in (gt[0, :2, 0, 0] * 255).round())
    at = [(r, c) for r in range(y, 237, 256) for c in range(x, 237, 256)
          if torch.equal(whole[0, :, r:r + 64, c:c + 64], gt[0])]
    assert any((degraded[0, :, r:r + 64, c:c + 64] - lq[0]).abs().max() < 1e-6 for r, c in at)


def test_rain_of_training_crops_is_as_bright_as_on_whole_images():
    """Mean within 5 % and deviation within 10 % of 2040 x 1356 images' (0.0645 and 0.095)."""
    layers = []
    for start in range(0, 200, 10):
        samples = [train.sample({"photos": Flat(value=0)}, ("rain",), 128, 600, (0, 0, 0, i)) for i in range(start, start + 10)]
        layers.append(train.make_batch(train.Part(samples), 128, "cpu")[0][:, 0])
    layers = torch.cat(layers)
    assert abs(layers.mean() / 0.0645 - 1) < 0.05
    assert abs(layers.std() / 0.095 - 1) < 0.10


def test_a_training_batch_is_device_clean():
    samples = [train.sample({"photos": Flat()}, TASKS, 64, 14, (0, 0, 0, i)) for i in range(14)]
    lq, gt, task = train.make_batch(train.Part(samples), 64, "meta")[:3]
    assert lq.is_meta and gt.is_meta and task.is_meta


def depth_cache(folder, size, maps):
    """A cache of one photo of random pixels, with a depth map of a quarter of its size or without."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    depth = rng.random((size[0] // 4, size[1] // 4), np.float32) * 9
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    return image, depth, d.ImageCache(folder, [("photo", lambda *_: (image, depth if maps else None), (None,), maps)], 32)


@pytest.mark.parametrize("maps", (False, True))
@pytest.mark.parametrize("size", [(300, 400), (1000, 1500), (100, 90), (40, 60)])
def test_a_hazy_crop_is_a_piece_of_the_whole_hazy_picture(tmp_path, size, maps):
    """Nearly nowhere does a crop hold the farthest point; the last two sizes are smaller than the canvas."""
    image, depth, cache = depth_cache(tmp_path / "c", size, maps)
    g, again = d.seeded(5), d.seeded(5)
    depth = torch.from_numpy(depth)[None, None] if maps else d.depth_prior(*size, again)
    drawn = {"airlight": torch.tensor([0.9]), "beta": torch.tensor([2.0])}
    whole = d.apply(d.to_tensor(image), "haze", drawn, depth, None if maps else 1.0)
    for top, left in ((0, 0), (max(size[0] - 112, 0), max(size[1] - 112, 0))):
        part = torch.from_numpy(cache.depth_crop(0, top, left, 112, g))[None]
        crop = torch.from_numpy(cache.crop(0, top, left, 112))[None].float() / 255
        h, w = min(112, size[0]), min(112, size[1])
        hazy = d.apply(crop, "haze", drawn, part, 1.0)
        assert part.shape == (1, 1, 112, 112) and part.min() >= 0 and part.max() <= 1
        assert (hazy[:, :, :h, :w] - whole[:, :, top:top + h, left:left + w]).abs().max() * 255 < 1.01
        assert h == 112 or torch.equal(hazy[0, :, h], hazy[0, :, h - 2])            # reflected
        if not maps:
            g = d.seeded(5)


@pytest.mark.parametrize("maps", (False, True))
def test_haze_costs_by_the_crop_not_by_the_photo(tmp_path, maps):
    """Measured in turns, in the processor's own time; the fastest of each counts."""
    sizes = ((300, 400), (2000, 3000))
    sources = {size: depth_cache(tmp_path / str(size[0]), size, maps)[2] for size in sizes}
    took = {size: [] for size in sizes}
    for _ in range(15):
        for size, times in took.items():
            start = time.process_time()
            for i in range(8):
                train.sample({"photos": sources[size]}, ("haze",), 128, 8, (0, 0, 0, i))
            times.append(time.process_time() - start)
    small, large = (min(times) for times in took.values())
    assert large / small <= 1.5
