"""The seven degradations of MiOIR, batched and on any device, and the images they are applied to.

    python degrade.py --images photos --out testsets                          # In-Dis test sets
    python degrade.py --images photos --depth maps --out both --split both --seed 3
    python degrade.py --images photos --out harder --split out                # Out-Dis alone
    python eval.py runs/demo/last.pt --testsets testsets                    # reads what was written

(--out must be a new or an empty folder: test sets of two kinds never mix.)

From a program: y = jpeg(x, quality=torch.tensor([30, 45, 70])) with its own quality for each image,
or y = degrade(x, "rain") with random parameters from the paper's ranges.

Glossary
    x            clean images, (N,3,H,W) in [0,1]: N images, RGB, H x W pixels
    y            degraded images, same shape; rounded to 8 bits (`quantize`)
    parameters   a number for all images, or an (N,) tensor with one value per image
    grey level   1/255
    In-Dis       drawn from the ranges of training ("in");  Out-Dis: stronger than trained ("out")
    d, t, A      haze: depth relative to the farthest point, transmission, airlight

Sources: paper (arXiv 2401.03379), Section 4.1, for what is drawn; the published code's
data_script/add_MiO_train_degradation.py for how it is applied, which uses OpenCV (blur, rain) and
DiffJPEG. Where published code does something odd, so does this file, and the comment says so: the
paper's models were trained and tested on such images.

Whatever a network computes in, data are made in float32 or finer: what could be computed in TF32 or
bfloat16 (matrix products, convolutions) is in float64 here, which neither of them touches.
"""
import argparse
import contextlib
import csv
import datetime
import difflib
import functools
import hashlib
import math
import os
import shlex
import signal
import sys
import threading
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch.nn import functional as F

from mioir import TASKS, blamed_on, reflect_pad, refuse_deep_grey, upright

# ---- What is drawn (paper, Section 4.1) ----------------------------------------------------------

# (lowest, highest) of every parameter, both included. "in" is for training and the In-Dis tests;
# "out" is for the Out-Dis tests alone: there sigma, density, beta or gamma begin about where those
# of training end, and JPEG's quality ends where it begins.
RANGES = {
    "in": {"blur": {"sigma": (1.0, 3.0), "kernel_size": (7, 21)},      # both in pixels
           "noise": {"sigma": (15, 50)},                               # in grey levels
           "jpeg": {"quality": (30, 70)},
           "rain": {"density": (50, 99), "width": (3, 11), "length": (20, 40), "angle": (-45, 44)},
           "haze": {"airlight": (0.8, 1.0), "beta": (0.5, 2.5)},
           "dark": {"gamma": (1.0, 3.0)},
           "sr": {}},                                                  # always x4: nothing to draw
    "out": {"blur": {"sigma": (3.0, 5.0), "kernel_size": (7, 21)},
            "noise": {"sigma": (50, 70)},
            "jpeg": {"quality": (10, 30)},
            "rain": {"density": (100, 149), "width": (3, 11), "length": (20, 40),
                     "angle": (-45, 44)},
            "haze": {"airlight": (0.8, 1.0), "beta": (2.5, 3.0)},
            "dark": {"gamma": (3.0, 4.0)}},                            # sr: not published
}
# A parameter named in STEPS takes whole numbers, all equally likely: lowest, lowest + step, ...
STEPS = {"kernel_size": 2, "width": 2, "density": 1, "length": 1, "angle": 1}       # 2: odd numbers
# Every other parameter of a task is uniform in its range, then rounded to so many decimals (so
# the lowest and highest number themselves come up half as often as those between).
DECIMALS = {"blur": 2, "noise": 0, "jpeg": 0, "haze": 2, "dark": 2}


# ---- The degradations ----------------------------------------------------------------------------

def quantize(x):
    """Rounds to the 256 grey levels and clips to [0,1]; any shape.

    Every degradation ends with it, because the published images went through 8-bit files: a network
    trained on finer numbers would meet steps in the test images that it has never seen.
    """
    return (x * 255).round_().clamp_(0, 255).div_(255)


def per_image(value, x, dtype=torch.float32):
    """A number or (N,) tensor -> (N,1,1,1) on x's device, ready to multiply x (N,3,H,W)."""
    if isinstance(value, (int, float)):                # filled in on the device: nothing is copied
        return x.new_full((x.shape[0], 1, 1, 1), value, dtype=dtype)
    value = torch.as_tensor(value).to(x.device, dtype, non_blocking=True)
    return value.expand(x.shape[0])[:, None, None, None]


def gaussian_taps(radius, sigma, room=None):
    """exp(-k^2 / (2 sigma^2)) at k = -room .. room, zero beyond the radius, divided by its sum.

    radius: a number or (N,1) tensor. sigma: tensor, () or (N,1); its dtype and device are the
    result's. room: the largest radius, needed where radius is a tensor. Returns (2 room + 1,) or
    (N, 2 room + 1).
    """
    room = radius if room is None else room
    k = torch.arange(-room, room + 1, dtype=sigma.dtype, device=sigma.device)
    taps = torch.exp(-0.5 * (k / sigma) ** 2) * (k.abs() <= radius)
    return taps / taps.sum(-1, keepdim=True)       # sum 1: the image keeps its brightness


def gaussian_blur(x, kernel_size, sigma):
    """Isotropic Gaussian blur: every pixel becomes the weighted mean of its neighbours.

    kernel_size: odd, at most 21; sigma in pixels. Borders are reflected without repeating the edge.
    """
    radius = per_image(kernel_size, x)[:, 0, 0] // 2                              # (N,1)
    taps = gaussian_taps(radius, per_image(sigma, x)[:, 0, 0], room=10)           # (N,21)
    # A size given as one number, for all images, lets the zeros beyond it be left out. (Those of a
    # tensor would have to be read first, for which a GPU's queue would have to run empty.)
    room = 10 if torch.is_tensor(kernel_size) else kernel_size // 2
    taps = taps[:, 10 - room:11 + room, None, None, None]             # taps[:, k]: (N,1,1,1)
    sizes = x.shape
    x = reflect_pad(x, room, room, room, room)
    # exp(-(i^2 + j^2) / (2 sigma^2)) is a product: down the columns, then along the rows, which is
    # 21 + 21 multiplications per pixel instead of 21 x 21.
    for axis in (2, 3):
        blurred = taps[:, 0] * x.narrow(axis, 0, sizes[axis])
        for k in range(1, 2 * room + 1):             # the image, shifted by k pixels
            blurred.addcmul_(taps[:, k], x.narrow(axis, k, sizes[axis]))
        x = blurred
    return quantize(x)


def add_noise(x, sigma, noise=None):
    """White Gaussian noise: y = x + sigma n, n ~ N(0,1), independent in every pixel and channel.

    sigma in grey levels. noise: n, (N,3,H,W); drawn from torch's own generator if not given.
    """
    noise = torch.randn_like(x) if noise is None else noise
    return quantize(x + noise * per_image(sigma, x) / 255)


# JPEG's standard tables of quantisation steps, in grey levels at quality 50 (ITU T.81, Annex K).
# Written as in the standard: top left is the mean of the block, to the right the horizontal
# frequency grows, downwards the vertical one. Fine detail, whose loss the eye hardly notices, gets
# the large steps.
_LUMA = ((16, 11, 10, 16, 24, 40, 51, 61),
         (12, 12, 14, 19, 26, 58, 60, 55),
         (14, 13, 16, 24, 40, 57, 69, 56),
         (14, 17, 22, 29, 51, 87, 80, 62),
         (18, 22, 37, 56, 68, 109, 103, 77),
         (24, 35, 55, 64, 81, 104, 113, 92),
         (49, 64, 78, 87, 103, 121, 120, 101),
         (72, 92, 95, 98, 112, 100, 103, 99))
# The upper left quarter for chroma; the other three hold 99. (It is its own transpose.)
_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))


@functools.lru_cache(maxsize=None)
def _jpeg_tables(device):
    """(C, luma, chroma), (8,8) each in float64: the cosine transform and the two tables. Made once
    per device, since each table that is copied to a GPU makes the processor wait.

    As published, the tables are applied TRANSPOSED: the standard's steps for vertical frequencies
    meet the horizontal ones. The right way round, images would differ by about 3 grey levels (4 at
    quality 10, 2 at 70, on average over a photo).
    """
    pixel = torch.arange(8, dtype=torch.float64, device="cpu")
    cosine = torch.cos((2 * pixel + 1) * pixel[:, None] * math.pi / 16) / 2       # rows: frequency
    cosine[0] /= math.sqrt(2)
    luma = torch.tensor(_LUMA, dtype=torch.float64, device="cpu").T
    chroma = torch.tensor(_CHROMA, dtype=torch.float64, device="cpu").T
    chroma = F.pad(chroma, (0, 4, 0, 4), value=99)
    with torch.inference_mode(False):      # else tables first used inside it could not leave it
        return tuple(table.to(device, copy=True) for table in (cosine, luma, chroma))


def _jpeg_blocks(channel, cosine, step):
    """What is left of a channel when its 8x8 blocks' cosine transforms have been rounded.

    channel: (N,H,W) in grey levels, H and W multiples of 8. cosine: C, (8,8). step: (N,1,1,8,8),
    the step of each coefficient (row = vertical frequency of the block). Float64 in and out.

        C[k,p] = cos((2p + 1) k pi / 16) / 2, its row k = 0 divided by sqrt(2): then C C^T = 1
        D  = C B C^T                              a block's 64 coefficients
        B' = C^T (round(D / step) step) C         the block that a decoder shows

    Without the rounding B' would be B again: it alone loses something.
    """
    n, h, w = channel.shape
    # Cut the plane into a grid of blocks. -128: the standard centres grey levels around 0.
    blocks = channel.view(n, h // 8, 8, w // 8, 8).transpose(2, 3) - 128          # (N,H/8,W/8,8,8)
    coefficients = (cosine @ blocks @ cosine.T / step).round() * step
    blocks = cosine.T @ coefficients @ cosine + 128
    return blocks.transpose(2, 3).reshape(n, h, w)


def jpeg(x, quality):
    """JPEG's losses: colour at half resolution and rounded 8x8 cosine transforms.

    quality: 1..99. The entropy coding is left out: it loses nothing, so it would change nothing.
    Mirrors DiffJPEG as the published script calls it: equal to within one grey level.
    """
    n, _, h, w = x.shape
    # The well-known rule: 1 at quality 50, 5 at quality 10, 0.6 at 70. A real encoder then rounds
    # each step and keeps it within 1..255; as published, neither happens here: at quality 10 the
    # largest step is 5 x 121.
    quality = per_image(quality, x, torch.float64)[..., None]
    factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50)            # (N,1,1,1,1)
    cosine, luma, chroma = _jpeg_tables(x.device)                                 # (8,8) each
    # Chroma blocks cover 16 x 16 pixels: black is added at the right and bottom, and cut off later.
    r, g, b = (F.pad(x, (0, -w % 16, 0, -h % 16)) * 255).unbind(1)                # each (N,H,W)
    y = 0.299 * r + 0.587 * g + 0.114 * b                                         # luma
    cb = -0.168736 * r - 0.331264 * g + 0.5 * b + 128                             # chroma: blue
    cr = 0.5 * r - 0.418688 * g - 0.081312 * b + 128                              # chroma: red
    y = _jpeg_blocks(y.double(), cosine, luma * factor).float()
    halved = []
    for channel in (cb, cr):         # 4:2:0: one colour for 2x2 pixels, their mean; then repeated
        channel = F.avg_pool2d(channel, 2).double()                               # (N,H/2,W/2)
        channel = _jpeg_blocks(channel, cosine, chroma * factor).float() - 128
        halved.append(channel.repeat_interleave(2, 1).repeat_interleave(2, 2))    # (N,H,W)
    cb, cr = halved
    rgb = torch.stack((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb), 1)
    return quantize(rgb[:, :, :h, :w] / 255)


# Rain, as published: a few random pixels light up, each becomes a streak, the sum is normalised.
#
#   1. drops    a uniform random field in [0,256); values of 256 - density/100 or more stay, all
#               others become 0: a pixel is a drop with probability density / 25600, that is 0.2 to
#               0.4 % of the pixels (In-Dis), 0.4 to 0.6 % (Out-Dis)
#   2. halo     3x3 filter: 8 in the centre, 0.1 above, below, left and right
#   3. streaks  correlation with a slanted, blurred line (`streak_kernels`)
#   4. layer    brought to 0 .. 255 by its smallest and largest value, cut to whole grey levels
#   5. sum      y = x + layer, clipped

def _turned_diagonal(at, length, angle):
    """Step 3a: the diagonal of a length x length matrix, turned by angle - 45 degrees and shrunk.

    at: (N,40), which rows and columns of the result to compute; length: (N,1); angle: (N,).
    Returns (N,40,40) in float64. Mirrors OpenCV's getRotationMatrix2D with warpAffine, bilinear,
    zero outside.
    """
    turn = (angle.double() - 45) * math.pi / 180      # the diagonal itself leans by 45 degrees
    length = length[:, :, None]                                                   # (N,1,1)
    centre = length / 2
    scale = 1 - length / 100
    cosine = torch.cos(turn)[:, None, None] / scale
    sine = torch.sin(turn)[:, None, None] / scale
    y, x = at[:, :, None], at[:, None, :]                                         # rows, columns
    # Backwards, from a pixel of the result to the point of the matrix that it shows:
    #   source = centre + R^-1 (pixel - centre) / scale,     cosine and sine being those / scale.
    # OpenCV's integers keep 10 binary digits of each of two parts, and of their sum then 5: source
    # coordinates come in steps of 1/32 pixel. (With exact ones a layer of rain would differ by 0.13
    # grey levels on average and up to 6.)
    def in_32nds(part, rest):
        return (((1024 * part).round() + (1024 * rest).round() + 16) / 32).floor() / 32
    source_x = in_32nds(cosine * x, -sine * y + (1 - cosine) * centre + sine * centre)
    source_y = in_32nds(sine * x, cosine * y + (1 - cosine) * centre - sine * centre)
    # Bilinear: the four pixels around the source point, the nearer the heavier. Pixels of an
    # identity matrix are 1 where row = column, so that no matrix needs to be stored or gathered.
    streak = torch.zeros_like(source_x)
    for row in (source_y.floor(), source_y.floor() + 1):
        for column in (source_x.floor(), source_x.floor() + 1):
            lit = (row == column) & (row >= 0) & (row < length)
            streak += lit * (1 - (source_y - row).abs()) * (1 - (source_x - column).abs())
    return streak


@functools.lru_cache(maxsize=None)
def _rain_tables(device):
    """Step 3b's taps for widths 3, 5, 7, 9 and 11, (5,11), and step 2's halo, (1,1,3,3); float64,
    made once per device like _jpeg_tables."""
    # Up to width 9 OpenCV has fixed kernels, which are Gaussian only roughly.
    taps = torch.tensor(((0, 0, 0, 0, 1, 2, 1, 0, 0, 0, 0),                       # width 3
                         (0, 0, 0, 1, 4, 6, 4, 1, 0, 0, 0),                       # width 5
                         (0, 0, 1, 3.5, 7, 9, 7, 3.5, 1, 0, 0),                   # width 7
                         (0, 1, 3.25, 7.5, 12.75, 15, 12.75, 7.5, 3.25, 1, 0)),   # width 9
                        dtype=torch.float64, device="cpu")
    # Wider ones follow its rule sigma = 0.3 ((width - 1) / 2 - 1) + 0.8, which is 2 for 11.
    widest = gaussian_taps(5, torch.tensor(2.0, dtype=torch.float64, device="cpu"))
    taps = torch.cat((taps / taps.sum(1, keepdim=True), widest[None]))
    halo = torch.tensor([[[(0, 0.1, 0), (0.1, 8, 0.1), (0, 0.1, 0)]]], dtype=torch.float64,
                        device="cpu")
    with torch.inference_mode(False):
        return taps.to(device, copy=True), halo.to(device, copy=True)


def _blur_matrix(at, length, width):
    """Step 3b: a Gaussian of `width` taps over rows 0 .. length - 1, written as a matrix.

    at: (N,40); length: (N,1); width: (N,), 3, 5, 7, 9 or 11. Returns (N,40,40): (B v)[p] is the
    weighted mean of v around p, borders reflected. Mirrors OpenCV's GaussianBlur without a sigma.
    """
    taps = _rain_tables(at.device)[0][(width.long() - 3) // 2]                    # (N,11)
    last = length - 1
    blur = 0
    for k in range(11):
        neighbour = (at + k - 5).abs()                           # -1 is reflected to 1, ...
        neighbour = last - (last - neighbour).abs()              # ... and length to length - 2
        lands = neighbour[:, :, None] == at[:, None, :]          # (N,40,40): p's k-th tap is on q
        blur = blur + lands * taps[:, k, None, None]
    return blur


def streak_kernels(width, length, angle):
    """What a single drop becomes: a slanted line with soft sides.

    width: 3, 5, 7, 9 or 11; length: 20..40; angle: -45..44 degrees, 0 is vertical; all (N,).
    Returns (N,40,40) in float64: each kernel has side `length` and zeros around it, and its anchor,
    pixel (length // 2, length // 2), is always at [20,20]. Mirrors `rain_blur` as published.
    """
    length = length.double()[:, None]                                             # (N,1)
    at = torch.arange(-20, 20, device=length.device) + length // 2                # (N,40)
    inside = (at >= 0) & (at < length)
    streak = _turned_diagonal(at, length, angle)
    streak = streak * inside[:, :, None] * inside[:, None, :]     # what turned out of it is lost
    blur = _blur_matrix(at, length, width) * inside[:, :, None]
    return blur @ streak @ blur.mT                                # B S B^T: columns, then rows


def correlate(x, kernel):
    """out[y,x] = sum over i, j of kernel[i,j] x[y+i,x+j], wherever the kernel lies inside.

    x: (N,1,h,w); kernel: (N,1,42,42), one for each image. Returns (N,1,h-41,w-41). By Fourier
    transforms, where a correlation is a product: directly it would take 42 x 42 products a pixel.
    (Streak by streak it would be faster on a CPU, since few pixels are drops; but a GPU would have
    to be asked how many, and all that is queued for it would have to wait for the answer.)
    """
    h, w = x.shape[2:]
    # A transform takes what it is given as periodic. What comes round the edge in this way falls
    # among the last 41 rows and columns, which are cut off. Multiples of 32 are transformed fast.
    period = (h + -h % 32, w + -w % 32)
    product = torch.fft.rfft2(x, s=period) * torch.fft.rfft2(kernel, s=period).conj()
    return torch.fft.irfft2(product, s=period)[:, :, :h - 41, :w - 41]


def rain_streaks(field, density, width, length, angle, peak=1.0, size=(None, None)):
    """A layer of rain: (N,1,H,W) in [0,1] in whole grey levels, `peak` at its brightest spot. Or,
    normalised with the rest, its upper left corner of (height, width) = size.

    field: (N,1,H,W) uniform random numbers in [0,256). density: 50..149; width: 3..11 odd, length:
    20..40, both in pixels; angle: -45..44 degrees.
    As published, brightness is relative to the brightest spot of the WHOLE image. A small field has
    a fainter brightest spot, and would be normalised to too bright a rain: give the whole image's
    field, or a peak below 1 (see train.RAIN_PEAK).
    """
    line = [per_image(value, field, torch.float64).flatten() for value in (width, length, angle)]
    # Halo and streak are two correlations with mirrored borders; the halo is symmetric, so that one
    # correlation with both kernels' convolution, 42 x 42, does the same.
    kernel = streak_kernels(*line)[:, None]                                       # (N,1,40,40)
    kernel = F.conv2d(kernel, _rain_tables(field.device)[1], padding=2)           # (N,1,42,42)
    least = 256 - per_image(density, field, torch.float64) / 100                  # (N,1,1,1)
    field = reflect_pad(field, 21, 20, 21, 20)                # as far as the kernel reaches
    drops = torch.where(field >= least, field, 0).double()                        # (N,1,H+41,W+41)
    layer = correlate(drops, kernel)                                              # (N,1,H,W)
    low, high = layer.amin((2, 3), keepdim=True), layer.amax((2, 3), keepdim=True)
    scale = 255 * peak / (high - low).clamp_min(1e-12)        # a field without drops stays black
    layer = layer[:, :, :size[0], :size[1]]
    # 1e-9: rounding errors of the sums must not turn a whole number into the one below.
    return ((layer - low) * scale + 1e-9).floor_().float().div_(255)


def add_rain(x, streaks):
    """y = x + streaks, clipped: rain only brightens. streaks: (N,1,H,W), the same in R, G and B."""
    return quantize(x + streaks)


def add_haze(x, depth, airlight, beta, depth_max=None):
    """Haze by the atmospheric scattering model: I = J t + A (1 - t) with t = exp(-beta d).

    J is the clear image x, t the share of its light that gets through the haze, and A the light
    that the haze itself scatters to the eye. depth: (N,1,h,w), any unit, larger is farther;
    resized bilinearly where not of x's size. airlight: A, in [0,1]; beta: density of the haze.
    d = depth / depth_max in [0,1], where depth_max is the WHOLE image's maximum (as published):
    give it when x is a crop, or the haze of a near corner would be as thick as the horizon's.
    """
    if depth.shape[2:] != x.shape[2:]:
        depth = F.interpolate(depth, x.shape[2:], mode="bilinear")
    if depth_max is None:
        depth_max = depth.amax((1, 2, 3))                                         # (N,)
    transmission = torch.exp(-per_image(beta, x) * depth / per_image(depth_max, x))   # (N,1,H,W)
    return quantize(x * transmission + per_image(airlight, x) * (1 - transmission))


def darken(x, gamma):
    """Low light: y = x^gamma. gamma 1 changes nothing; at 3, middle grey 0.5 falls to 0.125."""
    return quantize(x ** per_image(gamma, x))


def bicubic_x4(x, stored=False):
    """Low resolution, at full size: a quarter of the size and back, both by torch's bicubic.

    Neither has antialiasing, as in the published training script: a small pixel is made of its own
    4 x 4 pixels alone, chiefly of the middle four, so that fine patterns leave false, coarser ones
    behind instead of an even grey.
    stored: the small image is an 8-bit file in between, as in the published test sets.
    """
    h, w = x.shape[2:]
    small = F.interpolate(x, (max(h // 4, 1), max(w // 4, 1)), mode="bicubic")    # (N,3,H/4,W/4)
    small = quantize(small) if stored else small
    return quantize(F.interpolate(small, (h, w), mode="bicubic"))


# ---- Random degradation: draw the parameters, then apply them ------------------------------------
# Apart from each other, because training draws on the CPU, in worker processes if there are some,
# and applies to whole batches on the GPU.

def seeded(*numbers):
    """A torch.Generator whose state depends on all of the numbers (or words) and nothing else."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)    # 63 bits


def draw(task, size, split="in", generator=None, n=1, rain_field=None):
    """Every random number that degrading n images needs, but haze's depth where a photo has none
    (prior_knots): {name: tensor (n,...)} on the CPU.

    size: (H,W) of the images. rain_field: (H,W) of the rain's field, where it is larger than that.
    The names are the parameters of the task's function above.
    """
    if task not in RANGES[split]:
        raise ValueError(f"no {split!r} ranges for {task!r}, only for {', '.join(RANGES[split])}")
    # Said each time, since a caller may have changed torch's default type or device.
    kind = dict(generator=generator, dtype=torch.float32, device="cpu")
    drawn = {}
    for name, (low, high) in RANGES[split][task].items():
        u = torch.rand(n, **kind)                                                 # in [0,1)
        if name in STEPS:
            choices = (high - low) // STEPS[name] + 1
            drawn[name] = low + STEPS[name] * (u * choices).floor()
        else:
            drawn[name] = torch.round(low + u * (high - low), decimals=DECIMALS[task])
    if task == "noise":
        drawn["noise"] = torch.randn(n, 3, *size, **kind)
    if task == "rain":
        size = rain_field or size
        drawn["field"] = torch.rand(n, 1, *size, **kind).mul_(256)
    return drawn


# Where nothing but the image and its parameters is needed. A task of one's own is entered here and
# in RANGES; its parameters that are whole numbers in STEPS, and if it has others, it in DECIMALS.
DEGRADATIONS = {"blur": gaussian_blur, "noise": add_noise, "jpeg": jpeg, "dark": darken,
                "sr": bicubic_x4}


def apply(x, task, drawn, depth=None, depth_max=None, peak=1.0, generator=None):
    """Degrades x (N,3,H,W), on its device, by what `draw` gave.

    depth, depth_max: haze's alone, as in add_haze; without depth, depth_prior draws one for each
    image from the generator. peak: rain's alone, as in rain_streaks; of a rain field larger than x,
    the upper left corner is used, normalised with the rest.
    """
    drawn = {name: value.to(x.device, non_blocking=True) for name, value in drawn.items()}
    if task == "rain":
        return add_rain(x, rain_streaks(**drawn, peak=peak, size=x.shape[2:]))
    if task == "haze":
        if depth is None:
            depth = torch.cat([depth_prior(*x.shape[2:], generator) for _ in x])
            depth_max = 1.0
        return add_haze(x, depth.to(x, non_blocking=True), **drawn, depth_max=depth_max)
    return DEGRADATIONS[task](x, **drawn)


def degrade(x, task, split="in", depth=None, generator=None):
    """A random degradation of whole images, with the paper's ranges.

    x: (N,3,H,W) in [0,1]; task: one of TASKS; split: "in" or "out" (RANGES); depth: (N,1,h,w), used
    by haze, else depth_prior. Returns (N,3,H,W). Raises ValueError for "out" sr: not published.
    """
    drawn = draw(task, x.shape[2:], split, generator, len(x))
    return apply(x, task, drawn, depth, generator=generator)


# ==================================================================================================
# Nothing below this line is in the paper: images and depth made of a seed, image and depth files,
# the cache of decoded images that training reads a crop at a time, test sets, the command.
# ==================================================================================================

# ---- Depth for a photo without a depth map -------------------------------------------------------
# The paper estimated the depth of its photos with a network (DCNF, as RESIDE did). This stand-in
# needs no download, but its haze is smoother than theirs.

def prior_knots(generator=None):
    """Depth as in many outdoor photos: far at the top, near at the bottom, gently uneven.

    Returns (1,1,8,8) in (0,1], 1 at the farthest: knots spread evenly over the image, from corner
    to corner.
    """
    kind = dict(dtype=torch.float32, device="cpu")
    down = torch.linspace(1, 0.2, 8, **kind)[:, None]                             # (8,1)
    knots = down + 0.15 * torch.randn(8, 8, generator=generator, **kind)          # (8,8)
    return (knots / knots.max()).clamp_min(0.05)[None, None]


def depth_prior(height, width, generator=None):
    """prior_knots enlarged to an image's size: (1,1,H,W) in (0,1]."""
    knots = prior_knots(generator)
    return F.interpolate(knots, (height, width), mode="bilinear", align_corners=True)


# ---- Dead leaves: images with true depth, from a seed alone --------------------------------------
# They stand in for photos where there are none, so that training, tests and demos need no download.
# A scene is painted from far to near, each shape over what lies behind it, as leaves fall on
# leaves; so each pixel's depth is known, which haze needs and photos lack.

# Natural colours (RGB): sky, water, foliage, grass, soil, rock, sand, wood, brick, skin, petals.
_PALETTE = np.array([
    (150, 185, 220), (96, 130, 165), (214, 222, 228), (40, 66, 74), (58, 84, 38), (104, 128, 60),
    (150, 162, 84), (34, 46, 26), (92, 70, 50), (58, 46, 38), (128, 122, 114), (84, 84, 86),
    (176, 170, 158), (206, 186, 148), (156, 118, 80), (132, 68, 50), (212, 164, 134), (196, 74, 84),
    (222, 182, 70), (140, 96, 146), (238, 234, 226), (24, 24, 28)], dtype=np.float32) / 255


@functools.lru_cache(maxsize=8)
def _falloff(height, width, slope):
    """1 / frequency^slope, laid out as numpy's rfft2 does: (H,W/2 + 1)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf                                  # 1 / inf: no constant part
    return frequency ** -slope


def spectrum_noise(height, width, slope, rng):
    """Gaussian noise whose amplitude falls as 1 / frequency^slope: (H,W), mean 0, deviation 1.

    slope 0 is white noise, each pixel on its own; the larger it is, the softer are the clouds.
    """
    white = np.fft.rfft2(rng.standard_normal((height, width)))
    noise = np.fft.irfft2(white * _falloff(height, width, slope), s=(height, width))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def _outline(kind, u, v, rng):
    """Radius of a leaf's outline, of about 1, in the direction of the points (u,v), any shape."""
    if kind == "disc":                              # stretched, an ellipse or a stem
        return 1
    theta = np.arctan2(v, u)
    if kind == "polygon":                           # 3 to 6 sides; each side is a straight line,
        corner = 2 * np.pi / rng.integers(3, 7)     # r cos(angle from the side's middle) = constant
        return np.cos(corner / 2) / np.cos((theta % corner) - corner / 2) * 1.2
    if kind == "box":                               # superellipse |x|^p + |y|^p = 1: between a disc
        p = rng.uniform(3, 9)                       # (p = 2) and a square (p large)
        return (np.abs(np.cos(theta)) ** p + np.abs(np.sin(theta)) ** p + 1e-9) ** (-1 / p)
    waves = 0                                       # "blob": a circle with 2, 3, ... 6 waves on it
    for k in range(2, 7):
        waves = waves + rng.uniform(0, 0.7 / k) * np.cos(k * theta + rng.uniform(0, 7))
    return 1 + waves


def _leaf_texture(y, x, u, v, radius, noises, rng):
    """Relative brightness of a leaf's surface, around 0, at the pixels [y,x], which are (u,v) on
    the leaf; all of them (P,)."""
    kind = rng.random()
    strength = rng.uniform(0.02, 0.16) * (rng.random() < 0.4)     # most surfaces are smooth
    if kind < 0.25:                                 # a grating: stripes in one direction
        frequency, angle = rng.uniform(1.5, max(radius / 3, 2)), rng.uniform(0, np.pi)
        across = u * np.cos(angle) + v * np.sin(angle)
        texture = np.sin(frequency * np.pi * across + rng.uniform(0, 7))
    else:                                           # a piece of one of the noises, anywhere in it
        noise = noises[rng.integers(len(noises))]
        y, x = y + rng.integers(0, noise.shape[0]), x + rng.integers(0, noise.shape[1])
        texture = noise[y % noise.shape[0], x % noise.shape[1]]
    angle = rng.uniform(0, 2 * np.pi)               # shading: light from one side, and a bulge
    slope, bulge = rng.uniform(0, 0.25), rng.uniform(0, 0.12)
    shading = slope * (u * np.cos(angle) + v * np.sin(angle)) - bulge * (u * u + v * v)
    return strength * texture + shading


def _paint_leaf(image, depth, leaf_depth, radius, palette, noises, rng):
    """Paints one leaf into image (3,H,W) and depth (H,W), over what is there, where it reaches."""
    height, width = depth.shape
    # Its centre, which may lie a little outside the image.
    cy, cx = rng.uniform(-0.1, 1.1) * height, rng.uniform(-0.1, 1.1) * width
    stretch = np.exp(rng.normal(0, 0.45))
    reach = 1.6 * radius * max(stretch, 1 / stretch) + 4
    top, bottom = max(int(cy - reach), 0), min(int(cy + reach) + 1, height)
    left, right = max(int(cx - reach), 0), min(int(cx + reach) + 1, width)
    if top >= bottom or left >= right:
        return
    # (u,v): coordinates on the leaf, turned, in units of its two half axes.
    y, x = np.arange(top, bottom)[:, None] - cy, np.arange(left, right)[None] - cx
    angle = rng.uniform(0, np.pi)
    u = ((np.cos(angle) * x + np.sin(angle) * y) / (radius * stretch)).astype(np.float32)
    v = ((np.cos(angle) * y - np.sin(angle) * x) / (radius / stretch)).astype(np.float32)
    kind = ("disc", "box", "polygon", "blob", "blob")[rng.integers(5)]
    inside = (_outline(kind, u, v, rng) - np.hypot(u, v)) * radius  # about the pixels to the edge
    # The mean colour of where it falls. cumsum adds pixel after pixel in float32, where mean adds
    # in parts and rounds otherwise; scenes of a seed have been made so from the start.
    patch = image[:, top:bottom, left:right].reshape(3, -1)
    around = patch.cumsum(1)[:, -1] / np.float32(inside.size)
    # From here on P pixels alone: the leaf and its shadow, which reaches 0.3 radius + 3 beyond it.
    y, x = np.nonzero(inside > -(0.3 * radius + 3))
    u, v, inside = u[y, x], v[y, x], inside[y, x]
    y, x = y + top, x + left
    edge = rng.uniform(0.5, 1.2)                                # width of its soft edge, in pixels
    cover = np.clip(inside / edge + 0.5, 0, 1)                  # 1 on the leaf, 0 beside it
    shadow = np.clip(inside / (0.3 * radius + 3) + 1, 0, 1) * rng.uniform(0, 0.3)
    texture = _leaf_texture(y, x, u, v, radius, noises, rng)
    colour = palette[rng.integers(len(palette))] * np.exp(rng.normal(0, 0.35))
    colour += rng.normal(0, 0.02, 3)
    colour += rng.uniform(0, 0.9) * (around - colour)           # akin to its surroundings
    colour = np.clip(colour, 0.02, 1)[:, None] * (1 + texture)                    # (3,P)
    behind = image[:, y, x] * (1 - shadow * (1 - cover))        # its shadow falls beside
    image[:, y, x] = behind + cover * (colour - behind)
    depth[y[cover > 0.5], x[cover > 0.5]] = leaf_depth


def dead_leaves(height, width, generator):
    """A random scene: overlapping shapes, the nearer in front, each with colour, texture, shading.

    Radii have the density r^-3 between two bounds: enlarged or shrunk, the scene has as many leaves
    of each size as before, and natural images, too, look alike at all scales (Lee, Mumford, Huang,
    "Occlusion models for natural images", 2001). generator: torch.Generator. The larger side must
    have 31 pixels or more. Returns image (1,3,H,W) in [0,1], rounded to 8 bits, and its true depth
    (1,1,H,W) in (0,1].
    """
    seed = torch.randint(2 ** 62, (1,), generator=generator, device="cpu").item()
    rng = np.random.default_rng(seed)
    noises = [spectrum_noise(height, width, slope, rng) for slope in (0.3, 0.8, 1.5)]
    # Few colours in a scene: four of the palette, all tinted alike.
    palette = _PALETTE[rng.choice(len(_PALETTE), 4, replace=False)] * rng.uniform(0.9, 1.1, 3)
    # Behind all leaves: a smooth change of colour from top, the farthest (1), to bottom (0.75).
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None]                   # (H,1)
    top, bottom = palette[:2, :, None, None]                                      # (3,1,1) each
    image = top * (1 - down) + bottom * down + rng.uniform(0, 0.03) * noises[2]
    image = image.astype(np.float32)                                              # (3,H,W)
    depth = (1 - 0.25 * down).repeat(width, 1)                                    # (H,W)
    smallest = np.exp(rng.uniform(np.log(3), np.log(12)))       # s: the least radius
    largest = max(height, width) / 2.5                          # l: the greatest
    # The mean area of leaves under r^-3 is 2 pi s^2 log(l / s): enough of them for 0.7 images.
    count = int(0.7 * height * width / (2 * np.pi * smallest ** 2 * np.log(largest / smallest))) + 8
    # Under r^-3, r^-2 is uniform between l^-2 and s^-2.
    radii = (smallest ** -2 + rng.random(count) * (largest ** -2 - smallest ** -2)) ** -0.5
    for k, radius in enumerate(radii):                          # from far (0.75) to near (0.05)
        _paint_leaf(image, depth, 0.7 * (1 - k / count) + 0.05, radius, palette, noises, rng)
    image *= np.exp(0.2 * spectrum_noise(height, width, 2.2, rng))                # uneven light
    image = torch.from_numpy(image * np.float32(rng.uniform(0.8, 1.2)))[None]
    image = gaussian_blur(image.clamp(0, 1), 7, rng.uniform(0.2, 0.5))            # the lens
    return image, torch.from_numpy(depth)[None, None]


# ---- Image files ---------------------------------------------------------------------------------

SUFFIXES = ".png .jpg .jpeg .jfif .webp .avif .gif .bmp .tif .tiff .ppm .pgm .tga".split()
# Pillow's names of these formats. It knows dozens more; none of their decoders is let at a file.
DECODERS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA")


def _in_colour(image):
    """A picture of 8 bits -> mode 1, L or LA for grey, else RGB, RGBA, CMYK or YCbCr; what is
    transparent has an A."""
    if image.has_transparency_data:                    # an A, or a colour or palette entry
        clear = image.info.get("transparency")
        if isinstance(clear, tuple) and max(clear) > 255:       # of 16 bits; the colours are of 8
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        return image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
    if image.mode not in ("1", "L", "RGB", "CMYK", "YCbCr"):    # P, LAB (its profile becomes sRGB)
        return image.convert("RGB")
    return image


def _decode(file):
    """An opened image file -> (the picture in memory, upright and of 8 bits, notes on it). Raises
    ValueError for grey of more bits, since the numbers alone don't tell what white is."""
    refuse_deep_grey(file.mode)
    file.load()
    image, notes = _in_colour(upright(file)), []
    image.info.pop("exif", None)                       # or somebody would turn it once more
    # Asked for last, as it moves on in the file; counting all its frames could take a minute.
    with contextlib.suppress(Exception):
        file.seek(1)
        notes.append("the first of its frames")
    return image, notes


def open_image(path):
    """An image file, decoded, upright by its EXIF tag: (PIL image, notes on what was passed over).
    Of 16-bit colour, Pillow keeps the upper 8 bits. Raises ValueError with one line that names the
    file and what is wrong with it."""
    # Whole photographs hold more text, or larger profiles, than Pillow takes. Both stay bounded.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    with blamed_on(f"{path}: not a readable image"):
        try:
            with Image.open(path, formats=DECODERS) as file:
                pixels, most = math.prod(file.size), Image.MAX_IMAGE_PIXELS or math.inf
                if pixels > most:                      # Pillow itself only warns, up to twice that
                    raise Image.DecompressionBombError(f"{pixels} pixels, more than {most}.")
                return _decode(file)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error} If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS "
                             "(eval.py: --max-pixels N)") from None


def to_rgb(image):
    """PIL image -> (H,W,3) uint8; palette, grey and CMYK are converted, alpha is set aside."""
    return np.asarray(image.convert("RGB"))


def read_image(path, say=None):
    """Any image file -> (H,W,3) uint8 RGB. Raises ValueError as open_image does, whose notes are
    told to `say`."""
    image, notes = open_image(path)
    if notes and say:
        say(f"{path}: {', '.join(notes)}")
    return to_rgb(image)


def to_tensor(image):
    """(H,W,3) uint8 -> (1,3,H,W) float32 in [0,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(torch.float32) / 255


def to_image(x):
    """(1,3,H,W) or (3,H,W) in [0,1], clamped and rounded -> (H,W,3) uint8."""
    x = x.reshape(x.shape[-3:])
    return (x * 255).round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().cpu().numpy()


def short_name(name, most=200):
    """A name made of others, if need be cut to what file systems take (255 bytes, with endings):
    its beginning and a fingerprint of all of it, so that two long names stay two."""
    if len(os.fsencode(name)) <= most:
        return name
    cut = os.fsencode(name)[:most - 17].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


@contextlib.contextmanager
def whole_file(path):
    """An open binary file to write to, which becomes `path` when all is written and on the disk.

    Whatever happens half-way - a full disk, a kill, a power cut - `path` stays what it was: no torn
    file is left that would later be taken for a whole one.
    """
    path = Path(path)
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    unfinished = path.with_name(f".{writer}-{path.name[:40]}.tmp")           # short in any case
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())                    # the disk has it before the name says so
        try:
            os.replace(unfinished, path)               # atomic on one disk
        except PermissionError:                        # Windows: a virus scanner is reading `path`
            time.sleep(0.5)
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_image(path, image):
    """Writes (H,W,3) uint8 as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def progress(text):
    """Says a line aside, on stderr, so that a table on stdout can be redirected. Where nobody can
    hear it (a window without a terminal, a closed pipe), work goes on in silence."""
    if sys.stderr is not None:                         # print would take None for stdout
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def require_folder(folder):
    """Raises ValueError for a missing folder, or a file in its place."""
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file; give the folder it is in")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")


def _files_below(folder, entered):
    """All files below a folder, sorted, but hidden ones. Folders that are links are entered, too,
    but each real folder once, so that links in a circle end; entered: the set of those. Raises
    ValueError for a missing folder."""
    require_folder(folder)
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()                            # os.walk goes no deeper here
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [Path(place, name) for name in names if name[0] != "."]
    return sorted(files)


def list_images(folders, say=progress):
    """All images below the folders, those of each sorted; other files are counted, and some of them
    named, in one line. Raises ValueError for no images or a missing folder."""
    files, others, entered = [], [], set()
    for folder in folders:
        for path in _files_below(folder, entered):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                files.append(path)
            elif path.name.lower() not in ("thumbs.db", "desktop.ini"):       # Windows' own
                others.append(path.name if path.exists() else f"{path.name} (a broken link)")
    names = ", ".join(map(str, folders))
    if others:
        say(f"{names}: not read as images: {len(others)}, such as {', '.join(others[:5])}")
    if not files:
        raise ValueError(f"{names}: no images; looked for {' '.join(SUFFIXES)}")
    return files


# ---- Depth files ---------------------------------------------------------------------------------

def read_depth(path):
    """Depth map, (h,w) float32, larger is farther: .npy, or grey .png of 8 or 16 bits. Raises
    ValueError with one line that names the file and what is wrong with it."""
    with blamed_on(f"{path}: not a readable depth map"):
        if path.suffix.lower() == ".npy":
            depth = np.load(path, allow_pickle=False)
        else:
            with Image.open(path, formats=("PNG",)) as image:
                depth = np.asarray(image) if image.mode[0] in "LI" else None       # I: 16 bits
        if depth is None or depth.ndim != 2 or depth.dtype.kind not in "fiu":
            raise ValueError("expected one channel of numbers")
        depth = np.ascontiguousarray(depth, np.float32)
        if not np.isfinite(depth).all() or depth.min() < 0 or depth.max() <= 0:
            raise ValueError("expected finite numbers, none negative, some positive")
        return depth


def nfc(name):
    """A name in its composed spelling: macOS writes é as e and an accent, which is the same name.
    """
    return unicodedata.normalize("NFC", str(name))


def find_depths(folders, depth_folder, say=progress):
    """{image path: depth map path or None} for all images below the folders.

    A map is an image's if it has the same path below its folder, but for the ending (or the same
    with the image folder's name before it), else if it has the same stem. Raises ValueError where
    an image has no map or might have two, and where two images would share one.
    """
    files = list_images(folders, say)
    if depth_folder is None:
        return dict.fromkeys(files)
    maps = {}                                          # by path, a Path, and by stem, a str
    for path in _files_below(depth_folder, set()):
        if path.suffix.lower() in (".npy", ".png"):
            below = Path(nfc(path.relative_to(depth_folder).with_suffix("")))
            for key in (below, nfc(path.stem)):
                maps.setdefault(key, []).append(path)
    users = {}
    for path in files:
        folder = next(folder for folder in folders if path.is_relative_to(folder))
        below = Path(nfc(path.relative_to(folder).with_suffix("")))
        named = Path(nfc(Path(folder).name), below)    # with the image folder's name before it
        fits = maps.get(below) or maps.get(named) or maps.get(nfc(path.stem))
        if fits is None:
            raise ValueError(f"{depth_folder}: no depth map for {path.name} ({path})")
        users.setdefault(fits[0], []).append(path)
        for rivals in (fits, users[fits[0]]):          # two maps for an image; two images for a map
            if len(rivals) > 1:
                raise ValueError(f"--depth {depth_folder}: {rivals[0]} and {rivals[1]} have the "
                                 "same name; give each map its image's path below its folder")
    return {path: depth for depth, (path,) in users.items()}


def read_photo(path, depth_path=None):
    """(image (H,W,3) uint8, depth (h,w) float32 or None). Raises ValueError as its parts do."""
    return read_image(path, progress), None if depth_path is None else read_depth(depth_path)


# ---- Many files at a time ------------------------------------------------------------------------

def clock(seconds):
    """Seconds as hours, minutes and seconds: 1:05:09."""
    return str(datetime.timedelta(seconds=round(seconds)))


def time_left(start, done, total):
    """"0:00:12 left", if the rest goes on at the rate since `start`, a time.monotonic().
    done: 1 or more."""
    return f"{clock((time.monotonic() - start) / done * (total - done))} left"


def usable_cores():
    """How many cores this process may use: fewer than there are where a job was given a part."""
    if hasattr(os, "sched_getaffinity"):               # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run_all(jobs, say, doing):
    """Does all jobs, {key: (function, its arguments)}, in threads. Returns {key: result} and, where
    a ValueError came, {key: its text}, in the order of the jobs. Says how far it is.

    Threads suffice, because Pillow's decoders and torch's and numpy's loops let others run; unlike
    processes, they need no copy of the program and end with it. More than 16 would mostly wait for
    each other. Each computes on one core, so that results don't depend on the machine's number.
    Ctrl-C, or any other error, lets the jobs at work end and begins no others.
    """
    done, bad, start, cores = {}, {}, time.monotonic(), torch.get_num_threads()
    every = max(len(jobs) // 20, 25)
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(usable_cores(), 16))
    try:
        keys = {pool.submit(*job): key for key, job in jobs.items()}
        for count, future in enumerate(as_completed(keys), 1):
            try:
                done[keys[future]] = future.result()
            except ValueError as error:
                bad[keys[future]] = str(error)
            if count % every == 0 or count == len(jobs):
                say(f"{doing}: {count} of {len(jobs)}, {time_left(start, count, len(jobs))}")
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
    return done, {key: bad[key] for key in jobs if key in bad}


# ---- The cache: decoded images, of which a crop is read without the rest -------------------------
# A training crop is a small part of a photo, but a PNG or JPEG file can only be decoded as a whole.
# So each is decoded once, into an .npy file, of which a crop's rows are mapped into memory.
#
# An item is (name, maker, arguments), and True where a depth must come with it: maker(*arguments)
# gives (image (H,W,C) uint8, depth (h,w) float32 or None); the name changes when these would.

def _make_leaves(edge, seed):
    image, depth = dead_leaves(edge, edge, torch.Generator("cpu").manual_seed(seed))
    return to_image(image), depth[0, 0].numpy()


def leaf_items(count, edge, seed):
    """Items: dead leaves, edge x edge pixels, with true depth. The 3 in the name goes up when what
    is stored changes, so that a cache of older ones is not used."""
    return [(f"leaves3-{edge}-{seed}-{k}", _make_leaves, (edge, 1_000_003 * seed + k), True)
            for k in range(count)]


def item_name(stem, *files):
    """stem-size-fingerprint of files: so a changed file is read anew, and one that was only moved
    or copied is not. Their first 64 KB tell enough: a picture that was edited and stored again
    differs there, or in size. None stands for a depth map that is not given; a file that can't be
    read will be named when it is decoded."""
    size, start = 0, hashlib.sha256()
    for path in filter(None, files):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start.update(file.read(2 ** 16))
            size += os.fstat(file.fileno()).st_size
    stem = stem[:40].encode(errors="replace").decode()                 # a name that is not UTF-8
    return f"{stem}-{size}-{start.hexdigest()[:16]}"


def photo_items(folders, depth_folder=None, say=progress):
    """Items: the photos below the folders, with their depth maps."""
    return [(item_name(path.stem, path, depth), read_photo, (path, depth), depth is not None)
            for path, depth in find_depths(folders, depth_folder, say).items()]


def enlarged_part(depth, size, top, left, edge, corners=False):
    """Rows top .. top + edge - 1, and columns likewise, as far as there are any, of
    F.interpolate(depth, size, mode="bilinear", align_corners=corners), without the rest.

    depth: (1,1,h,w); size: (H,W). Returns (1,1,edge,edge) or less. Rounding apart, it is the same:
    on a map that falls from 1 to 0 between two of 500 knots, to 3e-5.
    """
    places = []              # of the part's pixels on the map, whose ends are at -1 and 1
    for pixels, start in zip(size, (top, left)):
        pixel = torch.arange(start, min(start + edge, pixels), dtype=torch.float64, device="cpu")
        # The first and the last pixel lie on the ends; or half a pixel inside, as cells' middles.
        span = max(pixels - 1, 1)
        places.append(2 * pixel / span - 1 if corners else (2 * pixel + 1) / pixels - 1)
    rows, columns = torch.meshgrid(*places, indexing="ij")
    grid = torch.stack((columns, rows), -1)[None].to(depth)                       # (1,edge,edge,2)
    return F.grid_sample(depth, grid, padding_mode="border", align_corners=corners)


def _store(maker, arguments, target):
    """Makes an item's arrays and stores them as TARGET.depth.npy and TARGET.npy.

    A depth map is divided by the maximum that it has when enlarged to the image's size: then 1 is
    the WHOLE image's farthest point, wherever it will be cropped (add_haze).
    """
    image, depth = maker(*arguments)
    if depth is not None:
        whole = torch.from_numpy(np.array(depth))[None, None]
        whole = F.interpolate(whole, image.shape[:2], mode="bilinear")
        with whole_file(f"{target}.depth.npy") as file:
            np.save(file, depth / max(whole.max().item(), 1e-12))
    with whole_file(f"{target}.npy") as file:
        np.save(file, image)


def _filled(part, edge):
    """(C,h,w) -> (C,edge,edge): reflected at the bottom and right where it is smaller."""
    missing = ((0, 0), (0, edge - part.shape[1]), (0, edge - part.shape[2]))
    return np.pad(part, missing, mode="reflect")


class ImageCache:
    """Decoded images in a folder, one .npy file each, of which only the rows of a crop are read.

    What is there already is used, so that building goes on where it was interrupted. Images that
    cannot be read or are smaller than `minimum` are skipped and named.
    """

    def __init__(self, folder, items, minimum, say=progress):
        self.folder = Path(folder)
        self.items = {name: (maker, arguments) for name, maker, arguments, *_ in items}
        self.with_depth = {name for name, *_, depth in items if depth is True}
        bad = self._build(say)                         # {name: what is wrong with it}
        self.sizes = {name: self._open(name).shape[:2] for name in self.items if name not in bad}
        for name, (h, w) in self.sizes.items():
            if min(h, w) < minimum:
                file = self.items[name][1][0]
                bad[name] = f"{file}: {w} x {h} pixels, smaller than the crop of {minimum}"
        for reason in bad.values():
            say(f"skipped {reason}")
        self.names = [name for name, *_ in items if name not in bad]
        if not self.names:
            raise ValueError(f"no usable image among {len(items)}: {next(iter(bad.values()))}")

    def _build(self, say):
        """Makes what is missing or can't be read. Returns {name: why it could not be made}."""
        jobs = {name: (_store, *item, self.folder / name) for name, item in self.items.items()
                if not self._is_whole(name)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return _run_all(jobs, say, "preparing images")[1]
        except OSError as error:                       # numpy's, of a full disk, has no strerror
            raise ValueError(f"{self.folder}: can't store images there ({error.strerror or error}"
                             "); --cache DIR names another disk's folder") from None

    def _open(self, name, suffix=".npy"):
        """An array left on the disk, of which what is used is read. The file is closed when the
        array goes, as a process may have few files open. "c": what would be written stays here."""
        return np.load(self.folder / f"{name}{suffix}", mmap_mode="c")

    def _is_whole(self, name):
        """Whether an item's files can be read: after a power cut, or a copy that was interrupted,
        some are empty, short or garbage."""
        try:
            return self._open(name).ndim == 3 and (name not in self.with_depth or
                                                   self._open(name, ".depth.npy").ndim == 2)
        except Exception:                              # garbage leads numpy to any kind
            return False

    def __len__(self):
        return len(self.names)

    @property
    def identity(self):
        """What must stay the same when a run goes on: the images' names, sizes and order."""
        kept = [name.rpartition("-")[0] for name in self.names]
        return f"{len(kept)} images, fingerprint {seeded(*kept).initial_seed():x}"

    def size(self, k):
        """(height, width) of image k."""
        return self.sizes[self.names[k]]

    def crop(self, k, top, left, edge):
        """(C,edge,edge) uint8 numpy array, reflected where the image is smaller."""
        part = self._open(self.names[k])[top:top + edge, left:left + edge]
        return _filled(np.array(part.transpose(2, 0, 1), order="C"), edge)

    def depth_crop(self, k, top, left, edge, generator):
        """The depth of that crop, (1,edge,edge) float32 numpy array in [0,1], where 1 is the WHOLE
        image's farthest point. Where the image came without a depth, prior_knots are drawn from the
        generator; one that should be there and is not is an OSError."""
        name = self.names[k]
        if name in self.with_depth or (self.folder / f"{name}.depth.npy").exists():
            depth = torch.from_numpy(self._open(name, ".depth.npy"))[None, None]
            part = enlarged_part(depth, self.size(k), top, left, edge)
        else:
            depth = prior_knots(generator)
            part = enlarged_part(depth, self.size(k), top, left, edge, corners=True)
        return _filled(part[0].numpy(), edge).clip(0, 1)


# ---- Writing test sets ---------------------------------------------------------------------------

def _write_truth(path, target):
    """Writes an image as it is: what the restored ones are compared with."""
    write_image(target, read_image(path, progress))


def _write_version(path, depth_path, out, name, split, task, seed):
    """Writes one degraded version of an image. Returns its row of params.csv."""
    x, depth = to_tensor(read_image(path)), None                                  # (1,3,H,W)
    # Each file has a generator of its own: its numbers do not depend on other files.
    g = seeded(seed, split, task, name)
    drawn = draw(task, x.shape[2:], split, g)
    if task == "sr":
        y = bicubic_x4(x, stored=True)
    else:
        if task == "haze" and depth_path is not None:
            depth = torch.from_numpy(read_depth(depth_path))[None, None]          # (1,1,h,w)
        y = apply(x, task, drawn, depth, generator=g)
    folder = f"single_indis/{task}" if split == "in" else f"single_outbig/{task}_outbig"
    write_image(out / folder / f"{name}.png", to_image(y))
    numbers = [f"{key}={value.item():g}" for key, value in drawn.items() if value.numel() == 1]
    return [f"{folder}/{name}.png", task, split, g.initial_seed(), " ".join(numbers)]


def write_test_sets(folder, out, split, seed, depth_folder=None, say=progress):
    """Degrades all images of a folder into the published test-set layout, with params.csv.

    out: a new or an empty folder. The same seed gives the same bytes, on any number of cores.
    Returns the number of images that could not be read; raises ValueError for what can't be begun.
    """
    out = Path(out)
    if out.resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"--out {out} is inside --images {folder}: its pictures would be taken "
                         "for sources; name a folder beside it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty; name a new folder: test sets never mix")
    jobs = {}                                          # {(image, set): what writes it there}
    for path, depth in find_depths([folder], depth_folder, say).items():
        name = short_name("_".join(path.relative_to(folder).with_suffix("").parts))  # a/b: a_b
        if (name, "GT") in jobs:
            raise ValueError(f"{path}: another image has this name but for its ending; rename one")
        jobs[name, "GT"] = _write_truth, path, out / "original" / "GT" / f"{name}.png"
        for which in ("in", "out") if split == "both" else (split,):
            for task in RANGES[which]:
                jobs[name, which + task] = _write_version, path, depth, out, name, which, task, seed
    out.mkdir(parents=True, exist_ok=True)
    rows, bad = _run_all(jobs, say, "degrading images")
    # A name that is no UTF-8 stays itself, byte by byte.
    encoding = dict(encoding="utf-8", errors="surrogateescape")
    with open(out / "params.csv", "w", newline="", **encoding) as file:
        writer = csv.writer(file)
        writer.writerow(["file", "task", "split", "generator_seed", "parameters"])
        writer.writerows(rows[key] for key in jobs if rows.get(key))
    for reason in dict.fromkeys(bad.values()):         # an image's sets all fail for one reason
        say(f"skipped {reason}")
    return len({name for name, _ in bad})


# ---- The command ---------------------------------------------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """A command line whose complaint is one line that ends the program; its help keeps the lines
    of `description` as they are. From here on all that is printed can be: a character that the
    terminal does not know, or a file's name that is not UTF-8, becomes \\xff and the like. Pillow's
    warnings are not shown: what matters is said by open_image, in one line."""
    def __init__(self, prog, description):
        super().__init__(prog, description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):         # a notebook's has not
                stream.reconfigure(errors="backslashreplace")
        warnings.filterwarnings("ignore", module="PIL")

    def error(self, message):
        if message.startswith("unrecognized"):             # perhaps a typing error
            for word in message.split():
                near = difflib.get_close_matches(word, self._option_string_actions, 1)
                message += f"; is {near[0]} meant?" if near else ""
        sys.exit(f"{self.prog}: {message} (see python {self.prog} --help)")


def lacks_memory(error):
    """Whether an exception says that memory ran out. numpy raises MemoryError; torch RuntimeError,
    which only its words tell from others: CUDA's "an illegal memory access" is a fault."""
    words = repr(error).lower()
    return "memory" in words and "illegal" not in words


@contextlib.contextmanager
def ends_in_one_line(program):
    """Around the work of a command: whatever ends it early is one line and a non-zero exit. What
    the user can mend (ValueError, OSError, memory) exits with 1, Ctrl-C with 130, kill with 143, as
    shells expect; a closed pipe, as of `| head`, ends it quietly, with 141. A traceback is a fault
    of ours.
    """
    def stop(number, frame):
        raise KeyboardInterrupt(number)
    before = None
    if threading.current_thread() is threading.main_thread():          # no other may ask for this
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()                         # while a closed pipe can still be handled
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # Python will flush again
        sys.exit(141)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        progress(f"{program}: stopped by {signal.Signals(number).name}")
        sys.exit(128 + number)
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        sys.exit(f"{program}: not enough memory ({' '.join(str(error).split())})")
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def main(argv=None):
    """The command."""
    parser = OneLineParser("degrade.py", description=__doc__)
    add = parser.add_argument
    add("--images", required=True, metavar="DIR", help="pictures to degrade, in any subfolders")
    add("--depth", metavar="DIR", help="depth maps for haze, by name (default: a smooth prior)")
    add("--out", required=True, metavar="DIR", help="where original/, single_indis/, ... go")
    add("--split", choices=("in", "out", "both"), default="in", help="In-Dis, Out-Dis or both")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with ends_in_one_line("degrade.py"):
        bad = write_test_sets(args.images, args.out, args.split, args.seed, args.depth)
        print(f"{args.out}: written; next: python eval.py CKPT --testsets {shlex.quote(args.out)}")
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
