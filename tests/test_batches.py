"""Training batches: which task, which crop, degraded so that a crop looks like a piece of a whole degraded image."""
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import degrade as d
import train
from degrade import TASKS
from mioir import reflect_pad


class Flat:
    """A source of one 300 x 300 image whose pixels tell where they came from."""
    share = 1

    def __init__(self, edge=300, value=None, depth=None):
        self.map = depth
        ramp = torch.arange(edge) % 256
        self.image = torch.stack((ramp[:, None].expand(edge, edge), ramp[None].expand(edge, edge),
                                  torch.zeros(edge, edge, dtype=torch.long))).byte()
        if value is not None:
            self.image = torch.full_like(self.image, value)

    def __len__(self):
        return 1

    def size(self, k):
        return tuple(self.image.shape[1:])

    def crop(self, k, top, left, edge):
        return self.image[:, top:top + edge, left:left + edge].numpy()

    def depth(self, k):
        return self.map

    depth_crop = d.ImageCache.depth_crop


def test_a_sample_depends_on_seed_stage_iteration_and_number_alone():
    one = lambda *key: train.sample({"photos": Flat()}, TASKS, 64, 8, key)
    assert np.array_equal(one(0, 1, 2, 3)["canvas"], one(0, 1, 2, 3)["canvas"])
    for other in ((1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)):
        assert not np.array_equal(one(0, 1, 2, 3)["canvas"], one(*other)["canvas"])


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
    whole = Flat().image[None].float() / 255
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
    for start in range(0, 600, 60):
        samples = [train.sample({"photos": Flat(value=0)}, ("rain",), 128, 600, (0, 0, 0, i)) for i in range(start, start + 60)]
        layers.append(train.make_batch(train.Part(samples), 128, "cpu")[0][:, 0])
    layers = torch.cat(layers)
    assert abs(layers.mean() / 0.0645 - 1) < 0.05
    assert abs(layers.std() / 0.095 - 1) < 0.10


def test_a_training_batch_is_device_clean():
    samples = [train.sample({"photos": Flat()}, TASKS, 64, 14, (0, 0, 0, i)) for i in range(14)]
    lq, gt, task = train.make_batch(train.Part(samples), 64, "meta")[:3]
    assert lq.is_meta and gt.is_meta and task.is_meta


class Photo(Flat):
    """A source of one photo of any size, whose pixels do not matter."""

    def __init__(self, size, depth=None):
        self.size = lambda k: size
        self.map = depth

    def crop(self, k, top, left, edge):
        return np.zeros((3, edge, edge), np.uint8)


@pytest.mark.parametrize("maps", (False, True))
@pytest.mark.parametrize("size", [(300, 400), (2000, 3000), (100, 90), (40, 60)])
def test_hazes_depth_is_the_whole_enlargements(size, maps):
    """As it was computed from the whole photo; the last two sizes are smaller than the canvas."""
    depth = torch.rand(1, 1, size[0] // 4, size[1] // 4, generator=d.seeded(size)) if maps else None
    s = train.sample({"photos": Photo(size, depth)}, ("haze",), 64, 8, (0, 0, 0, 0))
    g = d.seeded(0, 0, 0, 0)
    top, left = (int(torch.randint(max(n - 112, 0) + 1, (1,), generator=g)) for n in size)
    offset = tuple(16 + int(torch.randint(16, (1,), generator=g)) for _ in range(2))
    torch.randint(8, (1,), generator=g)
    d.draw("haze", (112, 112), "in", g)
    whole = d.depth_prior(*size, g) if depth is None else F.interpolate(depth, size, mode="bilinear")
    part = reflect_pad(whole[:, :, top:top + 112, left:left + 112], 0, max(112 - size[1], 0), 0, max(112 - size[0], 0))
    relative = part / (1 if depth is None else whole.amax())
    assert s["offset"] == offset and np.abs(s["depth"] - relative[0].numpy()).max() <= 1e-5
