"""What the published code gave, and the rule by which its weights were filled.

golden/models.json.gz: published parameter names and shapes of 14 variants; golden/models.npz: every
fourth pixel of their outputs. golden/degrade.*: published degradations, metrics and learning rates of
one 96 x 128 photo. All made with the published code, once; the tests compare ours with them.
"""
import functools
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = json.loads(gzip.decompress((GOLDEN / "models.json.gz").read_bytes()))
OUTPUTS = np.load(GOLDEN / "models.npz")
DEGRADED = np.load(GOLDEN / "degrade.npz")
CASES = json.loads((GOLDEN / "degrade.json").read_text())


@functools.cache
def filled(name, shape):
    """A weight that depends on its published name and shape alone."""
    values = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
    if name.endswith("temperature"):
        values = 1 + 0.1 * values
    elif "relative_position_bias_table" in name or "modulator" in name:
        values = 0.5 * values
    elif "prompt_param" in name:
        values = 0.5 + 0.3 * values
    elif len(shape) == 1:
        values = 0.1 * values + (1 if name.endswith("weight") else 0)
    else:
        values = values / np.sqrt(int(np.prod(shape[1:])))
    return torch.from_numpy(values.astype(np.float32))


def published_state(variant):
    return {name: filled(name, tuple(shape)) for name, shape in VARIANTS[variant]["keys"]}


def published_input(variant):
    n, _, h, w = VARIANTS[variant]["shape"]
    random = np.random.RandomState(VARIANTS[variant]["seed"])
    coarse = torch.from_numpy(random.rand(n, 3, (h + 7) // 8, (w + 7) // 8).astype(np.float32))
    smooth = F.interpolate(coarse, (h, w), mode="bilinear")
    return (0.8 * smooth + 0.2 * torch.from_numpy(random.rand(n, 3, h, w).astype(np.float32))).clamp(0, 1)


def published_prompts():
    return np.random.RandomState(7).rand(7, 128, 128).astype(np.float32)


def photo(name="gt"):
    """A golden picture as (1,3,H,W) in [0,1]."""
    return torch.from_numpy(DEGRADED[name].astype(np.float32) / 255).permute(2, 0, 1)[None]


def grey_levels(x, name):
    """Mean and largest difference of (1,3,H,W) from a golden picture, in grey levels."""
    ours = (x[0] * 255).round().permute(1, 2, 0).numpy()
    difference = np.abs(ours - DEGRADED[name].astype(np.float64))
    return difference.mean(), difference.max()


# Training: golden/training.npz -------------------------------------------------------------------------

TRAINED = np.load(GOLDEN / "training.npz")


def training_start(variant):
    """{published name: float32 tensor}: as filled, but weights a quarter as large, so that losses begin near 0.1."""
    return {name: 0.25 * value if value.ndim > 1 and not name.endswith("temperature") else value
            for name, value in published_state(variant).items()}


def training_batches(crop, count):
    """[(lq, gt, rows of TASKS), ...]: two pictures each, in float32."""
    batches, random = [], np.random.RandomState(20240)
    for _ in range(count):
        coarse = random.rand(2, 3, crop // 8, crop // 8).repeat(8, 2).repeat(8, 3)
        gt = 0.8 * coarse + 0.2 * random.rand(2, 3, crop, crop)
        lq = (gt + 0.1 * random.standard_normal(gt.shape)).clip(0, 1)
        batches.append((lq.astype(np.float32), gt.astype(np.float32), random.randint(7, size=2)))
    return batches


def training_places(name, size):
    """Which values of a tensor (flattened, published layout) the golden file keeps; the first ones of these."""
    return np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).randint(size, size=64)
