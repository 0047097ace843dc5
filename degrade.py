"""The seven degradations of MiOIR, batched and on any device; images to degrade; training batches.

    python degrade.py --images photos --out testsets                          # In-Dis test sets
    python degrade.py --images photos --depth maps --out testsets --split both --seed 3
    python degrade.py --images photos --out harder --split out                # Out-Dis alone
    python eval.py runs/demo/last.pt --testsets testsets                    # reads what was written

Every degradation takes and gives (N,3,H,W) in [0,1] and one parameter per image, and rounds its
result to 8 bits as the published data are: y = jpeg(x, quality=torch.tensor([30, 45, 70])).
Source: paper, Section 4.1 and the published data_script/add_MiO_train_degradation.py
(OpenCV, DiffJPEG).
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import math
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional as F

from mioir import TASKS, reflect_pad

# What is drawn per image: (lowest, highest), both included. "in" trains and tests (In-Dis), "out"
# tests only (Out-Dis). Numbers with a point are rounded to 2 decimals, the others are integers.
RANGES = {
    "in": {"blur": {"sigma": (1.0, 3.0), "kernel_size": (7, 21)},    # kernel_size: odd numbers only
           "noise": {"sigma": (15, 50)},                               # of 255 grey levels
           "jpeg": {"quality": (30, 70)},
           "rain": {"density": (50, 99), "width": (3, 11), "length": (20, 40), "angle": (-45, 44)},
           "haze": {"airlight": (0.8, 1.0), "beta": (0.5, 2.5)},
           "dark": {"gamma": (1.0, 3.0)},
           "sr": {}},                                                  # always x4
    "out": {"blur": {"sigma": (3.0, 5.0), "kernel_size": (7, 21)},
            "noise": {"sigma": (50, 70)},
            "jpeg": {"quality": (10, 30)},
            "rain": {"density": (100, 149), "width": (3, 11), "length": (20, 40),
                     "angle": (-45, 44)},
            "haze": {"airlight": (0.8, 1.0), "beta": (2.5, 3.0)},
            "dark": {"gamma": (3.0, 4.0)}},                            # sr: not published
}


# ---- The degradations. Parameters: a number, or an (N,) tensor with one value per image ----------

def quantize(x):
    """Rounds (N,3,H,W) to the 256 grey levels, clipped to [0,1]."""
    return (x * 255).round().clamp(0, 255) / 255


def per_image(value, x, dtype=torch.float32):
    """A number or (N,) tensor -> (N,1,1,1) on x's device."""
    value = torch.as_tensor(value, dtype=dtype, device=x.device)
    return value.expand(x.shape[0])[:, None, None, None]


def gaussian_blur(x, kernel_size, sigma):
    """Isotropic Gaussian; kernel_size: odd, at most 21; sigma in pixels; reflected borders."""
    kernel_size, sigma = per_image(kernel_size, x)[:, 0, 0], per_image(sigma, x)[:, 0, 0]   # (N,1)
    at = torch.arange(-10, 11, device=x.device)                                   # room for 21 taps
    taps = torch.exp(-0.5 * (at / sigma) ** 2) * (at.abs() <= kernel_size // 2)   # (N,21)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)          # one row per channel
    n, _, h, w = x.shape
    x = reflect_pad(x, 10, 10, 10, 10).flatten(0, 1)[None]                        # (1,3N,H+20,W+20)
    x = F.conv2d(x, taps[:, None, :, None], groups=3 * n)                  # the kernel is a product
    x = F.conv2d(x, taps[:, None, None, :], groups=3 * n)                         # of two 1-d ones
    return quantize(x.view(n, 3, h, w))


def add_noise(x, sigma, noise=None):
    """White Gaussian noise, independent per channel; sigma in grey levels (15 = 15/255).
    noise: (N,3,H,W) standard normal numbers, drawn from torch's own generator if not given."""
    noise = torch.randn_like(x) if noise is None else noise
    return quantize(x + noise * per_image(sigma, x) / 255)


# Luma and chroma tables of the JPEG standard (ITU T.81, Annex K), row = vertical frequency.
_LUMA = ((16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
         (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
         (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
         (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99))
_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))   # 99 elsewhere


def _jpeg_block(channel, table, factor):
    """Quantises the 8x8 cosine transform of (N,H,W) in grey levels, H and W multiples of 8."""
    k = torch.arange(8, device=channel.device)
    cosine = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2             # (frequency, pixel)
    cosine[0] /= math.sqrt(2)
    n, h, w = channel.shape
    blocks = channel.view(n, h // 8, 8, w // 8, 8).transpose(2, 3) - 128          # (N,H/8,W/8,8,8)
    step = table * factor[..., None]                                              # (N,1,1,8,8)
    coefficients = (cosine @ blocks @ cosine.T / step).round() * step
    blocks = cosine.T @ coefficients @ cosine + 128
    return blocks.transpose(2, 3).reshape(n, h, w)


def jpeg(x, quality):
    """JPEG's losses without its entropy coding: 4:2:0 chroma, 8x8 cosine transform, quantisation.

    quality: 1..99. As published: tables transposed (row = horizontal frequency), factor 50/q below
    50 and 2 - q/50 above, neither clipped nor rounded; sizes padded with black to multiples of 16.
    """
    n, _, h, w = x.shape
    quality = per_image(quality, x)
    factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    luma = torch.tensor(_LUMA, dtype=x.dtype, device=x.device).T
    chroma = torch.full((8, 8), 99.0, dtype=x.dtype, device=x.device)
    chroma[:4, :4] = torch.tensor(_CHROMA, dtype=x.dtype, device=x.device).T
    r, g, b = (F.pad(x, (0, -w % 16, 0, -h % 16)) * 255).unbind(1)                # each (N,H,W)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb = -0.168736 * r - 0.331264 * g + 0.5 * b + 128
    cr = 0.5 * r - 0.418688 * g - 0.081312 * b + 128
    y = _jpeg_block(y, luma, factor)
    cb, cr = (_jpeg_block(F.avg_pool2d(c, 2), chroma, factor) - 128 for c in (cb, cr))
    cb, cr = (c.repeat_interleave(2, 1).repeat_interleave(2, 2) for c in (cb, cr))
    rgb = torch.stack((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb), 1)
    return quantize(rgb[:, :, :h, :w] / 255)


# OpenCV's fixed Gaussian kernels, by width; 11 follows from its rule for sigma.
_SIGMA_11 = 0.3 * ((11 - 1) / 2 - 1) + 0.8
_WIDTH_TAPS = {3: (1, 2), 5: (1, 4, 6), 7: (1, 3.5, 7, 9), 9: (1, 3.25, 7.5, 12.75, 15),
               11: tuple(math.exp(-0.5 * (k / _SIGMA_11) ** 2) for k in range(-5, 1))}


def _width_taps(device):
    """(5,11): the Gaussian kernels of widths 3, 5, 7, 9, 11, centred, each with sum one."""
    rows = [(0,) * (6 - len(left)) + left + left[-2::-1] + (0,) * (6 - len(left))
            for left in _WIDTH_TAPS.values()]
    rows = torch.tensor(rows, dtype=torch.float64, device=device)
    return rows / rows.sum(1, keepdim=True)


def streak_kernels(width, length, angle):
    """The rain streaks: a diagonal line turned by angle - 45 degrees, shrunk, thickened.

    width: 3, 5, 7, 9 or 11; length: 20..40; angle: degrees, 0 is vertical; all (N,).
    Returns (N,40,40) in float64, the kernel's anchor (length // 2) at [20,20].
    Mirrors `rain_blur` of the published script: OpenCV's getRotationMatrix2D, warpAffine (source
    coordinates in steps of 1/32, bilinear, zero outside), GaussianBlur (reflect-101 borders).
    """
    length, angle = length.double(), (angle.double() - 45) * math.pi / 180
    scale = 1 - length / 100
    # The inverse map: from a pixel of the kernel to the point of the diagonal it shows.
    a, b = (torch.cos(angle) / scale)[:, None, None], (torch.sin(angle) / scale)[:, None, None]
    centre = (length / 2)[:, None, None]
    at = torch.arange(-20, 20, device=length.device).double() + length[:, None] // 2        # (N,40)
    y, x = at[:, :, None], at[:, None, :]                  # pixel coordinates inside each kernel
    def fixed(value):                                      # OpenCV's fixed point, 10 bits
        return (value * 1024).round()
    u = ((fixed(a * x) + fixed(-b * y + (1 - a) * centre + b * centre) + 16) / 32).floor() / 32
    v = ((fixed(b * x) + fixed(a * y + (1 - a) * centre - b * centre) + 16) / 32).floor() / 32
    streak = torch.zeros_like(u)
    for i in (0, 1):                                       # bilinear: the four pixels around (u,v)
        for j in (0, 1):
            row, col = v.floor() + i, u.floor() + j
            on_diagonal = (row == col) & (row >= 0) & (row < length[:, None, None])
            weight = (1 - (v - row).abs()) * (1 - (u - col).abs())
            streak += weight * on_diagonal
    inside = (at >= 0) & (at < length[:, None])
    streak = streak * inside[:, :, None] * inside[:, None, :]
    # Blur as a matrix: row p of `blur` holds the taps that fall on each pixel, borders reflected.
    taps = _width_taps(length.device)[(width.long() - 3) // 2]                    # (N,11)
    last = length[:, None, None] - 1
    reach = at[:, :, None] + torch.arange(-5, 6, device=length.device)            # (N,40,11)
    reach = last - (last - reach.abs()).abs()
    blur = ((reach[..., None] == at[:, None, None, :]) * taps[:, None, :, None]).sum(2)  # (N,40,40)
    blur = blur * inside[:, :, None]
    return blur @ streak @ blur.mT


def rain_streaks(field, density, width, length, angle, peak=1.0):
    """A layer of rain: (N,1,H,W) in [0,1] in steps of 1/255, `peak` at each field's brightest spot.

    field: (N,1,H,W) uniform random numbers in [0,256); a drop falls where it is among the largest
    density/100 of 256. density: 50..149; width: 3..11 odd, length: 20..40, both in pixels; angle:
    -45..44 degrees. Normalised over the whole field: give the whole image's, not a small crop's,
    or a peak below 1 (see RAIN_PEAK).
    """
    density, width, length, angle = (per_image(p, field, torch.float64).flatten()
                                     for p in (density, width, length, angle))
    # Each drop gets a small halo (3x3), then becomes a streak; both filters have mirrored borders,
    # and the halo is symmetric, so that one correlation with the 42 x 42 kernel of both does it.
    halo = field.new_tensor(((0, 0.1, 0), (0.1, 8, 0.1), (0, 0.1, 0)), dtype=torch.float64)
    streaks = streak_kernels(width, length, angle)[:, None]                       # (N,1,40,40)
    kernel = F.conv2d(streaks, halo[None, None], padding=2)                       # (N,1,42,42)
    least = 256 - density[:, None, None, None] / 100
    if field.device.type != "cpu":
        return _rain_layer(field, least, kernel, peak)
    each = zip(field.split(1), least, kernel.split(1))    # one at a time fits the processor's cache
    return torch.cat([_rain_layer(*one, peak) for one in each])


def _rain_layer(field, least, kernel, peak):
    """The drops of (N,1,H,W) that are `least` or more, each drawn as its kernel, normalised."""
    h, w = field.shape[2:]
    drops = torch.where(field >= least, field, 0).double()
    drops = reflect_pad(drops, 21, 20, 21, 20)                                    # (N,1,H+41,W+41)
    rows, columns = map(_fast_size, drops.shape[2:])
    spectrum = torch.fft.rfft2(drops, s=(rows, columns))      # correlation: the kernel's conjugate
    spectrum *= torch.fft.fft(torch.fft.rfft(kernel, columns), rows, dim=2).conj()
    layer = torch.fft.irfft2(spectrum, s=(rows, columns))[:, :, :h, :w]
    low, high = layer.amin((2, 3), keepdim=True), layer.amax((2, 3), keepdim=True)
    scale = 255 * peak / (high - low).clamp_min(1e-12)
    return ((layer - low) * scale + 1e-9).floor_().float() / 255                  # from 0 to peak


def _fast_size(n):
    """The next size whose only prime factors are 2, 3 and 5, which Fourier transforms like."""
    return next(m for m in range(n, 2 * n) if 60 ** 12 % m == 0)


def add_rain(x, streaks):
    """x: (N,3,H,W), streaks: (N,1,H,W), both in [0,1]: their sum, clipped."""
    return quantize(x + streaks)


def add_haze(x, depth, airlight, beta, depth_max=None):
    """x t + airlight (1 - t) with t = exp(-beta d): the atmospheric scattering model.

    depth: (N,1,h,w), any unit, larger is farther; enlarged to x's size where smaller (bilinear).
    d = depth / depth_max; depth_max is the WHOLE image's maximum: give it when x is a crop.
    airlight: brightness of the haze, in [0,1]; beta: its density.
    """
    if depth.shape[2:] != x.shape[2:]:
        depth = F.interpolate(depth, x.shape[2:], mode="bilinear")
    depth_max = depth.amax((2, 3), keepdim=True) if depth_max is None else per_image(depth_max, x)
    transmission = torch.exp(-per_image(beta, x) * depth / depth_max)
    return quantize(x * transmission + per_image(airlight, x) * (1 - transmission))


def darken(x, gamma):
    """x ** gamma: low light."""
    return quantize(x ** per_image(gamma, x))


def bicubic_x4(x, stored=False):
    """A quarter of the size and back, both bicubic without antialiasing (torch's own).
    stored: the small image is an 8-bit file in between, as in the published test sets."""
    small = F.interpolate(x, [max(s // 4, 1) for s in x.shape[2:]], mode="bicubic")
    small = quantize(small) if stored else small
    return quantize(F.interpolate(small, x.shape[2:], mode="bicubic"))


# ---- Random degradation: draw the parameters, then apply them ------------------------------------

_STEPS = {"kernel_size": 2, "width": 2, "density": 1, "length": 1, "angle": 1}    # evenly, in steps


def seeded(*numbers):
    """A torch.Generator whose state depends on all of the numbers and nothing else."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(task, size, split="in", generator=None, n=1, rain_field=None):
    """Every random number that degrading n images needs: {name: tensor (n,...)} on the CPU.

    size: (H,W) of the images. rain_field: (H,W) of the rain field where it differs.
    """
    if task not in RANGES[split]:
        raise ValueError(f"no {split!r} ranges for task {task!r}; "
                         f"there are {', '.join(RANGES[split])}")
    drawn = {}
    for name, (low, high) in RANGES[split][task].items():
        u = torch.rand(n, generator=generator)
        step = _STEPS.get(name)
        if step:
            drawn[name] = low + step * (u * ((high - low) // step + 1)).floor()
        else:                          # as published: uniform, then rounded
            decimals = 2 if isinstance(low, float) else 0
            drawn[name] = torch.round(low + u * (high - low), decimals=decimals)
    if task == "noise":
        drawn["noise"] = torch.randn(n, 3, *size, generator=generator)
    if task == "rain":
        drawn["field"] = torch.rand(n, 1, *(rain_field or size), generator=generator) * 256
    return drawn


def apply(x, task, drawn, depth=None, depth_max=None, peak=1.0):
    """Degrades x (N,3,H,W) by what `draw` gave. depth (haze): (N,1,h,w); depth_max: (N,) or None.
    A rain field larger than x is rain on a larger canvas with x in its corner."""
    drawn = {name: value.to(x.device) for name, value in drawn.items()}
    if task == "rain":
        streaks = rain_streaks(**drawn, peak=peak)
        return add_rain(x, streaks[:, :, :x.shape[2], :x.shape[3]])
    if task == "haze":
        return add_haze(x, depth.to(x), **drawn, depth_max=depth_max)
    return {"blur": gaussian_blur, "noise": add_noise, "jpeg": jpeg, "dark": darken,
            "sr": bicubic_x4}[task](x, **drawn)


def depth_prior(height, width, generator=None):
    """Depth for a photo that has none: (1,1,H,W) in (0,1], far at the top, near at the bottom,
    plus variation of low frequency. Its maximum counts as 1 wherever the image is cropped."""
    knots = torch.linspace(1, 0.2, 8)[:, None] + 0.15 * torch.randn(8, 8, generator=generator)
    knots = (knots / knots.max()).clamp_min(0.05)
    return F.interpolate(knots[None, None], (height, width), mode="bilinear", align_corners=True)


def degrade(x, task, split="in", depth=None, generator=None):
    """A random degradation of whole images, with the paper's ranges.

    x: (N,3,H,W) in [0,1]; task: one of TASKS; split: "in" or "out" (RANGES); depth: (N,1,h,w), used
    by haze, else depth_prior. Returns (N,3,H,W). Raises ValueError for "out" sr: not published.
    """
    n, _, h, w = x.shape
    drawn = draw(task, (h, w), split, generator, n)
    if task == "haze" and depth is None:
        depth = torch.cat([depth_prior(h, w, generator) for _ in range(n)])
        return apply(x, task, drawn, depth, depth_max=1.0)
    return apply(x, task, drawn, depth)


# ---- Dead leaves: images with true depth from a seed alone ---------------------------------------

# Natural colours (RGB): sky, water, foliage, grass, soil, rock, sand, wood, brick, skin, petals.
_PALETTE = np.array([
    (150, 185, 220), (96, 130, 165), (214, 222, 228), (40, 66, 74), (58, 84, 38), (104, 128, 60),
    (150, 162, 84), (34, 46, 26), (92, 70, 50), (58, 46, 38), (128, 122, 114), (84, 84, 86),
    (176, 170, 158), (206, 186, 148), (156, 118, 80), (132, 68, 50), (212, 164, 134), (196, 74, 84),
    (222, 182, 70), (140, 96, 146), (238, 234, 226), (24, 24, 28)], dtype=np.float32) / 255


def spectrum_noise(height, width, slope, rng):
    """Gaussian noise whose amplitude falls as 1/frequency^slope: (H,W), mean 0, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(rng.standard_normal((height, width)))
    noise = np.fft.irfft2(white * frequency ** -slope, s=(height, width))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def _outline(kind, theta, rng):
    """Radius of a leaf's outline in direction theta, of about 1."""
    if kind == "polygon":
        corner = 2 * np.pi / rng.integers(3, 7)
        return np.cos(corner / 2) / np.cos((theta % corner) - corner / 2) * 1.2
    if kind == "box":                                      # a superellipse: between disc and square
        p = rng.uniform(3, 9)
        return (np.abs(np.cos(theta)) ** p + np.abs(np.sin(theta)) ** p + 1e-9) ** (-1 / p)
    if kind == "blob":
        return 1 + sum(rng.uniform(0, 0.7 / k) * np.cos(k * theta + rng.uniform(0, 7))
                       for k in range(2, 7))
    return np.ones_like(theta)                             # "disc"; stretched, an ellipse or a stem


def _leaf_texture(u, v, top, left, radius, noises, rng):
    """Brightness of a leaf's surface around 0: gratings, noise, or nearly nothing; then shading."""
    kind, strength = rng.random(), rng.uniform(0.02, 0.16) * (rng.random() < 0.4)  # most are smooth
    if kind < 0.25:
        frequency, angle = rng.uniform(1.5, max(radius / 3, 2)), rng.uniform(0, np.pi)
        across = u * np.cos(angle) + v * np.sin(angle)
        texture = np.sin(frequency * np.pi * across + rng.uniform(0, 7))
    else:
        noise = noises[rng.integers(len(noises))]
        dy, dx = rng.integers(0, noise.shape[0]), rng.integers(0, noise.shape[1])
        rows = (np.arange(top, top + u.shape[0]) + dy) % noise.shape[0]
        texture = noise[rows[:, None], (np.arange(left, left + u.shape[1]) + dx) % noise.shape[1]]
    angle = rng.uniform(0, 2 * np.pi)
    slope, bulge = rng.uniform(0, 0.25), rng.uniform(0, 0.12)
    shading = slope * (u * np.cos(angle) + v * np.sin(angle)) - bulge * (u * u + v * v)
    return strength * texture + shading


def dead_leaves(height, width, generator):
    """A random scene: overlapping shapes, the nearer in front, each with colour, texture, shading.

    Radii follow the power law r^-3, which makes the image scale-invariant as natural images are
    (Lee, Mumford, Huang, "Occlusion models for natural images", 2001). generator: torch.Generator.
    Returns image (1,3,H,W) in [0,1], rounded to 8 bits, and its true depth (1,1,H,W) in (0,1].
    """
    rng = np.random.default_rng(torch.randint(2 ** 62, (1,), generator=generator).item())
    noises = [spectrum_noise(height, width, slope, rng) for slope in (0.3, 0.8, 1.5)]
    palette = _PALETTE[rng.choice(len(_PALETTE), 4, replace=False)] * rng.uniform(0.9, 1.1, 3)
    image, depth = _backdrop(height, width, palette, noises, rng)
    smallest, largest = np.exp(rng.uniform(np.log(3), np.log(12))), max(height, width) / 2.5
    # Enough leaves to cover the image about once: the mean area under r^-3 is 2 pi s^2 log(l/s).
    count = int(0.7 * height * width / (2 * np.pi * smallest ** 2 * np.log(largest / smallest))) + 8
    radii = (smallest ** -2 + rng.random(count) * (largest ** -2 - smallest ** -2)) ** -0.5
    for k, radius in enumerate(radii):                                            # from far to near
        _paint_leaf(image, depth, 0.7 * (1 - k / count) + 0.05, radius, palette, noises, rng)
    image *= np.exp(0.2 * spectrum_noise(height, width, 2.2, rng))[..., None]    # uneven light
    image = torch.from_numpy(image * np.float32(rng.uniform(0.8, 1.2))).permute(2, 0, 1)[None]
    image = gaussian_blur(image.clamp(0, 1), 7, rng.uniform(0.2, 0.5))            # the lens
    return image, torch.from_numpy(depth)[None, None]


def _backdrop(height, width, palette, noises, rng):
    """What lies behind all leaves: a smooth change of colour from top to bottom; far at the top."""
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    noise = rng.uniform(0, 0.03) * noises[2][..., None]
    image = palette[0] * (1 - down) + palette[1] * down + noise
    depth = np.broadcast_to(1 - 0.25 * down[..., 0], (height, width))
    return image.astype(np.float32), depth.astype(np.float32)


def _paint_leaf(image, depth, leaf_depth, radius, palette, noises, rng):
    """Paints one leaf over what lies behind it; touches only the rows and columns it reaches."""
    height, width = depth.shape
    cy, cx = rng.uniform(-0.1, 1.1) * height, rng.uniform(-0.1, 1.1) * width
    stretch = np.exp(rng.normal(0, 0.45))
    reach = 1.6 * radius * max(stretch, 1 / stretch) + 4
    top, bottom = max(int(cy - reach), 0), min(int(cy + reach) + 1, height)
    left, right = max(int(cx - reach), 0), min(int(cx + reach) + 1, width)
    if top >= bottom or left >= right:
        return
    y, x = np.arange(top, bottom)[:, None] - cy, np.arange(left, right)[None] - cx
    angle = rng.uniform(0, np.pi)
    u = ((np.cos(angle) * x + np.sin(angle) * y) / (radius * stretch)).astype(np.float32)
    v = ((np.cos(angle) * y - np.sin(angle) * x) / (radius / stretch)).astype(np.float32)
    kind = ("disc", "box", "polygon", "blob", "blob")[rng.integers(5)]
    inside = (_outline(kind, np.arctan2(v, u), rng) - np.hypot(u, v)) * radius  # pixels to the edge
    edge = rng.uniform(0.5, 1.2)                                               # its blur, in pixels
    cover = np.clip(inside / edge + 0.5, 0, 1)[..., None]
    shadow = np.clip(inside / (0.3 * radius + 3) + 1, 0, 1)[..., None] * rng.uniform(0, 0.3)
    texture = _leaf_texture(u, v, top, left, radius, noises, rng)[..., None]
    patch = image[top:bottom, left:right]
    colour = palette[rng.integers(len(palette))] * np.exp(rng.normal(0, 0.35))
    colour += rng.normal(0, 0.02, 3)
    colour += rng.uniform(0, 0.9) * (patch.mean((0, 1)) - colour)         # akin to its surroundings
    patch *= 1 - shadow * (1 - cover)                                         # darker beside a leaf
    patch += cover * (np.clip(colour, 0.02, 1) * (1 + texture) - patch)
    depth[top:bottom, left:right][cover[..., 0] > 0.5] = leaf_depth


# ---- Images: files, and a cache of decoded ones that is read a crop at a time --------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_FAULTS = (OSError, ValueError, SyntaxError, MemoryError, OverflowError, EOFError, TypeError)


def open_image(path):
    """An image file, decoded, upright by its EXIF tag: (PIL image, notes on what was changed).
    Raises ValueError with one line that names the file and what is wrong with it."""
    notes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")            # what matters is said below, in one line
            with Image.open(path) as image:
                limit = Image.MAX_IMAGE_PIXELS
                if limit and image.width * image.height > limit:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                if getattr(image, "n_frames", 1) > 1:
                    notes.append("the first of its frames")
                image = ImageOps.exif_transpose(image)
                if image.mode in ("F", "I") or image.mode.startswith("I;16"):
                    notes.append("read as 8 bits")
                    image = _to_8_bits(image)
                image.load()
                return image, notes
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: beyond the limit of {Image.MAX_IMAGE_PIXELS} pixels ({error}); "
                         "if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS "
                         "(eval.py: --max-pixels N)") from None
    except _FAULTS as error:
        raise ValueError(f"{path}: not a readable image ({' '.join(str(error).split())})") from None


def _to_8_bits(image):
    """A 16-bit or floating-point grey image -> 8 bits, scaled by what its numbers seem to mean."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = values.max()
    full = 1.0 if image.mode == "F" and peak <= 1 else 255.0 if peak <= 255 else 65535.0
    grey = Image.fromarray(np.clip(values / full * 255 + 0.5, 0, 255).astype(np.uint8))
    grey.info = image.info
    return grey


def to_rgb(image):
    """PIL image -> (H,W,3) uint8; palette, grey and CMYK are converted, alpha is set aside."""
    return np.asarray(image.convert("RGBA" if image.mode in ("P", "PA") else "RGB").convert("RGB"))


def read_image(path):
    """Any image file -> (H,W,3) uint8 RGB. Raises ValueError as open_image does."""
    return to_rgb(open_image(path)[0])


def to_tensor(image):
    """(H,W,3) uint8 -> (1,3,H,W) float32 in [0,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def to_image(x):
    """(1,3,H,W) or (3,H,W) in [0,1], clamped and rounded -> (H,W,3) uint8."""
    x = x[0] if x.ndim == 4 else x
    return (x * 255).round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().cpu().numpy()


@contextlib.contextmanager
def whole_file(path):
    """A name to write to, which becomes `path` when all is written, and vanishes otherwise."""
    path = Path(path)
    name = hashlib.sha256(f"{path.name} {os.getpid()}".encode()).hexdigest()[:16]
    unfinished = path.with_name(f".{name}.tmp")                  # short, however long path.name is
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def list_images(folders):
    """All images below the folders, sorted. Raises ValueError for no images or a missing folder."""
    files = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give a folder that holds images")
        files += sorted(p for p in folder.rglob("*")
                        if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{', '.join(map(str, folders))}: no images; "
                         f"looked for {' '.join(SUFFIXES)}")
    return files


def read_depth(path):
    """Depth map, (h,w) float32, larger is farther: .npy, 8- or 16-bit .png, .mat (`data_obj`)."""
    try:
        if path.suffix == ".npy":
            depth = np.load(path, allow_pickle=False)
        elif path.suffix == ".mat":
            try:
                from scipy.io import loadmat
            except ImportError:
                raise ValueError("a .mat file needs scipy, which is not installed; "
                                 "save the maps as .npy") from None
            depth = loadmat(path)["data_obj"]
        else:
            with Image.open(path) as image:
                depth = np.asarray(image)
        depth = np.asarray(depth, np.float32)
        if depth.ndim != 2 or not np.isfinite(depth).all() or depth.min() < 0 or depth.max() <= 0:
            raise ValueError("expected one channel of numbers, none negative, some positive")
        return depth
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable depth map ({error})") from None


def find_depths(files, folder):
    """{image path: depth map path or None}, matched by file stem."""
    if folder is None:
        return dict.fromkeys(files)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder; --depth takes a folder of depth maps")
    maps = {p.stem: p for p in Path(folder).rglob("*") if p.suffix in (".npy", ".png", ".mat")}
    missing = [p for p in files if p.stem not in maps]
    if missing:
        raise ValueError(f"{folder}: no depth map for {missing[0].name}"
                         + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    return {p: maps[p.stem] for p in files}


def _make_leaves(edge, seed):
    image, depth = dead_leaves(edge, edge, torch.Generator().manual_seed(seed))
    return to_image(image), depth[0, 0].numpy()


def _make_photo(path, depth_path):
    return read_image(path), None if depth_path is None else read_depth(depth_path)


def _store(maker, arguments, target):
    """Runs maker(*arguments) -> (image, depth or None) and stores both, whole or not at all."""
    try:
        image, depth = maker(*arguments)
    except ValueError as error:
        return str(error)
    for array, suffix in ((depth, ".depth.npy"), (image, ".npy")):                # the image last
        if array is not None:
            with whole_file(f"{target}{suffix}") as unfinished, open(unfinished, "wb") as file:
                np.save(file, array)
    return None


def processes(count):
    """A pool of processes, one core each; spawned, so whatever runs here does not disturb them."""
    return ProcessPoolExecutor(count, torch.multiprocessing.get_context("spawn"),
                               torch.set_num_threads, (1,))


def _head_size(maker, arguments):
    """(height, width) of an item before it is decoded, from the file's head; (0, 0): unreadable."""
    if maker is _make_leaves:
        return arguments[0], arguments[0]
    try:
        with Image.open(arguments[0]) as image:
            lies = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5       # on its side
            return image.size if lies else image.size[::-1]
    except (*_FAULTS, Image.DecompressionBombError):
        return 0, 0                                    # it will be named when it is decoded


def _stored_bytes(item):
    """What an item will take on the disk: 3 bytes of colour a pixel, and 4 of depth for leaves."""
    height, width = _head_size(*item[1:])
    return height * width * (7 if item[1] is _make_leaves else 3)


# A mapped file takes no memory; opening one takes longer than reading a crop.
_mapped = functools.lru_cache(maxsize=8192)(lambda path: np.load(path, mmap_mode="r"))


class ImageCache:
    """Decoded images in a folder, one .npy file each, of which only the rows of a crop are read.

    items: (name, maker, arguments); the name changes when the content would (see photo_items,
    leaf_items), so that a file that exists is right, and building goes on where it was interrupted.
    """
    share = 1                          # samples in a row that are cut from the same image

    def __init__(self, folder, items, minimum, say=print):
        self.folder = Path(folder)
        bad = self._build(items, say)
        self.sizes = {item[0]: self._size(item) for item in items if item[0] not in bad}
        for name, maker, arguments in items:
            if name in self.sizes and min(self.sizes[name]) < minimum:
                h, w = self.sizes.pop(name)
                bad[name] = f"{arguments[0]}: {w} x {h} pixels, smaller than the crop of {minimum}"
        for reason in bad.values():
            say(f"skipped {reason}")
        self.names = list(self.sizes)
        if not self.names:
            raise ValueError(f"no usable image among {len(items)}: {next(iter(bad.values()))}")

    def _path(self, name, suffix=".npy"):
        return self.folder / f"{name}{suffix}"

    def _size(self, item):
        return np.load(self._path(item[0]), mmap_mode="r").shape[:2]

    def _build(self, items, say):
        """Makes what is missing, in parallel if there is much of it. Returns {name: why not}."""
        self.folder.mkdir(parents=True, exist_ok=True)
        todo = [item for item in items if not self._path(item[0]).exists()]
        jobs = [(maker, arguments, str(self.folder / name)) for name, maker, arguments in todo]
        names = [name for name, _, _ in todo]
        needed, free = sum(map(_stored_bytes, todo)), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(f"{self.folder}: decoded images need {needed / 1e9:.1f} GB and "
                             f"{free / 1e9:.1f} GB are free; "
                             "name a folder on a larger disk with --cache")
        workers = min(os.cpu_count() or 1, len(todo) // 32)
        bad, step = {}, max(len(todo) // 10, 25)
        def done(count, name, reason):
            if reason:
                bad[name] = reason
            if count % step == 0:
                say(f"preparing images: {count} of {len(todo)}")
        if workers < 2:
            for count, (name, job) in enumerate(zip(names, jobs), 1):
                done(count, name, _store(*job))
            return bad
        with processes(workers) as pool:
            futures = {pool.submit(_store, *job): name for name, job in zip(names, jobs)}
            for count, future in enumerate(as_completed(futures), 1):
                done(count, futures[future], future.result())
        return bad

    def __len__(self):
        return len(self.names)

    @property
    def identity(self):
        """What must stay the same when a run goes on: the images' names, sizes and order. The last
        part of a name, of path and time, may differ: a run survives its data being moved."""
        kept = [name.rpartition("-")[0] for name in self.names]
        return f"{len(kept)} images, fingerprint {seeded(*kept).initial_seed():x}"

    def size(self, k):
        return self.sizes[self.names[k]]

    def image(self, k):
        return _mapped(self._path(self.names[k]))

    def crop(self, k, top, left, edge):
        """(3,edge,edge) uint8, reflected where the image is smaller."""
        part = np.array(self.image(k)[top:top + edge, left:left + edge])
        pad = [(0, edge - s) for s in part.shape[:2]] + [(0, 0)]
        return torch.from_numpy(np.pad(part, pad, mode="reflect")).permute(2, 0, 1)

    def depth(self, k):
        """(1,1,h,w) float32, or None if the image came without."""
        path = self._path(self.names[k], ".depth.npy")
        return torch.from_numpy(np.load(path))[None, None] if path.exists() else None


_decoded = functools.lru_cache(maxsize=2)(lambda name, maker, arguments: maker(*arguments))


class ImageFiles(ImageCache):
    """The same without a cache: slow, so 16 samples in a row share a decoded image."""
    share = 16

    def _build(self, items, say):
        """Looks at the heads of the files alone. A torn file stops the run, which names it."""
        self.items = {item[0]: item for item in items}
        return {name: f"{arguments[0]}: not a readable image" for name, maker, arguments in items
                if not all(_head_size(maker, arguments))}

    def _size(self, item):
        return _head_size(*item[1:])

    def image(self, k):
        return _decoded(*self.items[self.names[k]])[0]

    def depth(self, k):
        depth = _decoded(*self.items[self.names[k]])[1]
        return None if depth is None else torch.from_numpy(depth)[None, None]


def photo_items(folders, depth_folder=None):
    """Items of an ImageCache: (name, how to make it, from what). A name is stem-size-fingerprint;
    the fingerprint is of path, size and time, so that a changed file is read anew."""
    items = []
    for path, depth in find_depths(list_images(folders), depth_folder).items():
        facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns)
                 for p in (path, depth) if p]
        size, fingerprint = sum(f[1] for f in facts), hashlib.sha256(repr(facts).encode())
        name = f"{path.stem[:40]}-{size}-{fingerprint.hexdigest()[:16]}"
        items.append((name, _make_photo, (path, depth)))
    return items


def leaf_items(count, edge, seed):
    """Items of an ImageCache: dead leaves, edge x edge pixels, with true depth. The 2 in the name
    goes up when dead_leaves draws otherwise, so that a cache of older ones is not used."""
    return [(f"leaves2-{edge}-{seed}-{k}", _make_leaves, (edge, 1_000_003 * seed + k))
            for k in range(count)]


# ---- Writing test sets ---------------------------------------------------------------------------

def _test_images(path, name, depth_path, out, split, seed):
    """Writes one image's degraded versions that are not there yet. Returns rows of params.csv."""
    try:
        x = to_tensor(read_image(path))
        depth = None if depth_path is None else torch.from_numpy(read_depth(depth_path))[None, None]
    except ValueError as error:
        return str(error)
    rows, size = [], x.shape[2:]
    write_image(out / "original" / "GT" / f"{name}.png", to_image(x))
    for which in ("in", "out") if split == "both" else (split,):
        for task in RANGES[which]:
            g = seeded(seed, which, task, name)
            drawn = draw(task, size, which, g)
            alone = task == "haze" and depth is None
            far, farthest = (depth_prior(*size, g), 1.0) if alone else (depth, None)
            folder = {"in": f"single_indis/{task}", "out": f"single_outbig/{task}_outbig"}[which]
            target = out / folder / f"{name}.png"
            if not target.exists():
                y = (bicubic_x4(x, stored=True) if task == "sr"
                     else apply(x, task, drawn, far, farthest))
                write_image(target, to_image(y))
            numbers = {key: value.item() for key, value in drawn.items() if value.numel() == 1}
            rows.append([str(target.relative_to(out)), task, which, g.initial_seed(),
                         " ".join(f"{key}={value:g}" for key, value in numbers.items())])
    return rows


def write_image(path, image):
    """Writes a PNG whole or not at all, and leaves one that is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            Image.fromarray(image).save(unfinished, format="PNG")


def write_test_sets(folder, out, split, seed, depth_folder=None, say=print):
    """Degrades all images of a folder into the published test-set layout, with params.csv.

    The same seed gives the same bytes, on any number of cores and after any interruption. Returns
    the number of images that could not be read.
    """
    out, files = Path(out), find_depths(list_images([folder]), depth_folder)
    names = {path: "_".join(path.relative_to(folder).with_suffix("").parts) for path in files}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{folder}: two images have the same name but for their ending; "
                         "rename one")
    plan = out / "params.csv"
    settings = f"# images {len(files)}, split {split}, seed {seed}, depth {depth_folder or 'prior'}"
    if plan.exists() and plan.read_text().splitlines()[0] != settings:
        raise ValueError(f"--out {out} holds other test sets "
                         f"({plan.read_text().splitlines()[0][2:]}); choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    plan.write_text(settings + "\n")                       # begun; the rows follow when all is done
    results, start = {}, time.monotonic()
    with processes(min(os.cpu_count() or 1, len(files))) as pool:
        futures = {pool.submit(_test_images, path, names[path], depth, out, split, seed): path
                   for path, depth in files.items()}
        for count, future in enumerate(as_completed(futures), 1):
            results[futures[future]] = future.result()
            rate = count / (time.monotonic() - start)
            say(f"{count}/{len(files)} {futures[future].name} | {rate:.2f} images/s | "
                f"{(len(files) - count) / rate:.0f} s left")
    bad = [result for result in results.values() if isinstance(result, str)]
    with whole_file(plan) as unfinished, open(unfinished, "w", newline="") as file:
        file.write(settings + "\n")
        writer = csv.writer(file)
        writer.writerow(["file", "task", "split", "generator_seed", "parameters"])
        for path in files:
            if not isinstance(results[path], str):
                writer.writerows(results[path])
    for reason in bad:
        say(f"skipped {reason}")
    say(f"{out}: {len(files) - len(bad)} images in {time.monotonic() - start:.0f} s; "
        f"next: python eval.py CKPT --testsets {out}")
    return len(bad)


def main(argv=None):
    """The command. Whatever the user can mend ends in one line and a non-zero exit."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"degrade.py: {message} (see python degrade.py --help)")
    add = parser.add_argument
    add("--images", required=True, metavar="DIR", help="pictures to degrade, in any subfolders")
    add("--depth", metavar="DIR",
        help="depth maps for haze, matched by name (default: a smooth prior)")
    add("--out", required=True, metavar="DIR", help="where original/, single_indis/, ... go")
    add("--split", choices=("in", "out", "both"), default="in",
        help="In-Dis, Out-Dis ranges, or both")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if write_test_sets(args.images, args.out, args.split, args.seed, args.depth):
            sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(f"degrade.py: {error}")


if __name__ == "__main__":
    main()
